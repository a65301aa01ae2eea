"""`openmoe model ablate`: what each departure from the original is worth, measured small."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

Seeds = Annotated[int, typer.Option(metavar="N", min=1, help="Runs of each variant, with seeds from 0 on.")]
Tokens = Annotated[int, typer.Option(metavar="N", min=1, help="Of each run, padding included.")]
Only = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this variant only; may be repeated.")]
Out = Annotated[
    str, typer.Option(metavar="DIR", help="One file a run, kept; DIR.md is the page with all results found there.")
]
Data = Annotated[str, typer.Option(metavar="DIR", help="The quickstart's corpus and rows; built if not there.")]
Scale = Annotated[
    Literal["small", "100m"] | None,
    typer.Option(help="Size of the baseline, 100m: active parameters. Default: 100m on an accelerator, small on CPU."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def add_to(app: typer.Typer) -> None:
    """Adds the command to `openmoe model`."""
    app.command()(ablate)


def ablate(
    seeds: Seeds = 3,
    tokens: Tokens = 1_048_576,
    only: Only = None,
    out: Out = "docs/ablations",
    data: Data = "openmoe-runs/ablations/data",
    scale: Scale = None,
    as_json: Json = False,
) -> None:
    """Measure what each switch of improved mode is worth.

    Trains small models with each of them, and writes what it did into a page.
    """
    from dataclasses import replace

    from openmoe.platform.ablations.ablation import SCALES, SEQ_LEN, Plan

    first = scale or "small"
    plan = Plan(scale=first, base=SCALES[first], tokens=tokens, seeds=seeds, only=tuple(only or ()))

    from openmoe.pipelines import storage
    from openmoe.platform.ablations import ablation_data, ablation_report, ablation_run
    from openmoe.platform.commands import progress, tables

    if scale is None and (found := ablation_run.default_scale()) != first:
        plan = replace(plan, scale=found, base=SCALES[found])
    with progress.ProgressReport() as show:
        rows = ablation_data.rows_of(data, plan.tokens // SEQ_LEN, show)
        ran = ablation_run.run(plan, storage.join(out, plan.scale), rows, show)
    sections = ablation_run.write_page(out, plan, rows.data_id)
    summaries = next(section.summaries for section in sections if section.scale == plan.scale)
    if as_json:
        print(json.dumps({"ran": ran, "variants": [summary._asdict() for summary in summaries]}, indent=2))
        return
    tables.show(f"ablation at scale {plan.scale}", ablation_report.COLUMNS, ablation_report.table_rows(summaries))
    print(f"{ran} run(s) trained; {out}.md has all results")
