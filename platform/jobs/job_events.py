"""What happens to jobs, and what is to be done about it: the words between controller, command line and store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from openmoe.platform.run.verdict import Verdict

# Ray's words, and ours for a submission that a Ray which answers does not know.
RayStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED", "MISSING"]


class JobError(ValueError):
    """A job, a schedule or their database cannot be used as asked; one line with the remedy."""


def check_cluster(cluster: str) -> None:
    """Refuses an address that carries what must never reach the database.

    Raises:
      JobError: it has a user, a password or a token in it.
    """
    address = urlsplit(cluster)
    if address.scheme and (address.username or address.password or address.query or address.fragment):
        place = f"{address.scheme}://{address.hostname}"
        raise JobError(f"cluster: {place}...: an address carries no user, password or token; set RAY_AUTH_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job, at a Unix time."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}  # for the store, which decodes

    job_id: str
    time_s: float


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is asked of a job.

    Attributes:
      name: the run's.
      run_dir: absolute local path, or gs://.
      run_file: the resolved run file, YAML, with absolute paths.
      cluster: a name under home/clusters, or the http:// address of a Ray dashboard.
      cluster_file: the resolved cluster file, YAML; "" for an address.
      slots: what it occupies of its cluster: slices, or 1.
      budgets: restarts allowed, by cause.
    """

    name: str
    run_dir: str
    run_file: str
    cluster: str
    cluster_file: str
    slots: int
    budgets: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Submitted(JobRequest, Event):
    """Somebody, or a schedule, asked for a run.

    Attributes:
      schedule: its name, if it was one.
      stop_at_s: Unix time at which its window closes.
    """

    schedule: str | None = None
    stop_at_s: float | None = None

    def __post_init__(self) -> None:
        """Refuses what must never reach the database."""
        if self.slots < 1:
            raise JobError(f"slots: a job occupies at least 1, got {self.slots}")
        check_cluster(self.cluster)


@dataclass(frozen=True, kw_only=True)
class Admitted(Event):
    """Its cluster has room; the next attempt begins."""


@dataclass(frozen=True, kw_only=True)
class CancelAsked(Event):
    """Somebody wants it no more."""

    why: str = "on request"


@dataclass(frozen=True, kw_only=True)
class RetryAsked(Event):
    """Somebody wants a failed or cancelled job to go on, with fresh budgets and no window."""


@dataclass(frozen=True, kw_only=True)
class WindowClosed(Event):
    """The time that its schedule gave it is over; the controller says so once `stop_at_s` has passed."""

    why: str = "its window closed; the next firing goes on from the checkpoint"


@dataclass(frozen=True, kw_only=True)
class ClusterLost(Event):
    """Its cluster does not answer; nothing is known about the submission."""


@dataclass(frozen=True, kw_only=True)
class ClusterFound(Event):
    """Its cluster answers again."""


@dataclass(frozen=True, kw_only=True)
class SubmissionEvent(Event):
    """Something that happened to one submission of a job."""

    submission_id: str


@dataclass(frozen=True, kw_only=True)
class SubmissionAccepted(SubmissionEvent):
    """Ray has it, from this Submit or from an earlier one that was repeated."""


@dataclass(frozen=True, kw_only=True)
class SubmitRefused(SubmissionEvent):
    """Submit failed.

    Attributes:
      error: one line.
      retryable: the same submission may succeed later, or may have arrived all the same (no answer, a timeout).
    """

    error: str
    retryable: bool


@dataclass(frozen=True, kw_only=True)
class RaySaw(SubmissionEvent):
    """What Ray says of a submission; repeating it is harmless and leaves no trace.

    FAILED and STOPPED do not end a starting or running job: whoever saw them collects the evidence and tells
    `AttemptEnded`. MISSING is told only when the cluster answers and does not know the submission.
    """

    status: RayStatus


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(SubmissionEvent):
    """The submission is over and has been judged.

    Attributes:
      outcome: of the submission.
      verdict: why it did not succeed; None counts as unknown, or as an operator's for "stopped".
      step: of the newest accepted checkpoint; 0 for none.
      decided: the driver journalled this verdict and decided by itself to stop; nobody decides again.
      forgets: earlier restarts count as `verdict.counting` says. All counted when earlier versions recorded this, and
        a job must not come back to life because its events are replayed.
    """

    outcome: Literal["succeeded", "failed", "stopped"]
    verdict: Verdict | None = None
    step: int = 0
    decided: bool = False
    forgets: bool = False


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submit the job's run to Ray under this id; an id that Ray has already counts as submitted."""

    job_id: str
    submission_id: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Ask Ray to stop this submission; one that has ended, or that Ray does not know, is stopped."""

    job_id: str
    submission_id: str


Action = Submit | Stop
