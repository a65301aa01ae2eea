"""What each process does with what its steps tell of the run's health; the events are journalled once."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from openmoe.platform.run import lineage
from openmoe.platform.run.lineage import Incident, Position
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run.stragglers import Pace
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import health
from openmoe.platform.train.recorder import Recorder

PACE_EVERY_S = 30.0


class HealthWatch:
    """The health of one incarnation.

    Attributes:
      skips: updates that are not finite are not made.
    """

    def __init__(self, spec: RunSpec, run: RunDir) -> None:
        """Reads as many of the records before as it takes."""
        self.skips = spec.health.on_bad_numbers == "skip"
        history = [*itertools.islice(run.newest_steps(), health.history_steps(spec.health))][::-1]
        stage_ends = {(stage.until_tokens or 0) // spec.data.seq_len for stage in spec.data.stages[:-1]}
        self._numbers = health.Numbers(spec.health, history, stage_ends)
        self._alarms = health.Alarms(spec.health)

    def check(self, record: dict[str, Any], event: Callable[..., None]) -> None:
        """Takes the record of a step.

        Raises:
          BadNumbers: on which the run's policy is not to go on.
        """
        if record.get("update_skipped"):
            numbers = {name: str(record[name]) for name in ("total_loss", "grad_norm")}  # no JSON has a NaN
            event("update_skipped", step=record["step"], rows=record["rows"], **numbers)
        for alarm in self._alarms.add(record):
            event("alarm", **alarm)
        if (found := self._numbers.add(record)) is None:
            return
        ends = not (found.is_spike and self.skips)  # that update was made a step ago
        facts = {"rows": list(found.rows), "what": found.what, "is_spike": found.is_spike, "ends": ends}
        event("bad_numbers", step=found.step, **facts)
        if ends:
            raise found.error()


class Stopwatch:
    """Measures what the steps of this process take, and tells the means of the newest ones now and then.

    Not of the first one, which compiles: whoever does so for the others would be said to hold them up.
    """

    def __init__(
        self,
        tell: Callable[[Pace], None],
        beat: Callable[..., None],
        every_s: float = PACE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes who is told, the watchdog's beat, after how many seconds of steps to tell, and what tells the time."""
        self._tell, self._beat, self._every_s, self._clock = tell, beat, every_s, clock
        self._begin_s = self._own_s = 0.0
        self._has_compiled = False
        self._steps: list[tuple[int, float, float, float]] = []

    def begin(self) -> None:
        """Says that a step begins."""
        self._beat(step=True)
        self._begin_s = self._clock()

    def handed_over(self) -> None:
        """Says that the devices have it."""
        self._own_s = self._clock() - self._begin_s

    def end(self, step: int, data_wait_s: float) -> None:
        """Says that the step is over, as far as it is waited for."""
        if not self._has_compiled:
            self._has_compiled = True
            return
        self._steps.append((step, self._own_s, data_wait_s, self._clock() - self._begin_s))
        if sum(each[3] for each in self._steps) < self._every_s:
            return
        steps, *times = zip(*self._steps, strict=True)
        self._steps = []
        self._tell(Pace(steps[0], steps[-1], *map(statistics.fmean, times)))


def left_out(position: Position, incidents: Sequence[Incident], recorder: Recorder) -> Position:
    """Returns the position after rows that are to be left out here, and enters these into the ledger."""
    rows, why = lineage.rows_left_out(position.next_row, incidents)
    if not why:
        return position
    words = "; ".join(f"incident of incarnation {incident.incarnation}: {incident.reason}" for incident in why)
    return recorder.leave_out(position, rows.hi, words)
