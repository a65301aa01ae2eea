"""As many JAX processes on this machine as recorded steps were trained by, so that their bits can be compared.

On CPU a sum over processes is made in another order than one within a process. `openmoe replay` therefore starts itself
once more for each further process; these members join the group, execute the same, and print nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from typing import NamedTuple

from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.train import replay

HEARTBEAT_TIMEOUT_S, SHUTDOWN_TIMEOUT_S = 25, 10


class Shape(NamedTuple):
    """How many processes, with how many devices each."""

    processes: int
    devices: int


ONE = Shape(1, 0)  # this process, with the devices that it has


def shape_of(run: RunDir, step_number: int) -> Shape:
    """Returns by what group the steps of a replay were trained, if this machine can have such a one; else `ONE`."""
    steps, how = replay.recorded_steps(run), replay.circumstances(run)
    start = replay.start_of(run, step_number)
    wanted = range(start.step + 1 if start else 1, step_number + 1)
    shapes = set()
    for incarnation in {steps[number].incarnation for number in wanted if number in steps}:
        started = how.get(incarnation, {})
        if started.get("device") != "cpu" or "processes" not in started:
            return ONE
        shapes.add(Shape(started["processes"], started["devices"] // started["processes"]))
    return shapes.pop() if len(shapes) == 1 else ONE


@contextlib.contextmanager
def joined(shape: Shape, command: Sequence[str], member: str = "") -> Generator[None]:
    """Forms a JAX process group for the block; must come before JAX.

    Args:
      shape: of the group; of one process nothing is done.
      command: arguments of `openmoe` that do the same in a member, which gets `--member` besides.
      member: what this process was given as that: "<port>:<rank>"; "": it is rank 0 and starts the others.
    """
    if shape.processes == 1:
        yield
        return
    os.environ["JAX_NUM_CPU_DEVICES"] = str(shape.devices)
    port, rank = map(int, member.split(":")) if member else (_free_port(), 0)
    start = [sys.executable, "-m", "openmoe.platform", *command, "--member"]
    others = [] if member else [_quietly([*start, f"{port}:{n}"]) for n in range(1, shape.processes)]
    import jax

    try:
        with _stdout_to_stderr():
            jax.distributed.initialize(
                f"127.0.0.1:{port}",
                shape.processes,
                rank,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
            )
            try:
                yield
            finally:  # after an error too, which all have met: nobody waits for the others then
                jax.distributed.shutdown()
    finally:
        for other in others:
            other.kill()
            other.wait()


def _quietly(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _stdout_to_stderr() -> Generator[None]:
    """Keeps for the result what Gloo would fill with a line for each connection."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
