"""The controller: carries out what job.py and placement.py decide, and tells them what happened.

One loop in one process a home, twice a second:

    schedules that are due -> windows that closed -> clusters that answer (again): what lives there and must not
        -> jobs that fit -> what each job at work wants done -> what Ray says of it

Whatever is to be done is in the database, with the submission id it will use, before it is done; so the controller
may be killed at any moment, and the next one does again what may have been lost. Runs need no controller to go on:
their drivers live on the clusters. It replaces a driver that died or was lost with its cluster, and nothing else.
Nothing that goes wrong in a round ends the controller, not even a database that cannot be read: `openmoe up` would take
the cluster along, and with it all that trains there.
"""

from __future__ import annotations

import contextlib
import math
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from openmoe.clusters.twin import TwinError
from openmoe.pipelines.storage import StorageError
from openmoe.platform.jobs import attempt_end, cluster_access, controller_lock, cron, job_events, placement, wheel
from openmoe.platform.jobs import job as job_module
from openmoe.platform.jobs.attempt_end import End
from openmoe.platform.jobs.job import ACTIVE, DONE, Job
from openmoe.platform.jobs.job_events import Action, Event, JobError, Stop, Submit
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.jobs.ray_jobs import ClusterUnreachable, RayJob, RayJobs, RayJobsError, Refused
from openmoe.platform.run.journal import JournalError
from openmoe.platform.run.run_dir import RunDir, RunDirError

PERIOD_S = 0.5
LOST_AFTER_S = 10.0
LONGEST_REST_S = 5.0  # between two questions to a cluster that does not answer; each may take seconds
STRAYS_AGAIN_S = 5.0  # Ray gives what it stops 3 s
MAX_REASON = 300  # characters of a reason in one line; `openmoe jobs show` has it all
Say = Callable[[str], None]
Connect = Callable[[str, str], RayJobs]
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
    with _stop_signals() as stopped, contextlib.closing(JobStore(home / "controller.db")) as store:
        controller = Controller(store, home, say)
        say(f"controller: {_counted(store.jobs().values())}; database {store.path}")
        while not stopped.is_set():
            controller.tick(time.time())
            stopped.wait(PERIOD_S)
        return controller.at_work()


@dataclass
class _Link:
    """What the controller has to talk to one cluster with.

    Attributes:
      access: where it was last.
      ray: the client, while it answers.
      silent_since_s: Unix time when it stopped answering; None while it answers.
      ask_s: Unix time before which it is not asked whether it answers again.
      look_s: Unix time of the next look for strays: 0 before the first one since it answers, inf once there are none.
      why: it does not answer.
    """

    access: cluster_access.Access | None = None
    ray: RayJobs | None = None
    silent_since_s: float | None = None
    ask_s: float = 0.0
    look_s: float = 0.0
    why: str = ""

    def answers(self, access: cluster_access.Access, ray: RayJobs) -> None:
        """Takes note of somebody who answers (again), whose jobs nobody has looked at yet."""
        self.access, self.ray, self.look_s, self.why = access, ray, 0.0, ""

    def fails(self, why: Exception, now_s: float) -> None:
        """Remembers since when nobody answers, and the newest reason; a long silence is asked less often."""
        self.ray, self.why = None, str(why)
        if self.silent_since_s is None or now_s < self.silent_since_s:  # the latter when the clock was set back
            self.silent_since_s = now_s
        self.ask_s = now_s + min((now_s - self.silent_since_s) / 10, LONGEST_REST_S)

    def is_lost(self, now_s: float) -> bool:
        """Whether the silence has lasted too long for a hiccup."""
        return self.silent_since_s is not None and now_s - self.silent_since_s > LOST_AFTER_S


