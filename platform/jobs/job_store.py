"""The controller's database: one append-only log of events in SQLite; jobs and schedules are folds over it.

    event(id, time_s, subject, kind, body)      body: the event's fields as JSON, decoded strictly

Several processes write (command line, controller) and read (dashboard). Each write is one transaction that begins by
reading what the others have written, so that an event is judged by the job as it is; of two that exclude each other
one wins, and the other is refused. What `apply` has returned is on disk (WAL, synchronous FULL).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from openmoe.platform.jobs import cron, job, job_events
from openmoe.platform.jobs.cron import Schedule, ScheduleEvent
from openmoe.platform.jobs.job import Job
from openmoe.platform.jobs.job_events import Action, Event, JobError

KINDS: Mapping[str, type[Event | ScheduleEvent]] = {
    "submitted": job_events.Submitted,
    "admitted": job_events.Admitted,
    "cancel_asked": job_events.CancelAsked,
    "retry_asked": job_events.RetryAsked,
    "window_closed": job_events.WindowClosed,
    "cluster_lost": job_events.ClusterLost,
    "cluster_found": job_events.ClusterFound,
    "submission_accepted": job_events.SubmissionAccepted,
    "submit_refused": job_events.SubmitRefused,
    "ray_saw": job_events.RaySaw,
    "attempt_ended": job_events.AttemptEnded,
    "schedule_added": cron.ScheduleAdded,
    "schedule_removed": cron.ScheduleRemoved,
    "schedule_paused": cron.SchedulePaused,
    "schedule_resumed": cron.ScheduleResumed,
    "schedule_fired": cron.ScheduleFired,
}
_KIND_OF: Mapping[type, str] = {event_type: kind for kind, event_type in KINDS.items()}
_ADAPTERS: Mapping[str, TypeAdapter[Any]] = {kind: TypeAdapter(event_type) for kind, event_type in KINDS.items()}

# One entry a version: MIGRATIONS[n] leads from version n to n + 1. Never changed once released.
MIGRATIONS: Sequence[Sequence[str]] = (
    (
        """create table event (
            id integer primary key,
            time_s real not null,
            subject text not null,
            kind text not null,
            body text not null
        )""",
        "create index event_of_subject on event (subject, id)",
    ),
)
BUSY_TIMEOUT_S = 20.0
ID_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that is taken for another


@dataclass
class _Fold:
    """What the events up to `last_id` add up to."""

    jobs: dict[str, Job] = field(default_factory=dict)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    last_id: int = 0

    def copy(self) -> _Fold:
        return _Fold(dict(self.jobs), dict(self.schedules), self.last_id)

    def add(self, event: Event | ScheduleEvent) -> tuple[bool, list[Action]]:
        """Applies one event; returns whether it changed anything, and what it asks for."""
        if isinstance(event, ScheduleEvent):
            old = self.schedules.get(event.schedule)
            new = cron.changed(old, event)
            if new is None:
                del self.schedules[event.schedule]
            else:
                self.schedules[event.schedule] = new
            return new != old, []
        before = self.jobs.get(event.job_id)
        after, actions = job.transition(before, event)
        self.jobs[event.job_id] = after
        return after is not before, actions


class JobStore:
    """Jobs and schedules of one database; may be used from several threads.

    Reading costs one query for the events that are new since the last reading.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the database, home() / "controller.db"; makes it, readable by its owner alone, if it is not there.

        Raises:
          JobError: it is not a database of ours, or of a newer version.
        """
        self.path = Path(path)
        self._lock = threading.RLock()
        self._fold = _Fold()
        with self._explained():
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._sql = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._sql.execute("pragma synchronous = full")
            if self._migrations():
                with self._transaction():
                    for statement in self._migrations():
                        self._sql.execute(statement)
            self._sql.execute("pragma journal_mode = wal")

    def close(self) -> None:
        """Closes the database."""
        self._sql.close()

    def apply(self, event: Event) -> tuple[Job, list[Action]]:
        """Applies one event of a job in one transaction: fold, `job.transition`, insert.

        When this returns the event is on disk, and only then may its actions be performed. An event that changes
        nothing and asks for nothing is not recorded.

        Raises:
          InvalidTransition: the event cannot happen to the job as it is now, perhaps changed by another process.
        """
        with self._lock:
            actions = self.apply_all([event])
            return self._fold.jobs[event.job_id], actions

    def apply_all(self, events: Iterable[Event | ScheduleEvent]) -> list[Action]:
        """Applies events of jobs and schedules in one transaction: all of them or, if one is impossible, none.

        Returns:
          The actions of all of them, in their order.
        """
        with self._lock, self._explained():
            with self._transaction():
                self._refresh()
                fold = self._fold.copy()
                actions = [action for event in events for action in self._record(fold, event)]
            self._fold = fold
            return actions

    def jobs(self) -> dict[str, Job]:
        """Returns all jobs by id, oldest first."""
        with self._lock, self._explained():
            self._refresh()
            return dict(self._fold.jobs)

    def job(self, id_or_prefix: str) -> Job:
        """Returns the job of an id, or of an unambiguous beginning of one.

        Raises:
          JobError: there is none, or several; names those that are near.
        """
        jobs = self.jobs()
        if id_or_prefix in jobs:
            return jobs[id_or_prefix]
        found = [job_id for job_id in jobs if id_or_prefix and job_id.startswith(id_or_prefix)]
        if len(found) > 1:
            newest = ", ".join(found[:-4:-1])
            raise JobError(f"job {id_or_prefix!r}: {len(found)} jobs begin like this ({newest}); write more of the id")
        if not found:
            raise JobError(
                f"job {id_or_prefix!r}: there is none of this id; {_near(id_or_prefix, list(jobs), 'submit')}"
            )
        return jobs[found[0]]

    def schedules(self) -> dict[str, Schedule]:
        """Returns the schedules that are there, by name."""
        with self._lock, self._explained():
            self._refresh()
            return dict(self._fold.schedules)

    def schedule(self, name: str) -> Schedule:
        """Returns the schedule of a name.

        Raises:
          ScheduleError: there is none.
        """
        schedules = self.schedules()
        if name not in schedules:
            near = _near(name, list(schedules), "schedule add")
            raise cron.ScheduleError(f"schedule {name!r}: there is none of this name; {near}")
        return schedules[name]

    def events(self, subject: str) -> list[tuple[int, Event]]:
        """Returns the recorded events of one job with their ids, oldest first."""
        with self._lock, self._explained():
            rows = self._sql.execute("select id, kind, body from event where subject = ? order by id", (subject,))
            decoded = ((number, self._decode(number, kind, body)) for number, kind, body in rows)
            return [(number, event) for number, event in decoded if isinstance(event, Event)]

    def version(self) -> int:
        """Returns the id of the last event: it grows with every change of anything."""
        with self._lock, self._explained():
            return self._sql.execute("select coalesce(max(id), 0) from event").fetchone()[0]

    def new_id(self, run_name: str) -> str:
        """Returns a job id that was never used: "<run name>-<4 to 6 characters>"."""
        jobs = self.jobs()
        for tried in range(300):
            suffix = "".join(secrets.choice(ID_LETTERS) for _ in range(4 + tried // 100))
            if f"{run_name}-{suffix}" not in jobs:
                return f"{run_name}-{suffix}"
        raise JobError(f"{self.path}: no free job id for run {run_name}; choose another name")

    def _refresh(self) -> None:
        """Adds the events that were recorded since the last reading."""
        rows = self._sql.execute("select id, kind, body from event where id > ? order by id", (self._fold.last_id,))
        for number, kind, body in rows.fetchall():
            event = self._decode(number, kind, body)
            try:
                self._fold.add(event)
            except JobError as error:
                raise JobError(f"{self.path}: event {number} cannot follow those before it ({error})") from error
            self._fold.last_id = number

    def _record(self, fold: _Fold, event: Event | ScheduleEvent) -> list[Action]:
        changed, actions = fold.add(event)
        if changed or actions:
            subject = f"schedule:{event.schedule}" if isinstance(event, ScheduleEvent) else event.job_id
            row = (event.time_s, subject, _KIND_OF[type(event)], self._encode(event))
            added = self._sql.execute("insert into event (time_s, subject, kind, body) values (?, ?, ?, ?)", row)
            assert added.lastrowid is not None
            fold.last_id = added.lastrowid
        return actions

    @staticmethod
    def _encode(event: Event | ScheduleEvent) -> str:
        return json.dumps(asdict(event), separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def _decode(self, number: int, kind: str, body: str) -> Event | ScheduleEvent:
        if kind not in _ADAPTERS:
            raise JobError(f"{self.path}: event {number} is of a kind unknown here, {kind!r}; {self._version_remedy()}")
        try:
            return _ADAPTERS[kind].validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise JobError(
                f"{self.path}: event {number} ({kind}) cannot be read ({problem}); {self._version_remedy()}"
            ) from error

    def _migrations(self) -> list[str]:
        """Returns the statements that make the database one of today's version."""
        [version] = self._sql.execute("pragma user_version").fetchone()
        if version > len(MIGRATIONS):
            raise JobError(f"{self.path}: written by a newer OpenMoE; {self._version_remedy()}")
        if version == len(MIGRATIONS):
            return []
        if version == 0 and self._sql.execute("select count(*) from sqlite_schema").fetchone() != (0,):
            raise JobError(f"{self.path}: a database of something else; set OPENMOE_HOME to another folder")
        steps = [statement for step in MIGRATIONS[version:] for statement in step]
        return [*steps, f"pragma user_version = {len(MIGRATIONS)}"]

    def _version_remedy(self) -> str:
        [version] = self._sql.execute("pragma user_version").fetchone()
        here = f"its version is {version}, this OpenMoE knows {len(MIGRATIONS)}"
        return f"{here}: upgrade OpenMoE, or set OPENMOE_HOME to another folder"

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None]:
        """All of the block or nothing; other writers wait."""
        self._sql.execute("begin immediate")
        try:
            yield
            self._sql.execute("commit")
        except BaseException:
            if self._sql.in_transaction:
                self._sql.execute("rollback")
            raise

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JobError(f"{self.path}: the database of jobs cannot be used: {error}") from error


def _near(word: str, known: Sequence[str], command: str) -> str:
    if not known:
        return f"there are none yet, `openmoe {command}` makes one"
    near = difflib.get_close_matches(word, known, n=3)
    names = ", ".join(f"`{name}`" for name in near or known[:-4:-1])
    return f"did you mean {names}?" if near else f"the newest: {names}"
