"""How often to save: from what a save costs and how often work is thrown away, as this run has seen both. Pure.

Daly, "A higher order estimate of the optimum checkpoint interval" (2006), which goes beyond Young's sqrt(2 C M). The
cost C of a save is the time that it keeps training from going on, not the time until it is committed: writing goes on
in the background, and only bounds how close two saves may follow each other.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Saves until the first of them has been measured.
FIRST_STEPS = 20
NEWEST = 5
_ASKED_FOR = ("operator", "superseded", "bad_input")  # ends that say nothing about how long machines stay

Event = Mapping[str, Any]


class Seen(NamedTuple):
    """What a run has shown of its machines and its saves."""

    interruptions: int = 0  # incarnations that ended with work thrown away
    trained_s: float = 0.0  # the time that all incarnations have trained together
    stalls_s: tuple[float, ...] = ()  # how long each of the newest saves kept training from going on
    saves_s: tuple[float, ...] = ()  # how long each of the newest saves took until it was accepted
    step_s: float | None = None  # of a step between the newest two saves, waits included

    @property
    def save_s(self) -> float | None:
        """How long a save takes until it counts; not of the slowest, since a process's first save compiles too."""
        return statistics.median_low(self.saves_s) if self.saves_s else None

    def stalled(self, seconds: float) -> Seen:
        """Returns the same with one more save begun."""
        return self._replace(stalls_s=(*self.stalls_s, seconds)[-NEWEST:])

    def accepted(self, seconds: float) -> Seen:
        """Returns the same with one more save accepted."""
        return self._replace(saves_s=(*self.saves_s, seconds)[-NEWEST:])


NOTHING_SEEN = Seen()


class Cadence(NamedTuple):
    """How often to save, and what follows from what."""

    every_steps: int
    interruption_every_s: float  # expected: the prior, corrected by what was seen
    stall_s: float | None  # of a save; None: not measured yet, like the next two
    step_s: float | None
    every_s: float | None

    def __str__(self) -> str:
        hours = f"one interruption per {self.interruption_every_s / 3600:.2g} h expected"
        if self.stall_s is None or self.every_s is None:
            return f"every {self.every_steps} steps until a save is measured ({hours})"
        minutes = f"{self.every_s / 60:.3g} min"
        return f"every {self.every_steps:,} steps, {minutes} ({hours}, a save stalls for {self.stall_s:.2g} s)"


def daly_interval_s(cost_s: float, interruption_every_s: float) -> float:
    """Returns the time to train between two saves that loses least; saving does not count into it.

    Args:
      cost_s: of a save.
      interruption_every_s: the mean time between interruptions that come at random.
    """
    if cost_s >= 2 * interruption_every_s:
        return interruption_every_s
    ratio = cost_s / (2 * interruption_every_s)
    young_s = math.sqrt(2 * cost_s * interruption_every_s)
    return young_s * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def solve(seen: Seen, expected_interruption_s: float) -> Cadence:
    """Returns how often to save.

    The prior counts like one interruption seen after that time: it rules while nothing is known, and fades.

    Args:
      seen: of the run so far.
      expected_interruption_s: the prior, from the run file.
    """
    interruption_s = (expected_interruption_s + seen.trained_s) / (1 + seen.interruptions)
    if not seen.stalls_s or not seen.step_s:
        return Cadence(FIRST_STEPS, interruption_s, None, None, None)
    stall_s = statistics.median_low(seen.stalls_s)
    train_s = max(daly_interval_s(stall_s, interruption_s), seen.save_s or 0.0)
    steps = max(1, round(train_s / seen.step_s))
    return Cadence(steps, interruption_s, stall_s, seen.step_s, steps * seen.step_s + stall_s)


def seen_in(events: Sequence[Event]) -> Seen:
    """Returns what a run's journal shows.

    Args:
      events: of all incarnations, in the order of time.
    """
    by_incarnation: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_incarnation[event["incarnation"]].append(event)
    newest = max(by_incarnation, default=0)
    leader = [event for event in events if event["process"] == 0]
    saves = [event for event in leader if event["event"] == "save_started"]
    return Seen(
        interruptions=sum(_interrupted(of, last=n == newest) for n, of in by_incarnation.items()),
        trained_s=sum(map(_trained_s, by_incarnation.values())),
        stalls_s=tuple(event["stall_s"] for event in saves[-NEWEST:]),
        saves_s=tuple(event["seconds"] for event in leader if event["event"] == "accepted")[-NEWEST:],
        step_s=_step_s(saves),
    )


def _interrupted(events: Iterable[Event], *, last: bool) -> bool:
    """Returns whether an incarnation was ended by something that nobody asked for; the last one may live."""
    by_kind = {event["event"]: event for event in events}
    if ended := by_kind.get("ended"):
        return ended["cause"] not in _ASKED_FOR
    if last or "started" not in by_kind:
        return False
    return "accepted" not in by_kind or by_kind["accepted"]["step"] < by_kind["started"]["steps"]


def _trained_s(events: Sequence[Event]) -> float:
    """Returns how long an incarnation was there to be interrupted, as far as it told."""
    began_s = next((event["time_s"] for event in events if event["event"] == "started"), None)
    return 0.0 if began_s is None else events[-1]["time_s"] - began_s


def _step_s(saves: Sequence[Event]) -> float | None:
    for before, after in zip(saves[-2::-1], saves[:0:-1], strict=True):
        if before["incarnation"] == after["incarnation"] and after["step"] > before["step"]:
            return (after["time_s"] - after["stall_s"] - before["time_s"]) / (after["step"] - before["step"])
    return None
