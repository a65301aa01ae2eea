"""`openmoe schedule`: runs that start again and again, at times that a cron expression names."""

import json
import time
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openmoe.platform.commands.cli_jobs import Json, say_what_to_share, store_of_home

if TYPE_CHECKING:
    from openmoe.platform.jobs.cron import Schedule, ScheduleEvent
    from openmoe.platform.jobs.job_store import JobStore

app = typer.Typer(help="Start runs at set times.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A schedule's name.")]
_NUM_SHOWN = 3


@app.command()
def add(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run file, or the name of a shipped one.")],
    cron: Annotated[
        str,
        typer.Option(metavar="CRON", help='Minute, hour, day of month, month, day of week: "0 20 * * *".'),
    ],
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="IANA name in which it is read: Europe/Berlin.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file, e.g. train.steps=200."),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(metavar="CLUSTER", help="A cluster, by name or file, or the http:// address of a Ray dashboard."),
    ] = "local",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the schedule; default: the run's.")] = None,
    overlap: Annotated[
        Literal["skip", "queue", "replace"],
        typer.Option(help="While its last job is not done: skip the firing, queue behind it, or replace it."),
    ] = "skip",
    catch_up: Annotated[
        Literal["none", "latest"],
        typer.Option(help="Of firings that passed while no controller ran: do none, or the latest."),
    ] = "none",
    window: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Stop the job so long after its firing, e.g. 10h; the next goes on."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a run at set times.

    Each firing goes on from the run's last checkpoint.
    """
    from openmoe.platform.jobs import cron as cron_module
    from openmoe.platform.jobs import job_request

    request = job_request.resolve(run, overrides or (), cluster)
    schedule = cron_module.Schedule(
        name=name or request.name,
        cron=cron,
        timezone=timezone,
        run_name=request.name,
        **{key: value for key, value in vars(request).items() if key != "name"},
        overlap=overlap,
        catch_up=catch_up,
        window_s=None if window is None else cron_module.window_seconds(window),
    )
    cron_module.check(schedule)
    now_s, store = time.time(), store_of_home()
    store.apply_all([cron_module.ScheduleAdded(schedule=schedule.name, time_s=now_s, definition=schedule)])
    added = store.schedule(schedule.name)
    if as_json:
        print(json.dumps(_as_json(added, now_s), indent=2))
        return
    print(f"{added.name}: run {added.run_name} on cluster {added.cluster}, fires at")
    for fire_s in islice(cron_module.firings(added, now_s), _NUM_SHOWN):
        print(f"  {_local(fire_s, added.timezone)}   {_utc(fire_s)}")
    say_what_to_share(added.cluster, added.run_dir)
    _warn_without_controller()


@app.command("list")
def list_schedules(as_json: Json = False) -> None:
    """List schedules with their next firing."""
    from openmoe.platform.commands import tables

    now_s = time.time()
    schedules = sorted(store_of_home().schedules().values(), key=lambda schedule: schedule.name)
    if as_json:
        print(json.dumps([_as_json(schedule, now_s) for schedule in schedules], indent=2))
        return
    if not schedules:
        print("no schedules; `openmoe schedule add RUN --cron '0 20 * * *' --timezone Europe/Berlin` makes one")
        return
    rows = []
    for each in schedules:
        fires, problem = _fires(each, now_s)
        when = (_local(fires[0], each.timezone), _utc(fires[0])) if fires else (problem or "paused", "")
        window = f", {_duration(each.window_s)}" if each.window_s else ""
        policy = f"{each.overlap}, catch up {each.catch_up}{window}"
        rows.append((each.name, each.run_name, each.cluster, each.cron, *when, policy, each.last_result))
    columns = ("schedule", "run", "cluster", "cron", "next firing", "in UTC", "overlap, window", "last firing")
    tables.show("", columns, rows)


@app.command()
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a schedule; its jobs go on."""
    from openmoe.platform.jobs import cron

    store = store_of_home()
    schedule = store.schedule(name)
    store.apply_all([cron.ScheduleRemoved(schedule=name, time_s=time.time())])
    going_on = [job.id for job in _jobs_not_done(store, name)]
    if as_json:
        print(json.dumps({"removed": schedule.name, "jobs_not_done": going_on}, indent=2))
        return
    print(f"{schedule.name} is removed" + (f"; still there: {', '.join(going_on)}" if going_on else ""))


