"""Append-only records on storage that cannot append: folders of immutable numbered segments.

    <folder>/<incarnation>-<process>-<sequence>.jsonl        each created if absent, never changed
    <folder>/<incarnation>-<process>-<first>-<last>.jsonl    the segments first..last in one file

A segment is closed every `flush_s` seconds and at each save. Objects on gs:// cannot be appended to, so it is
done the same way everywhere. Nobody but the incarnation that owns the number writes under it.

So that a run of months stays quick to read, its writer merges every 10, 100 and 1,000 segments into one. Readers
meet each record once whenever they look, and whenever the writer is killed:

- a merged segment is complete when its name appears, and its parts are removed only at the next merge, so every
  record always has a segment, and nearly always two while names change;
- parts are told apart in a merged segment by an empty line, so a reader goes on in the middle of one;
- a reader follows the sequence numbers one by one: what a wider segment has given is never taken from a part, and
  a segment that is gone, or not in a listing made while names changed, is looked for in a new listing.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from openmoe.pipelines import storage

MERGED_SEGMENTS = (1000, 100, 10)
MERGED_BYTES = 2**24  # what a writer keeps in memory to merge; larger segments stay in fewer pieces anyway

DRIVER = 99_999  # the driver's process number; workers count from 0

_SEGMENT = re.compile(r"(\d{6})-(\d{5})-(\d{6})(?:-(\d{6}))?\.jsonl")
_LISTINGS = 5  # made of a folder before a missing segment counts as lost


class JournalError(ValueError):
    """A segment cannot be written or read; the message names it."""


class Segment(NamedTuple):
    """A file with the records of the sequence numbers first..last of one writer."""

    incarnation: int
    process: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The file's name."""
        numbers = f"{self.first:06d}" if self.first == self.last else f"{self.first:06d}-{self.last:06d}"
        return f"{self.incarnation:06d}-{self.process:05d}-{numbers}.jsonl"


class Journal:
    """Writes one process's records of one incarnation into `folder`."""

    def __init__(self, folder: str, *, incarnation: int, process: int, flush_s: float = 10.0) -> None:
        self._folder = folder
        self._owner = (incarnation, process)
        self._sequence = 0
        self._lines: list[str] = []
        self._closing = b""  # a segment not known to be durable yet; it may be, since answers get lost
        self._flush_s = flush_s
        self._flushed_at_s = time.monotonic()
        self._parts: list[bytes] = []  # contents of the newest segments, which may be merged yet
        self._files: list[Segment] = []
        self._merged_away: list[Segment] = []

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it is durable after the next flush."""
        self._lines.append(json.dumps(record, separators=(",", ":"), allow_nan=True))
        if time.monotonic() - self._flushed_at_s >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Closes the open segment: what was appended is durable when this returns."""
        self._flushed_at_s = time.monotonic()
        while self._closing or self._lines:
            if not self._closing:
                self._closing, self._lines = ("\n".join(self._lines) + "\n").encode(), []
            self._files.append(self._write(self._sequence, self._sequence, self._closing))
            self._parts.append(self._closing)
            self._closing = b""
            self._sequence += 1
            self._merge()

    def _write(self, first: int, last: int, data: bytes) -> Segment:
        segment = Segment(*self._owner, first, last)
        create(storage.join(self._folder, segment.name), data, incarnation=segment.incarnation)
        return segment

    def _merge(self) -> None:
        """Puts the newest segments into one when their number is round; those of the merge before are removed now."""
        span = next((n for n in MERGED_SEGMENTS if self._sequence % n == 0 and n <= len(self._parts)), 0)
        if span:
            storage.remove_files([storage.join(self._folder, segment.name) for segment in self._merged_away])
            first = self._sequence - span
            merged = self._write(first, self._sequence - 1, b"\n".join(self._parts[-span:]))
            self._merged_away = [segment for segment in self._files if segment.first >= first]
            self._files = [*(segment for segment in self._files if segment.first < first), merged]
        if span == MERGED_SEGMENTS[0] or sum(map(len, self._parts)) > MERGED_BYTES:
            self._parts.clear()
            self._files.clear()


