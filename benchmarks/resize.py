"""The same run on 1, 2 and 4 processes, and on all of them in turn: are its rows and losses the same?

    .venv/bin/python benchmarks/resize.py [--folder DIR] [--json FILE] [--write docs/resize.md] [VARIANT ...]

A small float32 model, 50 steps, without Ray: JAX processes on this machine with one device each, one process group, the
real training loop with its checkpoints and records. Where the number of processes changes in the middle, process 0 is
killed (SIGKILL) between two checkpoints, and the next group goes on from the last one accepted. The table compares
every step with that of one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/openmoe-resize-programs")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import loop

from openmoe.platform.run.lineage import Claim
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec
from openmoe.platform.train import train_loop

STEPS, SAVE_EVERY_STEPS = 50, 10
SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=16", "model.group_size=128"),
    *("data.seq_len=128", "train.batch_rows=4", f"train.steps={STEPS}"),
    *(f"train.checkpoint_every_steps={SAVE_EVERY_STEPS}", "train.keep_checkpoints=5"),
)
TOLERANCE = 1e-4  # of a loss in nats


class Group(NamedTuple):
    """Processes that train together, with one device each."""

    processes: int
    mesh: str
    killed_at: int | None = None  # after this step, as soon as they have a checkpoint; None: they train to the end


VARIANTS = {
    "1": (Group(1, "{}"),),
    "2": (Group(2, "{expert: 2}"),),
    "4": (Group(4, "{data: 2, expert: 2}"),),
    "1-2-4": (Group(1, "{}", 17), Group(2, "{expert: 2}", 33), Group(4, "{data: 2, expert: 2}")),
    "4-2-1": (Group(4, "{expert: 4}", 13), Group(2, "{data: 2}", 38), Group(1, "{}")),
}


def train(rank: int, group: Group, port: int, settings: list[str], manifest_path: str, claim: Claim, log: str) -> None:
    """Trains in one process of a group."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if group.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", group.processes, rank, heartbeat_timeout_seconds=25)
    loaded = spec.load("quickstart", settings)
    run = RunDir(loaded.run_dir)

    def report(record: dict[str, Any]) -> None:
        is_due = group.killed_at and record["step"] >= group.killed_at
        if is_due and any(accepted.incarnation == claim.incarnation for accepted in run.acceptances()):
            os.kill(os.getpid(), signal.SIGKILL)

    train_loop.train(loaded, run, claim, manifest_path, report)
    if group.processes > 1:
        jax.distributed.shutdown()


def run_group(group: Group, settings: list[str], manifest_path: str, log: str) -> None:
    """Runs a group until its end, or until its first process is killed; the others are killed then."""
    settings = [*settings, f"cluster.num_workers={group.processes}", f"mesh={group.mesh}"]
    loaded = spec.load("quickstart", settings)
    run = RunDir(loaded.run_dir)
    run.create(loaded)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, claim = multiprocessing.get_context("forkserver"), run.claim()
    same = (group, port, settings, manifest_path, claim, log)
    processes: list[BaseProcess] = [
        started.Process(target=train, args=(rank, *same)) for rank in range(group.processes)
    ]
    for process in processes:
        process.start()
    processes[0].join()
    wanted = -signal.SIGKILL if group.killed_at else 0
    if processes[0].exitcode != wanted:
        raise SystemExit(f"process 0 of {group} ended with {processes[0].exitcode}:\n{Path(log).read_text()[-3000:]}")
    for process in processes[1:]:
        if group.killed_at:
            process.kill()
        process.join()


def measure(folder: str, variants: list[str]) -> list[dict[str, Any]]:
    """Trains variants in `folder/<name>`; returns how each compares with the first."""
    settings, manifest_path = loop.build(folder, STEPS, list(SMALL))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["resize"])
    found, traces, heads = [], [], []
    for name in variants:
        run, groups = RunDir(f"{folder}/{name}"), VARIANTS[name]
        for group in groups:
            run_group(group, [*settings, f"run_dir={run.path}"], manifest_path, f"{run.path}.log")
        traces.append(run.trace())
        heads.append(run.acceptances()[-1].ledger_head)
        found.append(
            {
                "name": name,
                "groups": [
                    {"processes": group.processes, "mesh": group.mesh, "killed_at": group.killed_at, "from": step}
                    for group, step in zip(groups, [run.step_of(claim.resumes) for claim in run.claims()], strict=True)
                ],
                "rows": rows_of(traces[-1]) == rows_of(traces[0]) and heads[-1] == heads[0],
                "loss_difference": largest_difference(traces[-1], traces[0]),
            }
        )
        print(f"{name}: losses differ by at most {found[-1]['loss_difference']}", file=sys.stderr, flush=True)
    return found


def rows_of(trace: list[dict[str, Any]]) -> list[Any]:
    return [(record["step"], record["rows"], record["batch_checksum"]) for record in trace]


def largest_difference(trace: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    pairs = zip(trace, other, strict=True)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in ("loss", "total_loss"))


def table(found: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = ["| processes | mesh | steps | rows and ledger | largest difference of a loss |", "|---|---|---|---|---|"]
    for variant in found:
        groups = variant["groups"]
        ends = [*(group["from"] for group in groups[1:]), STEPS]
        steps = ", ".join(f"{group['from'] + 1} to {end}" for group, end in zip(groups, ends, strict=True))
        meshes = "; ".join(group["mesh"].strip("{}") or "one device" for group in groups)
        same = "the same" if variant["rows"] else "OTHERS"
        by = f"{variant['loss_difference']:.1e}" if variant is not found[0] else ""
        lines.append(f"| {', then '.join(variant['name'].split('-'))} | {meshes} | {steps} | {same} | {by} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", metavar="DIR", help="where the runs stay; default: nowhere")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--write", metavar="FILE", help="a page whose table is replaced")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; default: all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.folder or folder, arguments.variants or list(VARIANTS))
    print("\n".join(table(found)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    if arguments.write:
        page = Path(arguments.write)
        page.write_text(re.sub(r"(^\|.*\n)+", "\n".join(table(found)) + "\n", page.read_text(), flags=re.MULTILINE))
    if any(not variant["rows"] or variant["loss_difference"] > TOLERANCE for variant in found):
        raise SystemExit(f"the rows are others, or losses differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
