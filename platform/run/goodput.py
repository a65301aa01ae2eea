"""Where a run's time went: every millisecond of every attempt charged to one named cause. Pure.

What is known is painted layer over layer onto each attempt, so that nothing is counted twice and nothing is left out:

    the attempt           unrecorded
    its driver's phases   start, build, capacity, idle (a worker group is up), end
    a worker group        start, init
    its steps             step, redone
    what it told          compile, restore, save, evaluate, ...

The waits for rows are charged out of the steps. Times are Unix times of several hosts; what does not fit an attempt
is cut off at its edges.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

from openmoe.platform.run.lineage import Claim

CAUSES = {
    "step": "steps that count",
    "redone": "steps after the newest checkpoint, which had to be done again",
    "data_wait": "steps that waited for their rows",
    "save": "training stood still for a checkpoint",
    "evaluate": "held-out loss",
    "sample": "continuations at the end",
    "compile": "the step compiled, or loaded from the compile cache",
    "restore": "the newest checkpoint read",
    "init": "JAX process group, loader, first state",
    "start": "driver, Ray and worker processes come up",
    "build": "the data that training begins with",
    "capacity": "waiting for machines",
    "idle": "a worker group was up and did no step: mostly until a death was noticed",
    "end": "verdict, broken slices drained, report",
    "unrecorded": "no record says",
    "absent": "between attempts: no driver ran",
    "stopped": "between attempts: it was finished, or stopped on request",
}
GOOD = "step"
NOT_HELD = frozenset({"capacity", "absent", "stopped"})  # machines are not held meanwhile
OVER = "over"  # the driver's last mark


class Span(NamedTuple):
    """A stretch of time with one cause, Unix milliseconds."""

    begin_ms: int
    end_ms: int
    cause: str


class Mark(NamedTuple):
    """A driver's word that from now on its attempt is in a phase; `incarnation` is that of phase "idle"."""

    time_s: float
    phase: str
    incarnation: int = 0
    outcome: str = ""  # of the mark OVER: finished, stopped, failed


class Driver(NamedTuple):
    """What the driver of one attempt marked, oldest first; at least its begin."""

    name: str
    marks: Sequence[Mark]


