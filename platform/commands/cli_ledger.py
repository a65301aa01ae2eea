"""`openmoe ledger`: the proof that no row was lost or repeated."""

import json
import random
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmoe.platform.commands import tables

if TYPE_CHECKING:
    from openmoe.platform.run.ledger import Findings, Record, Steps
    from openmoe.platform.run.lineage import Acceptance
    from openmoe.platform.run.run_dir import RunDir

app = typer.Typer(help="Prove what a run was trained on.", no_args_is_help=True)


@app.command()
def verify(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or gs://.")],
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="Compare only the steps A to B with the shards.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Compare only N steps, drawn anew each time.")
    ] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Check the records alone, without the shards.")] = False,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the data is now; default as in the run file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Prove that every row was trained on exactly once.

    Every one up to the newest checkpoint. Follows the ledger along the line of accepted checkpoints, and compares what
    each step consumed with the shards.
    Exit code 1: it is not so, and the first contradiction is named.
    """
    from openmoe.pipelines.loader import Loader
    from openmoe.platform.commands import progress
    from openmoe.platform.run import ledger, ledger_data
    from openmoe.platform.run.run_dir import RunDir, RunDirError

    run = RunDir(run_dir)
    record, newest = opened(run)
    if newest is None:
        raise RunDirError(f"{run.path}: no checkpoint was accepted yet, so that no step counts; wait for the first one")
    chosen = _chosen(steps, sample, newest.step)
    facts = (run.claims(), run.acceptances(), run.quarantined(), records(run))
    if no_data:
        findings = ledger.verify(*facts, chosen=range(0))
    else:
        loader = Loader(ledger_data.manifest_of(run, newest.data_id, data))
        total = sum(step in chosen for step in range(1, newest.step + 1))
        with progress.ProgressReport() as show:
            compare = ledger_data.Comparison(loader, lambda done: show("compare", done, total, "steps"))
            findings = ledger.verify(*facts, compare=compare, chosen=chosen)
    _show(findings, record, newest.step, as_json=as_json)
    raise typer.Exit(0 if findings.holds else 1)


def opened(run: "RunDir") -> "tuple[dict[str, Any], Acceptance | None]":
    """Returns a run's run.json, and its newest acceptance that counts.

    Raises:
      RunDirError: it is no run, or it has no ledger.
    """
    from openmoe.pipelines import storage
    from openmoe.platform.run.run_dir import RunDirError

    run.must_exist()
    if not storage.list_files(run.at("ledger")):
        raise RunDirError(
            f"{run.path}: has no ledger: a version that kept none trained it, or it has not taken a step yet; "
            "go on with it, and what it is trained on from then on can be proven"
        )
    return run.record(), run.newest_accepted()


def records(run: "RunDir") -> "Iterator[tuple[int, Record]]":
    """Returns (incarnation, record) of a run's ledger, in the order written."""
    from openmoe.platform.run import journal

    return ((incarnation, record) for incarnation, _, record in journal.read(run.at("ledger")))


def _chosen(steps: str | None, sample: int | None, last: int) -> Container[int]:
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    first, stop = 1, last
    if steps is not None:
        ends = steps.split(":")
        if len(ends) != 2 or not all(end.isdecimal() for end in ends) or not 1 <= int(ends[0]) <= int(ends[1]):
            raise SpecError([Problem("", f"--steps {steps}: give the first and the last step, as 100:200")])
        first, stop = int(ends[0]), min(int(ends[1]), last)
        if first > last:
            raise SpecError([Problem("", f"--steps {steps}: the newest checkpoint is that of step {last}")])
    of = range(first, stop + 1)
    return of if sample is None else set(random.sample(of, min(sample, len(of))))


def _show(findings: "Findings", record: dict[str, Any], last: int, *, as_json: bool) -> None:
    row_tokens = record["spec"]["data"]["seq_len"]
    if as_json:
        print(json.dumps(_json(findings, record["name"], row_tokens), indent=2))
        return
    position, rows = findings.position, findings.trained_rows
    skipped = "; ".join(f"rows [{s.lo}, {s.hi}): {s.incident}" for s in findings.skipped)
    table = [
        ("steps", f"{position.step:,}", f"of {last:,} up to the newest checkpoint"),
        ("rows", f"{rows:,}", f"of [0, {position.next_row:,}), trained on"),
        ("tokens", f"{rows * row_tokens:,}", f"{row_tokens:,} a row, padding included"),
        ("incarnations", f"{len(findings.line)}", _listed(findings.line)),
        ("undone", _count(findings.undone), _listed(findings.undone)),
        ("not accepted", _count(findings.not_accepted), _listed(findings.not_accepted)),
        ("without entries", _count(findings.unrecorded), _listed(findings.unrecorded)),
        ("skipped", f"{len(findings.skipped)}", skipped),
        ("compared", f"{findings.compared:,}", "steps with what the shards hold"),
        ("head", findings.head[:16], "equal heads: the same batches in the same order"),
    ]
    always = ("undone", "skipped", "compared")
    tables.show(f"ledger of {record['name']}", ("", "", ""), [t for t in table if t[1] != "0" or t[0] in always])
    print(verdict(findings))


def verdict(findings: "Findings") -> str:
    """Returns the result in words."""
    position = findings.position
    if findings.contradiction:
        return "\n    ".join(("CONTRADICTION", *findings.contradiction.lines()))
    if findings.unrecorded:
        return (
            f"NOT PROVEN: steps {_listed(findings.unrecorded)} left no entries: an earlier version trained them, or "
            "their part of ledger/ was lost; all others hold"
        )
    once = f"each row of [0, {position.next_row:,}) was trained on exactly once"
    once += " or skipped as listed" if findings.skipped else ""
    if not findings.compared:
        return f"CONSISTENT: the entries say that {once}; nothing was compared with the shards"
    if findings.compared < position.step:
        return f"PROVEN IN PART: {once}; {findings.compared:,} of {position.step:,} steps were compared with the shards"
    return f"PROVEN: {once}"


def _count(parts: "Sequence[Steps]") -> str:
    return f"{sum(part.last - part.first + 1 for part in parts):,}"


def _listed(parts: "Sequence[Steps]") -> str:
    return "; ".join(f"{part.first:,} to {part.last:,} by incarnation {part.incarnation}" for part in parts)


def _json(findings: "Findings", name: str, row_tokens: int) -> dict[str, Any]:
    def listed(parts: Sequence[Any]) -> list[dict[str, Any]]:
        return [part._asdict() for part in parts]

    contradiction = findings.contradiction
    return {
        "run": name,
        "holds": findings.holds,
        "steps": findings.position.step,
        "next_row": findings.position.next_row,
        "trained_rows": findings.trained_rows,
        "tokens": findings.trained_rows * row_tokens,
        "compared": findings.compared,
        "head": findings.head,
        "line": listed(findings.line),
        "undone": listed(findings.undone),
        "not_accepted": listed(findings.not_accepted),
        "skipped": listed(findings.skipped),
        "unrecorded": listed(findings.unrecorded),
        "contradiction": contradiction._asdict() if contradiction else None,
    }
