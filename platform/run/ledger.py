"""The sample ledger: which rows each step consumed, and the proof that none was lost or repeated. Pure.

Every step leaves an entry: its global rows, and the checksum of what they held, taken by the step itself of the arrays
that the model got. An entry's digest is over the entry and the digest before it; an acceptance names the digest at its
checkpoint, and an incarnation goes on from the digest of the acceptance that it resumes. So the chain follows the line
of accepted checkpoints, and equal heads mean: trained on the same batches in the same order, whatever happened between.

    incarnation 1   1  2  3  4  5      entries; step 4 is accepted, 5 is undone by the claim of incarnation 2
    incarnation 2               5  6   goes on from the digest of step 4

The chain finds damage, and records that do not belong together. It is no signature: whoever may write to the run
directory may write all of it anew. What they cannot change are the shards, with which the checksums are compared.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from openmoe.platform.run import lineage
from openmoe.platform.run.lineage import Acceptance, Claim, Position, Stretch

VERSION = 1

Record = Mapping[str, Any]
Fate = Literal["counts", "undone", "not accepted"]


class Entry(NamedTuple):
    """What a step consumed, or rows that no step got.

    Attributes:
      step: that consumed the rows; of rows that no step got, the one before them.
      lo, hi: global rows [lo, hi).
      checksum: of what the rows held (`model/checksum.py`); none of rows that no step got.
      incident: why nothing was learned from the rows: no step got them, or its update was not made; "" if it was.
      digest: over all this and the digest before it, hexadecimal.
    """

    step: int
    lo: int
    hi: int
    checksum: tuple[int, ...]
    incident: str
    digest: str

    @property
    def what(self) -> str:
        """What it is about, in words."""
        return f"rows [{self.lo}, {self.hi}) {'skipped' if self.incident else 'trained on'} at step {self.step}"


def trained(head: str, position: Position, first_row: int, checksum: Sequence[int], incident: str = "") -> Entry:
    """Returns the entry of the step that led to `position`, which follows the digest `head`.

    Of a step whose update was not made, `incident` says why.
    """
    return _chained(head, position.step, first_row, position.next_row, tuple(checksum), incident)


def skipped(head: str, position: Position, first_row: int, incident: str) -> Entry:
    """Returns the entry of the rows from `first_row` up to `position` that are left out because of an incident."""
    return _chained(head, position.step, first_row, position.next_row, (), incident)


def _chained(head: str, step: int, lo: int, hi: int, checksum: tuple[int, ...], incident: str) -> Entry:
    fields = [VERSION, head, step, lo, hi, list(checksum), incident]
    digest = hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()
    return Entry(step, lo, hi, checksum, incident, digest)


def to_json(entry: Entry) -> dict[str, Any]:
    """Returns the record of an entry."""
    content: dict[str, Any] = {"checksum": list(entry.checksum)} if entry.checksum else {}
    content |= {"skipped": entry.incident} if entry.incident else {}
    return {"version": VERSION, "step": entry.step, "rows": [entry.lo, entry.hi], **content, "digest": entry.digest}


def from_json(record: Record) -> Entry:
    """Returns the entry of a record; raises ValueError, in words, if it is none of this version."""
    if record.get("version") != VERSION:
        raise ValueError(f"version {record.get('version')}, this program reads {VERSION}")
    match record:
        case {"step": int(step), "rows": [int(lo), int(hi)], "checksum": [int(a), int(b)], "digest": str(digest)}:
            if max(a, b) < 2**32 and min(a, b) >= 0:
                return Entry(step, lo, hi, (a, b), str(record.get("skipped", "")), digest)
        case {"step": int(step), "rows": [int(lo), int(hi)], "skipped": str(why), "digest": str(digest)} if why:
            return Entry(step, lo, hi, (), why, digest)
    raise ValueError(f"{json.dumps(record)[:200]}")


class Mismatch(NamedTuple):
    """Rows of the shards whose checksum is another than the step's; `hint` says what it may have read instead."""

    expected: str
    found: str
    hint: str = ""


Compare = Callable[[Entry], Mismatch | None]  # an entry with the shards; None: it is what they hold


class Contradiction(NamedTuple):
    """The first thing that cannot be true: who says it, what should stand there, and what stands there."""

    what: str
    incarnation: int
    step: int | None = None
    rows: tuple[int, int] | None = None
    expected: str = ""
    found: str = ""
    hint: str = ""

    def lines(self) -> list[str]:
        """Returns it for people."""
        step = "" if self.step is None else f"step {self.step}, "
        rows = f"rows [{self.rows[0]}, {self.rows[1]}), " if self.rows else ""
        said = (("expected", self.expected), ("found   ", self.found), ("it seems", self.hint))
        first = f"{step}{rows}incarnation {self.incarnation}: {self.what}"
        return [first, *(f"{name} {text}" for name, text in said if text)]


