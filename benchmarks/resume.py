"""How long a run stands still when a worker is killed, and when all of it is: the quickstart, itemised.

    .venv/bin/python benchmarks/resume.py [--steps N]

`openmoe quickstart` with its two workers, as a user starts it. A worker is killed with SIGKILL, then, some steps later,
every process of the run, and the command is given again. What each restart took comes from `openmoe goodput`: from the
last step before the death, or from the start of the command, to the end of the first new step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil
import quickstart_run

from openmoe.platform.run.run_dir import RunDir

GOALS_S = {"worker killed": 20.0, "new attempt": 60.0}


def below(process: subprocess.Popen[bytes], words: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_for_step(run: RunDir, process: subprocess.Popen[bytes], step: int) -> None:
    """Returns once a checkpoint of at least this step is accepted."""
    while not any(acceptance.step >= step for acceptance in run.acceptances()):
        if process.poll() is not None:
            raise SystemExit(f"the run ended with exit code {process.returncode}: {run.path}")
        time.sleep(0.1)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a run's driver and all that it started, at once."""
    if process.poll() is None:
        for each in [*below(process, ""), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.Error):
                each.kill()
    process.wait()


def measure(steps: int = 20) -> list[dict[str, Any]]:
    """Returns the restarts, as `openmoe goodput --json` has them, with the programs that each one loaded."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = RunDir(f"{folder}/run")
        process = quickstart_run.start(folder, steps, checkpoint_every_steps=5)
        try:
            wait_for_step(run, process, 5)
            below(process, "RayTrainWorker")[-1].send_signal(signal.SIGKILL)
            wait_for_step(run, process, 10)
            kill(process)
            process = quickstart_run.start(folder, steps, checkpoint_every_steps=5)
            wait_for_step(run, process, steps)
            process.wait()
        finally:
            kill(process)
        command = [sys.executable, "-m", "openmoe.platform", "goodput", run.path, "--json"]
        found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)["resumes"]
        compiled = {e["incarnation"]: e for e in run.events() if e["event"] == "compiled" and e["process"] == 0}
    return [resume | {"compiled": compiled.get(resume["incarnation"], {})} for resume in found]


def show(resumes: list[dict[str, Any]]) -> None:
    names = ("from scratch", "worker killed", "new attempt")
    for name, resume in zip(names, resumes, strict=True):
        parts = ", ".join(f"{cause} {ms / 1000:.1f}" for cause, ms in resume["causes_ms"].items() if ms)
        compiled = resume["compiled"]
        print(f"{name:<15}{resume['ms'] / 1000:7.1f} s to the first new step: {parts}")
        print(f"{'':<15}{compiled.get('loaded')} of {compiled.get('programs')} programs were compiled before")
    for name, goal_s in GOALS_S.items():
        took_s = resumes[names.index(name)]["ms"] / 1000
        print(f"{'under' if took_s < goal_s else 'OVER':<6}{goal_s:.0f} s  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    print(f"{os.cpu_count()} CPUs, of which {os.getloadavg()[0]:.1f} processes wanted one when it began", flush=True)
    show(measure(parser.parse_args().steps))


if __name__ == "__main__":
    main()
