"""`openmoe data explain`: a row down to the files it was made of, and the steps that consumed it."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from openmoe.pipelines.explain import Explanation, Segment
    from openmoe.platform.run.ledger import Fate
    from openmoe.platform.run.run_dir import RunDir

_STYLES = {"prompt": "bold cyan", "sentinel": "bold magenta", "end": "dim", "text": ""}
# By the first letter: regular, extreme, sequential, next_token, chat.
_DENOISERS = {"R": "green", "X": "yellow", "S": "blue", "n": "magenta", "c": "green"}


def explain(
    place: Annotated[
        str, typer.Argument(metavar="RUN_DIR|MANIFEST", help="A run directory, or a manifest of data; local or gs://.")
    ],
    row: Annotated[int, typer.Option("--row", metavar="N", min=0, help="Global number of the row.")],
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the run's data is now; default as in its run file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Show what a row holds, and which steps consumed it.

    Down to the files that it was made of.
    """
    from openmoe.pipelines import explain as explanation
    from openmoe.platform.run.run_dir import RunDir

    if place.endswith(".json"):
        path, uses = place, None
    else:
        run = RunDir(place)
        path, uses = _manifest(run, data), list(uses_of(run, row))
    found = explanation.explain(path, row)
    if as_json:
        print(json.dumps(_json(found, uses), indent=2))
    else:
        _show(found, uses)


def _manifest(run: "RunDir", data: str | None) -> str:
    """Returns the path of the manifest of the rows that a run was trained on last."""
    from openmoe.platform.run import ledger_data
    from openmoe.platform.run.run_dir import RunDirError

    run.must_exist()
    ids = [event["data_id"] for event in run.events() if event["event"] == "started"]
    if not ids:
        raise RunDirError(f"{run.path}: has not begun to train; give the manifest of its data")
    return ledger_data.manifest_of(run, ids[-1], data)


def uses_of(run: "RunDir", row: int) -> "Iterator[tuple[int, int, Fate | str]]":
    """Yields (step, incarnation, what became of it) of each time a row was consumed, as the ledger has it."""
    from openmoe.platform.commands.cli_ledger import records
    from openmoe.platform.run import ledger, lineage
    from openmoe.platform.run.run_dir import RunDirError

    claims = run.claims()
    newest = max((claim.incarnation for claim in claims), default=0)
    try:
        line = lineage.line(claims, run.acceptances(), run.quarantined())
        for incarnation, record in records(run):
            entry = ledger.from_json(record)
            if entry.lo <= row < entry.hi:
                fate = ledger.fate(line, newest, incarnation, entry)
                yield entry.step, incarnation, f"skipped: {entry.incident}" if entry.incident else fate
    except ValueError as error:
        raise RunDirError(f"{run.path}: its ledger is damaged ({error}); `openmoe ledger verify` says where") from error


def _json(found: "Explanation", uses: "list[tuple[int, int, str]] | None") -> dict[str, Any]:
    told = [{"step": step, "incarnation": incarnation, "fate": fate} for step, incarnation, fate in uses or ()]
    return {**_plain(found), "uses": None if uses is None else told}


def _plain(value: Any) -> Any:
    """Returns named tuples, and those inside, as dictionaries."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value._asdict().items()} if hasattr(value, "_asdict") else value


def _show(found: "Explanation", uses: "list[tuple[int, int, str]] | None") -> None:
    import sys

    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    lines = [
        ("row", f"{found.row:,} of data {found.data_id}: {found.slots:,} of {found.seq_len:,} slots are used"),
        ("stream", f"{found.stream}, pass {found.pass_number}"),
        ("shard", f"{found.shard}, row {found.row_in_shard:,}"),
    ]
    if uses is not None:
        told = "; ".join(f"step {step:,} of incarnation {n} ({fate})" for step, n, fate in uses)
        lines.append(("used", told or "no step has consumed it, or none that kept a ledger"))
    for name, value in lines:
        console.print(f"{name:9}{value}", markup=False, soft_wrap=True)
    for number, segment in enumerate(found.segments, 1):
        _show_segment(console, number, segment)


def _show_segment(console: "Console", number: int, segment: "Segment") -> None:
    from rich.text import Text

    colour = _DENOISERS[segment.denoiser[0]]
    origin, end = segment.origin, segment.start + segment.length
    slots = f"{segment.num_inputs:,} slots of inputs, {segment.num_targets:,} of targets"
    console.print()
    if not segment.num_inputs + segment.num_targets:
        slots = "in the slots of the segment before it"
    console.print(Text.assemble(f"segment {number}: denoiser ", (segment.denoiser, f"bold {colour}"), f", {slots}"))
    document = f"document {segment.document:,} of unit {segment.unit:,}"
    console.print(f"  {origin.file}, {origin.unit} {origin.offset:,}", markup=False, soft_wrap=True)
    console.print(f"  tokens [{segment.start:,}, {end:,}) of {document}", markup=False, soft_wrap=True)
    for name, parts in (("inputs", segment.inputs), ("targets", segment.targets)):
        if not parts:
            continue
        style = colour if name == "targets" else ""
        text = Text.assemble(*((part.text, _STYLES[part.kind] or style) for part in parts))
        console.print(f"  {name}")
        for line in text.split("\n", allow_blank=True):
            console.print(Text("    ").append_text(line), soft_wrap=True)
