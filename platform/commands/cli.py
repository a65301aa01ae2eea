"""The `openmoe` command. Commands import what they need when they run, so that help answers at once."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from openmoe.platform.commands import (
    cli_ablate,
    cli_checkpoint,
    cli_cluster,
    cli_convert,
    cli_dashboard,
    cli_data,
    cli_generate,
    cli_goodput,
    cli_jobs,
    cli_ledger,
    cli_plan,
    cli_profile,
    cli_render,
    cli_replay,
    cli_schedule,
    cli_warm,
    tables,
)

app = typer.Typer(
    name="openmoe",
    help="Train OpenMoE Mixture-of-Experts language models on machines that come and go.",
    epilog="Exit codes: 0 it worked; 1 the run failed; 2 bad input, and the message says what to change.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would double the time to answer --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Look at models.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file, e.g. train.steps=200."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def main() -> None:
    """Runs the command line; what the user can mend ends in one line a problem and exit code 2."""
    try:
        app(prog_name="openmoe")
    except ValueError as error:
        if not isinstance(error, _bad_input()):
            raise
        print(error, file=sys.stderr)
        sys.exit(1 if _may_pass(error) else 2)


def _bad_input() -> tuple[type[ValueError], ...]:
    from openmoe.clusters.local_ray import LocalRayError
    from openmoe.clusters.twin_state import TwinError
    from openmoe.pipelines.config import DataError
    from openmoe.pipelines.storage import StorageError
    from openmoe.platform.dashboard.server import DashboardError
    from openmoe.platform.jobs.job import JobError
    from openmoe.platform.run.journal import JournalError
    from openmoe.platform.run.run_dir import RunDirError
    from openmoe.platform.run_file.spec_errors import SpecError

    ours = (SpecError, DataError, StorageError, RunDirError, JournalError, LocalRayError, TwinError, JobError)
    if "openmoe.model.interop" not in sys.modules:  # its import takes seconds; then it has raised nothing
        return (*ours, DashboardError)
    from openmoe.model.interop import CheckpointError

    return (*ours, DashboardError, CheckpointError)


def _may_pass(error: ValueError) -> bool:
    from openmoe.pipelines.storage import StorageUnavailable

    return isinstance(error, StorageUnavailable)


@app.command()
def quickstart(
    overrides: Overrides = None,
    new: Annotated[bool, typer.Option("--new", help="Start over even if the quickstart run is finished.")] = False,
    run_dir: Annotated[str | None, typer.Option(help="Where the run is kept; default as in the run file.")] = None,
) -> None:
    """Train a small OpenMoE on Python's own text and code."""
    from openmoe.platform.run import quickstart as quickstart_module

    raise typer.Exit(quickstart_module.main(new=new, run_dir=run_dir, overrides=overrides or ()))


@app.command()
def train(
    run: Run,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="FILE", help="Cluster file: where the provider's records are.")
    ] = None,
    attempt: Annotated[str, typer.Option(metavar="NAME", help="What the run's records call this driver.")] = "",
) -> None:
    """Train a run, or go on with it where it stopped."""
    from openmoe.platform.run import attempt_log, instances
    from openmoe.platform.run_file import spec

    loaded = spec.load(run, overrides or ())
    read_instances = instances.reader(cluster)

    from openmoe.platform.run import driver  # imports Ray: only once the run file is known to be good

    raise typer.Exit(driver.train(loaded, read_instances, attempt, attempt_log.process_began_s()))


@app.command("host-agent")
def watch_host(
    address: Annotated[str, typer.Option(help="Ray cluster; auto: the one that this host is in.")] = "auto",
    slice_name: Annotated[str, typer.Option("--slice", help="Slice to drain; default: this host's.")] = "",
    metadata: Annotated[str | None, typer.Option(metavar="URL", help="Metadata server; default Google's.")] = None,
    grace: Annotated[float, typer.Option(metavar="S", help="Seconds that a preemption leaves.")] = 30.0,
    maintenance_grace: Annotated[float, typer.Option(metavar="S", help="Seconds that a maintenance leaves.")] = 3600.0,
) -> None:
    """Drain this host's slice when Google Cloud takes it away."""
    from openmoe.platform.run import host_agent

    host_agent.run(address, slice_name, metadata or host_agent.METADATA_URL, grace, maintenance_grace)


app.command()(cli_jobs.up)
app.command()(cli_jobs.submit)
app.command()(cli_convert.convert)
app.command()(cli_dashboard.dashboard)
app.command()(cli_generate.generate)
app.command()(cli_goodput.goodput)
app.command()(cli_profile.profile)
app.command()(cli_plan.plan)
app.command()(cli_warm.warm)
app.command()(cli_replay.replay)


@app.command()
def validate(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a run file; show every number that follows from it."""
    from openmoe.platform.run_file import spec
    from openmoe.platform.run_file import validate as validation

    tables.show_sections(validation.explain(spec.load(run, overrides or ())), as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a run file, for editors."""
    from openmoe.platform.run_file import spec

    print(json.dumps(spec.json_schema(), indent=2))


@app.command()
def runs(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of run directories, or one of them.")
    ] = "openmoe-runs",
    as_json: Json = False,
) -> None:
    """List the runs of a folder with state, step and loss."""
    from dataclasses import asdict
    from datetime import datetime

    from openmoe.platform.run import run_dir

    found = run_dir.list_runs(folder)
    if as_json:
        # JSON has no NaN.
        rows = [asdict(run) | {"loss": run.loss if math.isfinite(run.loss or 0.0) else None} for run in found]
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    if not found:
        print(f"no runs in {folder}; `openmoe quickstart` starts one")
        return
    rows = [
        (
            run.name,
            run.state,
            f"{run.step:,} / {run.steps:,}" if run.steps else f"{run.step:,}",
            "" if run.loss is None else f"{run.loss:.4f}",
            f"{datetime.fromtimestamp(run.updated_s).astimezone():%Y-%m-%d %H:%M:%S}" if run.updated_s else "",
            run.path,
        )
        for run in found
    ]
    tables.show("", ("run", "state", "step", "loss", "updated", "run directory"), rows)
    for run in found:
        if run.problem:
            print(run.problem, file=sys.stderr)


@app.command()
def wheel(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")] = Path("dist"),
) -> None:
    """Pack this code for a Ray job; print where."""
    from openmoe.platform.jobs import wheel as wheel_module

    print(wheel_module.built_wheel(folder))


@model_app.command("describe")
def model_describe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset, such as openmoe-8b.")],
    as_json: Json = False,
) -> None:
    """Show a preset's parameters by component, and its FLOPs."""
    from openmoe.model.config import PRESETS
    from openmoe.platform.run_file import validate as validation
    from openmoe.platform.run_file.spec_errors import Problem, SpecError, did_you_mean

    if name not in PRESETS:
        raise SpecError([Problem("", f"no preset of this name; {did_you_mean(name, PRESETS)}")], name)
    tables.show_sections(validation.describe_model(PRESETS[name]), as_json=as_json)


app.add_typer(cli_jobs.app, name="jobs")
app.add_typer(cli_jobs.controller_app, name="controller")
app.add_typer(cli_schedule.app, name="schedule")
app.add_typer(cli_cluster.app, name="cluster")
cli_render.add_to(cli_cluster.app)
app.add_typer(cli_checkpoint.app, name="checkpoint")
app.add_typer(cli_ledger.app, name="ledger")
app.add_typer(cli_data.app, name="data")
cli_ablate.add_to(model_app)
app.add_typer(model_app, name="model")
