"""`openmoe plan`: what a run would take, before anything is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file, e.g. train.steps=200."),
]
Topology = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Machines, such as v4-128, 2xv5p-64, h100-16; may be repeated."),
]
Spot = Annotated[bool, typer.Option("--spot/--on-demand", help="Machines that may be taken back, or not.")]
Mfu = Annotated[float | None, typer.Option(metavar="SHARE", help="Of the peak that is reached, model FLOPs alone.")]
File = Annotated[str | None, typer.Option(metavar="FILE", help="Your prices and rates; default: the shipped ones.")]
Assume = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Wins over that file, e.g. preemptions.hours_between=2; may be repeated."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Ask the TPU compiler, which needs no TPU: a minute or two.")]
Page = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write docs/planning.md: all presets with this run's batch.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def plan(
    run: Run,
    overrides: Overrides = None,
    topology: Topology = None,
    spot: Spot = True,
    mfu: Mfu = None,
    assumptions: File = None,
    assume: Assume = None,
    compile_step: Compile = False,
    page: Page = None,
    as_json: Json = False,
) -> None:
    """Plan a run: does it fit, how fast, how long, for how much?

    Before anything is rented.
    """
    from openmoe.pipelines import storage
    from openmoe.platform.commands import tables
    from openmoe.platform.planner import plan as planning
    from openmoe.platform.planner import plan_assumptions, plan_page
    from openmoe.platform.run_file import spec

    loaded = spec.load(run, overrides or ())
    assumed = plan_assumptions.load(assumptions, (*(assume or ()), *(() if mfu is None else (f"mfu={mfu}",))))
    if page is not None:
        command = " ".join(("openmoe plan", run, *(overrides or ()), f"--page {page}"))
        storage.write_durable(str(page), plan_page.page(loaded, assumed, command).encode())
        return
    plans = [planning.plan(loaded, each, assumed, spot=spot) for each in planning.machines_of(loaded, topology or ())]
    found = [section for each in plans for section in planning.sections(each, assumed, spot=spot)]
    if compile_step:
        from openmoe.platform.planner import plan_compile

        ways = [(each.way.spec, each.machines) for each in plans]
        found += [plan_compile.section(*way, plan_compile.compiled(*way)) for way in ways]
    tables.show_sections(found, as_json=as_json)
    if len(plans) > 1 and not as_json:
        rows = [planning.row(each, assumed, spot=spot) for each in plans]
        tables.show("beside each other", planning.COLUMNS, rows)
