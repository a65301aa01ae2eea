"""What a job's drivers print, from the cluster that runs them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from openmoe.clusters.twin import TwinError
from openmoe.platform import cluster_access
from openmoe.platform.job import DONE, Job
from openmoe.platform.job_events import JobError
from openmoe.platform.job_store import JobStore
from openmoe.platform.ray_jobs import RayJobs, RayJobsError


def read(job: Job, home: Path, attempt: int) -> str:
    """Returns all that the driver of an attempt has printed.

    Raises:
      JobError: there is no such attempt, or its cluster does not know it.
    """
    if not 1 <= attempt <= job.attempt:
        there = f"attempts 1 to {job.attempt}" if job.attempt else "none yet"
        raise JobError(f"{job.id}: no attempt {attempt}, there are {there}; it is {job.story}")
    text = _client(job, home).logs(f"{job.id}-{attempt}")
    if not text:
        raise JobError(f"{job.id}: its cluster keeps no lines of attempt {attempt}; {_elsewhere(job)}")
    return text


def follow(store: JobStore, job_id: str, home: Path, *, attempt: int | None, period_s: float) -> Iterator[str]:
    """Yields what the drivers of a job print until it is done, attempt after attempt; or those of one attempt.

    Raises:
      JobError: nobody can be asked.
    """
    done = (attempt or max(store.job(job_id).attempt, 1)) - 1
    while True:
        job = store.job(job_id)
        if job.attempt > done and (text := _all(job, home, done + 1)) is not None:
            yield from text
            done += 1
            if attempt is not None:
                return
        elif job.state in DONE:
            return
        else:
            time.sleep(period_s)


def _all(job: Job, home: Path, attempt: int) -> Iterator[str] | None:
    """The lines of an attempt until it has ended; None while Ray has not got it yet."""
    client = _client(job, home)
    if client.status(f"{job.id}-{attempt}") is None:
        return None if attempt == job.attempt and job.state not in DONE else iter(())
    return client.follow(f"{job.id}-{attempt}")


def _client(job: Job, home: Path) -> RayJobs:
    try:
        return RayJobs(*cluster_access.access(job.cluster, home))
    except (TwinError, RayJobsError, OSError) as error:
        raise JobError(f"{job.id}: its lines are on its cluster ({error}); {_elsewhere(job)}") from error


def _elsewhere(job: Job) -> str:
    return f"what the run directory knows: openmoe jobs story {job.id}"