class Steps(NamedTuple):
    """The recorded steps of one incarnation: first those that count, then those that were done again."""

    begin_s: float  # of the first one
    first_s: float  # its end
    kept_s: float  # end of the last one that counts; begin_s when none does
    end_s: float
    wait_s: float  # those that count waited so long for their rows
    last_step: int


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a run directory says.

    Attributes:
      claims: oldest first.
      events: of drivers and of process 0, by incarnation, in time order.
      steps: by incarnation; without those that have none.
      drivers: oldest first; a run from before they were logged has none.
    """

    claims: Sequence[Claim] = ()
    events: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    steps: Mapping[int, Steps] = field(default_factory=dict)
    drivers: Sequence[Driver] = ()


class Attempt(NamedTuple):
    """One attempt's account.

    `causes` sums to end_ms - begin_ms exactly; `spans` cover it without gaps, waits for rows still inside steps.
    """

    name: str
    begin_ms: int
    end_ms: int
    incarnations: tuple[int, ...]
    outcome: str  # "" when nobody said
    spans: tuple[Span, ...]
    causes: Counter[str]


class Resume(NamedTuple):
    """From the last step before, or from the attempt's begin, to the end of an incarnation's first step."""

    incarnation: int
    attempt: bool  # it is an attempt's first
    causes: Counter[str]


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """A run's account; all sums are exact.

    Attributes:
      between: what lay between attempts.
      causes: milliseconds, attempts and what lay between them together.
      startup_ms: from the claim of an incarnation to its first step, those that took one.
    """

    attempts: tuple[Attempt, ...]
    between: tuple[Span, ...]
    causes: Counter[str]
    resumes: tuple[Resume, ...]
    startup_ms: tuple[int, ...]

    @property
    def wall_ms(self) -> int:
        """From the first attempt's begin to the newest sign of life."""
        return self.attempts[-1].end_ms - self.attempts[0].begin_ms if self.attempts else 0

    @property
    def held_ms(self) -> int:
        """As long as machines were held."""
        return sum(ms for cause, ms in self.causes.items() if cause not in NOT_HELD)

    @property
    def wanted_ms(self) -> int:
        """As long as somebody wanted it to run."""
        return self.wall_ms - self.causes["stopped"]

    def of_held(self) -> tuple[float, float]:
        """Returns the share of held time in steps that count; and the same of a perfect controller.

        It starts each worker group as fast as the fastest was started, and loses nothing else.
        """
        if not self.held_ms:
            return 0.0, 0.0
        lost_ms = min(self.startup_ms, default=0) * len(self.startup_ms)
        best_ms = max(self.held_ms - lost_ms, self.causes[GOOD])  # never below, where clocks went wrong
        return self.causes[GOOD] / self.held_ms, best_ms / self.held_ms

    def of_wall(self, capacity: Sequence[tuple[float, int]], slices: int) -> tuple[float, float]:
        """Returns the share of the time in which the run was wanted; and the same of a perfect controller.

        It trains whenever enough slices are there, after a start as fast as the fastest.

        Args:
          capacity: (Unix time, slices available from then on), oldest first.
          slices: that the run needs.
        """
        if not self.wanted_ms:
            return 0.0, 0.0
        fastest_ms = min(self.startup_ms, default=0)
        wanted = [Span(a.begin_ms, a.end_ms, "") for a in self.attempts]
        wanted += [span for span in self.between if span.cause != "stopped"]
        there = _enough(capacity, slices, self.attempts[-1].end_ms)
        usable = [max(_common(span, wanted) - fastest_ms, 0) for span in there]
        return self.causes[GOOD] / self.wanted_ms, sum(usable) / self.wanted_ms


def _enough(capacity: Sequence[tuple[float, int]], slices: int, end_ms: int) -> list[Span]:
    """Returns when enough slices were there, without a break in each span."""
    found: list[Span] = []
    for (time_s, available), (until_s, _) in pairwise([*capacity, (end_ms / 1000, 0)]):
        begin_ms, until_ms = _ms(time_s), min(_ms(until_s), end_ms)
        if available < slices or until_ms <= begin_ms:
            continue
        if found and found[-1].end_ms == begin_ms:
            found[-1] = found[-1]._replace(end_ms=until_ms)
        else:
            found.append(Span(begin_ms, until_ms, ""))
    return found


def _common(span: Span, others: Iterable[Span]) -> int:
    return sum(max(min(span.end_ms, o.end_ms) - max(span.begin_ms, o.begin_ms), 0) for o in others)


def fold(records: Records) -> Goodput:
    """Charges a run's time, as far as its records go."""
    drivers = _drivers(records)
    begins = [_ms(driver.marks[0].time_s) for driver in drivers]
    attempts: list[Attempt] = []
    for driver, next_ms in zip_longest(drivers, begins[1:]):
        attempts.append(_attempt(records, driver, next_ms))
    between = []
    for before, after in pairwise(attempts):
        if before.end_ms < after.begin_ms:
            cause = "stopped" if before.outcome in ("finished", "stopped") else "absent"
            between.append(Span(before.end_ms, after.begin_ms, cause))
    causes = sum((attempt.causes for attempt in attempts), summed(between))
    resumes, startup_ms = [], []
    for attempt in attempts:
        before_s = 0.0
        for n in attempt.incarnations:
            steps = records.steps.get(n)
            if steps:
                since_ms = max(_ms(before_s), attempt.begin_ms)
                until = _part(attempt.spans, since_ms, _ms(steps.first_s))
                resumes.append(Resume(n, attempt=not before_s, causes=summed(until)))
                startup_ms.append(_startup_ms(records, attempt, n))
            before_s = max(_last_step_s(records, n), before_s)
    return Goodput(
        attempts=tuple(attempts),
        between=tuple(between),
        causes=causes,
        resumes=tuple(resumes),
        startup_ms=tuple(startup_ms),
    )


