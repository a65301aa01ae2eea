"""Where a followed run's time went, as its page shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.run import goodput, journal
from openmoe.platform.run.goodput import Records, Steps

MAX_RESTARTS = 10


@dataclass(frozen=True, kw_only=True)
class Account:
    """Milliseconds by cause, in the order of `goodput.CAUSES`; and the share of held time in steps that count.

    Attributes:
      causes: cause, milliseconds, what it is.
      restarts: the newest MAX_RESTARTS, oldest first: incarnation, whether an attempt begins with it, milliseconds
        until its first new step, of which each cause.
    """

    causes: tuple[tuple[str, int, str], ...]
    of_held: float
    of_held_perfect: float
    restarts: tuple[tuple[int, bool, int, tuple[tuple[str, int], ...]], ...] = ()


def account(run: RunFollower) -> Account | None:
    """Returns a run's account as far as its records have been read; None before its first attempt."""
    events: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in run.events:
        if event["process"] in (0, journal.DRIVER):
            events[event["incarnation"]].append(event)
    steps = {
        claim.incarnation: _steps(run, claim.incarnation) for claim in run.claims if claim.incarnation in run.steps
    }
    found = goodput.fold(Records(claims=run.claims, events=events, steps=steps, drivers=run.drivers))
    if not found.attempts:
        return None
    order = [*goodput.CAUSES, *sorted(found.causes.keys() - goodput.CAUSES.keys())]
    causes = ((cause, found.causes[cause], goodput.CAUSES.get(cause, "")) for cause in order if found.causes[cause])
    of_held, perfect = found.of_held()
    restarts = (
        (r.incarnation, r.attempt, r.causes.total(), tuple((cause, ms) for cause, ms in r.causes.items() if ms))
        for r in found.resumes[-MAX_RESTARTS:]
    )
    return Account(
        causes=tuple(causes),
        of_held=round(of_held, 4),
        of_held_perfect=round(perfect, 4),
        restarts=tuple(restarts),
    )


def _steps(run: RunFollower, incarnation: int) -> Steps:
    columns, kept = run.steps[incarnation], run.kept(incarnation)
    first_s, part = columns.at("time_s", 0), slice(0, kept)
    begin_s = first_s - columns.at("step_s", 0)
    waits = np.minimum(columns.get("data_wait_s", part), columns.get("step_s", part))
    return Steps(
        begin_s=begin_s,
        first_s=first_s,
        kept_s=columns.at("time_s", kept - 1) if kept else begin_s,
        end_s=columns.at("time_s", -1),
        wait_s=float(np.nansum(waits)),
        last_step=int(columns.at("step", -1)),
    )
