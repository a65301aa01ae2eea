"""`openmoe up`: a cluster on this machine, the controller and the dashboard, until Ctrl-C ends all three."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any

from openmoe.clusters import processes, twin, twin_state
from openmoe.clusters.spec import ClusterSpec
from openmoe.platform.commands import cli_cluster
from openmoe.platform.jobs import controller, controller_lock

_GOODBYE_S = 10.0
Say = Callable[[str], None]


def run(cluster: str, home: Path, say: Say, *, dashboard_port: int | None) -> int:
    """Starts everything, waits for SIGINT or SIGTERM, and ends everything; returns the exit code.

    Args:
      cluster: a cluster file, or the name of a shipped one.
      home: of the controller and the cluster's state.
      say: gets a line for each thing that happens.
      dashboard_port: where to serve the dashboard, 0 for any free port; None serves none.

    Raises:
      ControllerError: a controller of this home runs already.
      TwinError: the cluster cannot be started.
    """
    spec = _for_this_machine(cli_cluster.spec_of(cluster), say)
    state_dir = home / "clusters" / spec.name
    with controller_lock.only_one(home), _interrupted_by_signals():
        try:
            _start(spec, state_dir, say)
        except KeyboardInterrupt:
            _end(state_dir, say)
            return 0
        except twin_state.StartFailed as failed:
            say(str(failed))
            _end(state_dir, say)
            return 1
        try:
            with dashboard(home, dashboard_port) if dashboard_port is not None else contextlib.nullcontext():
                say(_what_next(spec))
                at_work = controller.serve(home, say)
                go_on = f"; at the next `openmoe up` these go on: {', '.join(at_work)}" if at_work else ""
                say(f"ending{go_on}")
        except KeyboardInterrupt:  # before the controller listened
            say("ending")
        finally:
            _end(state_dir, say)
    return 0


def _start(spec: ClusterSpec, state_dir: Path, say: Say) -> None:
    existed = (state_dir / "cluster.json").exists()
    try:
        twin.up(spec, state_dir, say)
    except twin.TwinError:
        if not existed and (state_dir / "cluster.json").exists():
            twin.down(state_dir, say)
        raise


def _for_this_machine(spec: ClusterSpec, say: Say) -> ClusterSpec:
    """Fake TPU hosts need Linux; elsewhere the cluster is one plain Ray, under the same name."""
    if spec.provider != "twin" or sys.platform.startswith("linux"):
        return spec
    say(f"this is {sys.platform}, where TPU slices cannot be shown: {spec.name} is a plain local Ray without slices")
    return ClusterSpec(name=spec.name, provider="local", head=spec.head)


def _what_next(spec: ClusterSpec) -> str:
    run_file = "twin" if spec.has_slices else "quickstart"
    lines = [f"in another terminal: openmoe submit {run_file}", "openmoe jobs list"]
    if spec.has_slices:
        lines += [f"openmoe cluster status {spec.name}", f"openmoe cluster preempt {spec.name} slice-a"]
    return f"\n{'':30}".join([*lines, "(Ctrl-C here ends all)"])


def _end(state_dir: Path, say: Say) -> None:
    for number in controller.stop_signals():
        signal.signal(number, signal.SIG_IGN)  # impatience must not leave half of it behind
    twin.down(state_dir, say)


@contextlib.contextmanager
def _interrupted_by_signals() -> Generator[None]:
    """Any request to stop raises KeyboardInterrupt as long as the block runs, unless somebody else listens."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in controller.stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def dashboard(home: Path, port: int) -> Generator[subprocess.Popen[Any]]:
    """Serves the dashboard in a process of its own, which prints its address; Ctrl-C reaches it by itself.

    One that an `openmoe up` of this home has left behind, because it was killed, ends first: it has the port.
    """
    mark = f"dashboard/{home}"
    processes.kill(mark.__eq__)
    command = [sys.executable, "-m", "openmoe.platform", "dashboard", "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, processes.MARK: mark}) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_GOODBYE_S)
            except subprocess.TimeoutExpired:
                process.kill()
