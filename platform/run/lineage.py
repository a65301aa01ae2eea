"""Which incarnation to believe: pure functions over the claims and acceptances of a run directory.

    claims       1 --------- 2 --------- 3          incarnation n says which acceptance it goes on from
    acceptances    k=1 k=2     k=3 k=4     k=5      written by the incarnation that saved the checkpoint

Claiming n+1 ends the acceptances of n: whatever n writes after the acceptance that n+1 went on from is void,
however late it arrives. So a zombie may write, and is never believed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Position:
    """How far a run is: the next step reads the global rows from `next_row` on."""

    step: int = 0
    next_row: int = 0

    def after(self, rows: int) -> Position:
        """Returns the position one step of `rows` rows later."""
        return Position(self.step + 1, self.next_row + rows)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Incarnation `incarnation` exists and goes on from acceptance `resumes` (0: from scratch)."""

    incarnation: int
    resumes: int
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """A checkpoint that counts.

    Attributes:
      number: k, unique in the run.
      incarnation: who saved it.
      step: steps completed.
      next_row: the global row that the next step begins with.
      checkpoint: its folder, relative to the run directory.
      digest: of all leaves' bits (`checkpoint.checksum`), independent of the sharding.
      ledger_head: digest of the chain of (step, rows, batch checksum) up to this step.
      data_id: manifest of the shards it was trained on.
      metrics: the newest value of each metric when it was saved; none of what earlier versions accepted.
      time_s: when it was accepted; 0 of what earlier versions accepted.
    """

    number: int
    incarnation: int
    step: int
    next_row: int
    checkpoint: str
    digest: str
    ledger_head: str
    data_id: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    time_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the record as it stands in the file."""
        return asdict(self)


class Rows(NamedTuple):
    """Global rows [lo, hi)."""

    lo: int
    hi: int


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Rows that the run goes on without: an incarnation's numbers went bad over them.

    Attributes:
      incarnation: that met it; later ones leave the rows out.
      step: at which it was seen.
      rows: to be left out.
      reason: in words.
    """

    incarnation: int
    step: int
    rows: Rows
    reason: str
    time_s: float


def incident(record: Mapping[str, Any]) -> Incident:
    """Returns the incident of a record as it stands in a file."""
    fields: dict[str, Any] = {**record, "rows": Rows(*record["rows"])}
    return Incident(**fields)


def tainted(acceptances: Iterable[Acceptance], incidents: Iterable[Incident]) -> dict[int, str]:
    """Returns the acceptances that must not be restored, since they were trained on rows of an incident, and why."""
    incidents = list(incidents)
    return {
        a.number: f"trained on rows [{i.rows.lo}, {i.rows.hi}): {i.reason}"
        for a in acceptances
        for i in incidents
        if a.incarnation <= i.incarnation and a.next_row > i.rows.lo
    }


def rows_left_out(row: int, incidents: Iterable[Incident]) -> tuple[Rows, list[Incident]]:
    """Returns the rows from `row` on that are to be left out, none if lo == hi, and the incidents that say so."""
    end, why = row, []
    for incident in sorted(incidents, key=lambda incident: incident.rows):
        if incident.rows.lo <= end < incident.rows.hi:
            end = incident.rows.hi
            why.append(incident)
    return Rows(row, end), why


def first_rows(row: int, steps: int, batch_rows: int, incidents: Sequence[Incident]) -> Iterator[int]:
    """Yields the first row of each of the coming steps, from `row` on."""
    for _ in range(steps):
        row = rows_left_out(row, incidents)[0].hi
        yield row
        row += batch_rows


def row_after(steps: int, batch_rows: int, incidents: Iterable[Incident]) -> int:
    """Returns the row behind those of a run's first steps, given what later incarnations leave out before it."""
    row, end = steps * batch_rows, 0
    for lo, hi in sorted(incident.rows for incident in incidents):
        if (begin := max(lo, end)) < min(hi, row):
            row += hi - begin
            end = hi
    return row