class Controller:
    """One round after another over everything that is not done.

    Args:
      store: what is wanted.
      home: where clusters and wheels are.
      say: gets a line for each thing that happened.
      connect: gives the client of a dashboard's address and token.
    """

    def __init__(self, store: JobStore, home: Path, say: Say, connect: Connect = RayJobs) -> None:
        self._store, self._home, self._print, self._connect = store, home, say, connect
        self._links: dict[str, _Link] = {}
        jobs = store.jobs().values()
        self._told = {job.id: _line(job, "") for job in jobs}
        self._reasons = {job.id: job.reason for job in jobs}

    def tick(self, now_s: float) -> None:
        """Does all there is to do now; whatever goes wrong is said, and tried again the next time."""
        for subject, do in {
            "schedules": self._fire_schedules,
            "windows": self._close_windows,
            "clusters": self._reach_clusters,
            "queue": self._admit,
            "jobs": self._attend_all,
        }.items():
            with self._trouble_told(subject):
                do(now_s)

    def at_work(self) -> list[str]:
        """Returns the ids of the jobs at work, as far as the database can be read."""
        with self._trouble_told("jobs"):
            return [job.id for job in self._store.jobs().values() if job.state in ACTIVE]
        return []

    def _jobs(self) -> list[Job]:
        """All jobs as they are now; what other processes did to them is told here."""
        jobs = list(self._store.jobs().values())
        for job in jobs:
            self._tell(job)
        return jobs

    def _fire_schedules(self, now_s: float) -> None:
        for schedule in self._store.schedules().values():
            with self._trouble_told(f"schedule {schedule.name}"):
                if decision := cron.decide(schedule, self._store.jobs().values(), now_s):
                    job_id = self._store.new_id(schedule.run_name)
                    self._store.apply_all(cron.events(schedule, decision, job_id, now_s))
                    self._say(f"schedule {schedule.name}: {self._store.schedule(schedule.name).last_result}")

    def _close_windows(self, now_s: float) -> None:
        for job in self._jobs():
            if job.state not in DONE | {"stopping"} and job.stop_at_s is not None and job.stop_at_s <= now_s:
                with self._trouble_told(f"window of {job.id}"):
                    self._apply(job_events.WindowClosed(job_id=job.id, time_s=now_s))

    def _reach_clusters(self, now_s: float) -> None:
        """Asks each cluster that some job has to do with, once a round, and stops what must not live there."""
        jobs = {job.id: job for job in self._jobs()}
        wanted = dict.fromkeys(job.cluster for job in jobs.values() if job_module.needs_cluster(job, now_s))
        self._links = {cluster: self._links.get(cluster, _Link()) for cluster in wanted}
        for cluster, link in self._links.items():
            with self._trouble_told(f"cluster {cluster}"), _silence_noted(link, now_s):
                self._reach(cluster, link, now_s)
                if link.ray is not None:
                    self._stop_strays(cluster, link, link.ray, jobs, now_s)
                    link.silent_since_s = None

    def _reach(self, cluster: str, link: _Link, now_s: float) -> None:
        """Connects to a cluster that was silent, or is elsewhere now."""
        if link.ray is None and 0 < link.ask_s - now_s <= LONGEST_REST_S:
            return
        try:
            access = cluster_access.access(cluster, self._home)
            if link.ray is None or access != link.access:
                link.answers(access, self._connect(*access))
        except (TwinError, RayJobsError, OSError) as silence:
            link.fails(silence, now_s)

    def _stop_strays(self, cluster: str, link: _Link, ray: RayJobs, jobs: Mapping[str, Job], now_s: float) -> None:
        """Looks for submissions that no job waits for: once after a cluster answers (again), and until none lives."""
        abandoned = [job for job in jobs.values() if job.cluster == cluster and job.abandoned]
        if now_s < link.look_s and not abandoned:
            return
        strays = job_module.strays(jobs, cluster, ray.alive(), now_s)
        for seen in strays:
            name = seen.submission_id
            self._tell_once(f"stray {name}", f"{name} lives although no job waits for it; stopping it")
            self._apply(seen, ray)
        for job in abandoned:
            self._apply(job_events.ClusterFound(job_id=job.id, time_s=now_s))
        link.look_s = now_s + STRAYS_AGAIN_S if strays else math.inf

    def _admit(self, now_s: float) -> None:
        """Starts attempts of queued jobs where a cluster answers, has been looked at for strays, and has room."""
        jobs = self._jobs()
        due = [job for job in jobs if job.state == "queued" and not job_module.pauses_s(job, now_s)]
        room: dict[str, int] = {}
        for cluster, link in self._links.items():
            if link.ray is not None and link.look_s > 0.0 and any(job.cluster == cluster for job in due):
                with self._trouble_told(f"room of {cluster}"):
                    room[cluster] = cluster_access.capacity(cluster, jobs, self._home)
        placed = placement.place(jobs, room, now_s)
        for admitted in placed.admitted:
            with self._trouble_told(f"admission of {admitted.job_id}"):
                self._apply(admitted)
        for job in due:
            if job.id in placed.waiting and (link := self._links.get(job.cluster)):
                why = placed.waiting[job.id] if job.cluster in room else link.why or placed.waiting[job.id]
                self._tell_once(f"waits {job.id}", f"{job.id} waits: {why}")

    def _attend_all(self, now_s: float) -> None:
        for job in self._jobs():
            if job.state in ACTIVE and (link := self._links.get(job.cluster)):
                with self._trouble_told(job.id), _silence_noted(link, now_s):
                    self._attend(job, link, now_s)

    def _attend(self, job: Job, link: _Link, now_s: float) -> None:
        """Does what a job at work wants done, then takes down what Ray says of it."""
        if link.ray is None:
            if link.is_lost(now_s) and not job.cluster_lost:
                self._apply(job_events.ClusterLost(job_id=job.id, time_s=now_s))
            return
        if job.cluster_lost:
            job = self._apply(job_events.ClusterFound(job_id=job.id, time_s=now_s))
        if not job_module.pauses_s(job, now_s):
            for action in job_module.pending(job):
                self._perform(action, link.ray, now_s)
        self._look(self._store.job(job.id), link.ray, now_s)

    def _perform(self, action: Action, ray: RayJobs, now_s: float) -> None:
        """Does one thing that the database holds already, and writes down what came of it."""
        match action:
            case Submit():
                self._apply(self._submit(self._store.job(action.job_id), action, ray, now_s), ray)
            case Stop():
                ray.stop(action.submission_id)

    def _submit(self, job: Job, action: Submit, ray: RayJobs, now_s: float) -> Event:
        """Gives Ray the job's run file and our code."""
        same = {"job_id": job.id, "submission_id": action.submission_id, "time_s": now_s}
        on_this_machine = not cluster_access.is_address(job.cluster)
        entrypoint = f"python -m openmoe.platform train run.yaml --attempt {action.submission_id}"
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
                    wheel=wheel.only_wheel(self._home / "wheels"),
                    environment={"OPENMOE_HOME": str(self._home)} if on_this_machine else {},
                )
            except Refused as refused:
                return job_events.SubmitRefused(**same, error=str(refused), retryable=refused.is_retryable)
        return job_events.SubmissionAccepted(**same)

    def _look(self, job: Job, ray: RayJobs, now_s: float) -> None:
        """Asks Ray about the job's submission, and judges it if it is over."""
        if job.state not in ACTIVE:
            return
        seen = ray.status(job.submission_id)
        same = {"job_id": job.id, "submission_id": job.submission_id, "time_s": now_s}
        if seen is not None and not seen.has_ended:
            self._apply(job_events.RaySaw(**same, status=seen.status), ray)
        elif seen is not None or job.accepted or job.state == "stopping":
            end = self.evidence(job, seen)
            judged = attempt_end.judge(end)
            self._apply(
                job_events.AttemptEnded(
                    **same,
                    outcome=judged.outcome,
                    verdict=judged.verdict,
                    step=end.step,
                    decided=judged.decided,
                    forgets=True,
                )
            )

    def evidence(self, job: Job, seen: RayJob | None) -> End:
        """Collects what Ray and the run directory say about a submission that is over (None: Ray does not know it).

        Records are the submission's by the name they carry; times would compare clocks of different machines.
        """
        run, name = RunDir(job.run_dir), job.submission_id
        try:
            ended = [event for event in run.events() if event["event"] == "ended" and event.get("attempt") == name]
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
            finished=finished is not None and finished.get("attempt") == name,
            step=newest.step if newest else 0,
        )

    def _apply(self, event: Event, ray: RayJobs | None = None) -> Job:
        """Writes an event down, tells it, and has `ray` stop what turned out to live although its attempt is over."""
        before = self._store.jobs().get(event.job_id)
        if before is not None and job_module.transition(before, event) == (before, []):
            return before
        job, actions = self._store.apply(event)
        self._tell(job)
        for action in actions:
            if ray is not None and isinstance(action, Stop) and action not in job_module.pending(job):
                ray.stop(action.submission_id)
        return job

    def _tell(self, job: Job) -> None:
        """Says where a job is; its reason only when that is news."""
        is_news = self._reasons.get(job.id, "") != job.reason
        line = _line(job, job.reason if is_news else "")
        if is_news or self._told.get(job.id) != line:
            self._reasons[job.id], self._told[job.id] = job.reason, _line(job, "")
            self._say(line)

    def _say(self, line: str) -> None:
        """Says a line; where it cannot be written, as on a full disk, the controller goes on without."""
        with contextlib.suppress(OSError):
            self._print(line)

    def _tell_once(self, subject: str, line: str) -> None:
        if self._told.get(subject) != line:
            self._told[subject] = line
            self._say(line)

    @contextlib.contextmanager
    def _trouble_told(self, subject: str) -> Generator[None]:
        """Says what could not be done for one subject, once; the others are attended to all the same."""
        try:
            yield
            self._told.pop(f"trouble {subject}", None)
        except TROUBLE as trouble:
            self._tell_once(f"trouble {subject}", f"{subject}: {trouble}; trying again")
        except Exception:  # a mistake in this program, which the others must not pay for
            self._tell_once(f"trouble {subject}", f"{subject}: {traceback.format_exc()}")


@contextlib.contextmanager
def _silence_noted(link: _Link, now_s: float) -> Generator[None]:
    """Takes note of a cluster that stops answering within the block."""
    try:
        yield
    except ClusterUnreachable as silence:
        link.fails(silence, now_s)


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
