"""Schedules: when a run starts, for how long, and what happens while its last job is still at work. Pure.

Cron expressions have five fields and the meaning that Debian's cron gives them. When clocks change, a fixed time that
does not exist fires at the first minute after the gap, and one that exists twice fires the first time only; a
wildcard in minute or hour follows real time.

    due --> decide (catch-up, window, overlap) --> Fire | Skip --> events --> one transaction of the store
"""

from __future__ import annotations

import difflib
import math
import re
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from itertools import takewhile
from typing import Any, ClassVar, Literal

from cronsim import CronSim, CronSimError

from openmoe.platform.jobs.job import DONE, Job
from openmoe.platform.jobs.job_events import CancelAsked, Event, JobError, Submitted, check_cluster

ON_TIME_S = 300.0  # a firing that is dealt with later than this was missed, and the catch-up policy decides
_STRICT = {"extra": "forbid", "strict": True}  # how the store decodes


class ScheduleError(JobError):
    """A schedule cannot be used as asked; one line with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run that starts again and again.

    Attributes:
      name: unique among the schedules that are there.
      cron: five fields: minute, hour, day of the month, month, day of the week.
      timezone: IANA name, in which `cron` is read.
      run_name: name of the run; with `run_dir` to `budgets`, what its jobs are submitted with (see `job.Job`).
      overlap: while a job of this schedule is not done: skip the firing, let it queue behind, or replace that job.
      catch_up: firings that passed while no controller ran: none of them, or the latest.
      window_s: how long after its firing a job is stopped; None for never.
      last_fired_s: Unix time up to which firings have been dealt with; at first, when it was added.
      paused: nothing fires, and nothing is caught up for the time of the pause.
      last_result: what the newest firing came to: the id of its job, or why it was skipped.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    name: str
    cron: str
    timezone: str
    run_name: str
    run_dir: str
    run_file: str
    cluster: str
    cluster_file: str
    slots: int
    budgets: Mapping[str, int]
    overlap: Literal["skip", "queue", "replace"] = "skip"
    catch_up: Literal["none", "latest"] = "none"
    window_s: float | None = None
    last_fired_s: float = 0.0
    paused: bool = False
    last_result: str = ""

    def __post_init__(self) -> None:
        """Refuses what must never reach the database."""
        check_cluster(self.cluster)


@dataclass(frozen=True, kw_only=True)
class ScheduleEvent:
    """Something that happened to the schedule of this name, at a Unix time."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    schedule: str
    time_s: float


@dataclass(frozen=True, kw_only=True)
class ScheduleAdded(ScheduleEvent):
    """Somebody wants it from now on."""

    definition: Schedule


@dataclass(frozen=True, kw_only=True)
class ScheduleRemoved(ScheduleEvent):
    """Somebody wants it no more; its jobs go on."""


@dataclass(frozen=True, kw_only=True)
class SchedulePaused(ScheduleEvent):
    """Nothing fires until it is resumed."""


@dataclass(frozen=True, kw_only=True)
class ScheduleResumed(ScheduleEvent):
    """It fires again, from now on."""


@dataclass(frozen=True, kw_only=True)
class ScheduleFired(ScheduleEvent):
    """A firing has been dealt with.

    Attributes:
      fire_s: Unix time for which it was due.
      missed: earlier firings that nothing was done about.
      job_id: the job it submitted; None if it was skipped.
      skipped: why.
      by_hand: somebody asked for it; it is no answer to a firing that is due.
    """

    fire_s: float
    missed: int = 0
    job_id: str | None = None
    skipped: str = ""
    by_hand: bool = False


