"""What happened to a run: its worker groups, why each ended, and what a day of it came to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.run.lineage import Claim

DAY_S = 86_400.0
MAX_TRACE = 6000

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why an incarnation ended.

    Attributes:
      cause: as in verdict.Cause; "done" when it reached its last step, "unseen" when nobody was left to say.
      action: what its driver decided: "retry", "stop", or "".
      time_s: Unix time.
    """

    cause: str
    reason: str
    action: str = ""
    evidence: tuple[str, ...] = ()
    trace: str = ""
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Incarnation:
    """One worker group's part of a run; None where it has not come so far.

    Attributes:
      kept_step: last of its steps that counts; those after it were trained again.
      hosts: where its workers ran, as far as the driver said.
    """

    number: int
    claimed_s: float
    start_step: int
    first_s: float | None = None
    last_s: float | None = None
    last_step: int | None = None
    kept_step: int | None = None
    processes: int | None = None
    devices: int | None = None
    hosts: tuple[str, ...] = ()
    ending: Ending | None = None


@dataclass(frozen=True, kw_only=True)
class Period:
    """The last day, or all of a run that is younger or over.

    Attributes:
      steps: that count.
      undone_steps: trained and then given up.
      training_share: of the time, spent in steps that count.
      endings: of incarnations, by cause; those that were done left out.
    """

    whole_run: bool
    steps: int
    undone_steps: int
    training_share: float | None
    endings: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the run with a mixture of its own, from `first_step` on."""

    number: int
    first_step: int
    mixture: str


def stages(run: RunFollower) -> list[Stage]:
    """Returns the stages of a run after the first one; none for a run with one mixture."""
    configured = run.record.get("spec", {}).get("data", {}).get("stages") or ()
    tokens = run.tokens_per_step or 1
    return [
        Stage(number=n, first_step=before["until_tokens"] // tokens + 1, mixture=_mixture(stage))
        for n, (before, stage) in enumerate(pairwise(configured), start=2)
    ]


def _mixture(stage: Mapping[str, Any]) -> str:
    weights = stage["weights"]
    total = sum(weights.values())
    mixture = ", ".join(f"{name} {weight / total:.0%}" for name, weight in weights.items() if weight)
    objective = stage.get("objective", "ul2")
    return mixture if objective == "ul2" else f"{objective}: {mixture}"


def incarnations(run: RunFollower) -> list[Incarnation]:
    """Returns the worker groups of a run, oldest first."""
    events: dict[int, list[Event]] = defaultdict(list)
    for event in run.events:
        events[event["incarnation"]].append(event)
    newest = run.claims[-1].incarnation if run.claims else 0
    return [_incarnation(run, claim, events[claim.incarnation], newest) for claim in run.claims]


def _incarnation(run: RunFollower, claim: Claim, events: Sequence[Event], newest: int) -> Incarnation:
    n = claim.incarnation
    started, placed = first(events, "started"), first(events, "placed")
    view = Incarnation(
        number=n,
        claimed_s=claim.time_s,
        start_step=run.starts[n],
        processes=started.get("processes"),
        devices=started.get("devices"),
        hosts=tuple(map(str, placed.get("hosts", ()))),
        ending=_ending(run, claim, events, is_newest=n == newest),
    )
    steps = run.steps.get(n)
    if steps is None:
        return view
    kept = run.kept(n)
    return replace(
        view,
        first_s=steps.at("time_s", 0) - steps.at("step_s", 0),
        last_s=steps.at("time_s", -1),
        last_step=int(steps.at("step", -1)),
        kept_step=int(steps.at("step", kept - 1)) if kept else run.starts[n],
    )


def _ending(run: RunFollower, claim: Claim, events: Sequence[Event], *, is_newest: bool) -> Ending | None:
    if ended := first(events[::-1], "ended"):
        return Ending(
            cause=str(ended.get("cause", "unknown")),
            reason=str(ended.get("reason", "")),
            action=str(ended.get("decision", {}).get("action", "")),
            evidence=tuple(map(str, ended.get("evidence", ()))),
            trace=str(ended.get("trace", ""))[-MAX_TRACE:],
            time_s=ended["time_s"],
        )
    steps = run.steps.get(claim.incarnation)
    last_s = steps.at("time_s", -1) if steps else claim.time_s
    if first(events, "sampled") or (is_newest and is_finished(run)):
        return Ending(cause="done", reason="reached its last step", time_s=last_s)
    if is_newest:
        return None
    raised = first(events[::-1], "raised")
    told = f"; a worker raised {raised.get('error')}" if raised else ""
    return Ending(cause="unseen", reason=f"its driver was gone before it could say why{told}", time_s=last_s)


def is_finished(run: RunFollower) -> bool:
    """Returns whether the run is finished and nobody has begun to train on since."""
    started_s = run.claims[-1].time_s if run.claims else 0.0
    return run.finished is not None and run.finished.get("time_s", 0.0) >= started_s


def first(events: Sequence[Event], kind: str) -> Event:
    """Returns the first event of a kind; an empty one when there is none."""
    return next((event for event in events if event["event"] == kind), {})


def period(run: RunFollower, now_s: float, *, last_sign_s: float, over: bool) -> Period | None:
    """Returns what the last day came to, or the whole run if it is younger or over; None before it started."""
    if not run.claims:
        return None
    end_s = last_sign_s if over else now_s
    whole_run = over or run.claims[0].time_s > now_s - DAY_S
    since_s = run.claims[0].time_s if whole_run else now_s - DAY_S
    line, undone = run.line("time_s", "step_s"), run.undone("time_s")
    inside = line["time_s"] > since_s
    endings = [view.ending for view in incarnations(run) if view.ending]
    return Period(
        whole_run=whole_run,
        steps=int(inside.sum()),
        undone_steps=int((undone["time_s"] > since_s).sum()),
        training_share=_share(float(line["step_s"][inside].sum()), end_s - since_s),
        endings=dict(Counter(end.cause for end in endings if end.cause != "done" and end.time_s > since_s)),
    )


def _share(part_s: float, whole_s: float) -> float | None:
    return round(min(part_s / whole_s, 1.0), 3) if whole_s > 0 else None