def create(path: str, data: bytes, *, incarnation: int) -> None:
    """Creates a file that only `incarnation` may write; one that is there with this content already is as good.

    Raises:
      JournalError: the name is taken by other content.
    """
    if not storage.create_if_absent(path, data) and storage.read_bytes(path) != data:
        raise JournalError(f"{path}: exists already; two processes write as incarnation {incarnation}")


def read(folder: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields (incarnation, process, record) in the order written, incarnation by incarnation."""
    return JournalReader(folder).new()


def newest_first(folder: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields what `read` does from its end on, and reads no more segments than it is asked for.

    Raises:
      JournalError: a segment is damaged or missing.
    """
    for owner in sorted(_listed(folder), reverse=True):
        yield from ((*owner, record) for record in _backwards(folder, owner))


def last_records(folder: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Returns the newest record of each (incarnation, process) that has one."""
    found = {owner: next(_backwards(folder, owner), None) for owner in _listed(folder)}
    return {owner: record for owner, record in found.items() if record is not None}


def _backwards(folder: str, owner: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yields one writer's records, the newest first."""
    segments = _listed(folder).get(owner, [])
    end, listings = max((segment.last + 1 for segment in segments), default=0), 1
    while end:
        # The narrowest that holds what comes next: a part rather than all that it was merged into.
        holding = [segment for segment in segments if segment.first < end <= segment.last + 1]
        segment = max(holding, key=lambda segment: segment.first, default=Segment(*owner, end - 1, end - 1))
        path = storage.join(folder, segment.name)
        if (data := storage.read_if_present(path)) is None:  # merged meanwhile
            if listings == _LISTINGS:
                raise _lost(path)
            segments, listings = _listed(folder).get(owner, []), listings + 1
            continue
        yield from reversed(_records(path, data, skip=0, stop=end - segment.first))
        end, listings = segment.first, 1


def _listed(folder: str) -> dict[tuple[int, int], list[Segment]]:
    """Returns the segments of each writer, the widest of those that begin alike first."""
    by_owner: dict[tuple[int, int], list[Segment]] = defaultdict(list)
    for name in storage.list_files(folder):
        if match := _SEGMENT.fullmatch(name):
            incarnation, process, first, last = (int(number or match[3]) for number in match.groups())
            by_owner[incarnation, process].append(Segment(incarnation, process, first, last))
    return {owner: sorted(segments, key=lambda s: (s.first, -s.last)) for owner, segments in sorted(by_owner.items())}


def _lost(path: str) -> JournalError:
    return JournalError(
        f"{path}: is gone, and later ones are there; "
        "restore it, or put an empty file there to go on without its records"
    )


class JournalReader:
    """Reads a folder again and again, while it is written, and gives each record once."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._next: Counter[tuple[int, int]] = Counter()  # by writer, the sequence number not yet read

    def new(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yields what is durable and was not yielded before, as `read` does; to be iterated to its end.

        Raises:
          JournalError: a segment is damaged or missing.
        """
        missing = ""
        for _ in range(_LISTINGS):
            for owner, segments in _listed(self._folder).items():
                missing = yield from self._follow(owner, segments)
                if missing:
                    break
            else:
                return
        raise _lost(storage.join(self._folder, missing))

    def _follow(
        self, owner: tuple[int, int], segments: list[Segment]
    ) -> Generator[tuple[int, int, dict[str, Any]], None, str]:
        """Yields one writer's new records; returns the name of the segment at which it cannot go on, else ""."""
        beginnings = {segment.first for segment in segments}
        for segment in segments:
            wanted = self._next[owner]
            if segment.last < wanted or (segment.first < wanted and wanted in beginnings):
                continue
            if segment.first > wanted:
                return Segment(*owner, wanted, wanted).name
            path = storage.join(self._folder, segment.name)
            if (data := storage.read_if_present(path)) is None:
                return segment.name
            records = _records(path, data, skip=wanted - segment.first)
            self._next[owner] = segment.last + 1
            yield from ((*owner, record) for record in records)
        return ""


def _records(path: str, data: bytes, *, skip: int, stop: int | None = None) -> list[dict[str, Any]]:
    """Returns the records of a segment's parts from `skip` on, before `stop` if that is given."""
    records, part = [], 0
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            part += 1
        elif part >= skip and (stop is None or part < stop):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise JournalError(f"{path}:{number}: not JSON ({error}); the segment is damaged") from error
    return records