@dataclass(frozen=True, kw_only=True)
class Fire:
    """Submit a job, after cancelling those it replaces."""

    fire_s: float
    missed: int = 0
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Submit nothing for this firing, for a reason."""

    fire_s: float
    missed: int = 0
    reason: str


def changed(schedule: Schedule | None, event: ScheduleEvent) -> Schedule | None:
    """Returns the schedule after an event; None when it is not there.

    Raises:
      ScheduleError: the event cannot happen: a second one of this name, or none at all.
    """
    if isinstance(event, ScheduleAdded):
        if schedule is not None:
            remedy = f"`openmoe schedule remove {event.schedule}` first, or choose another --name"
            raise ScheduleError(f"schedule {event.schedule}: there is one of this name; {remedy}")
        return replace(event.definition, name=event.schedule, last_fired_s=event.time_s, paused=False, last_result="")
    if schedule is None:
        raise ScheduleError(f"schedule {event.schedule}: there is none of this name")
    match event:
        case ScheduleRemoved():
            return None
        case SchedulePaused():
            return replace(schedule, paused=True)
        case ScheduleResumed():
            return replace(schedule, paused=False, last_fired_s=event.time_s) if schedule.paused else schedule
        case ScheduleFired():
            last_s = schedule.last_fired_s if event.by_hand else max(schedule.last_fired_s, event.fire_s)
            return replace(schedule, last_fired_s=last_s, last_result=event.job_id or f"skipped: {event.skipped}")
    raise ScheduleError(f"schedule {event.schedule}: cannot happen to it: {event}")


def check(schedule: Schedule) -> None:
    """Refuses a schedule that could never fire, or whose name cannot be typed.

    Raises:
      ScheduleError: in one line, with the remedy.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", schedule.name):
        raise ScheduleError(f"name {schedule.name!r}: letters, digits, . _ - and at most 63 of them, such as nightly")
    next_fire(schedule, 0.0)


def firings(schedule: Schedule, after_s: float) -> Iterator[float]:
    """Yields the firings after a Unix time, Unix times, oldest first."""
    start = datetime.fromtimestamp(after_s, _zone(schedule.timezone))
    if len(schedule.cron.split()) != 5:
        raise ScheduleError(_bad_cron(schedule.cron, f"{len(schedule.cron.split())} fields"))
    try:
        times = CronSim(schedule.cron, start)
    except CronSimError as error:
        raise ScheduleError(_bad_cron(schedule.cron, str(error).lower())) from error
    # A fixed time in the hour that exists twice is given as its first occurrence, even from within the second.
    yield from (fire_s for fire_s in (time.timestamp() for time in times) if fire_s > after_s)


def next_fire(schedule: Schedule, after_s: float) -> float:
    """Returns the first firing after a Unix time."""
    for fire_s in firings(schedule, after_s):
        return fire_s
    raise ScheduleError(_bad_cron(schedule.cron, "no such day comes in 50 years"))


def due(schedule: Schedule, last_fired_s: float, now_s: float) -> list[float]:
    """Returns the firings after `last_fired_s` up to now, Unix times, oldest first."""
    return list(takewhile(lambda fire_s: fire_s <= now_s, firings(schedule, last_fired_s)))


def decide(schedule: Schedule, jobs: Iterable[Job], now_s: float) -> Fire | Skip | None:
    """Decides what to do about the firings that are due; None if none is.

    The newest one counts, the others are missed. A missed one is caught up at most once, and never after its window.

    Args:
      schedule: as it stands.
      jobs: all jobs, or those of this schedule.
      now_s: Unix time.
    """
    if schedule.paused:
        return None
    fires = due(schedule, schedule.last_fired_s, now_s)
    if not fires:
        return None
    fire_s, missed = fires[-1], len(fires) - 1
    if schedule.window_s is not None and fire_s + schedule.window_s <= now_s:
        return Skip(fire_s=fire_s, missed=missed, reason="its window was over before a controller ran")
    if now_s - fire_s > ON_TIME_S and schedule.catch_up == "none":
        return Skip(fire_s=fire_s, missed=missed, reason="no controller ran at that time, and catch_up is none")
    return overlap(schedule, jobs, fire_s, missed)


