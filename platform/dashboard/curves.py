"""Long curves in few points: exact newest steps, before them means with the lowest and highest value beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_POINTS = 1500
NEWEST_POINTS = 500

Curves = dict[str, Any]


def thin(line: Mapping[str, np.ndarray], *, values: tuple[str, ...]) -> Curves:
    """Returns a line's curves in at most `MAX_POINTS` + `NEWEST_POINTS` points, and a few for each incarnation.

    Args:
      line: "incarnation", "step", "time_s" and the values, all float64[n], in step order.
      values: columns to be drawn over step or time.

    Returns:
      "incarnation", "step" and "time_s" (of a point's last step) as lists; for each value its "mean" and, when some
      points stand for several steps, "low" and "high". A number that is not finite is None.
    """
    n = len(line["step"])
    starts, span = _starts(line, max(n - NEWEST_POINTS, 0))
    ends = np.append(starts[1:], n) - 1 if n else starts
    curves: Curves = {
        "incarnation": line["incarnation"][ends].astype(int).tolist(),
        "step": line["step"][ends].astype(int).tolist(),
        "time_s": [round(t, 3) for t in line["time_s"][ends].tolist()],
    }
    counts = ends - starts + 1
    for name in values:
        column = line[name]
        if not n:
            curves[name] = {"mean": []}
            continue
        curve = {"mean": _listed(np.add.reduceat(column, starts) / counts)}
        if span > 1:
            curve |= {"low": _listed(np.fmin.reduceat(column, starts))}
            curve |= {"high": _listed(np.fmax.reduceat(column, starts))}
        curves[name] = curve
    return curves


def _starts(line: Mapping[str, np.ndarray], newest: int) -> tuple[np.ndarray, int]:
    """Returns the index at which each point begins, and how many steps the old ones span: a power of two."""
    n = len(line["step"])
    span = 2 ** max(math.ceil(math.log2(newest / MAX_POINTS)), 0) if newest else 1
    index = np.arange(n)
    step = line["step"].astype(np.int64) - 1
    block = np.where(index < newest, step // span, step)
    begins = np.ones(n, bool)
    begins[1:] = (np.diff(block) != 0) | (np.diff(line["incarnation"]) != 0)
    if 0 < newest < n:
        begins[newest] = True
    return np.flatnonzero(begins), span


def _listed(values: np.ndarray) -> list[float | None]:
    """Returns six significant digits of each: more than a screen has, and half the bytes."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values.tolist()]
