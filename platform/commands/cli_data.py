"""`openmoe data`: what training data will be, is made of, and whether it is sound."""

import contextlib
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmoe.platform.commands import cli_explain, cli_export, tables

if TYPE_CHECKING:
    from collections.abc import Generator

    from openmoe.pipelines.audit import Findings
    from openmoe.pipelines.manifest import Manifest
    from openmoe.platform.commands.progress import ProgressReport
    from openmoe.platform.data.data_plan import Plan, SourcePlan, StreamPlan
    from openmoe.platform.data.data_summary import StreamSummary
    from openmoe.platform.run_file.spec import RunSpec

app = typer.Typer(help="Plan, build, look at and check training data.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run file, or the name of a shipped one.")]
Built = Annotated[
    str, typer.Argument(metavar="RUN|MANIFEST", help="A run file, the name of a shipped one, or a manifest.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that win over the run file.")
]
LISTED = 20  # of a kind; JSON has all

Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def corpus(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where to write it, local or gs://.")],
    as_json: Json = False,
) -> None:
    """Write Python's own library as sample text and code."""
    from openmoe.pipelines import stdlib_corpus

    summary = stdlib_corpus.write_corpus(directory)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    rows = [(name, f"{n:,}", f"{summary['bytes'][name]:,}") for name, n in summary["documents"].items()]
    tables.show(directory, ("subset", "documents", "bytes"), rows)