def valid_acceptances(
    claims: Iterable[Claim], acceptances: Iterable[Acceptance], quarantined: Iterable[int] = ()
) -> list[Acceptance]:
    """Returns the acceptances that count, oldest first."""
    later, bad, valid = sorted(claims, key=lambda claim: claim.incarnation), set(quarantined), []
    lowest = math.inf  # that any claim after the incarnation in question goes on from
    for a in sorted(acceptances, key=lambda a: -a.incarnation):
        while later and later[-1].incarnation > a.incarnation:
            lowest = min(lowest, later.pop().resumes)
        if a.number <= lowest and a.number not in bad:
            valid.append(a)
    return sorted(valid, key=lambda a: a.number)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay, of those that count.

    Attributes:
      newest: so many, at least one.
      every_steps: the first at or after each of its multiples, for ever.
      best: so many with the lowest value of the metric.
      metric: by its name in the records.
      behind_steps: so far behind the newest there is always one, or the first: what a run may have to go back to.
    """

    newest: int
    every_steps: int | None = None
    best: int = 0
    metric: str = "loss"
    behind_steps: int = 0


def kept(valid: Sequence[Acceptance], keep: Retention) -> dict[int, list[str]]:
    """Returns why checkpoints stay, by the number of their acceptance; the others may go.

    Args:
      valid: the acceptances that count, oldest first.
      keep: what shall stay.
    """
    why: dict[int, list[str]] = defaultdict(list)
    for a in valid[-keep.newest :]:
        why[a.number].append("newest")
    if keep.every_steps:
        for a in _first_of_multiples(valid, keep.every_steps):
            why[a.number].append(f"every {keep.every_steps:,} steps")
    if keep.behind_steps:
        # A few of these, instead of all, so that one of them is there whenever the newest has come further.
        marks = [*valid[:1], *(a for a in _first_of_multiples(valid, keep.behind_steps) if a is not valid[0])]
        behind = [a.number for a in marks if a.step <= valid[-1].step - keep.behind_steps]
        for a in marks:
            if not behind or a.number >= behind[-1]:
                why[a.number].append("to go back to")
    measured = [a for a in valid if math.isfinite(a.metrics.get(keep.metric, math.nan))]
    for a in sorted(measured, key=lambda a: (a.metrics[keep.metric], a.number))[: keep.best]:
        why[a.number].append(f"best {keep.metric}")
    return dict(why)


def _first_of_multiples(valid: Sequence[Acceptance], steps: int) -> list[Acceptance]:
    """Returns the first acceptance at or after each multiple of `steps`."""
    before = [0, *(a.step for a in valid)]
    return [a for last, a in zip(before, valid, strict=False) if a.step // steps > last // steps]


def removable(
    found: Iterable[str], valid: Sequence[Acceptance], everything: Iterable[Acceptance], keep: Retention, *, writer: int
) -> list[str]:
    """Returns what may be removed of the folders found below checkpoints/, each as "checkpoints/<incarnation>/<name>".

    What incarnation `writer` has not accepted it may be writing now; of those before it that is a leftover.
    """
    why = kept(valid, keep)
    stays = {a.checkpoint for a in valid if a.number in why}
    accepted = {a.checkpoint for a in everything}
    owner = {path: int(path.split("/")[1]) for path in found}
    return [p for p, n in owner.items() if p not in stays and (n < writer or (n == writer and p in accepted))]


class BrokenLine(ValueError):
    """Claims and acceptances do not lead from the newest checkpoint back to the run's start; the message says where."""

    def __init__(self, incarnation: int, message: str) -> None:
        super().__init__(message)
        self.incarnation = incarnation


class Stretch(NamedTuple):
    """The part of an incarnation that counts: up to the acceptance from which the line goes on."""

    incarnation: int
    start: Acceptance | None  # that it went on from; None: from scratch
    accepted: tuple[Acceptance, ...]  # by it, in the order of their numbers; the stretch ends at the last

    @property
    def begin(self) -> Position:
        """Where it begins."""
        return Position(self.start.step, self.start.next_row) if self.start else Position()

    @property
    def end(self) -> Acceptance:
        """Where it ends."""
        return self.accepted[-1]


def line(claims: Iterable[Claim], acceptances: Sequence[Acceptance], quarantined: Iterable[int] = ()) -> list[Stretch]:
    """Returns the line of accepted checkpoints that leads to the newest one that counts, from the run's start on.

    Raises:
      BrokenLine: a record that it needs is missing, or contradicts another.
    """
    claims = list(claims)
    resumes = {claim.incarnation: claim.resumes for claim in claims}
    by_number = {a.number: a for a in acceptances}
    valid = valid_acceptances(claims, acceptances, quarantined)
    found: list[Stretch] = []
    end = valid[-1] if valid else None
    while end is not None:
        n = end.incarnation
        if n not in resumes:
            raise BrokenLine(n, f"acceptance {end.number} is of it, and it never claimed the run")
        start = by_number.get(resumes[n])
        if resumes[n] and start is None:
            raise BrokenLine(n, f"it goes on from acceptance {resumes[n]}, which is not there")
        if start and start.incarnation >= n:
            raise BrokenLine(
                n, f"it goes on from acceptance {start.number}, which incarnation {start.incarnation} wrote"
            )
        accepted = (a for a in acceptances if a.incarnation == n and a.number <= end.number)
        found.append(Stretch(n, start, tuple(sorted(accepted, key=lambda a: a.number))))
        end = start
    return found[::-1]


def ends(claims: Iterable[Claim], starts: Mapping[int, int]) -> dict[int, float]:
    """Returns the last step of each incarnation that counts: the lowest start of all later ones.

    Args:
      claims: all claims.
      starts: step at which each incarnation starts, by its number.
    """
    found: dict[int, float] = {}
    end = math.inf
    for claim in sorted(claims, key=lambda c: -c.incarnation):
        found[claim.incarnation] = end
        end = min(end, starts[claim.incarnation])
    return found


def trace(
    claims: Sequence[Claim],
    acceptances: Sequence[Acceptance],
    records: Mapping[int, Sequence[Mapping[str, Any]]],
) -> list[Mapping[str, Any]]:
    """Returns one record per step along the line that leads to the newest incarnation; undone steps drop out.

    Args:
      claims: all claims.
      acceptances: all acceptances (a claim may go on from one that was voided later).
      records: by incarnation, its metric records in the order written, each with a `step`.
    """
    step_of = {0: 0} | {a.number: a.step for a in acceptances}
    line: list[Mapping[str, Any]] = []
    for claim in sorted(claims, key=lambda c: c.incarnation):
        start = step_of.get(claim.resumes, 0)
        while line and line[-1]["step"] > start:
            line.pop()
        line += records.get(claim.incarnation, ())
    return line
