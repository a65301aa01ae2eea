"""Why a worker group ended, and what to do about it: two pure functions, shared by all who restart things.

`diagnose` names one cause and keeps the evidence; `decide` spends that cause's own budget. A cause never
hides another: a process that lost its peer is a consequence, so any first-hand failure outranks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal[
    "preemption",
    "host_fault",
    "hang",
    "out_of_memory",
    "bad_numbers",
    "bad_code",
    "bad_input",
    "damaged_checkpoint",
    "superseded",
    "operator",
    "unknown",
]
FailureKind = Literal[
    "bad_input",
    "damaged_checkpoint",
    "superseded",
    "bad_numbers",
    "out_of_memory",
    "raised",
    "process_died",
    "lost_peer",
    "start_timeout",
    "controller",
]

# First-hand failures before consequences. The first kind present names the cause.
CAUSE_OF_KIND: dict[FailureKind, Cause] = {
    "superseded": "superseded",
    "bad_input": "bad_input",
    "damaged_checkpoint": "damaged_checkpoint",
    "bad_numbers": "bad_numbers",
    "out_of_memory": "out_of_memory",
    "raised": "bad_code",
    "process_died": "host_fault",
    "start_timeout": "host_fault",
    "lost_peer": "host_fault",
    "controller": "unknown",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What one worker, or Ray's controller, reported when the group ended.

    Attributes:
      rank: the worker's rank; -1 for the controller.
      kind: what was seen, before any judgement.
      text: the error's own words.
    """

    rank: int
    kind: FailureKind
    text: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known about the end of one incarnation.

    Attributes:
      failures: one per failed worker.
      preempted_ranks: ranks whose hosts the provider or Ray announced as preempted.
      operator_stop: somebody asked for the stop (Ctrl-C, `ray job stop`).
    """

    failures: tuple[Failure, ...] = ()
    preempted_ranks: tuple[int, ...] = ()
    operator_stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One cause, with the reason in words and the trace that shows it."""

    cause: Cause
    reason: str
    trace: str = ""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Start another incarnation, or end the attempt; and why."""

    action: Literal["retry", "stop"]
    reason: str


def diagnose(evidence: Evidence) -> Verdict:
    """Names the cause of a stop from its evidence.

    A preemption explains the deaths of its own ranks and the lost peers of the others, never an exception
    that a worker raised by itself.
    """
    if evidence.operator_stop:
        return Verdict(cause="operator", reason="stopped on request")
    by_kind = {kind: [f for f in evidence.failures if f.kind == kind] for kind in CAUSE_OF_KIND}
    for kind, cause in CAUSE_OF_KIND.items():
        failures = by_kind[kind]
        if not failures:
            continue
        if cause == "host_fault" and _preemption_explains(evidence):
            break
        first = failures[0]
        return Verdict(cause=cause, reason=_reason(kind, failures), trace=first.text)
    if evidence.preempted_ranks:
        ranks = ", ".join(map(str, evidence.preempted_ranks))
        return Verdict(cause="preemption", reason=f"the hosts of ranks {ranks} were preempted")
    return Verdict(cause="unknown", reason="the worker group ended and left no evidence")


def _preemption_explains(evidence: Evidence) -> bool:
    dead = {f.rank for f in evidence.failures if f.kind == "process_died"}
    return bool(evidence.preempted_ranks) and dead <= set(evidence.preempted_ranks)


def _reason(kind: FailureKind, failures: Sequence[Failure]) -> str:
    ranks = ", ".join(str(f.rank) for f in failures)
    last_line = (failures[0].text.strip().splitlines() or [""])[-1]
    return {
        "superseded": "another driver has claimed this run directory",
        "bad_input": f"the input is wrong: {last_line}",
        "damaged_checkpoint": f"the checkpoint cannot be trusted: {last_line}",
        "bad_numbers": f"the loss is not finite: {last_line}",
        "out_of_memory": f"rank {ranks} ran out of memory",
        "raised": f"rank {ranks} raised: {last_line}",
        "process_died": f"the process of rank {ranks} died",
        "lost_peer": f"rank {ranks} lost a peer that left no trace",
        "start_timeout": f"the worker group did not start: {last_line}",
        "controller": f"Ray Train's controller failed: {last_line}",
    }[kind]


# A quarantined checkpoint is never tried again, so these restarts are bounded by the checkpoints there are.
UNBUDGETED: frozenset[Cause] = frozenset({"damaged_checkpoint"})
FINAL: frozenset[Cause] = frozenset({"operator", "superseded", "bad_input"})


def decide(
    verdict: Verdict,
    budgets: Mapping[str, int],
    spent: Mapping[str, int],
    *,
    same_trace_without_progress: bool = False,
) -> Decision:
    """Retries while the cause's own budget lasts; budgets of other causes are never touched.

    Args:
      verdict: of the incarnation that just ended.
      budgets: restarts allowed, by cause.
      spent: restarts already made, by cause.
      same_trace_without_progress: the previous incarnation ended with this very trace at this very step.
    """
    cause = verdict.cause
    if cause in FINAL:
        return Decision(action="stop", reason=verdict.reason)
    if cause in UNBUDGETED:
        return Decision(action="retry", reason=f"{verdict.reason}; going back one checkpoint")
    if same_trace_without_progress:
        return Decision(action="stop", reason=f"the same failure twice without progress: {verdict.reason}")
    used, allowed = spent.get(cause, 0), budgets[cause]
    if used >= allowed:
        return Decision(action="stop", reason=f"budgets.{cause} is spent ({used} of {allowed}): {verdict.reason}")
    return Decision(action="retry", reason=f"{cause} {used + 1} of {allowed}: {verdict.reason}")