def _startup_ms(records: Records, attempt: Attempt, incarnation: int) -> int:
    """Returns how long it took to the first span of steps after the claim."""
    claimed_ms = max(_ms(_claim(records, incarnation).time_s), attempt.begin_ms)
    after = itertools.islice(attempt.spans, bisect.bisect_left(attempt.spans, claimed_ms, key=_begin), None)
    begins = (span.begin_ms for span in after if span.cause in (GOOD, "redone"))
    return max(next(begins, attempt.end_ms) - claimed_ms, 0)


def _part(spans: Sequence[Span], begin_ms: int, end_ms: int) -> list[Span]:
    """Returns what of spans in order, which do not overlap, lies in [begin_ms, end_ms)."""
    first = bisect.bisect_right(spans, begin_ms, key=lambda span: span.end_ms)
    inside = spans[first : max(bisect.bisect_left(spans, end_ms, key=_begin), first)]
    return [Span(max(s.begin_ms, begin_ms), min(s.end_ms, end_ms), s.cause) for s in inside]


def _begin(span: Span) -> int:
    return span.begin_ms


def summed(spans: Iterable[Span]) -> Counter[str]:
    """Returns milliseconds by cause."""
    causes: Counter[str] = Counter()
    for span in spans:
        causes[span.cause] += span.end_ms - span.begin_ms
    return causes


def paint(begin_ms: int, end_ms: int, spans: Iterable[Span]) -> list[Span]:
    """Covers [begin_ms, end_ms) by spans that do not overlap; of those given, the later one wins.

    What none of them covers is "unrecorded".
    """
    inside = [
        (max(span.begin_ms, begin_ms), rank, min(span.end_ms, end_ms), span.cause)
        for rank, span in enumerate(spans, start=1)
    ]
    waiting = sorted(span for span in inside if span[0] < span[2])[::-1]
    edges = sorted({begin_ms, end_ms, *(edge for span in waiting for edge in (span[0], span[2]))})
    seen: list[tuple[int, int, str]] = [(0, end_ms, "unrecorded")]  # heap of (-rank, end, cause)
    covered: list[Span] = []
    for left, right in pairwise(edges):
        while waiting and waiting[-1][0] <= left:
            _, rank, until, cause = waiting.pop()
            heapq.heappush(seen, (-rank, until, cause))
        while seen[0][1] <= left:
            heapq.heappop(seen)
        cause = seen[0][2]
        if covered and covered[-1].cause == cause:
            covered[-1] = covered[-1]._replace(end_ms=right)
        else:
            covered.append(Span(left, right, cause))
    return covered


def _drivers(records: Records) -> list[Driver]:
    """Returns the drivers that were logged, and those that must have been there for the claims of nobody."""
    logged = {mark.incarnation for driver in records.drivers for mark in driver.marks}
    found = list(records.drivers)
    marks: list[Mark] = []
    for claim in records.claims:
        if claim.incarnation in logged:
            continue
        marks.append(Mark(claim.time_s, "idle", claim.incarnation))
        ended = _last(records, claim.incarnation, "ended")
        if ended and ended["decision"]["action"] == "retry":
            marks.append(Mark(ended["time_s"], "end"))
            continue
        if ended:
            outcome = "stopped" if ended["cause"] == "operator" else "failed"
            marks.append(Mark(ended["time_s"], OVER, outcome=outcome))
        found.append(Driver("", marks))
        marks = []
    if marks:
        found.append(Driver("", marks))
    return sorted(found, key=lambda driver: driver.marks[0].time_s)


