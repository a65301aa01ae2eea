"""Whether a run is well, from the records of its steps: pure, and the same in every process.

bad numbers   a loss that is not finite, or one that leaps above what the last steps had
alarms        experts that hardly anyone asks for any more, layers that ask for few of them, routers without a choice
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from openmoe.platform.run.lineage import Incident, Rows
from openmoe.platform.run_file.spec_sections import HealthConfig

DEVIATION = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
LEAST_DEVIATION = 1e-3  # of the median: losses that are almost equal make no spike of the next digit


class BadNumbers(ArithmeticError):
    """Training on would learn nothing any more; the message says from which step on."""


class NonFiniteLoss(BadNumbers):
    """The loss of a step is NaN or infinite."""


class LossSpike(BadNumbers):
    """The loss has leapt up."""


class Finding(NamedTuple):
    """Bad numbers, and the rows that are to blame.

    Attributes:
      step: at which it was seen.
      rows: of the first bad step, and so many before it as `guilty_steps_before` says, up to that step's.
      what: in words.
      is_spike: the loss is finite, and too high.
    """

    step: int
    rows: Rows
    what: str
    is_spike: bool

    def error(self) -> BadNumbers:
        """Returns what ends the incarnation."""
        words = f"step {self.step}, rows {self.rows.lo}..{self.rows.hi - 1}: {self.what}"
        return LossSpike(words) if self.is_spike else NonFiniteLoss(words)


def robust_score(window: Sequence[float], value: float) -> float:
    """Returns how many robust standard deviations a value lies above the median of a window.

    Few values, however wild, move neither the median nor the median absolute deviation from it.
    """
    median = statistics.median(window)
    deviation = DEVIATION * statistics.median(abs(each - median) for each in window)
    return (value - median) / max(deviation, LEAST_DEVIATION * abs(median), 1e-9)


def spike_score(losses: Sequence[float], config: HealthConfig) -> float | None:
    """Returns the score of a spike that ends with the last loss, or None if there is none.

    It is one when the last `spike_steps` losses all score `spike_score` against the `spike_window_steps` before them.
    """
    if config.spike_score is None or len(losses) < config.spike_window_steps + config.spike_steps:
        return None
    newest = losses[-config.spike_steps :]
    window = losses[-config.spike_window_steps - config.spike_steps : -config.spike_steps]
    score = min(robust_score(window, loss) for loss in newest)
    return score if score >= config.spike_score else None


def history_steps(config: HealthConfig) -> int:
    """Returns of how many steps the records are needed to go on as if the run had not been interrupted."""
    of_spikes = config.spike_window_steps + config.spike_steps if config.spike_score else 0
    return max(of_spikes, config.max_skips if config.on_bad_numbers == "skip" else 0)


class Numbers:
    """Finds bad numbers in the records of steps, given one after the other."""

    def __init__(
        self,
        config: HealthConfig,
        history: Iterable[Mapping[str, Any]] = (),
        stage_ends: Collection[int] = (),
    ) -> None:
        """Takes what to look for, and how far the run has come.

        Args:
          config: the settings.
          history: records of the newest `history_steps` steps along the line of truth, oldest first.
          stage_ends: rows with which another mixture begins, whose loss is another.
        """
        self._config, self._stage_ends = config, stage_ends
        self._losses: list[float] = []
        self._skips = 0  # in a row
        for record in history:
            self.add(record)

    @property
    def _span(self) -> int:
        return self._config.spike_window_steps + self._config.spike_steps

    def add(self, record: Mapping[str, Any]) -> Finding | None:
        """Takes the record of a step; returns what is bad about it, if anything is."""
        lo, hi = record["rows"]
        if any(lo <= end < hi for end in self._stage_ends):
            self._losses.clear()
        loss, before = record["total_loss"], self._config.guilty_steps_before
        if record.get("update_skipped"):
            self._skips += 1
            if self._skips <= self._config.max_skips:
                return None
            what = f"{self._skips} steps in a row were skipped, health.max_skips={self._config.max_skips}"
            return self._finding(record, self._skips - 1 + before, what)
        self._skips = 0
        if not math.isfinite(loss):
            return self._finding(record, before, f"loss {loss}")
        self._losses = [*self._losses[1 - self._span :], record["loss"]]
        if (score := spike_score(self._losses, self._config)) is None:
            return None
        self._losses.clear()
        what = f"loss {record['loss']:.3f} is {score:.1f} deviations above the median of the steps before"
        return self._finding(record, self._config.spike_steps - 1 + before, what, is_spike=True)

    def _finding(self, record: Mapping[str, Any], steps_before: int, what: str, *, is_spike: bool = False) -> Finding:
        lo, hi = record["rows"]
        return Finding(record["step"], Rows(max(lo - steps_before * (hi - lo), 0), hi), what, is_spike)


class Alarms:
    """Watches the experts' load and the routers' entropy.

    An alarm is raised once, and taken back when what it is about has ended.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._steps: dict[tuple[str, int, int], int] = {}  # in a row; by kind, layer, expert

    def add(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Takes the record of a step; yields the alarms that begin or end with it, as events have them."""
        for layer, load in enumerate(record.get("expert_load", ())):
            entropy = load_entropy(load)
            low = entropy < self._config.least_load_entropy
            yield from self._count(record, ("load_entropy", layer, -1), entropy, is_bad=low)
            for expert, share in enumerate(load):
                bad = share < self._config.collapsed_share / len(load)
                yield from self._count(record, ("expert_collapse", layer, expert), share * len(load), is_bad=bad)
        for layer, entropy in enumerate(record.get("router_entropy", ())):
            low = entropy < self._config.least_router_entropy
            yield from self._count(record, ("router_entropy", layer, -1), entropy, is_bad=low)

    def _count(
        self, record: Mapping[str, Any], key: tuple[str, int, int], value: float, *, is_bad: bool
    ) -> Iterator[dict[str, Any]]:
        steps = self._steps.pop(key, 0)
        if is_bad:
            self._steps[key] = steps + 1
        needed = self._config.alarm_steps
        if (is_bad and steps + 1 == needed) or (not is_bad and steps >= needed):
            kind, layer, expert = key
            what = {"layer": layer} | ({"expert": expert} if expert >= 0 else {})
            yield {"alarm": kind, "begins": is_bad, "step": record["step"], "value": value, **what}


def load_entropy(shares: Sequence[float]) -> float:
    """Returns the entropy of a layer's load over an even one's: 1 when all experts are asked alike, 0 when one is."""
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


def incident_of(events: Iterable[Mapping[str, Any]], incarnation: int) -> Incident | None:
    """Returns the bad numbers that an incarnation has ended of, as it journalled them, or None."""
    of_it = (e for e in events if e["incarnation"] == incarnation and e["event"] == "bad_numbers")
    found = [e for e in of_it if e.get("ends", True)]  # earlier versions did not say
    if not found:
        return None
    last = found[-1]
    reason, rows = f"step {last['step']}: {last['what']}", Rows(*last["rows"])
    return Incident(incarnation=incarnation, step=last["step"], rows=rows, reason=reason, time_s=last["time_s"])


def words(alarm: Mapping[str, Any]) -> str:
    """Returns an alarm as a sentence."""
    of = f"layer {alarm['layer']}"
    if alarm["alarm"] == "expert_collapse":
        state = f"is asked for {alarm['value']:.1%} of its even share" if alarm["begins"] else "is asked for again"
        return f"expert {alarm['expert']} of MoE {of} {state} at step {alarm['step']:,}"
    if alarm["alarm"] == "router_entropy":
        state = "the router leaves no token a choice" if alarm["begins"] else "the router weighs experts again"
        return f"MoE {of}: {state} at step {alarm['step']:,} (mean entropy of a token {alarm['value']:.2f} of 1)"
    state = "few experts take nearly all" if alarm["begins"] else "more experts are asked for again"
    return f"MoE {of}: {state} at step {alarm['step']:,} (entropy of the load {alarm['value']:.2f} of 1)"
