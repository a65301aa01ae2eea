"""After which steps an incarnation saves: the same ones in all processes, though each has a clock of its own."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import cadence
from openmoe.platform.train.cadence import Cadence, Seen
from openmoe.platform.train.recorder import Recorder


class Pace:
    """Says when to save: every so many steps as the run file says, or as process 0 solves anew at each save."""

    def __init__(self, spec: RunSpec, seen: Seen, recorder: Recorder) -> None:
        """Takes what the run has shown before.

        Args:
          spec: of the run.
          seen: by the incarnations before this one; the same in all processes.
          recorder: told of each cadence that is solved.
        """
        self._train, self._prior_s, self._recorder = spec.train, spec.cluster.expected_interruption_s, recorder
        self.seen = seen
        self._began_s = time.monotonic()
        self._last: tuple[int, float] | None = None  # the newest save's step, and when training went on after it
        self._every = self._due = 0

    def begin(self, step: int) -> None:
        """Says at which step the incarnation starts."""
        self._began_s = time.monotonic()
        if self._train.checkpoint_every_steps == "auto":
            self._follow(step, cadence.solve(self.seen, self._prior_s))

    def is_due(self, step: int) -> bool:
        """Returns whether to save after this step; the last one always is."""
        every = self._train.checkpoint_every_steps
        return step == self._train.total_steps or (step == self._due if every == "auto" else step % every == 0)

    def saved(self, step: int, stall_s: float) -> None:
        """Takes note of a save that has begun in all processes, and agrees with them on the next one.

        Args:
          step: that is saved.
          stall_s: how long this process could not train because of it.
        """
        now_s = time.monotonic()
        self.seen = self.seen.stalled(stall_s)
        if self._last is not None and step > self._last[0]:
            self.seen = self.seen._replace(step_s=(now_s - stall_s - self._last[1]) / (step - self._last[0]))
        self._last = (step, now_s)
        if self._train.checkpoint_every_steps == "auto" and step < self._train.total_steps:
            so_far = self.seen._replace(trained_s=self.seen.trained_s + now_s - self._began_s)
            solved = cadence.solve(so_far, self._prior_s)
            every = np.int32(min(solved.every_steps, self._train.total_steps))
            every = int(multihost_utils.broadcast_one_to_all(every))
            self._follow(step, solved._replace(every_steps=every))

    def accepted(self, seconds: float) -> None:
        """Takes note of how long a save took until it counted."""
        self.seen = self.seen.accepted(seconds)

    def _follow(self, step: int, solved: Cadence) -> None:
        self._due = step + solved.every_steps
        if solved.every_steps != self._every and jax.process_index() == 0:
            self._recorder.event("cadence", step=step, **solved._asdict())
        self._every = solved.every_steps
