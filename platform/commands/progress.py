"""Progress of long work: a bar with rate and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 10.0


class ProgressReport:
    """Shows stages of work as they are reported: `report("tokenize", 3, 10, "units")`.

    On a terminal each stage is a bar. Elsewhere a stage gets a line when it starts, every `LOG_EVERY_S`
    seconds, and when it ends.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._stages: dict[str, _Stage] = {}
        self._bars: Progress | None = None
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )

    def __enter__(self) -> ProgressReport:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self._console.print(line, markup=False)

    def __call__(self, stage: str, done: int, total: int, unit: str, detail: str = "") -> None:
        """Reports that `done` of `total` units of a stage are complete."""
        state = self._stages.get(stage)
        if state is None or done < state.done:
            state = self._stages[stage] = _Stage(first=done)
            if self._bars:
                state.bar = self._bars.add_task(stage, total=total, completed=done, rate="", detail=detail)
        state.done = done
        rate = state.rate()
        if self._bars and state.bar is not None:
            text = f"{rate:,.1f} {unit}/s" if rate else unit
            self._bars.update(state.bar, completed=done, total=total, rate=text, detail=detail)
        elif state.is_line_due(done >= total):
            left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
            speed = f", {rate:,.1f} {unit}/s" if rate else ""
            self.say(f"{stage}: {done:,} of {total:,} {unit}{speed}{left}{'  ' + detail if detail else ''}")


class _Stage:
    """When a stage began, how far it is, and when it was last printed."""

    def __init__(self, first: int) -> None:
        self.first = self.done = first
        self.bar: TaskID | None = None
        self._start_s = time.monotonic()
        self._printed_s: float | None = None
        self._ended = False

    def rate(self) -> float:
        """Returns units per second since the stage's first report."""
        elapsed_s = time.monotonic() - self._start_s
        return (self.done - self.first) / elapsed_s if elapsed_s > 0.2 else 0.0

    def is_line_due(self, ended: bool) -> bool:
        """Returns whether a log line is due: at the start, every LOG_EVERY_S, and once at the end."""
        now_s = time.monotonic()
        due = self._printed_s is None or now_s - self._printed_s >= LOG_EVERY_S or (ended and not self._ended)
        self._ended = self._ended or ended
        if due:
            self._printed_s = now_s
        return due
