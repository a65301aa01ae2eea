"""W&B gets each step that counts once, under one id."""

import importlib.util
import struct
import sys
import time

import pytest

from openmoe.platform.run import journal
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.train import wandb_curves
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.train.wandb_curves import Outbox, WandbCurves


def record(step):
    return {"step": step, "rows": [4 * step - 4, 4 * step], "step_s": 0.5, "time_s": 100.0 + step, "loss": 9 - step}


def test_steps_wait_for_a_checkpoint_and_leave_once():
    outbox = Outbox()
    for step in (1, 2, 3):
        outbox.put(record(step))
    assert [r["step"] for r in outbox.accepted(2)] == [1, 2]
    assert outbox.accepted(2) == []
    outbox.put(record(4))
    outbox.evaluated(4, {"loss": 5.0})
    outbox.evaluated(3, {"loss": 9.0})  # not the newest: none of this incarnation's
    assert [(r["step"], r.get("evaluation")) for r in outbox.accepted(9)] == [(3, None), (4, {"loss": 5.0})]


def test_what_ended_an_incarnation_is_durable_before_wandb_is_waited_for(run, monkeypatch):
    """Ray ends a process that is left when its peers have ended, and `bad_numbers` is what a rewind goes by."""
    durable = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(WandbCurves, "close", lambda self: durable.extend(e["event"] for e in run.events()))
    error = ArithmeticError()
    recorder = Recorder(run, run.claim(), print, row_tokens=1, trackers=["wandb"])
    recorder.event("bad_numbers")
    recorder.__exit__(ArithmeticError, error, None)
    assert durable == ["bad_numbers", "raised"]


@pytest.fixture
def run(tmp_path):
    run = RunDir(f"{tmp_path}/run")
    run.create(spec.load("quickstart", [f"run_dir={run.path}", "trackers=[wandb]"]))
    return run


def test_a_run_has_one_id_and_its_hash_does_not_know_of_trackers(run):
    first = run.record()
    assert wandb_curves.run_id(first) == wandb_curves.run_id(run.record())
    assert wandb_curves.run_id(first) != wandb_curves.run_id(first | {"created_s": 1.0})
    assert first["spec_hash"] == spec.spec_hash(spec.load("quickstart"))


def test_a_worker_without_wandb_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunDirError, match=r"trackers: wandb is not installed on this worker; install the extra wandb"):
        WandbCurves(run, row_tokens=1)


def test_what_a_wandb_that_was_given_up_would_get_is_not_kept(run, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # it is there, and cannot be imported
    curves = WandbCurves(run, row_tokens=1)
    curves.begin(0)
    curves._thread.join(20)
    assert "wandb: import of wandb halted" in capsys.readouterr().err
    curves.append(record(1))
    curves.accepted(1)
    assert curves._to_send.empty()
    curves.close()


def records_of(data):
    """The records of a W&B file: a LevelDB log behind 7 bytes, in blocks of 32 KiB."""
    at, found = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        found += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield found
            found = b""


def sent(folder, count):
    """(run id, step, loss, held-out loss) of what offline runs hold, by folder; W&B is a bit late."""
    deadline_s = time.monotonic() + 20
    while len(found := list(_sent(folder))) < count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.1)
    return found


def _sent(folder):
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records_of(path.read_bytes()):
            row = wandb_internal_pb2.Record.FromString(data)
            if row.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in row.history.item}
                step, loss = int(values["_step"]), float(values["loss/cross_entropy"])
                held_out = float(values["eval/loss/c4"]) if "eval/loss/c4" in values else None
                yield path.stem.removeprefix("run-"), step, loss, held_out


def test_a_real_wandb_offline_gets_the_steps_that_count_under_one_id(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed here: `make test-interop` runs its contract")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    first, claim = WandbCurves(run, row_tokens=512), run.claim()
    metrics = journal.Journal(run.at("metrics"), incarnation=claim.incarnation, process=0)
    events = journal.Journal(run.at("journal"), incarnation=claim.incarnation, process=0)
    first.begin(0)
    for step in (1, 2, 3):
        first.append(record(step))
        metrics.append(record(step))
        if step == 2:
            first.evaluated(step, {"loss/c4": 7.5})
            events.append({"event": "evaluated", "time_s": 102.0, "step": step, "losses": {"loss/c4": 7.5}})
    metrics.flush()
    events.flush()
    run.accept(Acceptance(
        number=1, incarnation=1, step=2, next_row=8, checkpoint="", digest="", ledger_head="", data_id="",
    ))  # fmt: skip
    first.accepted(2)
    first.close()
    name = wandb_curves.run_id(run.record())
    assert sent(tmp_path, 2) == [(name, 1, 8.0, None), (name, 2, 7.0, 7.5)]
    run.claim()
    second = WandbCurves(run, row_tokens=512)
    second.begin(2)
    second.append(record(3))
    second.accepted(3)
    second.close()
    # A new folder offline, which knows of no other: all that counts, and syncing it adds step 3.
    assert sent(tmp_path, 5)[2:] == [(name, 1, 8.0, None), (name, 2, 7.0, 7.5), (name, 3, 6.0, None)]
