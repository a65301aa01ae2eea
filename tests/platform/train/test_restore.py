"""What becomes of a checkpoint on a disk, and what restoring and `openmoe checkpoint` say about it."""

import errno
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gcsfs.retry
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from openmoe.model import checkpoint, sharding, step
from openmoe.pipelines import storage
from openmoe.pipelines.storage import StorageDenied, StorageUnavailable
from openmoe.platform.commands import cli
from openmoe.platform.run import worker_group
from openmoe.platform.run.lineage import Claim, Position
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.train import restore
from openmoe.platform.train.notice import Answer
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.train.restore import DamagedCheckpoint
from openmoe.platform.train.saver import NonFiniteState, Saver

SETTINGS = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.batch_rows=8", "mesh.expert=1", "cluster.num_workers=1"),
    "cluster.devices_per_worker=1",
)
EMBEDDING = "params/token_embedder/embedding"


def caused(error, by):
    error.__cause__ = by
    return error


def mesh_of(**axes):
    return sharding.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Its spec, its state, and a run with one accepted checkpoint, of step 2 (change nothing)."""
    loaded = spec.load("quickstart", [*SETTINGS, f"run_dir={tmp_path_factory.mktemp('made')}/run"])
    state = step.init_state(loaded.model, loaded.optimizer, 0, mesh_of(data=1))
    return loaded, state, accept(loaded, state)


def accept(loaded, state, at=2):
    """A run whose first incarnation has saved `state`."""
    run = RunDir(loaded.run_dir)
    run.create(loaded)
    with Recorder(run, run.claim(), lambda record: None, row_tokens=128) as recorder:
        recorder.begin(Position(), "", 0)
        recorder.newest = {"loss": 5.5}
        saver = Saver(loaded, run, Claim(incarnation=1, resumes=0, time_s=0.0), recorder, data_id="rows")
        saver.save(state, Position(at, 8 * at))
        saver.wait()
    return run


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(made[2].path, tmp_path / "run")
    return RunDir(str(tmp_path / "run"))


def restored(run, loaded, mesh=None):
    return restore.restored(
        run, run.acceptances()[0], step.state_shapes(loaded.model, loaded.optimizer, mesh or mesh_of(data=1))
    )


def replace_state(run, state, facts):
    """Saves another state in the place of the accepted one, as sound as Orbax can tell."""
    folder = Path(run.at("checkpoints/000001"))
    shutil.rmtree(folder / "2")
    checkpointer = checkpoint.Checkpointer(str(folder))
    checkpointer.save(2, state, facts)
    checkpointer.wait()


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 4}, {"expert": 4}, {"tensor": 2}]
)
def test_the_same_bits_come_back_on_any_split_of_any_number_of_devices(made, axes):
    loaded, state, run = made
    found, facts = restored(run, loaded, mesh_of(**axes))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
    assert all(len(leaf.sharding.device_set) == np.prod(list(axes.values())) for leaf in jax.tree.leaves(found))
    assert facts["next_row"] == 16


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon"])
def test_the_moments_of_every_optimizer_come_back_from_split_devices_on_any_others(name, tmp_path):
    loaded = spec.load("quickstart", [*SETTINGS, f"optimizer={{name: {name}}}", f"run_dir={tmp_path}/run"])
    template = step.state_shapes(loaded.model, loaded.optimizer, mesh_of(fsdp=2, expert=2, tensor=2))
    numbers = np.random.default_rng(0)
    state = jax.tree.map(lambda like: numbers.uniform(1, 9, like.shape).astype(like.dtype), template)
    run = accept(loaded, jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), state, template))
    for axes in ({"data": 1}, {"data": 2, "expert": 4}, {"fsdp": 4}):
        found, _ = restored(run, loaded, mesh_of(**axes))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), state)
        assert all(len(leaf.sharding.device_set) == np.prod(list(axes.values())) for leaf in jax.tree.leaves(found))


def test_a_checkpoint_says_what_it_is_wherever_it_is(made):
    loaded, state, run = made
    _, facts = restored(run, loaded)
    sums = facts.pop("sums")
    assert facts == {
        "run": "quickstart", "spec_hash": spec.spec_hash(loaded), "seed": 0, "incarnation": 1, "step": 2,
        "next_row": 16, "tokens": 2 * 8 * 128, "loss_tokens": 0, "data_id": "rows", "ledger_head": "",
    }  # fmt: skip
    assert sums[EMBEDDING] == checkpoint.sum_of(np.asarray(state.params["token_embedder"]["embedding"]))
    [accepted] = run.acceptances()
    assert checkpoint.digest(state, sums) == accepted.digest
    assert accepted.metrics == {"loss": 5.5}
    assert accepted.time_s > 1.7e9


def test_what_earlier_versions_saved_and_accepted_is_read(made, run):
    loaded, state, _ = made
    replace_state(run, state, {"next_row": 16})
    record = Path(run.at("accepted/000001.json"))
    old = {k: v for k, v in json.loads(record.read_text()).items() if k not in ("metrics", "time_s")}
    record.write_text(json.dumps(old))
    _, facts = restored(run, loaded)
    assert facts == {"next_row": 16}
    assert (run.acceptances()[0].metrics, run.acceptances()[0].time_s) == ({}, 0.0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what Orbax was reading besides
def test_whichever_file_is_damaged_the_bits_are_right_or_the_checkpoint_is_refused_in_one_line(made, run):
    loaded, state, _ = made
    folder, refused, damages = Path(run.at("checkpoints/000001/2")), {}, (flip, truncate, Path.unlink)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda path: (path.stat().st_size, path.name))
    for path, damage in zip(files, itertools.cycle(damages), strict=False):
        content = path.read_bytes()
        damage(path)
        try:
            found, _ = restored(run, loaded)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))
        except DamagedCheckpoint as error:
            refused[str(path.relative_to(folder))] = str(error)
        path.write_bytes(content)
    assert refused.keys() >= {"state/_METADATA", "state/manifest.ocdbt"}
    assert any(name.startswith("state/d/") for name in refused)
    for error in refused.values():
        assert error.startswith("acceptance 1: checkpoints/000001/2: ")
        assert len(error.splitlines()) == 1
        assert len(error) < 600


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            ValueError('PERMISSION_DENIED: Error reading "a/.zarray" in OCDBT database: Permission denied'),
            StorageDenied,
        ),
        (PermissionError(13, "Permission denied", "2/loader/metadata"), StorageDenied),
        (ValueError("UNAUTHENTICATED: error fetching token"), StorageDenied),
        (ValueError("DEADLINE_EXCEEDED: no answer"), StorageUnavailable),
        (caused(KeyError("2"), gcsfs.retry.HttpError({"code": 503, "message": "no answer"})), StorageUnavailable),
    ],
)
def test_a_checkpoint_that_may_not_be_read_or_cannot_be_now_is_not_taken_for_damaged(error, kind):
    with pytest.raises(kind, match=r"^gs://b/2: cannot be read: .*(ermission denied|token|no answer)"):
        restore.reason_of(error, "gs://b/2")


def test_storage_that_does_not_answer_while_a_checkpoint_is_saved_is_no_fault_of_the_code(made, tmp_path, monkeypatch):
    loaded, state, _ = made
    run = RunDir(f"{tmp_path}/run")
    run.create(loaded)

    def fails(self):
        raise ValueError("UNAVAILABLE: Error writing local file: CURL error") from None

    with Recorder(run, run.claim(), lambda record: None, row_tokens=128) as recorder:
        recorder.begin(Position(), "", 0)
        saver = Saver(loaded, run, Claim(incarnation=1, resumes=0, time_s=0.0), recorder, data_id="rows")
        saver.save(state, Position(2, 16))
        saver._checkpointer.wait()
        monkeypatch.setattr(checkpoint.Checkpointer, "wait", fails)
        with pytest.raises(StorageUnavailable, match="checkpoints/000001/2: cannot be written: UNAVAILABLE") as raised:
            saver.wait()
    assert worker_group.failure_of(0, raised.value).kind == "no_storage"
    assert run.acceptances() == []


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (StorageUnavailable("gs://b: cannot be removed: 503"), "gs://b: cannot be removed: 503"),
        # NFS: somebody reads it
        (OSError(errno.ENOTEMPTY, "Directory not empty"), "Directory not empty"),
    ],
)
def test_a_checkpoint_that_cannot_be_removed_now_goes_with_the_next_one(made, tmp_path, monkeypatch, failure, error):
    loaded = made[0].model_copy(update={"train": made[0].train.model_copy(update={"keep_checkpoints": 1})})
    run = RunDir(f"{tmp_path}/run")
    run.create(loaded)
    remove, failures = shutil.rmtree, [failure]
    monkeypatch.setattr(storage.shutil, "rmtree", lambda folder: fail(failures) or remove(folder))
    with Recorder(run, run.claim(), lambda record: None, row_tokens=128) as recorder:
        recorder.begin(Position(), "", 0)
        saver = Saver(loaded, run, Claim(incarnation=1, resumes=0, time_s=0.0), recorder, data_id="rows")
        stored = []
        for at in (2, 4, 6):
            saver.save(made[1], Position(at, 8 * at))
            saver.wait()
            stored.append(run.stored_checkpoints())
    first, second, third = (f"checkpoints/000001/{at}" for at in (2, 4, 6))
    assert stored == [[first], [first, second], [third]]
    [told] = [event for event in run.events() if event["event"] == "not_removed"]
    assert told["checkpoint"] == first
    assert told["error"].endswith(error)


def fail(failures):
    if failures:
        raise failures.pop()


def test_a_wait_for_a_save_on_notice_is_charged_to_it(made, tmp_path):
    loaded, state, _ = made
    run = RunDir(f"{tmp_path}/run")
    run.create(loaded)
    notice = SimpleNamespace(reached=lambda step: True, answer=lambda save_s: Answer(True, 30.0, save_s))
    with Recorder(run, run.claim(), lambda record: None, row_tokens=128) as recorder:
        recorder.begin(Position(), "", 0)
        saver = Saver(loaded, run, Claim(incarnation=1, resumes=0, time_s=0.0), recorder, data_id="rows")
        saver.after_step(Position(3, 24), notice, lambda: state)
    events = [(e["event"], e.get("cause")) for e in run.events()]
    assert events == [("notice", None), ("save_started", None), ("accepted", None), ("charged", "save")]


def test_a_checkpoint_that_is_gone_is_named(made, run):
    shutil.rmtree(run.at("checkpoints/000001/2"))
    with pytest.raises(DamagedCheckpoint, match="acceptance 1: checkpoints/000001/2: is gone"):
        restored(run, made[0])


def test_a_changed_number_of_the_facts_is_named(made, run):
    path = Path(run.at("checkpoints/000001/2/loader/metadata"))
    path.write_text(path.read_text().replace('"next_row": 16', '"next_row": 17'))
    with pytest.raises(DamagedCheckpoint, match="not the one that was accepted: its next_row is 17, accepted was 16"):
        restored(run, made[0])


def test_a_checkpoint_of_another_run_is_named_as_such(made, run, tmp_path):
    other = spec.load("quickstart", [*SETTINGS, "seed=7", "name=other", f"run_dir={tmp_path}/other"])
    accept(other, made[1])
    shutil.rmtree(run.at("checkpoints"))
    shutil.copytree(f"{other.run_dir}/checkpoints", run.at("checkpoints"))
    with pytest.raises(
        DamagedCheckpoint, match=r"checkpoints/000001/2: is of another run, other \(spec hash [0-9a-f]{16}\)"
    ):
        restored(run, made[0])


def test_a_changed_bit_is_named_with_its_array_even_if_storage_has_not_noticed(made, run):
    loaded, state, _ = made
    _, facts = restored(run, loaded)
    embedding = state.params["token_embedder"]["embedding"]
    bits = embedding.view(jnp.uint32).at[3, 5].set(embedding.view(jnp.uint32)[3, 5] ^ 1)
    changed = state._replace(params={**state.params, "token_embedder": {"embedding": bits.view(jnp.float32)}})
    replace_state(run, changed, facts)
    with pytest.raises(DamagedCheckpoint, match=f"000001/2: {EMBEDDING}: the bits are others than were saved"):
        restored(run, loaded)
    replace_state(run, changed, {"next_row": 16})
    with pytest.raises(DamagedCheckpoint, match="000001/2: its bits have digest "):
        restored(run, loaded)


def test_a_state_that_is_not_finite_is_neither_saved_nor_restored(made, tmp_path):
    loaded, state, _ = made
    norm = state.params["decoder"]["decoder_norm"]
    norm = {"scale": norm["scale"].at[4].set(jnp.nan)}
    bad = state._replace(params={**state.params, "decoder": {**state.params["decoder"], "decoder_norm": norm}})
    elsewhere = loaded.model_copy(update={"run_dir": f"{tmp_path}/bad"})
    with pytest.raises(NonFiniteState, match="step 2: params/decoder/decoder_norm/scale: holds numbers that are not"):
        accept(elsewhere, bad)
    run = accept(loaded.model_copy(update={"run_dir": f"{tmp_path}/old"}), state)
    replace_state(run, bad, {"next_row": 16})
    accepted = replace(run.acceptances()[0], digest=checkpoint.checksum(bad))
    with pytest.raises(DamagedCheckpoint, match="params/decoder/decoder_norm/scale: holds numbers that are not finite"):
        restore.restored(run, accepted, step.state_shapes(loaded.model, loaded.optimizer, mesh_of(data=1)))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2**9)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_host_and_devices_add_up_the_same_bits(shape, dtype, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PART_NUMBERS", 7)
    array = np.asarray(jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 1e6).astype(dtype))
    assert checkpoint.examine({"a": array}).sums == {"a": checkpoint.sum_of(array)}


def openmoe(*arguments):
    """Exit code and JSON of a command."""
    result = CliRunner().invoke(cli.app, ["checkpoint", *arguments, "--json"])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_the_list_says_why_each_checkpoint_is_kept_or_what_became_of_it(run):
    [first] = run.acceptances()
    for number, loss in ((2, 4.5), (3, 4.0), (4, 4.2), (5, 4.1)):
        checkpoint_path = f"checkpoints/000001/{2 * number}"
        accepted = replace(first, number=number, step=2 * number, checkpoint=checkpoint_path, metrics={"loss": loss})
        run.accept(accepted)
    run.quarantine(2, "checkpoints/000001/4: is gone")
    exit_code, found = openmoe("list", run.path)
    assert exit_code == 0
    assert found[0]["stored_bytes"] == sum(
        path.stat().st_size for path in Path(run.at("checkpoints/000001/2")).rglob("*") if path.is_file()
    )
    assert [(c["step"], c["tokens"], c["incarnation"], c["metric"], c["state"], c["why"]) for c in found] == [
        (2, 2048, 1, 5.5, "kept", "until the next save"),
        (4, 4096, 1, 4.5, "quarantined", "checkpoints/000001/4: is gone"),
        (6, 6144, 1, 4.0, "missing", "should be kept: newest"),
        (8, 8192, 1, 4.2, "missing", "should be kept: newest"),
        (10, 10240, 1, 4.1, "missing", "should be kept: newest"),
    ]
    run.claim()
    Path(run.at("incarnations/000002.json")).write_text('{"incarnation": 2, "resumes": 1, "time_s": 0.0}')
    assert [c["why"] for c in openmoe("list", run.path)[1]][2:] == ["incarnation 2 went on from step 2"] * 3
    shown = CliRunner().invoke(cli.app, ["checkpoint", "list", run.path]).stdout.splitlines()
    assert shown[0].rstrip() == "checkpoints of quickstart"
    assert [line.split()[0] for line in shown[2:7]] == ["2", "4", "6", "8", "10"]


def test_verify_names_the_first_damaged_array_and_exits_with_1(run):
    assert openmoe("verify", run.path) == (0, [{"step": 2, "whole": True, "damage": ""}])
    files = sorted(Path(run.at("checkpoints/000001/2/state")).rglob("d/*"), key=lambda path: path.stat().st_size)
    files[-1].unlink()
    exit_code, [found] = openmoe("verify", run.path, "--step", "2")
    assert exit_code == 1
    assert (found["step"], found["whole"]) == (2, False)
    assert "params/" in found["damage"]
    assert "cannot be read" in found["damage"]
    with pytest.raises(RunDirError, match="--step 3: no checkpoint of this step can be restored; there are 2"):
        CliRunner().invoke(cli.app, ["checkpoint", "verify", run.path, "--step", "3"], catch_exceptions=False)


def test_diff_says_how_far_apart_two_checkpoints_are(made, run, tmp_path):
    _, state, original = made
    shutil.copytree(run.at("checkpoints/000001/2"), tmp_path / "copied")
    assert openmoe("diff", original.path, f"{tmp_path}/copied")[0] == 0
    changed = np.array(state.params["token_embedder"]["embedding"])
    changed[3, 5] += 0.5
    other = spec.load("quickstart", [*SETTINGS, "seed=7", "name=other", f"run_dir={tmp_path}/other"])
    accept(other, state._replace(params={**state.params, "token_embedder": {"embedding": jnp.asarray(changed)}}))
    exit_code, found = openmoe("diff", original.path, other.run_dir)
    assert exit_code == 1
    [array] = [array for array in found["arrays"] if array["status"] != "equal"]
    assert (array["name"], array["status"], array["max_abs"]) == (EMBEDDING, "changed", pytest.approx(0.5, rel=1e-6))
    assert array["max_rel"] == pytest.approx(0.5 / abs(changed[3, 5]), rel=1e-5)
    assert array["norm_b"] == pytest.approx(float(np.linalg.norm(changed)), rel=1e-6)
    assert found["spec"] == ["data.seed: 0 there, 7 here", "seed: 0 there, 7 here"]
    assert found["facts"][0] == 'run: "quickstart" there, "other" here'
    shown = CliRunner().invoke(cli.app, ["checkpoint", "diff", original.path, other.run_dir]).stdout.splitlines()
    assert "seed: 0 in A, 7 in B" in shown
    assert shown[-1] == f"{len(found['arrays']) - 1} of {len(found['arrays'])} arrays are equal to the last bit"
