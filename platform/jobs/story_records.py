"""Reads what `story` tells: the controller's database and a run directory."""

from __future__ import annotations

from openmoe.platform.jobs import story
from openmoe.platform.jobs.job import Job
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.jobs.story import RunRecords, Sentence
from openmoe.platform.run import journal
from openmoe.platform.run.run_dir import RunDir


def of_job(store: JobStore, job: Job) -> list[Sentence]:
    """Returns the story of a job and of its run since it was submitted."""
    since_s = job.submitted_s
    told = [sentence for sentence in story.of_run(read(RunDir(job.run_dir))) if sentence.time_s >= since_s]
    return story.merged(story.of_job(event for _, event in store.events(job.id)), told)


def read(run: RunDir) -> RunRecords:
    """Returns what a run directory says; of one that is not there, nothing."""
    newest = journal.last_records(run.at("metrics"))  # of process 0, which alone writes them
    return RunRecords(
        claims=run.claims(),
        starts=run.starts(),
        events=run.events(),
        reached={incarnation: record["step"] for (incarnation, _), record in newest.items()},
        finished=run.finished(),
    )
