"""Jobs: what the controller was asked for, as frozen values and one pure transition.

    Submitted
        |
        v     Admitted              RaySaw RUNNING
      queued ------------> starting --------------> running
       ^ ^ |                   |                       |
       | | |                   +-----------+-----------+
       | | |                               +-- SUCCEEDED -------------------------------------> succeeded
       | | |                               +-- AttemptEnded, RaySaw MISSING, SubmitRefused
       | +-|-- decide: retry, after a pause --+-- decide: stop -------------------------------> failed
       |   |                               |  +-- stopped by an operator ---------------------> cancelled
       |   |                               +-- CancelAsked, WindowClosed
       |   |                               v
       |   |                     stopping(next=cancelled) -- it ended, or Ray does not know it -> cancelled
       |   |                                              +- it had SUCCEEDED all the same ----> succeeded
       |   +-- CancelAsked, WindowClosed ------------------------------------------------------> cancelled
       +-- RetryAsked, with fresh budgets ------------------------------------------------ failed, cancelled

One Ray submission at a time belongs to a job: `submission_id` is fixed when the attempt is admitted, that is recorded
before anything is submitted, so submitting it again after a crash is harmless. Events about another submission, or
about one whose attempt is over, are stale: they change nothing; where they show that it lives, they stop it.
Losing the cluster is no end: the job keeps its state and is flagged. When the cluster is found again, Ray says whether
the submission still lives; one that it does not know (`MISSING`) has ended with its cluster, at no cost to the budgets
of crashes. A job that is cancelled a second time meanwhile is `abandoned`; what lives on of it there, as any submission
that no job waits for, is one of the `strays`, which are stopped. Time is in the events and never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from openmoe.platform.jobs.job_events import (
    Action,
    Admitted,
    AttemptEnded,
    CancelAsked,
    ClusterFound,
    ClusterLost,
    Event,
    JobError,
    JobRequest,
    RaySaw,
    RayStatus,
    RetryAsked,
    Stop,
    SubmissionAccepted,
    SubmissionEvent,
    Submit,
    SubmitRefused,
    Submitted,
    WindowClosed,
)
from openmoe.platform.run import verdict as verdicts
from openmoe.platform.run.verdict import Cause, Restart, Verdict

JobState = Literal["queued", "starting", "running", "stopping", "succeeded", "failed", "cancelled"]
ACTIVE: frozenset[JobState] = frozenset({"starting", "running", "stopping"})
DONE: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
# The machines were taken away; waiting would not make the next ones better.
NO_PAUSE: frozenset[Cause] = frozenset({"preemption", "cluster_lost"})


@dataclass(frozen=True, kw_only=True)
class Job(JobRequest):
    """What was asked for, and how far it has come.

    Attributes:
      id: "<run name>-<4 to 6 characters>", unique for ever.
      submitted_s: Unix time; the place in the queue.
      changed_s: Unix time of the last event that changed this job.
      state: see the module.
      next: where a stopping job goes when it has stopped.
      attempt: number of the newest attempt; 0 before the first.
      accepted: Ray has the submission of this attempt.
      restarts: that were made and still counted against their budgets at the newest end.
      setbacks: faults and refused submissions in a row without progress; the pause grows with them.
      last_end: (trace, step) of the newest end that left a trace, for `verdict.same_end`.
      last_step: of the newest accepted checkpoint at the newest fault; evictions leave it alone.
      reason: why it is as it is, in words, newest.
      trace: what a failed job died of.
      cluster_lost: the cluster did not answer when last asked.
      abandoned: it was given up while its cluster was lost, which has not answered since: a submission may live there.
      not_before_s: Unix time before which nothing is submitted for it.
      schedule: name of the schedule that submitted it.
      stop_at_s: Unix time at which its window closes.
    """

    id: str
    submitted_s: float
    changed_s: float
    state: JobState = "queued"
    next: JobState | None = None
    attempt: int = 0
    accepted: bool = False
    restarts: tuple[Restart, ...] = ()
    setbacks: int = 0
    last_end: tuple[str, int] | None = None
    last_step: int | None = None
    reason: str = ""
    trace: str = ""
    cluster_lost: bool = False
    abandoned: bool = False
    not_before_s: float = 0.0
    schedule: str | None = None
    stop_at_s: float | None = None

    @property
    def submission_id(self) -> str:
        """The Ray submission of the newest attempt."""
        return f"{self.id}-{self.attempt}"

    @property
    def spent(self) -> dict[str, int]:
        """What counts against the budgets, by cause."""
        return verdicts.spent(self.restarts)

    @property
    def story(self) -> str:
        """State, attempt and newest reason, in one line."""
        attempt = f" (attempt {self.attempt})" if self.attempt else ""
        reason = f": {' '.join(self.reason.split())}" if self.reason else ""
        return f"{self.state}{attempt}{reason}"


class InvalidTransition(JobError):
    """An event that cannot happen to a job in its state; the message tells the job's story."""

    def __init__(self, job: Job | None, event: Event) -> None:
        self.job, self.event = job, event
        super().__init__(_impossible(job, event))


