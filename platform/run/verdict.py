"""Why a worker group ended, and what to do about it: two pure functions, shared by all who restart things.

`diagnose` names one cause and keeps the evidence; `decide` spends that cause's own budget. A cause never
hides another: a process that lost its peer is a consequence, so any first-hand failure outranks it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Cause = Literal[
    "preemption",
    "lost_slice",
    "host_fault",
    "hang",
    "out_of_memory",
    "bad_numbers",
    "bad_code",
    "bad_input",
    "damaged_checkpoint",
    "superseded",
    "operator",
    "cluster_lost",
    "unknown",
]
FailureKind = Literal[
    "bad_input",
    "damaged_checkpoint",
    "superseded",
    "bad_numbers",
    "out_of_memory",
    "raised",
    "hung",
    "no_storage",
    "frozen",
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
    "hung": "hang",
    "no_storage": "host_fault",
    "frozen": "host_fault",
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
class Host:
    """A machine that held workers of the group, as it was found after the end.

    Attributes:
      name: the provider's, such as slice-a-0; else its address.
      slice: the unit that the provider takes and gives; "" for a machine by itself.
      ranks: the workers it held.
      alive: its Ray node still answers.
      provider_state: what the provider's record says (RUNNING, PREEMPTED, STOPPED); "" where there is no record.
    """

    name: str
    slice: str
    ranks: tuple[int, ...]
    alive: bool
    provider_state: str = ""

    @property
    def lost(self) -> bool:
        """It can hold no worker any more."""
        return not self.alive or self.provider_state not in ("", "RUNNING")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known about the end of one incarnation, or of a whole attempt.

    Attributes:
      failures: one per failed worker.
      preempted_ranks: ranks whose hosts Ray announced as preempted.
      hosts: the machines that held the workers.
      operator_stop: somebody asked for the stop (Ctrl-C, `ray job stop`, `openmoe jobs cancel`).
      cluster_lost: the cluster went away as a whole; nothing is known about its workers.
    """

    failures: tuple[Failure, ...] = ()
    preempted_ranks: tuple[int, ...] = ()
    hosts: tuple[Host, ...] = ()
    operator_stop: bool = False
    cluster_lost: bool = False

    def with_told(self, told: Mapping[int, Failure]) -> Evidence:
        """Returns the evidence with what workers said of their own end, by rank; it outranks what was seen of it."""
        seen = (failure for failure in self.failures if failure.rank not in told)
        return replace(self, failures=(*told.values(), *seen))

    @property
    def evicted_ranks(self) -> frozenset[int]:
        """Ranks whose machine was taken back, by Ray's notice or by the provider's record."""
        recorded = (rank for host in self.hosts if host.provider_state == "PREEMPTED" for rank in host.ranks)
        return frozenset(self.preempted_ranks) | frozenset(recorded)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One cause, with the reason in words, the trace that shows it, and the sentences it rests on."""

    cause: Cause
    reason: str
    trace: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Start another incarnation, or end the attempt; and why."""

    action: Literal["retry", "stop"]
    reason: str


def diagnose(evidence: Evidence) -> Verdict:
    """Names the cause of a stop from its evidence.

    A preemption explains the deaths of its own ranks and the lost peers of the others, never an exception
    that a worker raised by itself. So does a TPU slice that lost a host, which is no slice any more: the provider gives
    and takes slices whole, and may have said nothing, so it is not counted among the faults of single machines.
    """
    said = tuple(_sentences(evidence))
    if evidence.operator_stop:
        return Verdict(cause="operator", reason="stopped on request", evidence=said)
    by_kind = {kind: [f for f in evidence.failures if f.kind == kind] for kind in CAUSE_OF_KIND}
    for kind, cause in CAUSE_OF_KIND.items():
        failures = by_kind[kind]
        if not failures:
            continue
        if cause in ("host_fault", "unknown") and (evidence.cluster_lost or _eviction_explains(evidence)):
            break
        if cause in ("host_fault", "unknown") and kind != "no_storage" and (lost := _lost(evidence)):
            return Verdict(cause="lost_slice", reason=lost, evidence=said)
        # What Ray says of a machine's death is no trace of the code: it may come twice without meaning anything. Nor is
        # it a fault of the code that the run was started a second time.
        trace = "" if cause in ("host_fault", "superseded") else failures[0].text
        return Verdict(cause=cause, reason=_reason(kind, failures, evidence), trace=trace, evidence=said)
    if _eviction_explains(evidence):
        return Verdict(cause="preemption", reason=_eviction(evidence), evidence=said)
    if evidence.cluster_lost:
        return Verdict(cause="cluster_lost", reason="the Ray cluster went away", evidence=said)
    return Verdict(cause="unknown", reason="it ended and left no evidence", evidence=said)


def _eviction_explains(evidence: Evidence) -> bool:
    """Returns whether every process that died did so because its machine, or the coordinator's, was taken back.

    Rank 0 holds the coordinator: when it goes, JAX aborts the processes of all other ranks.
    """
    evicted = evidence.evicted_ranks
    dead = {f.rank for f in evidence.failures if f.kind in ("process_died", "frozen")}
    return bool(evicted) and (dead <= evicted or 0 in evicted)


