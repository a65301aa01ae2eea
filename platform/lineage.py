"""Which incarnation to believe: pure functions over the claims and acceptances of a run directory.

    claims       1 --------- 2 --------- 3          incarnation n says which acceptance it goes on from
    acceptances    k=1 k=2     k=3 k=4     k=5      written by the incarnation that saved the checkpoint

Claiming n+1 ends the acceptances of n: whatever n writes after the acceptance that n+1 went on from is void,
however late it arrives. So a zombie may write, and is never believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


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
    """

    number: int
    incarnation: int
    step: int
    next_row: int
    checkpoint: str
    digest: str
    ledger_head: str
    data_id: str

    def to_json(self) -> dict[str, Any]:
        """Returns the record as it stands in the file."""
        return asdict(self)


def valid_acceptances(
    claims: Iterable[Claim], acceptances: Iterable[Acceptance], quarantined: Iterable[int] = ()
) -> list[Acceptance]:
    """Returns the acceptances that count, oldest first."""
    claims, bad = list(claims), set(quarantined)
    return [
        a
        for a in sorted(acceptances, key=lambda a: a.number)
        if a.number not in bad and not any(c.incarnation > a.incarnation and c.resumes < a.number for c in claims)
    ]


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
        line = [r for r in line if r["step"] <= start]
        line += records.get(claim.incarnation, ())
    return line
