"""The controller: carries out what job.py and placement.py decide, and tells them what happened.

One loop in one process a home, twice a second:

    schedules that are due -> windows that closed -> jobs that fit -> what each job at work wants done -> what Ray says

Whatever is to be done is in the database, with the submission id it will use, before it is done; so the controller
may be killed at any moment, and the next one does again what may have been lost. Runs need no controller to go on:
their drivers live on the clusters. It replaces a driver that died or was lost with its cluster, and nothing else.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from openmoe.clusters.twin import TwinError
from openmoe.pipelines.storage import StorageError
from openmoe.platform import attempt_end, cluster_access, controller_lock, cron, job_events, placement, wheel
from openmoe.platform import job as job_module
from openmoe.platform.attempt_end import End
from openmoe.platform.job import ACTIVE, DONE, Job
from openmoe.platform.job_events import Action, Event, JobError, Stop, Submit
from openmoe.platform.job_store import JobStore
from openmoe.platform.journal import JournalError
from openmoe.platform.ray_jobs import ClusterUnreachable, RayJob, RayJobs, RayJobsError, Refused
from openmoe.platform.run_dir import RunDir, RunDirError

PERIOD_S = 0.5
LOST_AFTER_S = 10.0
MAX_REASON = 300  # characters of a reason in one line; `openmoe jobs show` has it all
Say = Callable[[str], None]
# What can go wrong with one job without being the controller's fault; it is said, and tried again.
TROUBLE = (JobError, RayJobsError, TwinError, StorageError, JournalError, RunDirError, OSError)


def run(home: Path, say: Say) -> int:
    """Runs the controller until a signal tells it to stop; returns the exit code.

    Raises:
      ControllerError: another one runs in this home.
    """
    with controller_lock.only_one(home):
        at_work = serve(home, say)
    going_on = f"; these runs go on, on their clusters: {', '.join(at_work)}" if at_work else ""
    say(f"controller: stopped{going_on}")
    return 0


def serve(home: Path, say: Say) -> list[str]:
    """Runs the controller of a home whose lock the caller holds, until a signal; returns the jobs at work."""
    with _stop_signals() as stopped:
        store = JobStore(home / "controller.db")
        controller = Controller(store, home, say)
        say(f"controller: {_counted(store.jobs().values())}; database {store.path}")
        while not stopped.is_set():
            controller.tick(time.time())
            stopped.wait(PERIOD_S)
        at_work = [job.id for job in store.jobs().values() if job.state in ACTIVE]
        store.close()
    return at_work


@dataclass
class _Link:
    """What the controller has to talk to one cluster with.

    Attributes:
      access: where it was last.
      ray: the client, once somebody answered.
      silent_since: monotonic seconds when it stopped answering; None while it answers.
      why: it did not answer when last asked.
    """

    access: cluster_access.Access | None = None
    ray: RayJobs | None = None
    silent_since: float | None = None
    why: str = ""

    def fails(self, why: Exception) -> None:
        """Remembers since when nobody answers, and the newest reason."""
        self.ray, self.why = None, str(why)
        if self.silent_since is None:
            self.silent_since = time.monotonic()

    @property
    def is_lost(self) -> bool:
        """Whether the silence has lasted too long for a hiccup."""
        return self.silent_since is not None and time.monotonic() - self.silent_since > LOST_AFTER_S


class Controller:
    """One round after another over everything that is not done.

    Args:
      store: what is wanted.
      home: where clusters and wheels are.
      say: gets a line for each thing that happened.
    """

    def __init__(self, store: JobStore, home: Path, say: Say) -> None:
        self._store, self._home, self._say = store, home, say
        self._links: dict[str, _Link] = {}
        self._told = {job.id: _line(job, "") for job in store.jobs().values()}
        self._reasons = {job.id: job.reason for job in store.jobs().values()}

    def tick(self, now_s: float) -> None:
        """Does all there is to do now."""
        self._fire_schedules(now_s)
        self._close_windows(now_s)
        with self._trouble_told("queue"):
            self._admit(now_s)
        for job in self._jobs():
            if job.state in ACTIVE:
                with self._trouble_told(job.id):
                    self._attend(job, now_s)

    def _jobs(self) -> list[Job]:
        """All jobs as they are now; what other processes did to them is told here."""
        jobs = list(self._store.jobs().values())
        for job in jobs:
            self._tell(job)
        return jobs

    def _fire_schedules(self, now_s: float) -> None:
        for schedule in self._store.schedules().values():
            with self._trouble_told(schedule.name):
                if decision := cron.decide(schedule, self._store.jobs().values(), now_s):
                    job_id = self._store.new_id(schedule.run_name)
                    self._store.apply_all(cron.events(schedule, decision, job_id, now_s))
                    self._say(f"schedule {schedule.name}: {self._store.schedule(schedule.name).last_result}")

    def _close_windows(self, now_s: float) -> None:
        for job in self._jobs():
            if job.state not in DONE | {"stopping"} and job.stop_at_s is not None and job.stop_at_s <= now_s:
                self._apply(job_events.WindowClosed(job_id=job.id, time_s=now_s))

    def _admit(self, now_s: float) -> None:
        """Starts attempts of queued jobs where a cluster answers and has room."""
        jobs = self._jobs()
        clusters = {job.cluster for job in jobs if job.state == "queued" and job.not_before_s <= now_s}
        room = {
            cluster: cluster_access.capacity(cluster, jobs, self._home)
            for cluster in clusters
            if self._reach(cluster) is not None
        }
        placed = placement.place(jobs, room, now_s)
        for admitted in placed.admitted:
            with self._trouble_told(admitted.job_id):
                self._apply(admitted)
        for job in jobs:
            if job.id in placed.waiting and job.cluster in clusters and job.not_before_s <= now_s:
                why = placed.waiting[job.id] if job.cluster in room else self._links[job.cluster].why
                self._tell_once(f"waits {job.id}", f"{job.id} waits: {why}")

    def _attend(self, job: Job, now_s: float) -> None:
        """Does what a job at work wants done, then takes down what Ray says of it."""
        ray = self._reach(job.cluster)
        if ray is None:
            if self._links[job.cluster].is_lost and not job.cluster_lost:
                self._apply(job_events.ClusterLost(job_id=job.id, time_s=now_s))
            return
        try:
            if job.cluster_lost:
                job = self._apply(job_events.ClusterFound(job_id=job.id, time_s=now_s))
            if job.not_before_s <= now_s:
                for action in job_module.pending(job):
                    self.perform(action)
            self._look(self._store.job(job.id), ray)
        except ClusterUnreachable as silence:
            self._links[job.cluster].fails(silence)

    def _reach(self, cluster: str) -> RayJobs | None:
        """Returns the client of a cluster; None while nobody answers there."""
        link = self._links.setdefault(cluster, _Link())
        try:
            access = cluster_access.access(cluster, self._home)
            if link.ray is None or access != link.access:
                link.access, link.ray = access, RayJobs(*access)
            link.silent_since = None
        except (TwinError, ClusterUnreachable, OSError) as silence:
            link.fails(silence)
        return link.ray

    def perform(self, action: Action) -> None:
        """Does one thing that the database holds already, and writes down what came of it."""
        job = self._store.job(action.job_id)
        ray = self._reach(job.cluster)
        if ray is None:
            return
        match action:
            case Submit():
                self._apply(self._submit(job, action, ray))
            case Stop():
                ray.stop(action.submission_id)

    def _submit(self, job: Job, action: Submit, ray: RayJobs) -> Event:
        """Gives Ray the job's run file and our code."""
        same = {"job_id": job.id, "submission_id": action.submission_id}
        on_this_machine = not cluster_access.is_address(job.cluster)
        entrypoint = "python -m openmoe.platform train run.yaml"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "run.yaml").write_text(job.run_file)
            if job.cluster_file:
                (Path(folder) / "cluster.yaml").write_text(job.cluster_file)
                entrypoint += " --cluster cluster.yaml"
            try:
                ray.submit(
                    action.submission_id,
                    entrypoint,
                    working_dir=Path(folder),
                    wheel=wheel.built_wheel(self._home / "wheels"),
                    environment={"OPENMOE_HOME": str(self._home)} if on_this_machine else {},
                )
            except Refused as refused:
                return job_events.SubmitRefused(
                    **same, time_s=time.time(), error=str(refused), retryable=refused.is_retryable
                )
        return job_events.SubmissionAccepted(**same, time_s=time.time())

    def _look(self, job: Job, ray: RayJobs) -> None:
        """Asks Ray about the job's submission, and judges it if it is over."""
        if job.state not in ACTIVE:
            return
        seen = ray.status(job.submission_id)
        same = {"job_id": job.id, "submission_id": job.submission_id, "time_s": time.time()}
        if seen is not None and not seen.has_ended:
            self._apply(job_events.RaySaw(**same, status=seen.status))
        elif seen is not None or job.accepted or job.state == "stopping":
            end = self.evidence(job, seen)
            judged = attempt_end.judge(end)
            self._apply(
                job_events.AttemptEnded(
                    **same, outcome=judged.outcome, verdict=judged.verdict, step=end.step, decided=judged.decided
                )
            )

    def evidence(self, job: Job, seen: RayJob | None) -> End:
        """Collects what Ray and the run directory say about a submission that is over (None: Ray does not know it)."""
        admitted = [event for _, event in self._store.events(job.id) if isinstance(event, job_events.Admitted)]
        run, since_s = RunDir(job.run_dir), admitted[-1].time_s
        try:
            ended = [event for event in run.events() if event["event"] == "ended" and event["time_s"] >= since_s]
        except JournalError as damaged:  # Ray's word must do
            self._say(f"{job.id}: {damaged}")
            ended = []
        finished, newest = run.finished(), run.newest_accepted()
        return End(
            status=seen.status if seen else "MISSING",
            exit_code=seen.exit_code if seen else None,
            message=seen.message if seen else "",
            error_type=seen.error_type if seen else "",
            ended=ended[-1] if ended else None,
            finished=finished is not None and finished["time_s"] >= since_s,
            step=newest.step if newest else 0,
        )

    def _apply(self, event: Event) -> Job:
        """Writes an event down, tells it, and ends what turned out to live although its attempt is over."""
        before = self._store.jobs().get(event.job_id)
        if before is not None and job_module.transition(before, event) == (before, []):
            return before
        job, actions = self._store.apply(event)
        self._tell(job)
        for action in actions:
            if isinstance(action, Stop) and action.submission_id != job.submission_id:
                self.perform(action)
        return job

    def _tell(self, job: Job) -> None:
        """Says where a job is; its reason only when that is news."""
        is_news = self._reasons.get(job.id, "") != job.reason
        line = _line(job, job.reason if is_news else "")
        if is_news or self._told.get(job.id) != line:
            self._reasons[job.id], self._told[job.id] = job.reason, _line(job, "")
            self._say(line)

    def _tell_once(self, subject: str, line: str) -> None:
        if self._told.get(subject) != line:
            self._told[subject] = line
            self._say(line)

    @contextlib.contextmanager
    def _trouble_told(self, subject: str) -> Generator[None]:
        """Says what could not be done for one job or schedule; the others are attended to all the same."""
        try:
            yield
            self._told.pop(f"trouble {subject}", None)
        except TROUBLE as trouble:
            self._tell_once(f"trouble {subject}", f"{subject}: {trouble}; trying again")
        except Exception:  # a mistake in this program, which the others must not pay for
            self._tell_once(f"trouble {subject}", f"{subject}: {traceback.format_exc()}")


def _line(job: Job, reason: str) -> str:
    attempt = f", attempt {job.attempt}" if job.attempt else ""
    why = f": {' '.join(reason.split())[:MAX_REASON]}" if reason else ""
    pause_s = job.not_before_s - job.changed_s
    again = f"; again in {pause_s:.0f} s" if job.state == "queued" and pause_s > 0 else ""
    return f"{job.id} {job.state}{attempt}{why}{again}"


def _counted(jobs: Iterable[Job]) -> str:
    states = Counter(job.state for job in jobs)
    return ", ".join(f"{number} {state}" for state, number in states.items()) or "no jobs yet"


@contextlib.contextmanager
def _stop_signals() -> Generator[threading.Event]:
    """Gives an event that a request to stop sets, as long as the block runs."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in stop_signals()}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask for a clean end; one that the process was started to ignore, as by nohup, is not."""
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return [number for number in asked if signal.getsignal(number) is not signal.SIG_IGN]
