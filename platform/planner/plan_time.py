"""How long a run takes on machines that are taken back, and what that costs: a distribution, drawn. Pure.

Intervals between preemptions are exponential, and so are the waits for new machines. Each life of the machines begins
with a restart and loses what was done since its last checkpoint. The draws are seeded: the same question has the same
answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from openmoe.platform.planner.plan_assumptions import Preemptions

NUM_DRAWS = 400
MOST_LIVES = 10_000  # of the machines in one draw: with one preemption an hour, more than a year
LIVES_DRAWN = 200_000  # in all draws together, about: fewer draws of a long run, which spreads less


class Quantiles(NamedTuple):
    """The tenth, the half and nine tenths of what may come."""

    low: float
    median: float
    high: float


class Outlook(NamedTuple):
    """What may come of a run.

    Attributes:
      wall_s: from the first start to the last step.
      held_s: of it with machines held, which is paid.
      preemptions: so many.
      useful_share: of the time held that went into steps that counted.
    """

    wall_s: Quantiles
    held_s: Quantiles
    preemptions: Quantiles
    useful_share: Quantiles


class _Draw(NamedTuple):
    wall_s: float
    held_s: float
    preemptions: int


def outlook(*, work_s: float, cadence_s: float, preemptions: Preemptions, spot: bool, seed: int = 0) -> Outlook | None:
    """Returns what may come of a run, or None if it would not get there.

    Args:
      work_s: that all steps take, nothing else counted.
      cadence_s: work between two checkpoints.
      preemptions: how often, and what each costs.
      spot: whether there are any.
      seed: of the draws.
    """
    if not spot:
        held_s = work_s + _saves(work_s, cadence_s) * preemptions.save_s + preemptions.restart_s
        one = _Draw(held_s, held_s, 0)
        return _outlook(work_s, [one])
    lives = _expected_lives(work_s, cadence_s, preemptions)
    if lives > MOST_LIVES:
        return None
    chance, draws = random.Random(seed), min(NUM_DRAWS, max(20, int(LIVES_DRAWN / lives)))
    return _outlook(work_s, [_draw(chance, work_s, cadence_s, preemptions) for _ in range(draws)])


def _draw(chance: random.Random, work_s: float, cadence_s: float, preemptions: Preemptions) -> _Draw:
    done_s = wall_s = held_s = 0.0
    lives, mean_s = 0, 3600 * preemptions.hours_between
    while True:
        left_s = work_s - done_s
        needed_s = preemptions.restart_s + left_s + _saves(left_s, cadence_s) * preemptions.save_s
        life_s = chance.expovariate(1 / mean_s)
        if life_s >= needed_s:
            return _Draw(wall_s + needed_s, held_s + needed_s, lives)
        kept = int(max(life_s - preemptions.restart_s, 0) / (cadence_s + preemptions.save_s))
        done_s += min(kept * cadence_s, left_s)
        held_s += life_s
        wall_s += life_s + (chance.expovariate(1 / preemptions.wait_s) if preemptions.wait_s else 0.0)
        lives += 1


def _saves(work_s: float, cadence_s: float) -> int:
    return math.ceil(work_s / cadence_s - 1e-9)


def _expected_lives(work_s: float, cadence_s: float, preemptions: Preemptions) -> float:
    """Lives of the machines until all work is done; how many intervals a life survives is geometric."""
    mean_s = 3600 * preemptions.hours_between
    kept = math.exp(-preemptions.restart_s / mean_s) / math.expm1(min((cadence_s + preemptions.save_s) / mean_s, 700))
    return work_s / (kept * cadence_s) if kept else math.inf


def _outlook(work_s: float, draws: Sequence[_Draw]) -> Outlook:
    return Outlook(
        wall_s=_quantiles([draw.wall_s for draw in draws]),
        held_s=_quantiles([draw.held_s for draw in draws]),
        preemptions=_quantiles([draw.preemptions for draw in draws]),
        useful_share=_quantiles([work_s / draw.held_s for draw in draws]),
    )


def _quantiles(values: Sequence[float]) -> Quantiles:
    ordered = sorted(values)
    return Quantiles(*(ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9)))
