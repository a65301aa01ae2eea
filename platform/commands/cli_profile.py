"""`openmoe profile`: look into a live run."""

import secrets
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openmoe.platform.run.run_dir import RunDir
    from openmoe.platform.train.profiling import Request


def profile(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or gs://.")],
    steps: Annotated[int, typer.Option(min=0, max=1000, help="Steps of a trace.")] = 0,
    processes: Annotated[
        str, typer.Option(metavar="N,N", help="JAX processes, which on TPUs are hosts; or all.")
    ] = "0",
    hlo: Annotated[bool, typer.Option("--hlo", help="The compiled step as text.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="What is allocated, by device and by line of code.")] = False,
    stacks: Annotated[bool, typer.Option("--stacks", help="Where every thread stands.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Wait so long for the answers.")] = 600.0,
) -> None:
    """Look into a live run: a trace, its program, memory, stacks.

    What it gives lies in RUN_DIR/profiles. Exit code 1: not all answered.
    """
    from openmoe.platform.run.run_dir import RunDir, RunDirError
    from openmoe.platform.run_file.spec_errors import Problem, SpecError
    from openmoe.platform.train import profiling

    run = RunDir(run_dir)
    if not (steps or hlo or memory or stacks):
        raise SpecError([Problem("", "nothing is asked for; give --steps 3, --hlo, --memory or --stacks")])
    if processes != "all" and not all(part.isdecimal() for part in processes.split(",")):
        raise SpecError([Problem("", f"--processes {processes}: give numbers, as 0,3, or all")])
    run.must_exist()
    events = run.events()
    started = [event for event in events if event["event"] == "started"]
    if not started:
        raise RunDirError(f"{run.path}: no worker group has started yet; ask again when it trains")
    if why := _over(run, started[-1], events):
        raise RunDirError(f"{run.path}: {why}; nobody would answer, ask again when it trains")
    wanted = range(started[-1]["processes"]) if processes == "all" else sorted({int(p) for p in processes.split(",")})
    if wanted[-1] >= started[-1]["processes"]:
        raise SpecError([Problem("", f"--processes {processes}: the run has {started[-1]['processes']}, from 0 on")])
    request = profiling.Request(
        id=f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        **{"processes": tuple(wanted), "steps": steps, "hlo": hlo, "memory": memory, "stacks": stacks},
    )
    profiling.ask(run, request)
    raise typer.Exit(0 if _answered(run, request, timeout_s) else 1)


def _over(run: "RunDir", started: "Mapping[str, Any]", events: "Sequence[Mapping[str, Any]]") -> str:
    """Returns why the newest worker group, which has `started`, gives no answer any more; "" while it may."""
    ended = [e for e in events if e["event"] == "ended" and e["incarnation"] == started["incarnation"]]
    if ended:
        return f"its newest worker group has ended ({ended[-1]['cause'].replace('_', ' ')})"
    finished = run.finished()
    return "it is finished" if finished and finished["time_s"] > started["time_s"] else ""


def _answered(run: "RunDir", request: "Request", timeout_s: float) -> bool:
    """Waits for the answers and prints them; returns whether all came, without an error."""
    from openmoe.platform.train import profiling

    told: set[int] = set()
    good = True
    deadline_s = time.monotonic() + timeout_s
    while True:
        for process, answer in sorted(profiling.answers(run, request.id).items()):
            if process in told:
                continue
            told.add(process)
            folder = run.at(profiling.FOLDER, request.id, f"{process:05d}")
            print(f"process {process}, steps {answer['first_step']} to {answer['last_step']}: {folder}", flush=True)
            for name in answer["files"]:
                print(f"  {name}")
            if answer["error"]:
                good = False
                print(f"  {answer['error']}", file=sys.stderr)
        if told >= set(request.processes):
            break
        if time.monotonic() > deadline_s:
            missing = ", ".join(str(p) for p in request.processes if p not in told)
            print(f"no answer from process {missing} in {timeout_s:g} s: does it live?", file=sys.stderr)
            return False
        time.sleep(0.5)
    if request.steps:
        print(f"look: tensorboard --logdir {run.at(profiling.FOLDER, request.id)}, with the package xprof;")
        print("      or perfetto_trace.json.gz at https://ui.perfetto.dev")
    return good