@app.command("run-now")
def run_now(name: Name, as_json: Json = False) -> None:
    """Submit a schedule's run at once, as a firing would.

    Its other firings stay as they are.
    """
    from openmoe.platform.jobs import cron

    store = store_of_home()
    schedule, now_s = store.schedule(name), time.time()
    decision = cron.overlap(schedule, store.jobs().values(), now_s)
    if isinstance(decision, cron.Skip):
        remedy = "`openmoe jobs cancel` it first, or wait"
        raise cron.ScheduleError(f"schedule {name}: {decision.reason}, and overlap is {schedule.overlap}; {remedy}")
    job_id = store.new_id(schedule.run_name)
    store.apply_all(cron.events(schedule, decision, job_id, now_s, by_hand=True))
    if as_json:
        print(json.dumps({"schedule": name, "job": job_id, "replaces": list(decision.replaces)}, indent=2))
        return
    replaced = f" and replaces {', '.join(decision.replaces)}" if decision.replaces else ""
    print(f"{job_id} is queued for cluster {schedule.cluster}{replaced}")
    _warn_without_controller()


@app.command()
def pause(name: Name, as_json: Json = False) -> None:
    """Let a schedule fire no more until it is resumed.

    Its jobs go on.
    """
    from openmoe.platform.jobs import cron

    schedule, now_s = _after(cron.SchedulePaused, name)
    if as_json:
        print(json.dumps(_as_json(schedule, now_s), indent=2))
        return
    print(f"{name} is paused; `openmoe schedule resume {name}` lets it fire again")


@app.command()
def resume(name: Name, as_json: Json = False) -> None:
    """Let a paused schedule fire again.

    Nothing is caught up for the pause.
    """
    from openmoe.platform.jobs import cron

    schedule, now_s = _after(cron.ScheduleResumed, name)
    if as_json:
        print(json.dumps(_as_json(schedule, now_s), indent=2))
        return
    print(f"{name} fires next at {_local(cron.next_fire(schedule, now_s), schedule.timezone)}")


def _after(event: "type[ScheduleEvent]", name: str) -> "tuple[Schedule, float]":
    """Lets an event happen to a schedule; returns what it is then, and when that is, Unix time."""
    store, now_s = store_of_home(), time.time()
    store.apply_all([event(schedule=store.schedule(name).name, time_s=now_s)])
    return store.schedule(name), now_s


def _jobs_not_done(store: "JobStore", schedule: str) -> list[Any]:
    from openmoe.platform.jobs import job as job_module

    jobs = store.jobs().values()
    return [job for job in jobs if job.schedule == schedule and job.state not in job_module.DONE]


def _warn_without_controller() -> None:
    from openmoe.platform import home
    from openmoe.platform.jobs import controller_lock

    if not controller_lock.is_running(home.home()):
        print("no controller runs here, so nothing starts yet; start one: openmoe controller run   (or: openmoe up)")


def _as_json(schedule: "Schedule", now_s: float) -> dict[str, Any]:
    """All of a schedule but its files, with the next firings."""
    from dataclasses import asdict

    values = {key: value for key, value in asdict(schedule).items() if key not in ("run_file", "cluster_file")}
    fires, problem = _fires(schedule, now_s)
    return values | {
        "next": [
            {"local": _local(fire_s, schedule.timezone), "utc": _utc(fire_s), "unix_s": fire_s} for fire_s in fires
        ],
        "problem": problem,
    }


def _fires(schedule: "Schedule", now_s: float) -> tuple[list[float], str]:
    """Returns the next firings, none of a paused schedule, and why nobody knows them, as in an unknown time zone."""
    from openmoe.platform.jobs import cron

    try:
        return [] if schedule.paused else list(islice(cron.firings(schedule, now_s), _NUM_SHOWN)), ""
    except cron.ScheduleError as error:
        return [], str(error)


def _duration(seconds: float) -> str:
    """As `--window` takes it: 36000 s are 10h."""
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return "".join(f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "m"), (rest_s, "s")) if number)


def _local(time_s: float, timezone: str) -> str:
    from datetime import datetime
    from zoneinfo import ZoneInfo

    return f"{datetime.fromtimestamp(time_s, ZoneInfo(timezone)):%a %Y-%m-%d %H:%M %Z}"


def _utc(time_s: float) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M} UTC"
