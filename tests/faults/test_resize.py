"""Another number of processes, in the middle of a run: the same rows, and the same losses to 1e-4."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.train import replay

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resize.py"
QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """50 steps by 1 process, and by 1, then 2, then 4 with experts and rows split, each killed in between."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), "1", "1-2-4"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUICKLY)
    assert result.returncode == 0, result.stdout + result.stderr
    return [RunDir(f"{folder}/{name}") for name in ("1", "1-2-4")]


def test_1_then_2_then_4_processes_train_on_the_same_rows_with_the_same_losses_to_1e_4(runs):
    one, resized = (run.trace() for run in runs)
    assert [record["step"] for record in resized] == list(range(1, 51))
    assert [record["rows"] for record in resized] == [[4 * step, 4 * step + 4] for step in range(50)]
    assert [record["batch_checksum"] for record in resized] == [record["batch_checksum"] for record in one]
    assert runs[1].acceptances()[-1].ledger_head == runs[0].acceptances()[-1].ledger_head
    assert max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(resized, one, strict=True)) <= 1e-4
    started = [event for event in runs[1].events() if event["event"] == "started" and event["process"] == 0]
    assert [(event["processes"], event["mesh"]["data"], event["mesh"]["expert"]) for event in started] == [
        (1, 1, 1),
        (2, 1, 2),
        (4, 2, 2),
    ]
    first, second, third = (runs[1].step_of(claim.resumes) for claim in runs[1].claims())
    assert (first, 0 < second < third < 50) == (0, True)


def test_a_step_of_two_processes_is_replayed_by_two_to_the_same_bits_and_by_one_within_the_tolerance(runs):
    run = runs[1]
    step = run.step_of(run.claims()[2].resumes)  # the last one of the second incarnation, which was saved
    command = [sys.executable, "-m", "openmoe.platform", "replay", run.path, "--step", str(step), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUICKLY)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    number = run.claims()[2].resumes
    assert (found["compared"], found["changed"], found["acceptance"]) == ("bits", [], number)
    here = replay.replay(run, run.spec(), step)
    assert (here.compared, here.difference) == ("rows, and losses within 0.001", None)
    assert here.changed[0] == "processes: 2 then, 1 here"
    assert here.changed[1].startswith("xla_flags: ")