def overlap(schedule: Schedule, jobs: Iterable[Job], fire_s: float, missed: int = 0) -> Fire | Skip:
    """Decides whether a firing becomes a job while others of the same schedule may not be done.

    A job whose window was over by then does not count, done or not: it is being stopped, and the new one waits for it.
    """
    there = [
        job
        for job in jobs
        if job.schedule == schedule.name and job.state not in DONE and (job.stop_at_s or math.inf) > fire_s
    ]
    queued = [job for job in there if job.state == "queued"]
    match schedule.overlap:
        case "skip" if there:
            return Skip(fire_s=fire_s, missed=missed, reason=f"{there[0].id} is still {there[0].state}")
        case "queue" if queued:
            return Skip(fire_s=fire_s, missed=missed, reason=f"{queued[0].id} is queued already")
        case "replace":
            replaces = tuple(job.id for job in there if job.state != "stopping")
            return Fire(fire_s=fire_s, missed=missed, replaces=replaces)
    return Fire(fire_s=fire_s, missed=missed)


def events(
    schedule: Schedule, decision: Fire | Skip, job_id: str, now_s: float, *, by_hand: bool = False
) -> list[Event | ScheduleEvent]:
    """Returns what a decision means for the store, to be applied in one transaction.

    Args:
      schedule: as it was decided about.
      decision: of `decide` or `overlap`.
      job_id: never used before; that of the job which a `Fire` submits.
      now_s: Unix time.
      by_hand: somebody asked for this firing.
    """
    fired = ScheduleFired(
        schedule=schedule.name, time_s=now_s, fire_s=decision.fire_s, missed=decision.missed, by_hand=by_hand
    )
    if isinstance(decision, Skip):
        return [replace(fired, skipped=decision.reason)]
    why = f"replaced by {job_id}, the next firing of schedule {schedule.name}"
    submitted = Submitted(
        job_id=job_id,
        time_s=now_s,
        name=schedule.run_name,
        run_dir=schedule.run_dir,
        run_file=schedule.run_file,
        cluster=schedule.cluster,
        cluster_file=schedule.cluster_file,
        slots=schedule.slots,
        budgets=schedule.budgets,
        schedule=schedule.name,
        stop_at_s=None if schedule.window_s is None else decision.fire_s + schedule.window_s,
    )
    cancelled = [CancelAsked(job_id=replaced, time_s=now_s, why=why) for replaced in decision.replaces]
    return [*cancelled, replace(fired, job_id=job_id), submitted]


def window_seconds(text: str) -> float:
    """Reads a duration such as 10h, 90m, 2h30m or 1d.

    Raises:
      ScheduleError: it is none, or not positive.
    """
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    days, hours, minutes, seconds = (int(part or 0) for part in (match.groups() if match else "0000"))
    window_s = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if window_s <= 0:
        raise ScheduleError(f"window: expected a duration such as 10h, 90m, 2h30m or 1d, got {text!r}")
    return window_s


def _bad_cron(cron: str, problem: str) -> str:
    remedy = "write five: minute hour day-of-month month day-of-week, such as '0 20 * * *' for every day at 20:00"
    return f"cron {cron!r}: {problem}; {remedy}"


def _zone(name: str) -> tzinfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ScheduleError(f"timezone {name!r}: unknown; {_near_timezones(name)}") from error


def _near_timezones(name: str) -> str:
    """The nearest names as a question, by the whole name or by its city."""
    known = {zone.lower(): zone for zone in sorted(zoneinfo.available_timezones())}
    cities = {zone.rpartition("/")[2]: zone for zone in known if "/" in zone}
    word = name.lower().replace(" ", "_")
    near = [cities[city] for city in difflib.get_close_matches(word.rpartition("/")[2], cities, n=1, cutoff=0.8)]
    near = near or difflib.get_close_matches(word, known, n=2)
    if not near:
        return "write an IANA name such as Europe/Berlin, America/New_York or UTC"
    return "did you mean " + " or ".join(f"`{known[zone]}`" for zone in near) + "?"
