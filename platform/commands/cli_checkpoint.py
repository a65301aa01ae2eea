"""`openmoe checkpoint`: what a run has kept, whether it is whole, and how two checkpoints differ."""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from openmoe.platform.commands import cli_replay, tables

if TYPE_CHECKING:
    from openmoe.platform.run.lineage import Acceptance
    from openmoe.platform.run.run_dir import RunDir
    from openmoe.platform.run_file.spec import RunSpec
    from openmoe.platform.train.checkpoints import Compared, Listed

app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or gs://.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command("list")
def list_checkpoints(run_dir: Run, as_json: Json = False) -> None:
    """List accepted checkpoints, and why each is kept.

    With --json those that were removed too.
    """
    _on_the_host()
    from openmoe.platform.run.run_dir import RunDir
    from openmoe.platform.train import checkpoints

    run = RunDir(run_dir)
    spec = run.spec()
    found = checkpoints.listed(run, spec)
    if as_json:
        print(json.dumps([checkpoint._asdict() for checkpoint in found], indent=2))
        return
    shown = [c for c in found if c.state != "removed"]
    if not shown:
        print(f"{run_dir}: no checkpoint was accepted yet")
        return
    columns = ("step", "tokens", "incarnation", "accepted", "MB", spec.train.best_metric, "state", "why")
    tables.show(f"checkpoints of {spec.name}", columns, [_row(checkpoint) for checkpoint in shown])
    if removed := len(found) - len(shown):
        print(f"and {removed:,} that were removed since")


def _row(found: "Listed") -> Sequence[str]:
    when = f"{datetime.fromtimestamp(found.accepted_s).astimezone():%Y-%m-%d %H:%M:%S}" if found.accepted_s else ""
    size = "" if found.stored_bytes is None else f"{found.stored_bytes / 1e6:,.1f}"
    metric = "" if found.metric is None else f"{found.metric:.4f}"
    return (
        *(f"{found.step:,}", f"{found.tokens:,}", str(found.incarnation), when, size, metric),
        *(found.state, found.why),
    )


@app.command()
def verify(
    run_dir: Run,
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Only that of step N; default all that can be restored.")
    ] = None,
    loss: Annotated[
        bool, typer.Option("--loss", help="Take the next step from each too: is its loss the one on record?")
    ] = False,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="With --loss: where the data is now; default as in the run file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read checkpoints back, and compare every bit.

    Array by array, with what was accepted. Exit code 1: one is damaged, and the first array in which it is, is named.
    Nothing is changed; training that meets a damaged checkpoint quarantines it and goes on from the one before.
    """
    from openmoe.platform.run.run_dir import RunDir

    run = RunDir(run_dir)
    spec = run.spec()
    if loss:
        cli_replay.prepare(run)
    else:
        _on_the_host()
    from openmoe.platform.commands import progress
    from openmoe.platform.train import checkpoints

    results, losses = {}, {}
    with progress.ProgressReport() as show:
        for accepted in _chosen(run, step):
            name = f"step {accepted.step:,}"
            results[accepted.step] = checkpoints.damage(
                run, spec, accepted, lambda done, of, name=name: show(name, done, of, "arrays")
            )
            if loss and not results[accepted.step]:
                losses[accepted.step] = _loss(run, spec, accepted, data)
    if as_json:
        found = [{"step": at, "whole": not reason, "damage": reason} for at, reason in results.items()]
        print(json.dumps([one | ({"loss": losses.get(one["step"], "")} if loss else {}) for one in found], indent=2))
    for at, reason in () if as_json else results.items():
        print(f"step {at:,}: {f'DAMAGED: {reason}' if reason else 'WHOLE: every bit is the one that was accepted'}")
        if at in losses:
            print(f"  loss of the next step's rows: {losses[at]}")
    wrong = [*filter(None, results.values()), *(found for found in losses.values() if found not in _LOSS_IS_FINE)]
    raise typer.Exit(1 if wrong else 0)


_LOSS_IS_FINE = ("as recorded", "not on record")


def _loss(run: "RunDir", spec: "RunSpec", accepted: "Acceptance", data: str | None) -> str:
    """Returns whether the step after a checkpoint has the loss on record, computed once more from it."""
    from openmoe.platform.train import replay

    if accepted.step + 1 not in replay.recorded_steps(run):
        return "not on record"
    found = replay.replay(run, spec, accepted.step + 1, data_dir=data, start=accepted)
    return str(found.difference or "as recorded")


def _chosen(run: "RunDir", step: int | None) -> "list[Acceptance]":
    """Returns the acceptances that count and whose checkpoints should be there, or that of one step."""
    from openmoe.platform.run import lineage
    from openmoe.platform.run.run_dir import RunDirError

    valid = lineage.valid_acceptances(run.claims(), run.acceptances(), run.quarantined())
    kept, stored = lineage.kept(valid, run.spec().retention), set(run.stored_checkpoints())
    there = [a for a in valid if a.number in kept or a.checkpoint in stored]
    if not there:
        raise RunDirError(f"{run.path}: the run has no accepted checkpoint yet; train it until its first one")
    chosen = [a for a in there if step in (None, a.step)]
    if not chosen:
        steps = ", ".join(str(a.step) for a in there)
        raise RunDirError(f"--step {step}: no checkpoint of this step can be restored; there are {steps}")
    return chosen


@app.command()
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint (RUN_DIR/checkpoints/000001/20), or a run for its newest.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: Json = False,
) -> None:
    """Compare two checkpoints array by array. Exit code 1: they differ."""
    _on_the_host()
    from openmoe.platform.commands import progress
    from openmoe.platform.train import checkpoints

    paths = [checkpoints.located(path) for path in (first, second)]
    with progress.ProgressReport() as show:
        compared = checkpoints.compare(*paths, lambda done, of: show("compare", done, of, "arrays"))
    if as_json:
        print(json.dumps(compared._asdict() | {"arrays": [array._asdict() for array in compared.arrays]}, indent=2))
    else:
        _show(compared, paths)
    raise typer.Exit(0 if compared.equal else 1)


def _show(compared: "Compared", paths: Sequence[str]) -> None:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    different = [array for array in compared.arrays if array.status != "equal"]
    columns = ("array", "", "largest difference", "relative", "norm of A", "norm of B")
    if different:
        tables.show(f"A {paths[0]}\nB {paths[1]}", columns, [(a.name, a.status, *map(text, a[2:])) for a in different])
    for line in (*compared.facts, *compared.spec):
        print(line.replace(" there, ", " in A, ").removesuffix(" here") + " in B")
    print(f"{len(compared.arrays) - len(different):,} of {len(compared.arrays):,} arrays are equal to the last bit")


def _on_the_host() -> None:
    """Leaves the accelerators alone, which a training process may hold; must come before JAX."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
