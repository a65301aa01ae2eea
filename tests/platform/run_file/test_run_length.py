"""A run's length: steps as they are, or epochs of its data."""

import pytest

from openmoe.platform.run_file import run_length, spec


def train(*overrides):
    return spec.load("quickstart", overrides).train


@pytest.mark.parametrize(
    ("epochs", "epoch_rows", "rows", "steps"),
    [("2", 106, 212, 53), ("1", 107, 107, 26), ("0.29", 100, 29, 7), ("1.1", 10, 11, 2), ("3.0", 8, 24, 6)],
)
def test_epochs_are_rows_in_the_decimals_as_written_and_whole_steps_of_them(epochs, epoch_rows, rows, steps):
    length = train("train.steps=null", f"train.epochs={epochs}")
    assert run_length.rows_of(length.epochs, epoch_rows) == rows
    assert run_length.steps_of(length, epoch_rows) == steps


def test_steps_are_not_changed_by_the_data():
    loaded = spec.load("quickstart")
    assert run_length.resolved(loaded, 551) is loaded
    assert run_length.steps_of(loaded.train, 551) == 100


def test_a_resolved_run_travels_to_the_workers():
    loaded = spec.load("quickstart", ["train.steps=null", "train.epochs=2"])
    assert run_length.resolved(loaded, None) is loaded
    resolved = run_length.resolved(loaded, 551)
    assert (resolved.train.total_steps, resolved.train.epochs) == (275, None)
    assert spec.RunSpec.model_validate_json(resolved.model_dump_json()) == resolved
    assert spec.spec_hash(resolved) == spec.spec_hash(loaded)
    with pytest.raises(ValueError, match=r"train\.epochs=2: not steps yet"):
        loaded.train.total_steps  # noqa: B018


@pytest.mark.parametrize(
    ("overrides", "finished", "reached"),
    [
        (("train.steps=100",), {"steps": 100}, True),
        (("train.steps=101",), {"steps": 100}, False),
        (("train.steps=null", "train.epochs=2"), {"steps": 53, "epoch_rows": 106}, True),
        (("train.steps=null", "train.epochs=2.1"), {"steps": 53, "epoch_rows": 106}, False),
        (("train.steps=null", "train.epochs=2"), {"steps": 53, "epoch_rows": None}, False),
        (("train.steps=null", "train.epochs=2"), {"steps": 53}, False),
    ],
)
def test_a_finished_run_that_is_wanted_longer_is_not_finished(overrides, finished, reached):
    assert run_length.is_reached(train(*overrides), finished) == reached


def test_what_makes_a_run_longer_is_said_in_its_own_unit():
    assert run_length.longer(train()) == "train.steps=200"
    assert run_length.longer(train("train.steps=null", "train.epochs=1.5")) == "train.epochs=3"


def test_what_makes_a_run_longer_is_more_than_it_has_done():
    assert run_length.longer(train("train.steps=50"), steps=100, epochs=0.5) == "train.steps=200"
    assert run_length.longer(train("train.steps=null", "train.epochs=1.5"), steps=100, epochs=2.0) == "train.epochs=4"