@app.command()
def plan(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a build would do, and what is done already.

    Lists files and reads receipts, no documents.
    """
    loaded = _loaded(run, overrides)

    from openmoe.platform.commands import progress
    from openmoe.platform.data import data_plan

    with progress.ProgressReport() as show:
        found = data_plan.plan(loaded, show.say, show)
    if as_json:
        sources, streams = ([each._asdict() for each in rows] for rows in (found.sources, found.streams))
        print(json.dumps({"manifest": found.manifest, "sources": sources, "streams": streams}, indent=2))
    else:
        _show_plan(found)


@app.command()
def tokenize(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tokenize what a run reads, and pack nothing yet."""
    with _working(run, overrides) as (loaded, show):
        from openmoe.platform.data import build_ahead

        manifest = build_ahead.tokenize(loaded, show, show.say)
    units = [unit for source in manifest.sources for unit in source.units]
    documents, tokens = (sum(unit[key] for unit in units) for key in ("documents", "tokens"))
    if as_json:
        facts = {"manifest": manifest.path, "units": len(units), "documents": documents, "tokens": tokens}
        print(json.dumps(facts, indent=2))
        return
    print(f"{manifest.path}: {tokens:,} tokens of {documents:,} documents in {len(units):,} units")


@app.command()
def build(run: Run, overrides: Overrides = None, as_json: Json = False) -> None:
    """Build the shards that a run reads, and stop there."""
    with _working(run, overrides) as (loaded, show):
        from openmoe.pipelines.passes import Passes
        from openmoe.platform.data import build_ahead

        manifest = build_ahead.build_all(loaded, show, show.say)
        rows = manifest.mixture.rows_available(Passes(manifest).total_rows())
    if as_json:
        print(json.dumps({"manifest": manifest.path, "data_id": manifest.data_id, "rows": rows}, indent=2))
        return
    print(f"{manifest.path}: {rows:,} rows can be read")


@contextlib.contextmanager
def _working(run: str, overrides: list[str] | None) -> "Generator[tuple[RunSpec, ProgressReport]]":
    """Gives what a build needs, under Ray and with its sources at hand."""
    loaded = _loaded(run, overrides)

    from openmoe.platform.commands import progress
    from openmoe.platform.run import driver, ray_session
    from openmoe.platform.run_file import validate

    validate.check_tokenizer(loaded)
    with progress.ProgressReport() as show, ray_session.started(loaded.cluster):
        driver.write_sample_corpus(loaded)
        yield loaded, show


@app.command()
def inspect(run: Built, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what built data consists of, by stream."""
    from openmoe.platform.data import data_summary

    found = data_summary.builds_of(run, overrides or ())
    summaries = {manifest.data_id: data_summary.summarize(manifest) for manifest in found}
    if as_json:
        print(json.dumps({data_id: [s._asdict() for s in rows] for data_id, rows in summaries.items()}, indent=2))
        return
    columns = (
        *("source", "share", "documents", "bad", "duplicates", "validation", "its rows", "tokens a pass", "passes"),
        *("rows", "fill", "loss", "denoisers"),
    )
    for manifest, streams in zip(found, summaries.values(), strict=True):
        without = f", without {', '.join(manifest.missing)}" if manifest.missing else ""
        tables.show(f"data {manifest.data_id}{without}", columns, [_stream_row(stream) for stream in streams])
        for name, cut_off, lone in ((s.name, s.cut_off, s.lone) for s in streams if s.cut_off or s.lone):
            print(f"{name}: packing reference cut off {cut_off:,} tokens, and made no example of {lone:,} of text")


@app.command()
def audit(
    run: Built,
    overrides: Overrides = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Read the contents of N files only, drawn anew each time."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that built data is all there, as its receipts say.

    Exit code 1: it is not so, and the first contradiction is named.
    """
    from openmoe.pipelines import audit as audits
    from openmoe.platform.commands import progress
    from openmoe.platform.data import data_summary

    audited = []
    for manifest in data_summary.builds_of(run, overrides or ()):
        with progress.ProgressReport() as show:
            audited.append((manifest, audits.audit(manifest, sample=sample, report=show)))
    if as_json:
        print(json.dumps([{"manifest": m.path, **_audit_json(findings)} for m, findings in audited], indent=2))
    else:
        for manifest, findings in audited:
            _show_audit(manifest, findings)
    raise typer.Exit(1 if any(findings.contradictions for _, findings in audited) else 0)


@app.command()
def report(
    run: Built,
    overrides: Overrides = None,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Where to write it, local or gs://.")
    ] = "report.html",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the page's figures as JSON, and write no page.")
    ] = False,
) -> None:
    """Write a page about built data, with pictures.

    Mixture, fill, noise, document lengths, what was left out. One HTML file that needs nothing else. Document lengths
    are read from the token cache, of at most 32 units a source.
    """
    from openmoe.pipelines import storage
    from openmoe.platform.commands import progress
    from openmoe.platform.data import data_figures, data_report, data_summary

    manifest = data_summary.build_of(run, overrides or ())
    with progress.ProgressReport() as show:
        figures = data_figures.collect(manifest, show)
    if as_json:
        print(json.dumps(data_figures.to_json(figures), indent=2))
        return
    storage.write_durable(out, data_report.page(figures).encode())
    print(out)


app.command()(cli_explain.explain)
app.command()(cli_export.export)


def _loaded(run: str, overrides: list[str] | None) -> "RunSpec":
    """Returns a run with its local paths absolute, before anything slow is imported."""
    from openmoe.platform.run_file import spec, spec_paths

    return spec_paths.with_absolute_paths(spec.load(run, overrides or ()))


def _stream_row(stream: "StreamSummary") -> tuple[str, ...]:
    return (
        stream.name,
        f"{stream.share:.2%}",
        f"{stream.documents:,}",
        f"{stream.bad:,}",
        f"{stream.duplicates:,}",
        f"{stream.validation:,}",
        f"{stream.validation_rows:,}",
        f"{stream.tokens:,}",
        f"{stream.passes}",
        f"{stream.rows:,}",
        f"{stream.fill:.1%}",
        f"{stream.loss:.1%}",
        " ".join(f"{name} {share:.0%}" for name, share in stream.denoisers.items()),
    )


def _audit_json(findings: "Findings") -> dict[str, Any]:
    contradictions = [each._asdict() for each in findings.contradictions]
    return {"sound": not contradictions, **findings._asdict(), "contradictions": contradictions}


