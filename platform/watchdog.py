"""Ends a process that lives but gets nowhere: a read that never returns, a collective that a peer never enters.

Such a process keeps its heartbeat, so neither JAX nor Ray would ever end it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from openmoe.platform import prefetch

EXIT_CODE = 70


class Watchdog:
    """Watches the thread that enters it, from then on; whoever gets on says so with `beat`."""

    def __init__(
        self, timeout_s: float, tell: Callable[[str], None], end: Callable[[], None] = lambda: os._exit(EXIT_CODE)
    ) -> None:
        """Takes its patience.

        Args:
          timeout_s: without a beat, after which the process counts as stuck.
          tell: gets where the watched thread stands, before the end.
          end: ends the process; a stuck thread could not.
        """
        self._timeout_s, self._tell, self._end = timeout_s, tell, end
        self._stop, self._watched = threading.Event(), 0
        self._beat_s = time.monotonic()
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

    def beat(self) -> None:
        """Says that the process gets on."""
        self._beat_s = time.monotonic()

    def _watch(self) -> None:
        while (left_s := self._beat_s + self._timeout_s - time.monotonic()) > 0:
            if self._stop.wait(left_s):
                return
        stack = self._stack()
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(all_threads=True)  # to the worker's log
            self._tell(f"{stack}stuck here: no step for {self._timeout_s:g} s")
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
