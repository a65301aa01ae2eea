"""`openmoe warm`: the programs of a run, compiled before it needs them."""

from __future__ import annotations

from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file, e.g. train.steps=200."),
]
Workers = Annotated[
    list[int] | None,
    typer.Option(min=1, metavar="N", help="Numbers of workers; default: every legal one up to the file's."),
]


def warm(run: Run, overrides: Overrides = None, workers: Workers = None) -> None:
    """Compile a run's programs ahead of time.

    For every number of workers that it may have to go on with. Each number needs its machines for as long as compiling
    takes: nothing is compiled for what is not there. Prints the settings with which `openmoe train` then finds its
    programs. Exit code 1: some could not be compiled.
    """
    from openmoe.platform.commands.progress import ProgressReport
    from openmoe.platform.planner import layouts
    from openmoe.platform.run import warm as warming
    from openmoe.platform.run_file import spec
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    loaded = spec.load(run, overrides or ())
    if loaded.cluster.compile_cache == "none":
        raise SpecError([Problem("cluster.compile_cache", "is none, so nothing would be kept; name a folder")])
    counts = [layouts.on_workers(loaded, number).cluster.num_workers for number in workers or ()]

    with ProgressReport() as show:
        raise typer.Exit(0 if warming.warm(loaded, counts or layouts.legal_counts(loaded), show.say) else 1)