class _Contradicted(Exception):
    def __init__(self, contradiction: Contradiction) -> None:
        super().__init__(contradiction)
        self.contradiction = contradiction


class Steps(NamedTuple):
    """Some steps of an incarnation, from the first to the last."""

    incarnation: int
    first: int
    last: int


class Skipped(NamedTuple):
    """Rows [lo, hi) of the line that no step got, or whose step's update was not made."""

    incarnation: int
    lo: int
    hi: int
    incident: str


@dataclass(kw_only=True)
class Findings:
    """What a ledger says.

    Attributes:
      position: how far the entries of the line were followed.
      head: digest there.
      line: steps of each incarnation that count, oldest first.
      trained_rows: rows that these steps consumed.
      compared: entries that were compared with the shards.
      skipped: rows of the line from which nothing was learned.
      undone: steps that were trained, and taken back by a later incarnation.
      not_accepted: steps since the newest checkpoint.
      unrecorded: steps of the line whose incarnation has no ledger.
      contradiction: the first one; nothing after it was looked at.
    """

    position: Position = field(default_factory=Position)
    head: str = ""
    line: list[Steps] = field(default_factory=list)
    trained_rows: int = 0
    compared: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    undone: list[Steps] = field(default_factory=list)
    not_accepted: list[Steps] = field(default_factory=list)
    unrecorded: list[Steps] = field(default_factory=list)
    contradiction: Contradiction | None = None

    @property
    def holds(self) -> bool:
        """Whether every row before `position` was trained on exactly once, or skipped with its incident.

        As the entries say; that they say the truth is shown for those that were compared with the shards.
        """
        return self.contradiction is None and not self.unrecorded


def verify(
    claims: Sequence[Claim],
    acceptances: Sequence[Acceptance],
    quarantined: Iterable[int],
    records: Iterable[tuple[int, Record]],
    *,
    compare: Compare = lambda entry: None,
    chosen: Container[int] = range(sys.maxsize),
) -> Findings:
    """Follows the entries along the line of accepted checkpoints that leads to the newest one.

    Args:
      claims: all of the run.
      acceptances: all of the run.
      quarantined: numbers of those that were barred.
      records: (incarnation, record) of the ledger, incarnation by incarnation, in the order written.
      compare: an entry with the shards.
      chosen: steps to compare.

    Returns:
      What was found, up to the first contradiction.
    """
    walk = _Walk(Findings(), compare, chosen)
    resumes = {claim.incarnation: claim.resumes for claim in claims}
    starts, newest = {a.number: a for a in acceptances}, max(resumes, default=0)
    try:
        waiting = lineage.line(claims, acceptances, quarantined)
        for incarnation, group in itertools.groupby(records, key=lambda record: record[0]):
            if incarnation > newest:
                break  # it began after the claims were read
            while waiting and waiting[0].incarnation < incarnation:
                walk.pass_over(waiting.pop(0))
            walk.begin(incarnation, resumes.get(incarnation), starts)
            entries = _parsed(group)
            if waiting and waiting[0].incarnation == incarnation:
                walk.along(waiting.pop(0), entries)
            walk.beyond(incarnation, entries, newest=newest)
        for stretch in waiting:
            walk.pass_over(stretch)
    except lineage.BrokenLine as error:
        walk.findings.contradiction = Contradiction(str(error), error.incarnation)
    except _Contradicted as found:
        walk.findings.contradiction = found.contradiction
    return walk.findings


def _parsed(group: Iterable[tuple[int, Record]]) -> Iterator[Entry]:
    last = 0
    for incarnation, record in group:
        try:
            entry = from_json(record)
        except ValueError as error:
            what = f"what follows its entry of step {last} is none"
            fields = f"version {VERSION}, step, rows, checksum or skipped, digest"
            raise _Contradicted(Contradiction(what, incarnation, last, None, fields, str(error))) from error
        last = entry.step
        yield entry


