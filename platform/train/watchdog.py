"""Ends a process that lives but gets nowhere: a read that never returns, a collective that a peer never enters.

Such a process keeps its heartbeat, so neither JAX nor Ray would ever end it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from types import TracebackType

from openmoe.platform.train import prefetch

EXIT_CODE = 70
CHECK_EVERY_S = 1.0
KNOWN_STEPS = 10  # before their median says anything
MEDIAN_STEPS = 101  # the newest ones, of which it is taken


class Watchdog:
    """Watches the thread that enters it, from then on; whoever gets on says so with `beat`.

    It is patient for `timeout_s`, with what begins and ends with steps only for as long as steps usually take.
    """

    def __init__(
        self,
        timeout_s: float,
        tell: Callable[[str], None],
        end: Callable[[], None] = lambda: os._exit(EXIT_CODE),
        *,
        multiple: float = math.inf,
        least_s: float = 0.0,
    ) -> None:
        """Takes its patience.

        Args:
          timeout_s: without a beat, after which the process counts as stuck, whatever it does.
          tell: gets where the watched thread stands, before the end.
          end: ends the process; a stuck thread could not.
          multiple: of the median step, after which a step counts as stuck.
          least_s: and never before this.
        """
        self._timeout_s, self._tell, self._end = timeout_s, tell, end
        self._multiple, self._least_s = multiple, least_s
        self._stop, self._watched = threading.Event(), 0
        self._beat_s = time.monotonic()
        self._limit_s = timeout_s
        self._steps_s: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._was_step = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def beat(self, *, step: bool = False) -> None:
        """Says that the process gets on.

        Args:
          step: what follows is a step and nothing else, such as a save or an evaluation, until the next beat.
        """
        now_s = time.monotonic()
        if step and self._was_step:
            self._steps_s.append(now_s - self._beat_s)
        self._was_step, self._beat_s = step, now_s
        self._limit_s = self._step_limit_s() if step else self._timeout_s

    def _step_limit_s(self) -> float:
        if len(self._steps_s) < KNOWN_STEPS:
            return self._timeout_s
        return min(self._timeout_s, max(self._least_s, self._multiple * statistics.median(self._steps_s)))

    def _watch(self) -> None:
        while (left_s := self._beat_s + (limit_s := self._limit_s) - time.monotonic()) > 0:
            if self._stop.wait(min(left_s, CHECK_EVERY_S)):
                return
        stack = self._stack()
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(all_threads=True)  # to the worker's log
            self._tell(f"{stack}stuck here: no step for {limit_s:g} s")
        self._end()

    def _stack(self) -> str:
        """Returns where the watched thread stands; where it waits for what is read ahead, where the reader stands."""
        frames = sys._current_frames()
        stack = "".join(traceback.format_stack(frames[self._watched]))
        if prefetch.__file__ not in stack:
            return stack
        readers = [thread.ident for thread in threading.enumerate() if thread.name.startswith(prefetch.THREAD_NAME)]
        reading = ["".join(traceback.format_stack(frames[ident])) for ident in readers if ident in frames]
        return f"{stack}which waits for\n{''.join(reading)}"
