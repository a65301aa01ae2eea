"""A data build at its memory limit beside a run, in one Ray: whose processes end, and whether steps wait for rows.

    .venv/bin/python benchmarks/side_by_side.py [--steps N]

`openmoe quickstart` with its two workers takes N steps alone, then N more while builds of another corpus follow each
other, each task with its memory reserved and limited. In each build one document wants more than that: its unit is
named and left out. That steps are slower beside a build is no finding: the two share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import quickstart_run

from openmoe.clusters import local_ray

os.environ.update(local_ray.environment())

import ray

from openmoe.pipelines import build, stdlib_corpus
from openmoe.pipelines.config import DataConfig, SourceConfig
from openmoe.platform.run import journal
from openmoe.platform.run.run_dir import RunDir

GOAL, TASK_MEMORY_BYTES = 0.01, 192 * 2**20


def records(run: RunDir) -> list[dict[str, Any]]:
    return [record for _, _, record in journal.read(run.at("metrics"))]


def pids() -> list[int]:
    below = psutil.Process().children(recursive=True)
    return sorted(process.pid for process in below if "RayTrainWorker" in " ".join(process.cmdline()))


def wait_for_step(run: RunDir, process: subprocess.Popen[bytes], step: int) -> None:
    while not any(record["step"] >= step for record in records(run)):
        if process.poll() is not None:
            raise SystemExit(f"the run ended with exit code {process.returncode}: {run.path}")
        time.sleep(0.5)


class Builds:
    """Builds of the same text, each under another seed and so from its tokens to its rows anew."""

    def __init__(self, folder: str) -> None:
        self._folder, self.done, self.said = folder, 0, list[str]()
        stdlib_corpus.write_corpus(f"{folder}/texts", max_text_bytes=3_000_000, max_code_bytes=10_000)
        Path(f"{folder}/texts/c4/huge.jsonl").write_text(json.dumps({"text": "some words " * 3_000_000}) + "\n")

    def one(self) -> None:
        paths = (f"{self._folder}/texts/c4/*.jsonl",)
        source = SourceConfig(name="c4", format="redpajama", paths=paths, weight=1.0, max_quarantined_units=1)
        config = DataConfig(
            tokenizer="builtin:small_8192", sources=(source,), seq_len=512, seed=self.done, unit_bytes=40_000_000
        )
        place = build.Workplace(
            num_workers=1, task_memory_bytes=TASK_MEMORY_BYTES, reserved_cpus=2, say=self.said.append
        )
        build.build(config, f"{self._folder}/built-{self.done}", min_rows=400, place=place)
        self.done += 1


def measure(folder: str, steps: int) -> dict[str, Any]:
    run, builds = RunDir(f"{folder}/run"), Builds(folder)
    here = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = quickstart_run.start(folder, 20 * steps, checkpoint_every_steps=10, environment=here)
    try:
        wait_for_step(run, process, 10)  # what is compiled is compiled
        before, first = pids(), len(records(run))
        wait_for_step(run, process, first + steps)
        second = len(records(run))
        while len(records(run)) < second + steps and process.poll() is None:
            builds.one()
        found, after = records(run), pids()
    finally:
        process.terminate()
        process.wait()
    parts = {"alone": found[first : first + steps], "beside a build": found[second + 1 :]}
    return {
        "pids": {"alone": before, "beside a build": after},
        "incarnations": len(run.claims()),
        "builds": builds.done,
        "ended": sum("huge.jsonl" in line for line in builds.said),
        "parts": {name: shares(part) for name, part in parts.items()},
    }


def shares(part: list[dict[str, Any]]) -> dict[str, float]:
    """Returns of some steps how many, how long the median took, and the share that went into waiting for rows."""
    waited_s, took_s = (sum(record[key] for record in part) for key in ("data_wait_s", "step_s"))
    median_s = statistics.median(record["step_s"] for record in part)
    return {"steps": len(part), "step_s": median_s, "data_wait": waited_s / took_s}


def show(found: dict[str, Any]) -> None:
    for name, part in found["parts"].items():
        print(
            f"{name:<16}{part['steps']:5.0f} steps of {part['step_s']:.3f} s; data wait {part['data_wait']:.3%}; "
            f"workers {', '.join(map(str, found['pids'][name]))}"
        )
    limit = f"{TASK_MEMORY_BYTES >> 20} MiB"
    print(f"{found['builds']} builds beside it, {found['ended']} tasks done again after the limit of {limit}")
    same = found["pids"]["alone"] == found["pids"]["beside a build"] and found["incarnations"] == 1
    print(f"{'same' if same else 'OTHER'} processes, {found['incarnations']} incarnation")
    print(f"{'under' if found['parts']['beside a build']['data_wait'] < GOAL else 'OVER'} {GOAL:.0%} data wait")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each part")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, of which {os.getloadavg()[0]:.1f} processes wanted one when it began", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ray.init(**local_ray.init_arguments(num_cpus=4, object_store_bytes=200_000_000))
        try:
            show(measure(folder, arguments.steps))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
