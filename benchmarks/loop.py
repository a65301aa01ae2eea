"""The training loop beside the bare jitted step: waits for rows, saves, and all else that it does.

    .venv/bin/python benchmarks/loop.py [--blocks N] [--steps N] [--no-resume] [--json FILE] [KEY=VALUE ...]

The quickstart's model, data and loop in one process with one device, without Ray. Blocks of the real loop
(`train_loop.train`, which goes on from its last checkpoint) and of the bare step take turns, so what else the machine
does meets both, and the quickest fifth of the steps of each is compared. Half of the loop's block is without a
save, which the loop is judged by; beside the other half one is written, maybe on the same cores: what that costs is the
save's. The last step of a block waits for its save, as one that does not run beside training would. Then, with Ray,
`benchmarks/resume.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import quickstart_run

from openmoe.model import sharding, step
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import passes, sources, stdlib_corpus, token_cache, tokenizer
from openmoe.pipelines.loader import Loader
from openmoe.platform.run import journal
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import train_loop

PREEMPTED_EVERY_S = 3 * 3600.0
GOALS = {"data wait": 0.01, "loop overhead": 0.03, "checkpoint stall": 0.01}


def build(folder: str, steps: int, overrides: list[str]) -> tuple[list[str], str]:
    """Builds the quickstart's data without Ray; returns settings that name it, and its manifest."""
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=400_000, max_code_bytes=400_000)
    settings = [*quickstart_run.settings(folder), f"data_dir={folder}/data", "mesh.expert=1"]
    settings += ["cluster.num_workers=1", "cluster.devices_per_worker=1", *overrides]
    config = spec.load("quickstart", settings).data
    text = tokenizer.load(config.tokenizer)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    receipts = {
        name: [token_cache.tokenize(unit, text, f"{folder}/data/tokens") for unit in of_source]
        for name, of_source in units.items()
    }
    every = [unit for of_source in units.values() for unit in of_source]
    path = manifests.manifest_path(f"{folder}/data", config, text, every)
    manifests.commit(manifests.assemble(path, config, text, receipts))
    built = passes.Passes(manifests.load(path))
    while wanted := passes.lacking(built, steps * 4):
        for group in wanted:
            passes.pack_group(built.manifest, *group)
        built.refresh()
    built.record()
    return settings, path


class Bare:
    """The jitted step and nothing else: one batch, again and again, one step in flight."""

    def __init__(self, loaded: RunSpec, manifest_path: str) -> None:
        mesh = sharding.make_mesh(**loaded.mesh.model_dump())
        plan = (loaded.model, loaded.optimizer, mesh, loaded.execution)
        self._batch = train_loop.global_batch(loaded, mesh, Loader(manifest_path), first_row=0)
        self._state = step.init_state(loaded.model, loaded.optimizer, loaded.seed, mesh)
        self._state, self._step = step.arranged(*plan, self._state), step.make_train_step(*plan)
        self.block(2)

    def block(self, steps: int) -> tuple[list[float], float]:
        """Returns the seconds of each step but the first, and the mean of their CPU time."""
        ends_s, cpu_s, before = [], [], None
        for n in range(steps + 2):
            metrics = None
            if n <= steps:
                self._state, metrics = self._step(self._state, self._batch)
            if before is not None:
                jax.block_until_ready(before)
                ends_s.append(time.perf_counter())
                cpu_s.append(time.process_time())
            before = metrics
        return [end_s - start_s for start_s, end_s in pairwise(ends_s)], (cpu_s[-1] - cpu_s[0]) / steps


class Block(NamedTuple):
    """What a block of the real loop took; its first step, which loads programs, is left out.

    Attributes:
      steps_s: of each step without a save.
      cpu_s: of these, in the mean, CPU time of the whole process.
      wait_s: of these, waiting for rows.
      stall_s: a save held the loop up for so long.
      shadow_s: and made the steps beside which it was written slower by so much together.
      blocking_s: the save at the end, which is waited for.
    """

    steps_s: list[float]
    cpu_s: float
    wait_s: float
    stall_s: float
    shadow_s: float
    blocking_s: float


def train_block(settings: list[str], manifest_path: str, steps: int, last: int) -> Block:
    """Trains on to step `last`, `steps` without a save and `steps` after one has begun."""
    loaded = spec.load("quickstart", [*settings, f"train.steps={last}", f"train.checkpoint_every_steps={steps}"])
    run = RunDir(loaded.run_dir)
    run.create(loaded)
    claim = run.claim()
    cpu_s: list[float] = []
    train_loop.train(loaded, run, claim, manifest_path, lambda record: cpu_s.append(time.process_time()))
    records = [r for n, _, r in journal.read(run.at("metrics")) if n == claim.incarnation]
    events = [e for n, _, e in journal.read(run.at("journal")) if n == claim.incarnation]
    alone, beside = records[1:steps], records[steps:]
    step_s = statistics.fmean(record["step_s"] for record in alone)
    stall_s = next(event["stall_s"] for event in events if event["event"] == "save_started")
    return Block(
        steps_s=[record["step_s"] for record in alone],
        cpu_s=(cpu_s[steps - 1] - cpu_s[0]) / (steps - 1),
        wait_s=statistics.fmean(record["data_wait_s"] for record in alone),
        stall_s=stall_s,
        shadow_s=sum(record["step_s"] for record in beside) - stall_s - len(beside) * step_s,
        blocking_s=[event["seconds"] for event in events if event["event"] == "accepted"][-1],
    )


