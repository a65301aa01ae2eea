"""Whatever is killed, the same command goes on with the very next row, and with the same bits."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEPS, BATCH_ROWS = 60, 4


def bits(run):
    """Every figure of every step along the line of truth, exactly."""
    names = ("loss", "text_loss", "aux_loss", "router_z_loss", "grad_norm")
    return [(r["step"], *r["rows"], *r["batch_checksum"], *(r[n].hex() for n in names)) for r in run.trace()]


def assert_every_row_once(run):
    rows = [r["rows"] for r in run.trace()]
    assert rows == [[BATCH_ROWS * s, BATCH_ROWS * (s + 1)] for s in range(STEPS)]


def assert_proven(run):
    """The ledger, as a user asks for it: a process of its own, and every step compared with the shards."""
    command = [sys.executable, "-m", "openmoe.platform", "ledger", "verify", run.path, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert (found["steps"], found["compared"], found["next_row"]) == (STEPS, STEPS, STEPS * BATCH_ROWS)
    return found


def assert_all_time_is_charged(run):
    """What the death of a worker cost, as a user asks for it: a process of its own."""
    command = [sys.executable, "-m", "openmoe.platform", "goodput", run.path, "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert sum(found["causes_ms"].values()) == found["wall_ms"]
    assert "unrecorded" not in found["causes_ms"]
    [attempt] = found["attempts"]
    assert (attempt["incarnations"], attempt["outcome"]) == ([1, 2], "finished")
    assert {"start", "build", "init", "compile", "step", "save", "end"} <= attempt["causes_ms"].keys()
    started, restarted = found["resumes"]
    assert started["attempt"]
    assert not restarted["attempt"]
    assert {"idle", "start", "init", "restore", "compile"} <= restarted["causes_ms"].keys()


def compiled(run, *owner):
    return [e for e in run.events() if e["event"] == "compiled" and (e["incarnation"], e["process"]) == owner]


def ends(run):
    return [(e["cause"], e["decision"]["action"]) for e in run.events() if e["event"] == "ended"]


def test_an_undisturbed_run_reads_every_row_once(undisturbed):
    assert_every_row_once(undisturbed)
    assert len(undisturbed.claims()) == 1
    assert undisturbed.finished()["steps"] == STEPS


def test_a_killed_worker_is_replaced_by_the_driver_and_the_bits_are_the_same(lost_worker, undisturbed):
    for _ in lost_worker.events:  # what of it no other test has asked for
        pass
    run = lost_worker.trainer.run
    assert ends(run) == [("host_fault", "retry")]
    assert "incarnation 1 ended, retry: host_fault 1 of 10: the process of rank " in lost_worker.output
    assert [c.incarnation for c in run.claims()] == [1, 2]
    assert_every_row_once(run)
    assert bits(run) == bits(undisturbed)
    assert_all_time_is_charged(run)
    for process in (0, 1):
        before, after = compiled(run, 1, process)[:2]
        assert (after["loaded"] - before["loaded"], after["programs"] - before["programs"]) == (0, 1)
        before, after = compiled(run, 2, process)[:2]
        assert (after["loaded"] - before["loaded"], after["programs"] - before["programs"]) == (1, 1)
        assert after["refused"] == 0


def test_a_killed_driver_all_killed_and_a_damaged_checkpoint_leave_the_same_bits_and_curves(
    trainer, undisturbed, curves
):
    run = trainer()
    run.start()
    run.wait_for_acceptance(1)
    run.kill_driver()
    run.start()
    run.wait_for_acceptance(3)
    run.kill_everything()
    newest = run.run.newest_accepted()
    damage_largest_file(Path(run.run.at(newest.checkpoint)))
    run.start()
    run.finish()
    assert list(run.run.quarantined()) == [newest.number]
    assert ends(run.run) == [("damaged_checkpoint", "retry")]
    third, fourth = run.run.claims()[2:]
    assert (third.resumes, fourth.resumes) == (newest.number, newest.number - 1)
    assert_every_row_once(run.run)
    assert bits(run.run) == bits(undisturbed)
    proven = assert_proven(run.run)
    assert proven["head"] == undisturbed.newest_accepted().ledger_head
    assert {1, 4} <= {part["incarnation"] for part in proven["line"]} <= {1, 2, 4}
    assert {part["incarnation"] for part in proven["undone"]} <= {1, 2}
    drawn = curves(run.run.at("tensorboard"))
    assert drawn["loss/cross_entropy"] == {r["step"]: r["loss"] for r in undisturbed.trace()}


def test_a_disk_that_fills_up_is_one_line_and_with_space_again_the_run_goes_on_with_the_same_bits(
    trainer, undisturbed, tmp_path, mount_disk
):
    (tmp_path / "disk").mkdir()
    mount_disk(tmp_path / "disk", "64m")
    run = trainer("disk/run")
    run.start()
    run.wait_for_acceptance(1)
    filler = tmp_path / "disk" / "filler"
    fill(filler)
    output, _ = run.process.communicate(timeout=240)
    assert run.process.returncode == 2, output
    assert "Traceback" not in output
    ended = [line for line in output.splitlines() if line.startswith("incarnation 1 ended, stop: ")]
    assert len(ended) == 1, output
    assert run.run_dir in ended[0]
    assert "the disk is full; free some space" in ended[0]
    filler.unlink()
    run.start()
    run.finish()
    assert_every_row_once(run.run)
    assert bits(run.run) == bits(undisturbed)


def fill(path):
    """Takes all that is left of a disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def damage_largest_file(folder):
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


def test_after_ctrl_c_another_number_of_processes_goes_on_with_the_same_rows_and_losses_to_1e_4(
    trainer, undisturbed, capsys
):
    run = trainer()
    run.start()
    run.wait_for_acceptance(2)
    output = run.stop(signal.SIGINT)
    assert "Traceback" not in output
    assert output.splitlines()[-1] == (
        f"stopped on request; the same command goes on from the last checkpoint in {run.run_dir}"
    )
    assert ends(run.run) == [("operator", "stop")]
    run.overrides = ("cluster.num_workers=1", "cluster.devices_per_worker=4")
    run.start()
    run.finish()
    assert_every_row_once(run.run)
    ours, theirs = run.run.trace(), undisturbed.trace()
    assert [r["batch_checksum"] for r in ours] == [r["batch_checksum"] for r in theirs]
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    choices = np.asarray([r["expert_load"] for r in ours]) - np.asarray([r["expert_load"] for r in theirs])
    per_step = 128 * BATCH_ROWS * 2
    changed = round(float(np.abs(choices).sum()) / 2 * per_step)
    with capsys.disabled():
        print(f"\nlargest loss difference {difference:.3g}; at least {changed} routing choices of {STEPS} steps differ")
    assert difference <= 1e-4
