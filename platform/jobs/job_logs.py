"""What a job's drivers print, from the cluster that runs them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from openmoe.clusters.twin import TwinError
from openmoe.platform.jobs import cluster_access
from openmoe.platform.jobs.job import DONE, Job
from openmoe.platform.jobs.job_events import JobError
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.jobs.ray_jobs import RayJobs, RayJobsError


def read(job: Job, home: Path, attempt: int) -> str:
    """Returns all that the driver of an attempt has printed.

    Raises:
      JobError: there is no such attempt, or its cluster does not answer or know it.
    """
    if not 1 <= attempt <= job.attempt:
        there = f"attempts 1 to {job.attempt}" if job.attempt else "none yet"
        raise JobError(f"{job.id}: no attempt {attempt}, there are {there}; it is {job.story}")
    with _explained(job):
        text = _client(job, home).logs(f"{job.id}-{attempt}")
    if not text:
        raise JobError(f"{job.id}: its cluster keeps no lines of attempt {attempt}; {_elsewhere(job)}")
    return text


def follow(store: JobStore, job_id: str, home: Path, *, attempt: int | None, period_s: float) -> Iterator[str]:
    """Yields what the drivers of a job print until it is done, attempt after attempt; or those of one attempt.

    Raises:
      JobError: its cluster does not answer, or not any more.
    """
    done = (attempt or max(store.job(job_id).attempt, 1)) - 1
    while True:
        job = store.job(job_id)
        with _explained(job):
            parts = _all(job, home, done + 1) if job.attempt > done else None
            yield from parts or ()
        if parts is not None:
            done += 1
            if attempt is not None:
                return
        elif job.state in DONE:
            return
        else:
            time.sleep(period_s)


def _all(job: Job, home: Path, attempt: int) -> Iterator[str] | None:
    """What an attempt prints until it has ended; None while Ray has not got it yet."""
    client = _client(job, home)
    if client.status(f"{job.id}-{attempt}") is None:
        return None if attempt == job.attempt and job.state not in DONE else iter(())
    return client.follow(f"{job.id}-{attempt}")


def _client(job: Job, home: Path) -> RayJobs:
    return RayJobs(*cluster_access.access(job.cluster, home))


@contextlib.contextmanager
def _explained(job: Job) -> Generator[None]:
    """Says where the lines are when the cluster that has them cannot be asked."""
    try:
        yield
    except (TwinError, RayJobsError, OSError) as error:
        raise JobError(f"{job.id}: its lines are on its cluster ({error}); {_elsewhere(job)}") from error


def _elsewhere(job: Job) -> str:
    return f"what the run directory knows: openmoe jobs story {job.id}"
