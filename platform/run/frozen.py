"""Ends workers that froze: stopped from outside (SIGSTOP, a debugger), alive and deaf to all who ask them to leave.

JAX ends the processes that live when a peer's heartbeat stays away, but not the peer. Ray asks it to leave, waits, and
neither places a new group meanwhile nor says which process it was. So each worker tells the board now and then that it
gets on; of one that is silent, its own node looks at the process, and kills it once it is of no use to anybody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, NamedTuple

import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from openmoe.clusters.processes import Process, identify
from openmoe.platform.run.verdict import Failure

TELL_EVERY_S = 1.0
LOOK_AFTER = 0.5  # of the heartbeat's patience; the first look also starts what looks, which takes seconds
END_AFTER = 0.8  # JAX too gives a peer up before all of it: after 20.6 of 25 s

State = Literal["gone", "stopped", "runs"]
Order = Literal["look", "end if stopped", "end"]


class Pulse(NamedTuple):
    """What the board knows of the life of one worker's process."""

    node_id: str  # of Ray
    process: Process
    silent_s: float  # since it said last that it gets on


class Seen(NamedTuple):
    """What a node saw of a worker's process, and did to it."""

    state: State
    killed: bool


@contextlib.contextmanager
def telling(tell: Callable[[Process | None], object]) -> Generator[None]:
    """Calls `tell` with this process every second, as long as the block runs and its threads do, and then with None."""
    process, stop = identify(os.getpid()), threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            tell(process)
            stop.wait(TELL_EVERY_S)

    thread = threading.Thread(target=go_on, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        tell(None)


def orders(pulses: Mapping[int, Pulse], states: Mapping[int, State], heartbeat_timeout_s: float) -> dict[int, Order]:
    """Returns what is to be done about each silent rank.

    A process that is stopped cannot have kept JAX's heartbeat. Any other that says nothing may only be busy, and is
    ended when a peer's process has gone: then there is no group any more that it could go on in.

    Args:
      pulses: of all ranks that live, as far as they said.
      states: as their nodes have seen silent ranks last.
      heartbeat_timeout_s: JAX's, after which a silent peer ends the group.
    """
    found: dict[int, Order] = {}
    for rank, pulse in pulses.items():
        patience = pulse.silent_s / heartbeat_timeout_s
        if patience < LOOK_AFTER or states.get(rank) == "gone":
            continue
        peer_gone = any(state == "gone" for other, state in states.items() if other != rank)
        found[rank] = "end" if patience >= 1 and peer_gone else "end if stopped" if patience >= END_AFTER else "look"
    return found


def look(process: Process, order: Order) -> Seen:
    """Looks at a process of this machine, and kills it if that is the order; a later one of its id is another."""
    try:
        status = psutil.Process(process.pid).status()
        if not process.alive:
            return Seen("gone", killed=False)
        stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        kills = order == "end" or (order == "end if stopped" and stopped)
        if kills:
            os.kill(process.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return Seen("gone", killed=False)
    return Seen("stopped" if stopped else "runs", kills)


class Watch:
    """Watches the workers of one incarnation from the driver; each look at it returns at once."""

    def __init__(self, heartbeat_timeout_s: float, name: Callable[[str], str], say: Callable[[str], None]) -> None:
        """Begins to watch.

        Args:
          heartbeat_timeout_s: as of `orders`.
          name: of the host that is a Ray node.
          say: told of each process that is killed.
        """
        self._timeout_s, self._name, self._say = heartbeat_timeout_s, name, say
        self._states: dict[int, State] = {}
        self._asked: dict[Any, tuple[int, Pulse]] = {}
        self._found: dict[int, Failure] = {}

    def go_on(self, pulses: Mapping[int, Pulse]) -> None:
        """Takes the newest pulses: hears what the nodes have seen, and asks them again where it is still silent."""
        self._hear()
        for rank in [rank for rank in self._found if self._states[rank] == "stopped"]:
            if rank in pulses and pulses[rank].silent_s < LOOK_AFTER * self._timeout_s:  # it was let go on
                del self._found[rank], self._states[rank]
        busy = {rank for rank, _ in self._asked.values()}
        for rank, order in orders(pulses, self._states, self._timeout_s).items():
            if rank not in busy:
                pulse = pulses[rank]
                where = NodeAffinitySchedulingStrategy(pulse.node_id, soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(look).options(scheduling_strategy=where)
                self._asked[task.remote(pulse.process, order)] = (rank, pulse)

    def failures(self) -> dict[int, Failure]:
        """Returns what is known of the ranks that froze."""
        self._hear()
        return dict(self._found)

    def _hear(self) -> None:
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for answer in answered:
            rank, pulse = self._asked.pop(answer)
            with contextlib.suppress(ray.exceptions.RayError):  # of a node that is gone, Ray ends the workers
                self._take(rank, pulse, ray.get(answer))

    def _take(self, rank: int, pulse: Pulse, seen: Seen) -> None:
        self._states[rank] = "gone" if seen.killed else seen.state
        if not seen.killed and seen.state != "stopped":
            return
        who = f"process {pulse.process.pid} on {self._name(pulse.node_id)}"
        how = "is stopped" if seen.state == "stopped" else "does not answer"
        text = f"{who} {how}, and has said nothing for {pulse.silent_s:.0f} s"
        if seen.killed:
            text += "; killed, so that its group ends"
            self._say(f"rank {rank}: {text}")
        self._found[rank] = Failure(rank=rank, kind="frozen", text=text)