def _kept_apart(rows: int) -> str:
    return f", {rows:,} of them kept apart for validation" if rows else ""


def _show_audit(manifest: "Manifest", findings: "Findings") -> None:
    bad = [f"{source} {reason} {n:,}" for source, counts in findings.bad.items() for reason, n in counts.items()]
    table = [
        ("units", f"{findings.units:,}", "of the sources, tokenized"),
        ("groups", f"{findings.groups:,}", f"with {findings.rows:,} rows{_kept_apart(findings.validation_rows)}"),
        ("artefacts", f"{findings.artefacts:,}", "that are there and have a receipt that the manifest wants"),
        ("read", f"{findings.read:,}", f"{findings.read_bytes:,} bytes; digests and counts compared"),
        ("cut off", f"{findings.cut_off:,}", "tokens, as the original does" * bool(findings.cut_off)),
        ("lone", f"{findings.lone:,}", "tokens of which no example was made" * bool(findings.lone)),
        ("bad", f"{sum(sum(counts.values()) for counts in findings.bad.values()):,}", ", ".join(bad)),
        ("quarantined", f"{len(findings.quarantined):,}", "; ".join(findings.quarantined[:LISTED])),
        (
            "orphans",
            f"{len(findings.orphans):,}",
            "artefacts without a receipt, which nobody reads" * bool(findings.orphans),
        ),
    ]
    tables.show(f"data {manifest.data_id}", ("", "", ""), table)
    for path in findings.orphans[:LISTED]:
        print(f"orphan  {path}")
    wrong = findings.contradictions
    if wrong:
        print("\n    ".join(("CONTRADICTION", *map(str, wrong[:LISTED]))))
        if len(wrong) > LISTED:
            print(f"    and {len(wrong) - LISTED:,} more; --json has them all")
    elif findings.read < findings.artefacts:
        print(f"SOUND IN PART: all is there, {findings.read:,} of {findings.artefacts:,} files were read")
    else:
        print("SOUND: all is there, and holds what its receipts say")


def _show_plan(found: "Plan") -> None:
    columns = ("source", "files", "compressed", "bytes", "units", "tokenized", "documents", "tokens", "tokens of all")
    tables.show("sources", columns, [_source_plan_row(source) for source in found.sources])
    columns = ("stream", "rows of the run", "passes", "packed rows", "packed groups", "groups left")
    tables.show("streams", columns, [_stream_plan_row(stream) for stream in found.streams])
    units = sum(source.units - source.tokenized for source in found.sources)
    groups = [stream.groups_left for stream in found.streams]
    known = [number for number in groups if number is not None]
    left = f"then to pack about {sum(known):,} groups" if known else "then to pack the groups of its epochs"
    if found.manifest and known and not any(known):
        print(f"everything is built: {found.manifest}")
    else:
        print(f"left to do: {units:,} units to tokenize, {left}")


def _source_plan_row(source: "SourcePlan") -> tuple[str, ...]:
    if source.missing:
        return (source.name, "missing", *[""] * 7)
    return (
        source.name,
        f"{source.files:,}",
        f"{source.compressed:,}",
        f"{source.bytes:,}",
        f"{source.units:,}",
        f"{source.tokenized:,}",
        f"{source.documents:,}",
        f"{source.tokens:,}",
        f"{source.estimated_tokens:,}" if source.units == source.tokenized else _estimate(source),
    )


def _estimate(source: "SourcePlan") -> str:
    basis = "by the tokenized units" if source.measured else "by the bytes"
    return f"about {source.estimated_tokens:,} {basis}"


def _stream_plan_row(stream: "StreamPlan") -> tuple[str, ...]:
    return (
        stream.name,
        "not known" if stream.rows is None else f"{stream.rows:,}",
        "not known" if stream.passes is None else f"{stream.passes:.2f}",
        f"{stream.packed_rows:,}",
        f"{stream.packed_groups:,}",
        "not known" if stream.groups_left is None else f"{stream.groups_left:,}",
    )