class _Walk:
    """Goes through the incarnations, entry by entry; raises the first _Contradicted."""

    def __init__(self, findings: Findings, compare: Compare, chosen: Container[int]) -> None:
        self.findings, self._compare, self._chosen = findings, compare, chosen
        self._position, self._head, self._data_id = Position(), "", ""

    def begin(self, incarnation: int, resumes: int | None, starts: Mapping[int, Acceptance]) -> None:
        """Stands where an incarnation began: at the acceptance that it went on from."""
        if resumes is None:
            raise _Contradicted(Contradiction("it has entries, and it never claimed the run", incarnation))
        if resumes and resumes not in starts:
            raise _Contradicted(Contradiction(f"it goes on from acceptance {resumes}, which is not there", incarnation))
        start = starts.get(resumes)
        self._position = Position(start.step, start.next_row) if start else Position()
        self._head = start.ledger_head if start else ""

    def along(self, stretch: Stretch, entries: Iterator[Entry]) -> None:
        """Takes entries up to the end of the stretch, and no more."""
        findings, n, accepted = self.findings, stretch.incarnation, list(stretch.accepted)
        findings.line.append(Steps(n, self._position.step + 1, self._position.step))
        for entry in entries:
            self._check(n, entry)
            self._check_content(n, entry)
            if entry.incident:
                findings.skipped.append(Skipped(n, entry.lo, entry.hi, entry.incident))
            else:
                findings.trained_rows += entry.hi - entry.lo
            if entry.checksum:
                findings.line[-1] = findings.line[-1]._replace(last=entry.step)
            findings.position, findings.head = self._position, self._head
            while accepted and self._is_at(accepted[0]):
                accepted.pop(0)
            if not accepted:
                return
        end, position = stretch.end, self._position
        rows = (position.next_row, end.next_row)
        expected = f"entries up to step {end.step}, for which acceptance {end.number} stands"
        found = f"none after step {position.step}"
        raise _Contradicted(Contradiction("steps are missing", n, position.step + 1, rows, expected, found))

    def pass_over(self, stretch: Stretch) -> None:
        """Takes note of a stretch without any entry: an earlier version wrote it, or its part of the ledger is lost."""
        self.findings.unrecorded.append(Steps(stretch.incarnation, stretch.begin.step + 1, stretch.end.step))
        self.findings.position = Position(stretch.end.step, stretch.end.next_row)
        self.findings.head = stretch.end.ledger_head

    def beyond(self, incarnation: int, entries: Iterator[Entry], *, newest: int) -> None:
        """Counts the steps of an incarnation that are not, or not yet, on the line."""
        steps = []
        for entry in entries:
            self._check(incarnation, entry)
            steps += [entry.step] if entry.checksum else []
        if steps:
            to = self.findings.undone if incarnation < newest else self.findings.not_accepted
            to.append(Steps(incarnation, steps[0], steps[-1]))

    def _check(self, incarnation: int, entry: Entry) -> None:
        """Takes the next entry, which must follow the one before it."""
        step, row = self._position.step + bool(entry.checksum), self._position.next_row
        if (entry.step, entry.lo) != (step, row) or entry.hi <= entry.lo:
            what = "is out of order"
            if entry.lo > row:
                what = f"rows [{row}, {entry.lo}) are missing"
            elif entry.lo < row:
                what = f"rows [{entry.lo}, {min(row, entry.hi)}) are trained on again"
            raise _contradicted(incarnation, entry, what, f"step {step}, rows from {row} on", entry.what)
        wanted = _chained(self._head, *entry[:5]).digest
        if wanted != entry.digest:
            what = "this entry, or the one before it, was changed"
            raise _contradicted(incarnation, entry, what, f"digest {wanted}", entry.digest)
        self._position, self._head = Position(entry.step, entry.hi), entry.digest

    def _check_content(self, incarnation: int, entry: Entry) -> None:
        if not entry.checksum or entry.step not in self._chosen:
            return
        if mismatch := self._compare(entry):
            raise _contradicted(incarnation, entry, "trained on something else than the shards hold", *mismatch)
        self.findings.compared += 1

    def _is_at(self, accepted: Acceptance) -> bool:
        """Returns whether this is where a checkpoint was accepted; its record must say the same."""
        step, next_row = position = self._position.step, self._position.next_row
        if position < (accepted.step, accepted.next_row):
            return False
        self._data_id = self._data_id or accepted.data_id
        words = "step {}, next row {}, data {}, head {}".format
        here = words(step, next_row, self._data_id, self._head)
        says = words(accepted.step, accepted.next_row, accepted.data_id, accepted.ledger_head)
        if says != here:
            what = f"acceptance {accepted.number} does not fit the entries"
            raise _Contradicted(Contradiction(what, accepted.incarnation, step, (0, next_row), here, says))
        return True


def _contradicted(
    incarnation: int, entry: Entry, what: str, expected: str, found: str, hint: str = ""
) -> _Contradicted:
    rows = (entry.lo, entry.hi)
    return _Contradicted(Contradiction(what, incarnation, entry.step, rows, expected, found, hint))


def fate(line: Sequence[Stretch], newest: int, incarnation: int, entry: Entry) -> Fate:
    """Returns what became of a step of a sound ledger."""
    if any(s.incarnation == incarnation and s.begin.next_row <= entry.lo < s.end.next_row for s in line):
        return "counts"
    return "undone" if incarnation < newest else "not accepted"