def transition(job: Job | None, event: Event) -> tuple[Job, list[Action]]:
    """Returns the job after an event, and what has to be done about it.

    Args:
      job: before the event; None for one that is not known yet.
      event: what happened. If it changes nothing, the very same job comes back.

    Raises:
      InvalidTransition: the event cannot happen to this job.
    """
    if isinstance(event, Submitted):
        if job is not None:
            raise InvalidTransition(job, event)
        return _new(event), []
    if job is None or event.job_id != job.id:
        raise InvalidTransition(job, event)
    if isinstance(event, SubmissionEvent) and (
        event.submission_id != job.submission_id or job.state == "queued" or job.state in DONE
    ):
        return job, _stop_stray(job, event)
    known = replace(job, abandoned=False) if isinstance(event, ClusterFound) else job
    match job.state:
        case "queued":
            after, actions = _queued(known, event)
        case "starting" | "running":
            after, actions = _at_work(known, event)
        case "stopping":
            after, actions = _stopping(known, event)
        case _:
            after, actions = _done(known, event)
    return (job if after == job else replace(after, changed_s=event.time_s)), actions


def pending(job: Job) -> list[Action]:
    """Returns what has to be done for a job as it stands, whether or not it has been done before.

    After a crash this is what may have been lost; at any time doing it again is harmless, since the submission id is
    the same. So one may also do it every time round, once `not_before_s` has passed: a Stop is repeated until Ray
    says that the submission has ended.
    """
    match job.state:
        case "starting" if not job.accepted:
            return [Submit(job_id=job.id, submission_id=job.submission_id)]
        case "stopping":
            return [Stop(job_id=job.id, submission_id=job.submission_id)]
    return []


def needs_cluster(job: Job, now_s: float) -> bool:
    """Returns whether its cluster has to be asked: whether it answers, and what lives there."""
    return job.state in ACTIVE or job.abandoned or (job.state == "queued" and not pauses_s(job, now_s))


def strays(jobs: Mapping[str, Job], cluster: str, alive: Mapping[str, RayStatus], time_s: float) -> list[RaySaw]:
    """Returns what to tell `transition` of submissions that live on a cluster although no job waits for them.

    Args:
      jobs: all, by id.
      cluster: which answers.
      alive: what Ray says of each submission there that has not ended, by id, those of other people included.
      time_s: Unix time.
    """
    found = []
    for submission_id, status in alive.items():
        job_id, _, number = submission_id.rpartition("-")
        job = jobs.get(job_id)
        if job is None or job.cluster != cluster or not number.isdecimal():
            continue
        if job.state not in ACTIVE or submission_id != job.submission_id:
            found.append(RaySaw(job_id=job_id, time_s=time_s, submission_id=submission_id, status=status))
    return found


def pauses_s(job: Job, now_s: float) -> float:
    """Returns how long a job still pauses; 0 too when the clock has been set back to before the pause began."""
    return max(job.not_before_s - now_s, 0.0) if now_s >= job.changed_s else 0.0