def _lost(evidence: Evidence) -> str:
    """Returns which TPU slices lost a host without notice, in words; "" if none did."""
    hosts = [host for host in evidence.hosts if host.slice and not set(host.ranks) & evidence.evicted_ranks]
    sentences = []
    for name in sorted({host.slice for host in hosts if host.lost}):
        of_slice = [host for host in hosts if host.slice == name]
        gone = [host for host in of_slice if host.lost]
        which = "all of it" if len(gone) == len(of_slice) > 1 else ", ".join(host.name for host in gone)
        ranks = ", ".join(str(rank) for host in gone for rank in host.ranks) or "none"
        sentences.append(f"{name} was lost without notice: {which} is gone (ranks {ranks})")
    return "; ".join(sentences)


def _eviction(evidence: Evidence) -> str:
    slices = sorted({host.slice or host.name for host in evidence.hosts if set(host.ranks) & evidence.evicted_ranks})
    ranks = ", ".join(map(str, sorted(evidence.evicted_ranks)))
    if not slices:
        return f"the hosts of ranks {ranks} were preempted"
    return f"{', '.join(slices)} {'was' if len(slices) == 1 else 'were'} preempted (ranks {ranks})"


def _sentences(evidence: Evidence) -> Iterator[str]:
    """What was seen, machine by machine and worker by worker, in the order of the ranks."""
    if evidence.preempted_ranks:
        yield f"Ray announced the preemption of ranks {', '.join(map(str, sorted(evidence.preempted_ranks)))}"
    for host in sorted(evidence.hosts, key=lambda host: host.ranks):
        if host.lost:
            ranks = f"ranks {', '.join(map(str, host.ranks))}" if host.ranks else "no rank"
            record = f", the provider's record says {host.provider_state}" if host.provider_state else ""
            yield f"{host.name} ({ranks}) {'still answers' if host.alive else 'is gone'}{record}"
    for failure in sorted(evidence.failures, key=lambda failure: failure.rank):
        last_line = _last_line(failure)
        who = f"rank {failure.rank}" if failure.rank >= 0 else "Ray Train"
        yield f"{who}: {failure.kind.replace('_', ' ')}: {last_line[:300]}"


# All of them leave the mathematics of a run as it is.
_LESS_MEMORY = "execution.remat, execution.accumulation_steps and mesh.fsdp take less, `openmoe plan` says what fits"


def _last_line(failure: Failure) -> str:
    """Returns the last line of what was raised, without the full name of an error of ours: the words are enough."""
    return re.sub(r"^openmoe(\.\w+)+: ", "", (failure.text.strip().splitlines() or [""])[-1].strip())


def _reason(kind: FailureKind, failures: Sequence[Failure], evidence: Evidence) -> str:
    gone = ", ".join(host.name for host in evidence.hosts if host.lost)
    ranks = ", ".join(str(f.rank) for f in failures)
    last_line = _last_line(failures[0])
    return {
        "superseded": "another driver has claimed this run directory: the run was started a second time",
        "bad_input": f"the input is wrong: {last_line}",
        "damaged_checkpoint": f"the checkpoint cannot be trusted: {last_line}",
        "bad_numbers": f"the loss is not finite, or has leapt up: {last_line}",
        "out_of_memory": f"rank {ranks} ran out of memory; {_LESS_MEMORY}",
        "raised": f"rank {ranks} raised: {last_line}",
        "hung": f"rank {ranks} made no progress: {last_line}",
        "no_storage": f"the storage did not answer: {last_line}",
        "frozen": f"rank {ranks} froze: {last_line}",
        "process_died": f"the process of rank {ranks} died" + (f" with its host {gone}" if gone else ""),
        "lost_peer": f"rank {ranks} lost a peer" + (f": {gone} is gone" if gone else " that left no trace"),
        "start_timeout": f"the worker group did not start: {last_line}",
        "controller": f"Ray Train's controller failed: {last_line}",
    }[kind]


# What differs each time the same thing happens: addresses in memory and on the net, ids, processes.
_INCIDENTAL = re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\bpid[= ]\d+|\b\d+(\.\d+){3}(:\d+)?")


def same_end(last: tuple[str, int] | None, trace: str, step: int) -> bool:
    """Returns whether a run died of the same as before, without having come any further.

    Args:
      last: trace and step of the newest end that left a trace; None if none did. What the machines do in between,
        such as preemptions, is no end of this kind.
      trace: of this end; "" for one that left none.
      step: of the newest accepted checkpoint at this end.
    """
    if last is None or not trace or step > last[1]:
        return False
    return _INCIDENTAL.sub("", trace) == _INCIDENTAL.sub("", last[0])


FORGOTTEN_AFTER_S = 24 * 3600.0


class Restart(NamedTuple):
    """That something was started again."""

    cause: Cause
    step: int  # of the newest accepted checkpoint, then
    time_s: float  # Unix time


def counting(restarts: Iterable[Restart], step: int, time_s: float) -> tuple[Restart, ...]:
    """Returns the restarts that still count against their budgets: of the last day, and since the run got no further.

    So a run of months needs no budget for all of them, one that gets nowhere ends however slowly it fails, and one that
    fails after each checkpoint does so no more often in a day than its budgets allow.

    Args:
      restarts: those that counted so far.
      step: of the newest accepted checkpoint.
      time_s: Unix time.
    """
    return tuple(r for r in restarts if step <= r.step or time_s - r.time_s < FORGOTTEN_AFTER_S)


def spent(restarts: Iterable[Restart]) -> dict[str, int]:
    """Returns how many restarts there are of each cause."""
    return dict(Counter(restart.cause for restart in restarts))


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
      spent: restarts that count (see `counting`), by cause.
      same_trace_without_progress: see `same_end`.
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
