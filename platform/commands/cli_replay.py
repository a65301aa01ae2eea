"""`openmoe replay`: a recorded step, executed again and compared bit by bit."""

import json
import math
import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from openmoe.platform.run.run_dir import RunDir
    from openmoe.platform.train.replay import Replayed


def replay(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or gs://.")],
    step: Annotated[int, typer.Option(metavar="N", min=1, help="The step to execute again.")],
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the data is now; default as in the run file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    member: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Execute a recorded step again, and compare every bit.

    It begins at the checkpoint before it, and as many steps as lie between are executed and compared too: their rows
    with the ledger, all metrics, and the state if a checkpoint was accepted at the last. On CPU as many processes do it
    as then; elsewhere, or where these changed in between, losses are compared within 1e-3. Exit code 1: something came
    out otherwise, the first is named.
    """
    from openmoe.platform.run.run_dir import RunDir

    run = RunDir(run_dir)
    spec = run.spec()
    prepare(run)
    from openmoe.platform.commands import progress
    from openmoe.platform.run.run_dir import RunDirError
    from openmoe.platform.train import replay as replays
    from openmoe.platform.train import replay_group

    group = replay_group.shape_of(run, step)
    command = ["replay", run_dir, "--step", str(step), *(("--data", data) if data else ())]
    with replay_group.joined(group, command, member), progress.ProgressReport() as show:
        from openmoe.platform.train.restore import DamagedCheckpoint  # imports JAX, which must not be there before

        try:
            found = replays.replay(
                run, spec, step, data_dir=data, report=lambda done, of: show("replay", done, of, "steps")
            )
        except DamagedCheckpoint as error:
            raise RunDirError(f"{run_dir}: {error}; `openmoe checkpoint verify` says more") from error
    if as_json:
        told = {"compared": found.compared, "difference": found.difference and found.difference._asdict()}
        print(json.dumps(found._asdict() | told, indent=2))
    else:
        print("\n".join(lines(found)))
    raise typer.Exit(1 if found.difference else 0)


def prepare(run: "RunDir") -> None:
    """Gives JAX the devices that the run had, if these were virtual; must come before JAX."""
    from openmoe.platform.train import replay as replays

    how = replays.circumstances(run).values()
    if how and all(started.get("device") == "cpu" for started in how):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        sizes = [math.prod(started["mesh"].values()) for started in how]
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(max(sizes)))


def lines(found: "Replayed") -> list[str]:
    """Returns the result in words."""
    began = f"from step {found.start}" if found.start else "from scratch"
    told = [f"not the same as then, so {found.compared} are compared: {'; '.join(found.changed)}"]
    told = told if found.changed else []
    if found.difference:
        return [*told, f"DIFFERENT: replayed {began}, {found.difference}"]
    how = "within the tolerance" if found.changed else "to the last bit"
    what = f"the rows and {len(found.metrics) - 1} metrics of {found.step - found.start} step(s)"
    what += f", and the state of acceptance {found.acceptance}" if found.acceptance else ""
    return [*told, f"EQUAL: step {found.step}, replayed {began}: {what}, {how}"]
