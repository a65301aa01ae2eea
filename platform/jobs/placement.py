"""Which queued jobs start now: first come, first served on each cluster, without starvation.

A job that does not fit blocks those behind it on its cluster, so that a large one is never passed for ever. Two kinds
of waiting block nobody, because no free slot would end them: a pause (`not_before_s`), and another job at work in the
same run directory. A job after its pause stands where it stood, by the time it was submitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from openmoe.platform.jobs.job import ACTIVE, Job, pauses_s
from openmoe.platform.jobs.job_events import Admitted


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What follows from the queue.

    Attributes:
      admitted: events, in the order of the queue.
      waiting: why each other queued job does not start, in words, by job id.
    """

    admitted: tuple[Admitted, ...]
    waiting: Mapping[str, str]


def place(jobs: Iterable[Job], capacity: Mapping[str, int], now_s: float) -> Placement:
    """Decides about every queued job.

    Args:
      jobs: all jobs, those that are done included.
      capacity: slots by cluster, those in use included; a cluster that does not answer is not named.
      now_s: Unix time.
    """
    jobs = sorted(jobs, key=lambda job: (job.submitted_s, job.id))
    active = [job for job in jobs if job.state in ACTIVE]
    at_work = {_run_of(job): job.id for job in active}
    used = Counter[str]()
    for job in active:
        used[job.cluster] += job.slots
    admitted: list[Admitted] = []
    waiting: dict[str, str] = {}
    first: dict[str, str] = {}  # by cluster, the job that waits for slots
    for job in jobs:
        free = capacity.get(job.cluster, 0) - used[job.cluster]
        if job.state != "queued":
            continue
        if _run_of(job) in at_work:
            waiting[job.id] = f"{at_work[_run_of(job)]} is at work in the same run directory"
        elif left_s := pauses_s(job, now_s):
            waiting[job.id] = f"pauses for {left_s:.0f} s"
        elif job.cluster not in capacity:
            waiting[job.id] = f"cluster {job.cluster} does not answer"
        elif job.cluster in first:
            waiting[job.id] = f"behind {first[job.cluster]}"
        elif job.slots > free:
            first[job.cluster] = job.id
            waiting[job.id] = f"needs {job.slots} of {job.cluster}, {max(free, 0)} free"
        else:
            admitted.append(Admitted(job_id=job.id, time_s=now_s))
            used[job.cluster] += job.slots
            at_work[_run_of(job)] = job.id
    return Placement(admitted=tuple(admitted), waiting=waiting)


def _run_of(job: Job) -> str:
    return job.run_dir.rstrip("/")
