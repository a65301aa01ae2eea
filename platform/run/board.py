"""What the workers tell the driver while they live: where they are, the newest step, and what ended them.

One small actor on the driver's node. It is a view and a witness, never the record: that is the run directory. Nobody
waits for it for long, and losing it ends no run.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from openmoe.clusters.processes import Process
from openmoe.platform.run.frozen import Pulse
from openmoe.platform.run.stragglers import Pace
from openmoe.platform.run.verdict import Failure
from openmoe.platform.train import memory_kills

T = TypeVar("T")


class Board:
    """Holds what was said until the driver asks."""

    def __init__(self) -> None:
        self._newest: dict[str, Any] | None = None
        self._nodes: dict[int, str] = {}
        self._memory_kills: dict[int, int | None] = {}
        self._paces: dict[int, Pace] = {}
        self._failures: dict[int, Failure] = {}
        self._rendered_groups = 0
        self._pulses: dict[int, tuple[str, Process, float]] = {}

    def place(self, rank: int, node_id: str, memory_kills: int | None = None) -> None:
        """Keeps the Ray node on which a worker runs, and how often the kernel had killed for memory there before."""
        self._nodes[rank] = node_id
        self._memory_kills[rank] = memory_kills

    def placements(self) -> dict[int, str]:
        """Returns the Ray node id of each rank that said so."""
        return self._nodes

    def memory_kills(self) -> dict[int, int | None]:
        """Returns the counter of each rank that said where it is, when it said so."""
        return self._memory_kills

    def memory_kills_here(self) -> dict[str, int | None]:
        """Returns the counter of the board's own node as it is now: it need not wait for a process there."""
        return {ray.get_runtime_context().get_node_id(): memory_kills.count()}

    def lives(self, rank: int, node_id: str, process: Process | None) -> None:
        """Keeps that a worker's process gets on; None: it has done its work, and says no more."""
        self._pulses.pop(rank, None)
        if process is not None:
            self._pulses[rank] = (node_id, process, time.monotonic())

    def pulses(self) -> dict[int, Pulse]:
        """Returns how long each rank that has still to work has been silent, and which process it is."""
        now_s = time.monotonic()
        return {rank: Pulse(node, process, now_s - told_s) for rank, (node, process, told_s) in self._pulses.items()}

    def put(self, record: dict[str, Any]) -> None:
        """Replaces the newest step's record."""
        self._newest = record

    def pace(self, rank: int, pace: Pace) -> None:
        """Keeps how long a worker took over its own part of the newest steps."""
        self._paces[rank] = pace

    def paces(self) -> dict[int, Pace]:
        """Returns the newest pace of each rank that told one."""
        return self._paces

    def take(self) -> dict[str, Any] | None:
        """Returns the newest record since the last call, if any, with the groups that all workers have rendered."""
        newest, self._newest = self._newest, None
        return newest and {**newest, "rendered_groups": self._rendered_groups}

    def rendered(self) -> None:
        """Counts a group of rows that a worker begins to render, since nobody has packed it."""
        self._rendered_groups += 1

    def fail(self, failure: Failure) -> None:
        """Keeps what a worker says of its own end; the first word of a rank counts."""
        self._failures.setdefault(failure.rank, failure)

    def failures(self) -> dict[int, Failure]:
        """Returns what each rank said of its end."""
        return self._failures


def start() -> Any:
    """Starts the board on this node, so that it lives as long as the driver that reads it; returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()


def living(spare: Any = None) -> Any:
    """Returns a board that was started before, if it is still there; else a new one."""
    return start() if spare is None or ask(spare.failures.remote(), None) is None else spare


def ask(answer: Any, nothing: T) -> T:
    """Returns the answer to a question to the board, or `nothing` when the board is gone."""
    try:
        return ray.get(answer)
    except ray.exceptions.RayError:
        return nothing