def pause_s(setbacks: int) -> float:
    """Returns how long a job waits after so many setbacks in a row: 5 s doubling to 300 s."""
    return min(FIRST_PAUSE_S * 2 ** min(setbacks - 1, 16), LONGEST_PAUSE_S) if setbacks else 0.0


def _new(event: Submitted) -> Job:
    return Job(
        id=event.job_id,
        name=event.name,
        run_dir=event.run_dir,
        run_file=event.run_file,
        cluster=event.cluster,
        cluster_file=event.cluster_file,
        slots=event.slots,
        budgets=event.budgets,
        submitted_s=event.time_s,
        changed_s=event.time_s,
        schedule=event.schedule,
        stop_at_s=event.stop_at_s,
    )


def _queued(job: Job, event: Event) -> tuple[Job, list[Action]]:
    match event:
        case Admitted():
            started = replace(job, state="starting", attempt=job.attempt + 1, accepted=False, not_before_s=0.0)
            return started, pending(started)
        case CancelAsked(why=why) | WindowClosed(why=why):
            return replace(job, state="cancelled", reason=why), []
        case ClusterLost() | ClusterFound():
            return job, []
    raise InvalidTransition(job, event)


def _at_work(job: Job, event: Event) -> tuple[Job, list[Action]]:
    """Starting or running."""
    match event:
        case SubmissionAccepted():
            return replace(job, accepted=True), []
        case SubmitRefused():
            return (job if job.accepted else _refused(job, event)), []
        case RaySaw(status="PENDING"):
            return _alive(job), []
        case RaySaw(status="RUNNING"):
            return replace(_alive(job), state="running"), []
        case RaySaw(status="SUCCEEDED") | AttemptEnded(outcome="succeeded"):
            return _end(job, "succeeded", "finished"), []
        case RaySaw(status="MISSING"):
            return (_judged(job, event, _FORGOTTEN) if job.accepted else job), []
        case RaySaw():
            return job, []
        case AttemptEnded():
            if event.forgets:
                job = replace(job, restarts=verdicts.counting(job.restarts, event.step, event.time_s))
            return _judged(job, event, event.verdict or _UNSAID[event.outcome], event.step, decided=event.decided), []
        case CancelAsked(why=why) | WindowClosed(why=why):
            stopping = replace(job, state="stopping", next="cancelled", reason=why, not_before_s=0.0)
            return stopping, pending(stopping)
        case ClusterLost():
            return (job if job.cluster_lost else replace(job, cluster_lost=True, reason=_LOST)), []
        case ClusterFound():
            return _found(job)
    raise InvalidTransition(job, event)


def _stopping(job: Job, event: Event) -> tuple[Job, list[Action]]:
    assert job.next is not None
    match event:
        case RaySaw(status="SUCCEEDED") | AttemptEnded(outcome="succeeded"):
            return _end(job, "succeeded", "finished before it could be stopped"), []
        case RaySaw(status="STOPPED" | "FAILED" | "MISSING") | AttemptEnded() | SubmitRefused(retryable=False):
            return _end(job, job.next, job.reason), []
        case SubmissionAccepted():  # it was under way when the stop was asked for: that stop may have come too early
            return replace(job, accepted=True), pending(job)
        case RaySaw():
            return replace(job, accepted=True, cluster_lost=False), []
        case CancelAsked() if job.cluster_lost:
            given_up = _end(job, "cancelled", f"{job.reason}; asked again while its cluster was lost")
            return replace(given_up, abandoned=True), []
        case CancelAsked() | WindowClosed() | SubmitRefused():
            return job, []
        case ClusterLost():
            return replace(job, cluster_lost=True), []
        case ClusterFound():
            return replace(job, cluster_lost=False), pending(job) if job.cluster_lost else []
    raise InvalidTransition(job, event)


def _done(job: Job, event: Event) -> tuple[Job, list[Action]]:
    match event:
        case RetryAsked() if job.state != "succeeded":
            fresh = replace(job, state="queued", restarts=(), setbacks=0, last_end=None, last_step=None, trace="")
            return replace(fresh, reason="asked to try again", not_before_s=0.0, stop_at_s=None), []
        case ClusterLost() | ClusterFound() | WindowClosed():
            return job, []
    raise InvalidTransition(job, event)


