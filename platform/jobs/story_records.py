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
    claims = run.claims()
    step_of = {0: 0} | {acceptance.number: acceptance.step for acceptance in run.acceptances()}
    reached: dict[int, int] = {}
    for incarnation, _, record in journal.read(run.at("metrics")):
        reached[incarnation] = max(record["step"], reached.get(incarnation, 0))
    return RunRecords(
        claims=claims,
        starts={claim.incarnation: step_of[claim.resumes] for claim in claims},
        events=run.events(),
        reached=reached,
        finished=run.finished(),
    )
