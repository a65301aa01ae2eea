"""Following a run says what reading it all at once says, and reads nothing twice."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.platform.dashboard.follow import MAX_LOAD_COLUMNS, LoadHistory, RunFollower, StepColumns
from openmoe.platform.run.journal import Journal
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir


def follow(run):
    followed = RunFollower(run.dir)
    followed.advance()
    assert followed.problem == ""
    return followed


def steps_of(followed):
    return followed.line("step")["step"].tolist()


def test_the_line_is_that_of_the_run_directory_and_what_was_undone_stands_beside_it(written):
    run = written().with_two_interruptions()
    followed = follow(run)
    assert steps_of(followed) == [r["step"] for r in run.dir.trace()] == list(range(1, 61))
    assert followed.undone("step")["step"].tolist() == [*range(21, 41), *range(51, 61)]
    assert followed.undone("step")["incarnation"].tolist() == [1] * 20 + [2] * 10
    assert followed.ends == {1: 20, 2: 50, 3: float("inf")}


actions = st.lists(st.sampled_from(["train", "accept", "claim", "zombie", "look"]), min_size=3, max_size=25)


@settings(max_examples=30, deadline=None)
@given(actions)
def test_however_a_run_grows_following_it_gives_its_trace(doings):
    with tempfile.TemporaryDirectory() as folder:
        run, journals, steps, accepted = RunDir(folder), {}, {}, 0
        spec = {"train": {"batch_rows": 1}, "data": {"seq_len": 1}}
        record = {"format": 1, "name": "a", "created_s": 0.0, "spec": spec, "spec_hash": "", "mathematics": {}}
        Path(folder, "run.json").write_text(json.dumps(record))
        followed = RunFollower(run)
        for doing in ["claim", *doings, "look"]:
            newest = max(journals, default=0)
            if doing == "claim":
                claim = run.claim()
                journals[claim.incarnation] = Journal(run.at("metrics"), incarnation=claim.incarnation, process=0)
                steps[claim.incarnation] = run.step_of(claim.resumes)
            elif doing in ("train", "zombie"):
                n = newest if doing == "train" else max(newest - 1, 1)
                steps[n] += 1
                journals[n].append({"step": steps[n], "time_s": 0.0, "loss": n * 1000.0 + steps[n]})
                journals[n].flush()
            elif doing == "accept":
                accepted = run.accept(
                    Acceptance(number=accepted + 1, incarnation=newest, step=steps[newest], next_row=0, checkpoint="",
                               digest="", ledger_head="", data_id="")
                ).number  # fmt: skip
            else:
                followed.advance()
                line = followed.line("step", "text_loss")
                assert list(zip(line["step"], line["text_loss"], strict=True)) == [
                    (record["step"], record["loss"]) for record in run.trace()
                ]


def test_a_segment_that_was_read_is_never_opened_again(written):
    run = written()
    run.claim()
    run.train(3)
    followed = follow(run)
    for path in (Path(run.dir.path) / "metrics").iterdir():
        path.write_text("this is not JSON\n")
    run.train(2)
    followed.advance()
    assert (followed.problem, steps_of(followed)) == ("", [1, 2, 3, 4, 5])


def test_a_long_history_is_read_in_slices(written):
    run = written()
    run.claim()
    run.train(50)
    followed = RunFollower(run.dir)
    lengths = []
    while not followed.complete:
        followed.advance(budget_s=0)
        lengths.append(len(steps_of(followed)))
    assert lengths == [*range(1, 51), 50]


def test_a_damaged_segment_is_named_and_the_rest_is_shown(written):
    run = written()
    run.claim()
    run.train(3)
    run.train(2)
    (Path(run.dir.path) / "metrics" / "000001-00000-000001.jsonl").write_text("{broken\n")
    followed = RunFollower(run.dir)
    followed.advance()
    assert "000001-00000-000001.jsonl:1: not JSON" in followed.problem
    assert steps_of(followed) == [1, 2, 3]
    followed.advance()
    assert steps_of(followed) == [1, 2, 3]


@pytest.mark.parametrize("record", ["[]", '{"incarnation": 1}', '{"incarnation": 1, "resumes": 7, "time_s": 1}', "{"])
def test_a_damaged_claim_is_a_problem_and_no_error(written, record):
    run = written()
    run.claim()
    (Path(run.dir.path) / "incarnations" / "000001.json").write_text(record)
    followed = RunFollower(run.dir)
    followed.advance()
    assert run.dir.path in followed.problem


def test_a_run_that_was_started_over_is_followed_anew(written):
    run = written()
    run.claim()
    run.train(30)
    followed = follow(run)
    for folder in ("incarnations", "metrics", "journal"):
        for path in (Path(run.dir.path) / folder).iterdir():
            path.unlink()
    record = json.loads((Path(run.dir.path) / "run.json").read_text())
    (Path(run.dir.path) / "run.json").write_text(json.dumps(record | {"created_s": 5000.0}))
    run.journals.clear()
    run.claim()
    run.train(2)
    followed.advance()
    assert (followed.problem, steps_of(followed)) == ("", [1, 2])


def test_a_run_on_a_bucket_is_followed_like_a_local_one(gcs):
    run = RunDir(f"{gcs}/dashboard/run")
    from openmoe.platform.run_file import spec

    run.create(spec.load("quickstart"))
    metrics = Journal(run.at("metrics"), incarnation=run.claim().incarnation, process=0)
    followed = RunFollower(run)
    for step in (1, 2, 3):
        metrics.append({"step": step, "time_s": float(step), "step_s": 1.0, "loss": 5.0})
        metrics.flush()
        followed.advance()
        assert (followed.problem, steps_of(followed)) == ("", list(range(1, step + 1)))


def test_load_columns_double_their_width_before_there_are_too_many():
    load = LoadHistory()
    for step in range(1, 2 * MAX_LOAD_COLUMNS + 2):
        load.add(step, [[0.5, 0.5] if step % 2 else [1.0, 0.0]])
    columns = load.columns()
    assert load.width == 4
    assert columns[0] == (0, [[150, 50]])  # steps 1 to 4, the mean of both kinds; 100 is an even share
    assert columns[-1] == (2 * MAX_LOAD_COLUMNS // 4, [[100, 100]])
    assert load.columns(since_step=2 * MAX_LOAD_COLUMNS) == columns[-2:]


def test_undone_load_is_forgotten():
    load = LoadHistory()
    for step in range(1, 11):
        load.add(step, [[1.0, 0.0]])
    load.undo_after(6)
    assert [column for column, _ in load.columns()] == [0, 1, 2, 3, 4, 5]


def test_columns_hold_eight_bytes_a_number_and_nan_for_what_is_missing():
    columns = StepColumns()
    columns.append({"step": 1, "time_s": 2.0, "loss": 3.0})
    assert columns.get("text_loss", slice(None)).tolist() == [3.0]
    assert np.isnan(columns.at("drop_fraction", -1))
    columns.append({"step": 2, "time_s": 3.0, "loss": 4.0})  # a view of the buffer would forbid this
    assert columns.up_to(1) == 1
