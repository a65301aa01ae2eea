"""Why an attempt ended: what Ray and the run directory say about a submission, judged. Pure.

The run directory is believed first: it is the truth about what happened, and the driver that wrote it knew more than
Ray does. Ray's exit code speaks when the driver could not.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from openmoe.platform.jobs.job_events import RayStatus
from openmoe.platform.run.verdict import Evidence, Failure, FailureKind, Verdict, diagnose

Outcome = Literal["succeeded", "failed", "stopped"]
BAD_INPUT = 2
_SIGNAL_BASE = 128  # how a shell reports that a signal ended its command
_RAYS_WORDS = ("Job entrypoint command failed", "Runtime env is setting up", "Running entrypoint for job")


@dataclass(frozen=True, kw_only=True)
class End:
    """All that is known about a submission that is over.

    Attributes:
      status: Ray's word; MISSING when a cluster that answers does not know the submission.
      exit_code: of the driver's process, if it ended by itself.
      message: Ray's words, with the driver's last lines.
      error_type: Ray's name of the failure, if it has one.
      ended: the newest `ended` record in the run's journal that carries this submission, if any.
      finished: the run directory says that this submission has done the run's last step.
      step: of the newest accepted checkpoint.
    """

    status: RayStatus
    exit_code: int | None = None
    message: str = ""
    error_type: str = ""
    ended: Mapping[str, Any] | None = None
    finished: bool = False
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How an attempt ended. Fields as in `job_events.AttemptEnded`."""

    outcome: Outcome
    verdict: Verdict | None = None
    decided: bool = False


def judge(end: End) -> Judgement:
    """Names the outcome of a submission that is over and, unless it succeeded, its cause with the evidence."""
    decided = _decided_by_the_driver(end)
    match end.status:
        case "SUCCEEDED":
            return Judgement(outcome="succeeded")
        case "MISSING" if end.finished:
            return Judgement(outcome="succeeded")
        case "MISSING" if decided and decided.cause != "operator":  # a machine that shuts down asks its drivers too
            return Judgement(outcome="failed", verdict=decided, decided=True)
        case "MISSING":
            return Judgement(outcome="failed", verdict=_forgotten(end))
        case "STOPPED":
            reason = "stopped by somebody else, as with `ray job stop`"
            return Judgement(outcome="stopped", verdict=_verdict(Evidence(operator_stop=True), reason, end))
    if decided:
        return Judgement(outcome="failed", verdict=decided, decided=True)
    if end.exit_code == BAD_INPUT:
        lines = "\n".join(driver_lines(end.message)[-5:])
        verdict = _verdict(_driver("bad_input"), _last(lines) or "the input is wrong", end, trace=lines)
        return Judgement(outcome="failed", verdict=verdict, decided=True)
    return Judgement(outcome="failed", verdict=_failed(end))


def _decided_by_the_driver(end: End) -> Verdict | None:
    """The verdict with which the driver ended the attempt by itself, if it did."""
    if end.ended is None or end.ended["decision"]["action"] != "stop":
        return None
    return Verdict(
        cause=end.ended["cause"],
        reason=end.ended["decision"]["reason"],
        trace=end.ended["trace"],
        evidence=tuple(end.ended.get("evidence", ())),
    )


def _failed(end: End) -> Verdict:
    """The driver ended without a word in the journal."""
    if number := _signal_number(end.exit_code):
        return _verdict(_driver("process_died"), f"the driver was killed by {_signal_name(number)}", end)
    if end.error_type == "JOB_SUPERVISOR_ACTOR_DIED":
        return _verdict(_driver("process_died"), f"the driver's host or supervisor died: {_last(end.message)}", end)
    if end.exit_code is None:
        reason = f"the driver did not start: {_last(end.message)}"
        return _verdict(_driver("controller"), reason, end, trace=end.message)
    lines = driver_lines(end.message)
    reason = f"the driver ended with exit code {end.exit_code}: {lines[-1] if lines else 'it printed nothing'}"
    return _verdict(_driver("controller"), reason, end, trace="\n".join(lines[-30:]))


def _forgotten(end: End) -> Verdict:
    return _verdict(Evidence(cluster_lost=True), "the cluster that answers now does not know the submission", end)


def _driver(kind: FailureKind) -> Evidence:
    """The evidence of an attempt of which only the end of its driver is known."""
    return Evidence(failures=(Failure(rank=-1, kind=kind, text=""),))


def _verdict(evidence: Evidence, reason: str, end: End, trace: str = "") -> Verdict:
    said = [f"Ray says {end.status}" + (f", exit code {end.exit_code}" if end.exit_code is not None else "")]
    if lines := driver_lines(end.message):
        said.append(f"the driver's last line: {lines[-1]}")
    said.append(f"newest accepted checkpoint: step {end.step}" if end.step else "no checkpoint was accepted yet")
    return replace(diagnose(evidence), reason=reason, trace=trace, evidence=tuple(said))


def driver_lines(message: str) -> list[str]:
    """Returns what the driver itself printed last, out of Ray's message about a failed job."""
    if not message.startswith("Job entrypoint command failed"):
        return []
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    return [line for line in lines if not any(words in line for words in _RAYS_WORDS)]


def _signal_number(exit_code: int | None) -> int:
    """The signal that ended a process, by Python's way of reporting it or the shell's; 0 if none did."""
    if exit_code is None or 0 <= exit_code <= _SIGNAL_BASE:
        return 0
    return -exit_code if exit_code < 0 else exit_code - _SIGNAL_BASE


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
