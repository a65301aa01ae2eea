"""What happened to a job and its run, in sentences that a person reads from top to bottom. Pure.

    10:02:11  submitted: run twin for cluster local
    10:02:12  attempt 1 starts
    10:02:31  incarnation 1 starts from scratch on slice-a-0, slice-a-1
    10:03:20  checkpoints accepted: steps 10 to 40 (4)
    10:03:22  incarnation 1 ended at step 43: preemption: slice-a was preempted; goes on from step 40 (3 steps undone)
              slice-a-0 (ranks 0) is gone, the provider's record says PREEMPTED

A job's part comes from its events in the controller's database, a run's part from its directory alone.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openmoe.platform.jobs import job as jobs
from openmoe.platform.jobs import job_events
from openmoe.platform.jobs.job import Job
from openmoe.platform.jobs.job_events import Event
from openmoe.platform.run.lineage import Claim
from openmoe.platform.train import health

Kind = Literal["job", "incarnation", "checkpoint", "end", "trouble"]


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One thing that happened.

    Attributes:
      time_s: Unix time.
      kind: what it is about; "end" and "trouble" are what to look at first.
      text: without a full stop.
      evidence: sentences that show it.
    """

    time_s: float
    kind: Kind
    text: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What a run directory says, as far as it is told.

    Attributes:
      claims: oldest first.
      starts: step at which each incarnation starts, by its number.
      events: of the journal, in time order, each with its incarnation.
      reached: last step that each incarnation trained, by its number, where that is known.
      finished: what finished.json says.
    """

    claims: Sequence[Claim] = ()
    starts: Mapping[int, int] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    reached: Mapping[int, int] = field(default_factory=dict)
    finished: Mapping[str, Any] | None = None


def merged(*parts: Iterable[Sentence]) -> list[Sentence]:
    """Returns the sentences of several parts in the order of time."""
    return sorted(itertools.chain(*parts), key=lambda sentence: sentence.time_s)


def lines(sentences: Iterable[Sentence]) -> list[str]:
    """Returns the sentences with local times, the evidence indented below, and a line for each new day."""
    from datetime import datetime

    told, day = [], ""
    for sentence in sentences:
        when = datetime.fromtimestamp(sentence.time_s).astimezone()
        if f"{when:%Y-%m-%d}" != day:
            day = f"{when:%Y-%m-%d}"
            told.append(day)
        told.append(f"{when:%H:%M:%S}  {sentence.text}")
        told += [f"{'':10}{line}" for line in sentence.evidence]
    return told


def of_job(events: Iterable[Event]) -> list[Sentence]:
    """Tells what a job went through.

    Args:
      events: all that are recorded about one job, oldest first.
    """
    told: list[Sentence] = []
    job: Job | None = None
    for event in events:
        before = job
        job, _ = jobs.transition(before, event)
        told += _sentences(before, event, job)
    return told


def _sentences(before: Job | None, event: Event, after: Job) -> Iterator[Sentence]:
    n, at = after.attempt, event.time_s
    match event:
        case job_events.Submitted():
            by = f" by schedule {event.schedule}" if event.schedule else ""
            yield Sentence(time_s=at, kind="job", text=f"submitted{by}: run {event.name} for cluster {event.cluster}")
        case job_events.Admitted():
            yield Sentence(time_s=at, kind="job", text=f"attempt {n} starts")
        case job_events.SubmitRefused():
            yield Sentence(time_s=at, kind="trouble", text=f"attempt {n}: {after.reason}")
        case job_events.RaySaw(status="RUNNING") if before and before.state == "starting":
            yield Sentence(time_s=at, kind="job", text=f"attempt {n}: its driver runs")
        case job_events.ClusterLost():
            text = "its cluster does not answer; whether the run goes on there is not known"
            yield Sentence(time_s=at, kind="trouble", text=text)
        case job_events.ClusterFound():
            yield Sentence(time_s=at, kind="job", text="its cluster answers again")
        case job_events.CancelAsked(why=why) | job_events.WindowClosed(why=why) if before and before.state == "queued":
            yield Sentence(time_s=at, kind="end", text=f"cancelled before it started: {why}")
        case job_events.CancelAsked(why=why):
            yield Sentence(time_s=at, kind="job", text=f"attempt {n} is being stopped: {why}")
        case job_events.WindowClosed(why=why):
            yield Sentence(time_s=at, kind="job", text=f"attempt {n} is being stopped: {why}")
        case job_events.RetryAsked():
            yield Sentence(time_s=at, kind="job", text="asked to try again, with fresh budgets")
    if before and before.state in jobs.ACTIVE and after.state not in jobs.ACTIVE:
        yield _attempt_ended(before, event, after)


def _attempt_ended(before: Job, event: Event, after: Job) -> Sentence:
    verdict = event.verdict if isinstance(event, job_events.AttemptEnded) else None
    step = f" at step {event.step}" if isinstance(event, job_events.AttemptEnded) and event.step else ""
    attempt, evidence = f"attempt {before.attempt}", verdict.evidence if verdict else ()
    match after.state:
        case "succeeded":
            text, evidence = f"{attempt} succeeded: the job is done", ()
        case "cancelled":
            text, evidence = f"{attempt} is over{step}: the job is cancelled: {after.reason}", ()
        case "failed":
            text = f"{attempt} ended{step}: the job has failed: {after.reason}"
        case _:
            wait_s = after.not_before_s - event.time_s
            follows = f"another one in {wait_s:.0f} s" if wait_s > 0 else "another one follows"
            text = f"{attempt} ended{step}: {after.reason}; {follows}"
    return Sentence(time_s=event.time_s, kind="end", text=text, evidence=evidence)


def of_run(records: RunRecords) -> list[Sentence]:
    """Tells what a run went through, from its directory alone."""
    by_incarnation: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in records.events:
        by_incarnation[event["incarnation"]].append(event)
    told: list[Sentence] = []
    for index, claim in enumerate(records.claims):
        events = by_incarnation[claim.incarnation]
        following = records.claims[index + 1] if index + 1 < len(records.claims) else None
        told += _incarnation(records, claim, events, following)
    if records.finished:
        loss = records.finished.get("loss")
        final = f", final loss {loss:.3f} nats" if isinstance(loss, float) else ""
        saturated = ", saturated" if records.finished.get("reason") == "saturated" else ""
        text = f"finished: {records.finished['steps']:,} steps{saturated}{final}"
        told.append(Sentence(time_s=records.finished["time_s"], kind="end", text=text))
    return merged(told)


def _incarnation(
    records: RunRecords, claim: Claim, events: Sequence[Mapping[str, Any]], following: Claim | None
) -> Iterator[Sentence]:
    n, start = claim.incarnation, records.starts[claim.incarnation]
    hosts = next((sorted(set(event["hosts"])) for event in events if event["event"] == "placed"), [])
    where = f"goes on from step {start:,}" if start else "starts from scratch"
    on = f" on {', '.join(hosts)}" if hosts else ""
    yield Sentence(time_s=claim.time_s, kind="incarnation", text=f"incarnation {n} {where}{on}")
    accepted = [event for event in events if event["event"] == "accepted"]
    if accepted:
        steps = sorted(event["step"] for event in accepted)
        yield Sentence(time_s=accepted[-1]["time_s"], kind="checkpoint", text=_accepted(steps))
    safe = max([start, *(event["step"] for event in accepted)])
    next_start = records.starts[following.incarnation] if following else safe
    for event in events:
        if event["event"] == "notice":
            yield Sentence(time_s=event["time_s"], kind="checkpoint", text=_noticed(event))
        if event["event"] == "ended":
            yield _incarnation_ended(event, records.reached.get(n), next_start)
    yield from _health(events)


def _health(events: Sequence[Mapping[str, Any]]) -> Iterator[Sentence]:
    """Tells what was found about the run's health; of many skipped updates in one sentence."""
    for event in events:
        if event["event"] == "alarm":
            yield Sentence(time_s=event["time_s"], kind="trouble", text=health.words(event))
        elif event["event"] == "straggler":
            yield Sentence(time_s=event["time_s"], kind="trouble", text=event["text"])
        elif event["event"] == "left_out":
            text = "rows [{:,}, {:,}) are left out: {}".format(*event["rows"], event["incident"])
            yield Sentence(time_s=event["time_s"], kind="trouble", text=text)
    if left := [event for event in events if event["event"] == "not_removed"]:
        text = "an old checkpoint was not removed ({:,} times): {error}".format(len(left), **left[-1])
        yield Sentence(time_s=left[-1]["time_s"], kind="trouble", text=text)
    if skipped := [event for event in events if event["event"] == "update_skipped"]:
        steps = sorted({event["step"] for event in skipped})
        named = ", ".join(f"{step:,}" for step in steps[:10]) + (f" and {len(steps) - 10:,} more" * (len(steps) > 10))
        text = f"updates that were not finite were skipped: steps {named}"
        yield Sentence(time_s=skipped[-1]["time_s"], kind="trouble", text=text)


