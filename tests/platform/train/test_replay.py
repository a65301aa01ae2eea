"""A recorded step comes out the same when it is executed again, and whoever changed something is caught."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmoe.pipelines.storage import StorageError
from openmoe.platform.commands import cli
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.train import replay
from openmoe.platform.train.replay import Recorded

pytestmark = pytest.mark.timeout(180)

SETTINGS = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.steps=5", "train.batch_rows=8", "train.checkpoint_every_steps=2"),
    *("train.sample_tokens=0", "mesh.expert=8", "cluster.num_workers=1", "cluster.devices_per_worker=8"),
)


@pytest.fixture(scope="module")
def made(small_data, tmp_path_factory):
    """A run of 5 steps with checkpoints at 2, 4 and 5, in this process; its data lies elsewhere (change nothing)."""
    from openmoe.platform.train import train_loop

    loaded = spec.load("quickstart", [*SETTINGS, f"run_dir={tmp_path_factory.mktemp('made')}/run"])
    run = RunDir(loaded.run_dir)
    run.create(loaded)
    train_loop.train(loaded, run, run.claim(), small_data.path, lambda record: None)
    return run, small_data.path.rsplit("/", 2)[0]


def openmoe(run, data, *arguments):
    """Exit code and JSON of the command."""
    command = ["replay", run.path, "--data", data, *arguments, "--json"]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout)


def test_an_honest_run_comes_out_the_same_to_the_last_bit(made):
    run, data = made
    exit_code, found = openmoe(run, data, "--step", "4")
    metrics = found.pop("metrics")
    assert found == {"start": 2, "step": 4, "compared": "bits", "changed": [], "acceptance": 2, "difference": None}
    assert exit_code == 0
    assert metrics[:2] == ["batch_checksum", "loss"]
    assert {"grad_norm", "expert_load", "learning_rate"} <= set(metrics)
    with pytest.raises(RunDirError, match="--step 6: step 6 is not on record; the run has steps 1 to 5"):
        openmoe(run, data, "--step", "6")
    command = ["checkpoint", "verify", run.path, "--step", "2", "--loss", "--data", data, "--json"]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert json.loads(result.stdout) == [{"step": 2, "whole": True, "damage": "", "loss": "as recorded"}]


def test_one_flipped_bit_of_a_recorded_loss_is_named(made, tmp_path):
    original, data = made
    shutil.copytree(original.path, tmp_path / "run")
    run = RunDir(str(tmp_path / "run"))
    [loss] = [record["loss"] for record in run.trace() if record["step"] == 3]
    mantissa, exponent = loss.hex().split("p")
    changed = float.fromhex(f"{mantissa[:7]}{int(mantissa[7], 16) ^ 2:x}{mantissa[8:]}p{exponent}")  # a bit of float32
    for path in Path(run.at("metrics")).iterdir():
        path.write_text(path.read_text().replace(f'"loss":{loss!r}', f'"loss":{changed!r}'))
    exit_code, found = openmoe(run, data, "--step", "5")
    assert (exit_code, found["start"]) == (0, 4)
    shutil.rmtree(run.at("checkpoints/000001/4"))
    exit_code, found = openmoe(run, data, "--step", "5")
    assert exit_code == 1
    wanted = {"step": 3, "incarnation": 1, "what": "loss", "recorded": changed, "computed": loss}
    assert found["difference"] == wanted


def test_a_tampered_shard_is_named(made, tmp_path):
    run, data = made
    shutil.copytree(data, tmp_path / "data")
    for shard in Path(tmp_path / "data").rglob("*.array_record"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    with pytest.raises(StorageError, match=rf"{tmp_path}/data/passes/.*\.array_record: damaged or replaced"):
        openmoe(run, f"{tmp_path}/data", "--step", "5")


RECORD = {"batch_checksum": [1, 2], "loss": 5.25, "text_loss": float("nan"), "expert_load": [[0.5, 0.5]], "step_s": 1.0}


@pytest.mark.parametrize(
    ("change", "exact", "found"),
    [
        ({}, True, None),
        ({"loss": 5.250000000000001}, True, ("loss", 5.25, 5.250000000000001)),
        ({"loss": 5.2549}, False, None),
        ({"loss": 5.256}, False, ("loss", 5.25, 5.256)),
        ({"expert_load": [[0.5, 0.25]]}, True, ("expert_load", [[0.5, 0.5]], [[0.5, 0.25]])),
        ({"expert_load": [[0.5, 0.25]]}, False, None),
        ({"batch_checksum": [1, 3]}, False, ("checksum of its rows in the ledger", [1, 2], [1, 3])),
        ({"new_metric": 1.0}, True, None),
    ],
)
def test_what_came_out_otherwise_is_named_within_the_tolerance_that_the_machines_allow(change, exact, found):
    record = RECORD if exact else RECORD | {"text_loss": 5.0}
    computed = {name: value for name, value in record.items() if name != "step_s"} | change
    assert replay.difference(computed, Recorded(1, record, [1, 2]), exact=exact) == found


def test_the_rows_of_the_record_count_where_there_is_no_ledger():
    computed = RECORD | {"batch_checksum": [1, 3]}
    assert replay.difference(computed, Recorded(1, RECORD, None), exact=True) == ("batch_checksum", [1, 2], [1, 3])