_LOST, _BACK = "its cluster does not answer", "its cluster answers again"
_FORGOTTEN = Verdict(cause="cluster_lost", reason="the cluster that answers now does not know the submission")
_UNSAID = {
    "failed": Verdict(cause="unknown", reason="it ended and left no evidence"),
    "stopped": Verdict(cause="operator", reason="stopped on request"),
}


def _stop_stray(job: Job, event: SubmissionEvent) -> list[Action]:
    """A submission that lives although its attempt is over must not: one run directory, one driver."""
    match event:
        case SubmissionAccepted() | RaySaw(status="PENDING" | "RUNNING"):
            return [Stop(job_id=job.id, submission_id=event.submission_id)]
    return []


def _refused(job: Job, event: SubmitRefused) -> Job:
    if not event.retryable:
        return replace(_end(job, "failed", f"Ray refused it: {event.error}"), trace=event.error)
    setbacks = job.setbacks + 1
    wait_s = pause_s(setbacks)
    reason = f"could not be submitted ({event.error}); again in {wait_s:.0f} s"
    return replace(job, setbacks=setbacks, not_before_s=event.time_s + wait_s, reason=reason)


def _found(job: Job) -> tuple[Job, list[Action]]:
    """The cluster is back: what Ray has not accepted is sent again at once; what it had, `RaySaw` tells."""
    if not job.cluster_lost:
        return job, []
    found = replace(job, cluster_lost=False, not_before_s=0.0, reason=_BACK)
    return found, pending(found)


def _alive(job: Job) -> Job:
    return replace(job, accepted=True, cluster_lost=False, reason=_BACK if job.cluster_lost else job.reason)


def _judged(job: Job, event: Event, verdict: Verdict, step: int = 0, *, decided: bool = False) -> Job:
    """The attempt is over without success: the policy of `verdict.decide` says whether there is another one."""
    evicted = verdict.cause in NO_PAUSE
    decision = verdicts.decide(
        verdict,
        dict.fromkeys(get_args(Cause), 0) | dict(job.budgets),  # a budget that was never given is none
        job.spent,
        same_trace_without_progress=verdicts.same_end(job.last_end, verdict.trace, step),
    )
    if decided or decision.action == "stop":
        state: JobState = "cancelled" if verdict.cause == "operator" else "failed"
        reason = verdict.reason if decided else decision.reason
        return replace(_end(job, state, reason), trace=verdict.trace)
    stuck = job.last_step is not None and step <= job.last_step
    setbacks = job.setbacks if evicted else job.setbacks + 1 if stuck else 1
    return replace(
        _end(job, "queued", decision.reason),
        restarts=(*job.restarts, Restart(verdict.cause, step, event.time_s)),
        setbacks=setbacks,
        last_end=(verdict.trace, step) if verdict.trace else job.last_end,
        last_step=job.last_step if evicted else step,
        not_before_s=0.0 if evicted else event.time_s + pause_s(setbacks),
    )


def _end(job: Job, state: JobState, reason: str) -> Job:
    """The attempt is over."""
    return replace(job, state=state, next=None, accepted=False, cluster_lost=False, reason=reason, not_before_s=0.0)


def _impossible(job: Job | None, event: Event) -> str:
    if job is None:
        return f"{event.job_id}: no such job; `openmoe jobs list` shows them"
    match event:
        case RetryAsked() if job.state == "succeeded":
            return f"{job.id}: it has succeeded; to train on, submit the run with more steps"
        case RetryAsked():
            return f"{job.id}: cannot be tried again while it is {job.story}; `openmoe jobs cancel {job.id}` first"
        case CancelAsked():
            return f"{job.id}: nothing to cancel, it is {job.story}"
        case Submitted():
            return f"{job.id}: a job of this id was submitted before; it is {job.story}"
    return f"{job.id}: cannot happen to a job that is {job.story}: {event}"