def _noticed(event: Mapping[str, Any]) -> str:
    does = "saves" if event["saves"] else "does not save"
    takes = f"a save takes {event['save_s']:.0f} s" if event["save_s"] else "no save was measured yet"
    return f"notice at step {event['step']:,}: {does}: {max(0, event['grace_s']):.0f} s are left, {takes}"


def _accepted(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"checkpoint accepted: step {steps[0]:,}"
    return f"checkpoints accepted: steps {steps[0]:,} to {steps[-1]:,} ({len(steps)})"


def _incarnation_ended(event: Mapping[str, Any], reached: int | None, next_start: int) -> Sentence:
    at = "" if reached is None else f" at step {reached:,}"
    text = f"incarnation {event['incarnation']} ended{at}: {event['cause']}: {event['reason']}"
    if event["decision"]["action"] == "retry":
        text += f"; goes on from step {next_start:,}" if next_start else "; starts over"
        undone = (reached or next_start) - next_start
        if undone > 0:
            text += f" ({undone:,} step{'s' if undone > 1 else ''} undone)"
    elif event["decision"]["reason"] != event["reason"]:
        text += f"; its driver gives up: {event['decision']['reason'].removesuffix(': ' + event['reason'])}"
    return Sentence(time_s=event["time_s"], kind="end", text=text, evidence=tuple(event.get("evidence", ())))