def measure(folder: str, blocks: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    settings, manifest_path = build(folder, (blocks + 1) * 2 * steps, overrides)
    loaded = spec.load("quickstart", [*settings, f"train.steps={steps}", "train.checkpoint_every_steps=1"])
    bare = Bare(loaded, manifest_path)
    bares, found = [], []
    for block in range(blocks + 1):
        bares.append(bare.block(steps))
        found.append(train_block(settings, manifest_path, steps, (block + 1) * 2 * steps))
        means = f"bare {statistics.fmean(bares[-1][0]):.4f} s, loop {statistics.fmean(found[-1].steps_s):.4f} s"
        print(f"block {block} of {blocks}: {means}", file=sys.stderr, flush=True)
    bares, found = bares[1:], found[1:]  # the first turn warms up
    stall_s = statistics.median(block.stall_s for block in found)
    shadow_s = max(0.0, statistics.median(block.shadow_s for block in found))
    cadence_s = math.sqrt(2 * (stall_s + shadow_s) * PREEMPTED_EVERY_S)  # Young's: a save against what a death undoes
    bare_s, loop_s = quick(steps_s for steps_s, _ in bares), quick(block.steps_s for block in found)
    return {
        "bare": bares,
        "blocks": [block._asdict() for block in found],
        "step_s": bare_s,
        "loop overhead": loop_s / bare_s - 1,
        "loop overhead of each block": [
            statistics.median(block.steps_s) / statistics.median(steps_s) - 1
            for block, (steps_s, _) in zip(found, bares, strict=True)
        ],
        "CPU_s": [statistics.fmean(cpu_s for _, cpu_s in bares), statistics.fmean(block.cpu_s for block in found)],
        "data wait": statistics.median(block.wait_s / statistics.fmean(block.steps_s) for block in found),
        "save stall_s": stall_s,
        "save shadow_s": shadow_s,
        "save blocking_s": statistics.median(block.blocking_s for block in found),
        "cadence_s": cadence_s,
        "checkpoint stall": (stall_s + shadow_s) / cadence_s,
    }


def quick(blocks: Iterable[list[float]]) -> float:
    """Returns what the quickest fifth of all steps took at most: what else the machine does only makes steps longer."""
    return statistics.quantiles([step_s for steps_s in blocks for step_s in steps_s], n=5)[0]


def show(found: dict[str, Any]) -> None:
    spread = ", ".join(f"{share:+.1%}" for share in found["loop overhead of each block"])
    bare_s = found["step_s"]
    print(f"{'loop overhead':<18}{found['loop overhead']:8.2%}  over the bare jitted step of {bare_s:.3f} s, no save")
    print(f"{'':<28}by the quickest fifth of steps; medians of each block: {spread}")
    bare_cpu_s, loop_cpu_s = found["CPU_s"]
    print(f"{'':<18}{loop_cpu_s / bare_cpu_s - 1:8.2%}  by CPU time: {loop_cpu_s:.3f} s a step, and {bare_cpu_s:.3f} s")
    print(f"{'data wait':<18}{found['data wait']:8.2%}  of the time of steps")
    stall_s, blocking_s = found["save stall_s"], found["save blocking_s"]
    print(f"{'save':<18}{stall_s:8.3f} s of stall, and steps beside it took {found['save shadow_s']:.3f} s more;")
    print(f"{'':<28}{blocking_s:.3f} s if it were waited for: {blocking_s / (stall_s + found['save shadow_s']):.1f}x")
    print(
        f"{'checkpoint stall':<18}{found['checkpoint stall']:8.2%}  with a save every {found['cadence_s']:.0f} s, the"
    )
    print(f"{'':<28}best cadence (Young) at one preemption in {PREEMPTED_EVERY_S / 3600:g} h")
    for name, goal in GOALS.items():
        print(f"{'under' if found[name] < goal else 'OVER':<6}{goal:.0%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=16, help="of half a block")
    parser.add_argument("--no-resume", action="store_true", help="leave out what needs Ray")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="that win over the quickstart's")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} CPUs, of which {load:.1f} processes wanted one when it began", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(folder, arguments.blocks, arguments.steps, arguments.settings)
    show(found)
    if not arguments.no_resume:
        import resume

        found["resume"] = resume.measure()
        resume.show(found["resume"])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
