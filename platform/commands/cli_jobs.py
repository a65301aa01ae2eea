"""`openmoe submit`, `openmoe jobs`, `openmoe controller` and `openmoe up`: what somebody wants, and how far it is."""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmoe.platform.commands.cli_dashboard import DEFAULT_PORT

if TYPE_CHECKING:
    from pathlib import Path

    from openmoe.platform.jobs.job import Job
    from openmoe.platform.jobs.job_store import JobStore

app = typer.Typer(help="Look at jobs, stop them, try them again.", no_args_is_help=True)
controller_app = typer.Typer(help="Start the process that carries jobs out.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or the beginning of one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]

_FOLLOW_S = 1.0


def submit(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file, e.g. train.steps=200."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="A cluster that is up, by name or file, or the http:// address of a Ray dashboard; default: the one "
            "that is up here.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit a run as a job.

    The controller starts it when its cluster has room.
    """
    from openmoe.platform import home as home_folder
    from openmoe.platform.jobs import cluster_access, controller_lock, job_events, job_request

    home = home_folder.home()
    request = job_request.resolve(run, overrides or (), cluster)
    cluster_access.check_known(request.cluster, home)
    store = store_of_home()
    _refuse_second(store, request.run_dir)
    job_id = store.new_id(request.name)
    job, _ = store.apply(job_events.Submitted(job_id=job_id, time_s=time.time(), **vars(request)))
    if as_json:
        print(json.dumps(_as_json(job), indent=2))
        return
    print(f"{job.id} is queued for cluster {job.cluster}")
    say_what_to_share(job.cluster, job.run_dir)
    if not controller_lock.is_running(home):
        print("no controller runs here, so nothing happens yet; start one: openmoe controller run   (or: openmoe up)")
    print(f"  openmoe jobs logs -f {job.id}\n  openmoe jobs story {job.id}\n  openmoe jobs cancel {job.id}")


def say_what_to_share(cluster: str, run_dir: str) -> None:
    """Says what must be true of a run directory that lies on another machine than its cluster may."""
    from openmoe.pipelines import storage
    from openmoe.platform.jobs import cluster_access

    if cluster_access.is_address(cluster) and not storage.is_remote(run_dir):
        print(f"run_dir: {run_dir} must be one folder for all hosts of that cluster, on a shared disk; or give gs://")


@app.command("list")
def list_jobs(
    everything: Annotated[bool, typer.Option("--all", help="Jobs that were done more than a day ago too.")] = False,
    as_json: Json = False,
) -> None:
    """List jobs with state, attempt and reason, newest last."""
    from openmoe.platform.commands import tables
    from openmoe.platform.jobs import job as job_module

    jobs = list(store_of_home().jobs().values())
    recent = [j for j in jobs if everything or j.state not in job_module.DONE or j.changed_s > time.time() - 86_400]
    why = _waiting(jobs)
    if as_json:
        print(json.dumps([_as_json(job) | {"waiting": why.get(job.id)} for job in recent], indent=2))
        return
    if not recent:
        old = f"; {len(jobs)} older ones: openmoe jobs list --all" if jobs else ""
        print(f"no jobs{old or '; `openmoe submit RUN` makes one'}")
        return
    rows = [(j.id, _state(j), j.attempt, j.cluster, _when(j.changed_s), _reason(j, why)) for j in recent]
    tables.show("", ("job", "state", "attempt", "cluster", "since", "reason"), rows)


@app.command()
def show(job: JobId, as_json: Json = False) -> None:
    """Show one job: state, budgets, run, and what it died of."""
    from openmoe.platform.commands import tables
    from openmoe.platform.run import run_dir

    store = store_of_home()
    found = store.job(job)
    run = run_dir.RunDir(found.run_dir)
    newest = run.newest_accepted()
    why = _waiting(store.jobs().values())
    if as_json:
        files = {"run_file": found.run_file, "cluster_file": found.cluster_file}
        more = {"waiting": why.get(found.id), "step": newest.step if newest else 0}
        print(json.dumps(_as_json(found) | files | more, indent=2))
        return
    spent = ", ".join(f"{cause} {n} of {found.budgets.get(cause, 0)}" for cause, n in found.spent.items())
    reason = _reason(found, why)
    rows = [
        ("state", _state(found) + (f": {reason}" if reason else "")),
        ("attempt", str(found.attempt) + (f", in Ray {found.submission_id}" if found.attempt else "")),
        ("budgets spent", spent or "none"),
        ("cluster", found.cluster + (" (does not answer)" if found.cluster_lost else "")),
        ("run directory", found.run_dir),
        ("checkpoint", f"step {newest.step:,}" if newest else "none yet"),
        ("submitted", _when(found.submitted_s) + (f" by schedule {found.schedule}" if found.schedule else "")),
    ]
    tables.show(found.id, ("", ""), rows)
    if found.trace:
        print(found.trace)


@app.command()
def story(job: JobId, as_json: Json = False) -> None:
    """Tell what happened to a job and its run, in sentences."""
    from dataclasses import asdict

    from openmoe.platform.jobs import story as story_module
    from openmoe.platform.jobs import story_records

    store = store_of_home()
    sentences = story_records.of_job(store, store.job(job))
    if as_json:
        print(json.dumps([asdict(sentence) for sentence in sentences], indent=2))
        return
    print("\n".join(story_module.lines(sentences)))


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is done.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="An earlier attempt's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only; with -f, a line for each part.")] = False,
) -> None:
    """Print what a job's driver printed, of the newest attempt."""
    from openmoe.platform.jobs import job_logs

    store = store_of_home()
    found = store.job(job)
    if follow:
        if found.state == "queued":
            why = _reason(found, _waiting(store.jobs().values()))
            print(f"{found.id} is queued{': ' if why else ''}{why}", file=sys.stderr)
        for text in job_logs.follow(store, found.id, _home(), attempt=attempt, period_s=_FOLLOW_S):
            print(json.dumps({"text": text}) + "\n" if as_json else text, end="", flush=True)
        return
    number = attempt or found.attempt
    text = job_logs.read(found, _home(), number)
    if as_json:
        print(json.dumps({"job": found.id, "attempt": number, "logs": text}, indent=2))
        return
    print(text, end="")


@app.command()
def cancel(job: JobId, as_json: Json = False) -> None:
    """Stop a job; its run stays resumable."""
    from openmoe.platform.jobs import job_events

    store = store_of_home()
    found, _ = store.apply(job_events.CancelAsked(job_id=store.job(job).id, time_s=time.time()))
    _report(found, f"{found.id} is {_state(found)}; its run can go on later", as_json=as_json)


@app.command()
def retry(job: JobId, as_json: Json = False) -> None:
    """Let a failed or cancelled job go on, with fresh budgets."""
    from openmoe.platform.jobs import job_events

    store = store_of_home()
    found = store.job(job)
    _refuse_second(store, found.run_dir)
    found, _ = store.apply(job_events.RetryAsked(job_id=found.id, time_s=time.time()))
    _report(found, f"{found.id} is {_state(found)}", as_json=as_json)


@controller_app.command("run")
def controller_run() -> None:
    """Run the controller until Ctrl-C; jobs go on without it."""
    from openmoe.platform.jobs import controller

    raise typer.Exit(controller.run(_home(), say))


def up(
    cluster: Annotated[
        str, typer.Argument(metavar="CLUSTER", help="A cluster file, or the name of a shipped one.")
    ] = "local",
    dashboard: Annotated[bool, typer.Option(help="Serve the dashboard too.")] = True,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the dashboard; 0 for any free one.")] = DEFAULT_PORT,
) -> None:
    """Start a cluster here, the controller and the dashboard.

    Ctrl-C ends all three.
    """
    from openmoe.platform.jobs import up as up_module

    raise typer.Exit(up_module.run(cluster, _home(), say, dashboard_port=port if dashboard else None))


def say(line: str) -> None:
    """Prints a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _home() -> "Path":
    from openmoe.platform import home

    return home.home()


def store_of_home() -> "JobStore":
    """Opens the controller's database of this machine."""
    from openmoe.platform.jobs.job_store import JobStore

    return JobStore(_home() / "controller.db")


def _refuse_second(store: "JobStore", run_dir: str) -> None:
    """One run directory, one job: two drivers would supersede each other for ever."""
    from openmoe.platform.jobs.job import DONE
    from openmoe.platform.jobs.job_events import JobError

    for other in store.jobs().values():
        if other.run_dir == run_dir and other.state not in DONE:
            raise JobError(
                f"run_dir: {run_dir} belongs to job {other.id}, which is {other.state}; "
                f"`openmoe jobs cancel {other.id}` first, or choose another run_dir"
            )


def _waiting(jobs: "Sequence[Job] | Any") -> dict[str, str]:
    """Returns why queued jobs do not start, by id."""
    from openmoe.platform.jobs import cluster_access, controller_lock, placement

    home, jobs = _home(), list(jobs)
    clusters = {job.cluster for job in jobs if job.state == "queued"}
    if not clusters:
        return {}
    if not controller_lock.is_running(home):
        return {job.id: "no controller runs: openmoe controller run" for job in jobs if job.state == "queued"}
    room = {cluster: cluster_access.capacity(cluster, jobs, home) for cluster in clusters}
    return dict(placement.place(jobs, room, time.time()).waiting)


def _reason(job: "Job", waiting: dict[str, str]) -> str:
    return "; ".join(part for part in (job.reason, waiting.get(job.id, "")) if part)


def _state(job: "Job") -> str:
    return f"{job.state}, then {job.next}" if job.next else job.state


def _as_json(job: "Job") -> dict[str, Any]:
    """All of a job but its files."""
    from dataclasses import asdict

    values = {key: value for key, value in asdict(job).items() if key not in ("run_file", "cluster_file", "restarts")}
    return values | {"spent": job.spent, "submission_id": job.submission_id if job.attempt else None}


def _report(job: "Job", line: str, *, as_json: bool) -> None:
    from openmoe.platform.jobs import controller_lock

    print(json.dumps(_as_json(job), indent=2) if as_json else line)
    if job.state in ("queued", "stopping") and not controller_lock.is_running(_home()):
        print("no controller runs here, so nothing happens yet: openmoe controller run", file=sys.stderr)


def _when(time_s: float) -> str:
    from datetime import datetime

    return f"{datetime.fromtimestamp(time_s).astimezone():%Y-%m-%d %H:%M:%S}"
