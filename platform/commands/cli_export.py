"""`openmoe data export`: a run's rows for other trainers."""

import json
import re
from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """Of the files."""

    parquet = "parquet"
    array_record = "array_record"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run file, the name of a shipped one, or a manifest.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where to write, local or gs://; must be empty.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that win over the run file.")
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="array_record holds tf.Example, as MaxText and Grain read them.")
    ] = Format.parquet,
    rows: Annotated[
        str | None, typer.Option(metavar="LO:HI", help="Global rows; all that are built when not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the export's receipt only.")] = False,
) -> None:
    """Write a run's rows as Parquet or tf.Example ArrayRecord."""
    from openmoe.pipelines import export as exports
    from openmoe.pipelines.loader import Loader
    from openmoe.platform.commands import progress
    from openmoe.platform.data import data_summary

    loader = Loader(data_summary.build_of(run, overrides or ()).path)
    plan = exports.Plan(data_id=loader.data_id, format=form.value, rows=_rows(rows, loader.num_rows))
    with progress.ProgressReport() as show:
        receipt = exports.export(loader, directory.rstrip("/"), plan, show)
    if as_json:
        print(json.dumps(receipt, indent=2))
        return
    lo, hi = receipt["rows"]
    print(f"{directory}: rows {lo} to {hi - 1} in {len(receipt['files'])} file(s), data {loader.data_id}")


def _rows(text: str | None, num_rows: int) -> tuple[int, int]:
    from openmoe.pipelines.config import DataError

    if text is None:
        return 0, num_rows
    if not (found := re.fullmatch(r"(\d*):(\d*)", text)):
        raise DataError(f"--rows {text}: two numbers with a colon wanted, such as 0:{num_rows}")
    return int(found[1] or 0), int(found[2] or num_rows)
