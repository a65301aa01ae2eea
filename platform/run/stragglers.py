"""Which host holds the others up, from what each process measures of its own steps. Pure.

A step is as slow as its slowest process, and from outside all look alike: who is ready waits for who is not. What a
process does by itself before it hands a step to its devices (wait for its rows, run Python) can be told from what it
waits for then. A slow chip cannot: it shows as a wait in every process, its own included.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

LEAST_SHARE = 0.25  # of a step, that a process must hold the others up; a busy machine has 0.1 by itself


class Pace(NamedTuple):
    """Means over the newest steps of a process, seconds a step.

    Attributes:
      first, last: steps.
      own_s: until a step was handed to the devices: the wait for its rows, and the host's work.
      data_wait_s: of it, the wait for rows.
      step_s: all of it.
    """

    first: int
    last: int
    own_s: float
    data_wait_s: float
    step_s: float


class Straggler(NamedTuple):
    """A process that takes longer over its own part than the others do."""

    rank: int
    pace: Pace
    others_s: float  # median of the others' own part


def find(paces: Mapping[int, Pace]) -> Straggler | None:
    """Returns the process that holds the others up the most, if one does for a good part of a step.

    Args:
      paces: newest of each rank.
    """
    if len(paces) < 2:
        return None
    rank = max(paces, key=lambda rank: (paces[rank].own_s, -rank))
    pace = paces[rank]
    others_s = statistics.median(other.own_s for r, other in paces.items() if r != rank)
    return Straggler(rank, pace, others_s) if pace.own_s - others_s >= LEAST_SHARE * pace.step_s else None


def words(straggler: Straggler, host: str) -> str:
    """Returns it as a sentence."""
    rank, pace, others_s = straggler
    waits = f", {pace.data_wait_s:.2f} s of it for rows" if pace.data_wait_s >= pace.own_s / 2 else ""
    return (
        f"rank {rank} on {host} holds the others up: steps {pace.first:,} to {pace.last:,} took {pace.step_s:.2f} s "
        f"each, {pace.own_s:.2f} s its own part{waits}; the others' is {others_s:.2f} s"
    )
