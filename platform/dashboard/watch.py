"""Reads the runs for all who look at them: each at most once a second, by the first who asks; none while nobody looks.

What a run's files said is kept (follow.py), so a page costs one reading of what is new, however many have it open.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openmoe.pipelines import storage
from openmoe.platform.dashboard import views
from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.jobs import story
from openmoe.platform.run.run_dir import RunDir

if TYPE_CHECKING:
    from openmoe.platform.jobs.cron import Schedule
    from openmoe.platform.jobs.job import Job
    from openmoe.platform.jobs.job_store import JobStore
    from openmoe.platform.jobs.story import Sentence

T = TypeVar("T")

READ_EVERY_S = 1.0
LIST_EVERY_S = 5.0
READ_COST_SHARE = 0.2  # of the time, at most, goes into reading one run
BUDGET_S = 1.0  # of one reading; a long history takes several, and is shown as far as it was read
QUIET_SHARE = 0.05  # a run that was quiet for a minute is read every 3 s for the overview
QUIET_MAX_S = 30.0


@dataclass
class WatchedRun:
    """One run, read by one at a time."""

    key: str
    follower: RunFollower
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    read_at_s: float = -1e9
    took_s: float = 0.0
    changed_at_s: float = field(default_factory=time.monotonic)

    async def read(self, view: Callable[[RunFollower], T], *, max_age_s: float = READ_EVERY_S) -> T:
        """Reads what is new, unless somebody has just done so, and returns a view; both in a thread.

        A visitor who leaves meanwhile must not let the next one in before the thread is done.
        """
        return await asyncio.shield(asyncio.ensure_future(self._read(view, max_age_s)))

    async def _read(self, view: Callable[[RunFollower], T], max_age_s: float) -> T:
        async with self.lock:
            await asyncio.to_thread(self._advance, max_age_s)
            return await asyncio.to_thread(view, self.follower)

    def _advance(self, max_age_s: float) -> None:
        began_s = time.monotonic()
        if not self.follower.complete or began_s - self.read_at_s >= max(max_age_s, self.took_s / READ_COST_SHARE):
            before = self.follower.version
            self.follower.advance(BUDGET_S)
            self.read_at_s = time.monotonic()
            self.took_s = self.read_at_s - began_s if self.follower.complete else 0.0
            if self.follower.version != before:
                self.changed_at_s = self.read_at_s

    @property
    def quiet_age_s(self) -> float:
        """How old a reading may be for somebody who looks at all runs."""
        quiet_s = time.monotonic() - self.changed_at_s
        return min(max(READ_EVERY_S, quiet_s * QUIET_SHARE), QUIET_MAX_S) if self.follower.complete else READ_EVERY_S


class Watch:
    """The runs in some folders, and those of the controller's jobs."""

    def __init__(self, folders: Sequence[str], home: Path) -> None:
        """Looks at nothing yet.

        Args:
          folders: run directories, or folders of them; local or gs://.
          home: where the controller's database and the local clusters are, if there are any.
        """
        self.folders = [absolute(folder) for folder in folders]
        self._home = home
        self._runs: dict[str, WatchedRun] = {}
        self.unlisted: dict[str, str] = {}
        self._listed_at_s = -1e9
        self._lock = asyncio.Lock()
        self._store: JobStore | None = None
        self.jobs_problem = ""

    async def run(self, key: str) -> WatchedRun | None:
        """Returns the run of a key; None if there is none."""
        await self.look_for_runs(LIST_EVERY_S if key in self._runs else 0.0)
        return self._runs.get(key)

    async def look_for_runs(self, max_age_s: float = LIST_EVERY_S) -> None:
        """Lists the folders again, unless that was just done."""
        async with self._lock:
            if time.monotonic() - self._listed_at_s >= max_age_s:
                paths = await asyncio.to_thread(self._find)
                self._runs = {
                    key: self._runs.get(key) or WatchedRun(key, RunFollower(RunDir(path)))
                    for key, path in ((key_of(path), path) for path in paths)
                }
                self._listed_at_s = time.monotonic()

    def _find(self) -> list[str]:
        """Returns the runs' directories, each once; what cannot be listed is said on the page."""
        found, self.unlisted = [], {}
        for folder in dict.fromkeys([*self.folders, *(absolute(job.run_dir) for job in self.jobs())]):
            try:
                if RunDir(folder).exists():
                    found.append(folder)
                elif folder in self.folders:
                    below = [storage.join(folder, name) for name in storage.list_folders(folder)]
                    found += [path for path in below if RunDir(path).exists()]
            except storage.StorageError as error:
                self.unlisted[folder] = str(error)
        return list(dict.fromkeys(found))

    def jobs(self) -> list[Job]:
        """Returns the controller's jobs, newest first; none where no controller has run."""
        return self._of_store(lambda store: list(reversed(store.jobs().values())), [])

    def jobs_of(self, path: str) -> list[Job]:
        """Returns the jobs of a run directory, newest first."""
        return [job for job in self.jobs() if absolute(job.run_dir) == path]

    def story_of_jobs(self, jobs: Iterable[Job]) -> list[Sentence]:
        """Returns what the controller has to tell about some jobs."""
        ids = [job.id for job in jobs]
        events = self._of_store(lambda store: [[event for _, event in store.events(job_id)] for job_id in ids], [])
        return [sentence for of_job in events for sentence in story.of_job(of_job)]

    def version(self) -> int:
        """Returns a number that grows with every change of any job."""
        return self._of_store(lambda store: store.version(), 0)

    def _of_store(self, read: Callable[[JobStore], T], without: T) -> T:
        """Returns what the controller's database says; `without` if there is none, or it cannot be read, and then why.

        Runs are shown all the same.
        """
        path = self._home / "controller.db"
        if not path.exists():
            return without
        from openmoe.platform.jobs.job_events import JobError
        from openmoe.platform.jobs.job_store import JobStore

        try:
            self._store = self._store or JobStore(path)
            found, self.jobs_problem = read(self._store), ""
        except JobError as error:
            self.jobs_problem = str(error)
            return without
        return found

    async def overview(self) -> dict[str, Any]:
        """Returns all that the first page shows."""
        await self.look_for_runs()
        now_s = time.time()

        def row(watched: WatchedRun) -> Callable[[RunFollower], dict[str, Any]]:
            return lambda run: asdict(views.figures(run, watched.key, now_s)) | {"spark": views.sparkline(run)}

        runs = list(self._runs.values())
        rows = await asyncio.gather(*(each.read(row(each), max_age_s=each.quiet_age_s) for each in runs))
        return {"runs": rows, **await asyncio.to_thread(self._wanted, now_s)}

    def _wanted(self, now_s: float) -> dict[str, Any]:
        """What is asked for, and where it may run."""
        jobs = self.jobs()
        schedules = self._of_store(lambda store: list(store.schedules().values()), [])
        return {
            "folders": self.folders,
            "unlisted": self.unlisted,
            "controller": (self._home / "controller.db").exists(),
            "jobs_problem": self.jobs_problem,
            "jobs": [asdict(self.job_view(job)) for job in jobs],
            "schedules": [asdict(_schedule(each, now_s)) for each in schedules],
            "clusters": _clusters(self._home / "clusters"),
        }

    def job_view(self, job: Job) -> views.JobView:
        """Returns a job as it is shown, with the key of its run if that is there."""
        key = key_of(absolute(job.run_dir))
        return views.job_view(job, key if key in self._runs else None)


