"""Append-only records on storage that cannot append: folders of immutable numbered segments.

    <folder>/<incarnation>-<process>-<sequence>.jsonl        each created if absent, never changed

A segment is closed every `flush_s` seconds and at each save. Objects on gs:// cannot be appended to, so it is
done the same way everywhere. Nobody but the incarnation that owns the number writes under it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

from openmoe.pipelines import storage

_SEGMENT = re.compile(r"(\d{6})-(\d{5})-(\d{6})\.jsonl")


class JournalError(ValueError):
    """A segment cannot be written or read; the message names it."""


class Journal:
    """Writes one process's records of one incarnation into `folder`."""

    def __init__(self, folder: str, *, incarnation: int, process: int, flush_s: float = 10.0) -> None:
        self._folder = folder
        self._owner = (incarnation, process)
        self._sequence = 0
        self._lines: list[str] = []
        self._flush_s = flush_s
        self._flushed_at_s = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it is durable after the next flush."""
        self._lines.append(json.dumps(record, separators=(",", ":"), allow_nan=True))
        if time.monotonic() - self._flushed_at_s >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Closes the open segment: what was appended is durable when this returns."""
        self._flushed_at_s = time.monotonic()
        if not self._lines:
            return
        incarnation, process = self._owner
        name = f"{incarnation:06d}-{process:05d}-{self._sequence:06d}.jsonl"
        path = storage.join(self._folder, name)
        if not storage.create_if_absent(path, ("\n".join(self._lines) + "\n").encode()):
            raise JournalError(f"{path}: exists already; two processes write as incarnation {incarnation}")
        self._sequence += 1
        self._lines = []


def read(folder: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields (incarnation, process, record) in the order written, incarnation by incarnation."""
    for name in storage.list_files(folder):
        match = _SEGMENT.fullmatch(name)
        if match is None:
            continue
        path = storage.join(folder, name)
        for number, line in enumerate(storage.read_bytes(path).splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise JournalError(f"{path}:{number}: not JSON ({error}); the segment is damaged") from error
            yield int(match[1]), int(match[2]), record
