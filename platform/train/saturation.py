"""When a run has learned what it can: a rule over its evaluations. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from openmoe.platform.run_file.spec_sections import StopWhenConfig

# As packing.KINDS, which imports NumPy; a test compares them.
KINDS = ("R3", "R8", "X3", "X8", "X64", "S", "next_token", "chat")


def metrics(streams: Iterable[str]) -> list[str]:
    """Returns what evaluations measure, given the names of the streams that are read."""
    return ["loss", "text_loss", *(f"loss/{name}" for name in (*streams, *KINDS))]


def saturated_at(rule: StopWhenConfig | None, evaluations: Iterable[Mapping[str, Any]]) -> int | None:
    """Returns the step of the first evaluation at which a run is saturated, or None.

    An evaluation gains if it is at least `min_gain` below the best one that gained; so small steps in the right
    direction add up, and count when together they are a gain. After `patience` evaluations in a row without one, it is
    enough.

    Args:
      rule: of the run; None: it is never enough.
      evaluations: in the order of their steps, each with `step` and `losses`; those without the rule's metric are left
        out, and one that is not finite is no gain.
    """
    if rule is None:
        return None
    best, without_gain = math.inf, 0
    for evaluation in evaluations:
        value = evaluation["losses"].get(rule.metric)
        if value is None:
            continue
        if value < best and best - value >= rule.min_gain:
            best, without_gain = value, 0
        else:
            without_gain += 1
        if without_gain >= rule.patience:
            return evaluation["step"]
    return None