def _schedule(schedule: Schedule, now_s: float) -> views.ScheduleView:
    from openmoe.platform.jobs import cron

    try:
        return views.schedule_view(schedule, cron.next_fire(schedule, now_s))
    except cron.ScheduleError as error:  # as of a time zone that this machine does not know
        return views.schedule_view(schedule, None, str(error))


def _clusters(folder: Path) -> list[dict[str, Any]]:
    """Returns the clusters of this machine; those that cannot be read are named as such."""
    if not folder.is_dir():
        return []
    from openmoe.clusters import twin

    found = []
    for state_dir in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            found.append(views.cluster_view(twin.status(state_dir)))
        except (ValueError, OSError, TypeError, KeyError) as error:
            name = state_dir.name
            found.append({"name": name, "provider": "", "head_alive": False, "slices": [], "problem": str(error)})
    return found


def absolute(path: str) -> str:
    """Returns a path as it is known by: absolute if local, without a slash at its end."""
    return path.rstrip("/") if storage.is_remote(path) else str(Path(path).absolute())


def key_of(path: str) -> str:
    """Returns what a run is called in addresses; no path ever comes from an address."""
    return hashlib.sha256(path.encode()).hexdigest()[:16]


def digest(value: Any) -> str:
    """Returns a short name of a JSON value, equal when it is."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