def _attempt(records: Records, driver: Driver, next_ms: int | None) -> Attempt:
    begin_ms = _ms(driver.marks[0].time_s)
    incarnations = tuple(mark.incarnation for mark in driver.marks if mark.incarnation)
    last = driver.marks[-1]
    signs = [mark.time_s for mark in driver.marks]
    if last.phase != OVER:
        signs += [event["time_s"] for n in incarnations for event in records.events.get(n, ())]
        signs += [records.steps[n].end_s for n in incarnations if n in records.steps]
    end_ms = max(begin_ms, *(_ms(sign) for sign in signs))
    if next_ms is not None:
        end_ms = min(end_ms, next_ms)
    until = [*(mark.time_s for mark in driver.marks[1:]), end_ms / 1000]
    layers = [Span(_ms(mark.time_s), _ms(end_s), mark.phase) for mark, end_s in zip(driver.marks, until, strict=True)]
    waits_ms = 0
    for mark, end_s in zip(driver.marks, until, strict=True):
        if mark.incarnation:
            layers += _incarnation(records, mark.incarnation, end_s)
            waits_ms += _ms(records.steps[mark.incarnation].wait_s) if mark.incarnation in records.steps else 0
    spans = paint(begin_ms, end_ms, layers)
    causes = summed(spans)
    waits_ms = min(waits_ms, causes[GOOD])
    causes.update({"data_wait": waits_ms, GOOD: -waits_ms})
    return Attempt(driver.name, begin_ms, end_ms, incarnations, last.outcome, tuple(spans), +causes)


def _incarnation(records: Records, n: int, end_s: float) -> Iterable[Span]:
    """Yields what is known of an incarnation that was over at `end_s`, layer over layer."""
    events, steps = records.events.get(n, ()), records.steps.get(n)
    told = [_told(event) for event in events]
    told = [span for span in told if span is not None]
    begun = next((event for event in events if event["event"] == "started"), None)
    joining_s = min(begun.get("join_s", begun["time_s"]), begun["time_s"]) if begun else end_s
    claimed_ms = _ms(_claim(records, n).time_s)
    yield Span(claimed_ms, _ms(joining_s), "start")
    if steps is None:
        yield Span(_ms(joining_s), _ms(end_s), "init")
    else:
        compiled = [span.end_ms for span in told if span.cause == "compile" and span.end_ms <= _ms(steps.first_s)]
        begin_ms = max([claimed_ms, _ms(steps.begin_s), *compiled])
        yield Span(_ms(joining_s), begin_ms, "init")
        yield Span(begin_ms, _ms(steps.kept_s), GOOD)
        yield Span(max(begin_ms, _ms(steps.kept_s)), _ms(_last_step_s(records, n)), "redone")
    yield from told


def _told(event: Mapping[str, Any]) -> Span | None:
    """Returns what an event says that the time before it was spent on."""
    match event["event"]:
        case "charged":
            cause, seconds = str(event["cause"]), event["seconds"]
        case "restored":
            cause, seconds = "restore", event["seconds"]
        case "save_started":
            cause, seconds = "save", event["stall_s"]
        case _:
            return None
    return Span(_ms(event["time_s"] - seconds), _ms(event["time_s"]), cause)


def _last_step_s(records: Records, n: int) -> float:
    """Returns when the last step of an incarnation ended, as its driver saw it or as it was recorded; 0 without one.

    What the driver saw and nobody recorded was lost with the process.
    """
    steps, ended = records.steps.get(n), _last(records, n, "ended")
    recorded_s = steps.end_s if steps else 0.0
    if ended and steps and ended.get("step", 0) > steps.last_step:
        return max(recorded_s, ended.get("step_time_s", 0.0))
    return recorded_s


def _last(records: Records, n: int, kind: str) -> Mapping[str, Any] | None:
    return next((event for event in reversed(records.events.get(n, ())) if event["event"] == kind), None)


def _claim(records: Records, n: int) -> Claim:
    return next(claim for claim in records.claims if claim.incarnation == n)


def _ms(time_s: float) -> int:
    return round(time_s * 1000) if math.isfinite(time_s) else 0
