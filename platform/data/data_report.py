"""The page about a data build: one HTML file that looks like the dashboard and loads nothing; its pictures are SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from openmoe.platform.commands import facts
from openmoe.platform.data.data_figures import Figures, SourceFigures, StageFigures
from openmoe.platform.data.data_summary import StreamSummary

STYLE = Path(__file__).parents[1] / "dashboard" / "static" / "dashboard.css"
# What the dashboard has no names for; everything else is its own.
_OWN_STYLE = """
svg { display: block; width: 100%; min-width: 34rem; max-width: 46rem; height: auto; }
svg { font: 13px system-ui, -apple-system, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); } svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; } svg .ground { fill: var(--grid); } svg .bar { fill: var(--accent); }
svg .second { fill: var(--accent-soft); } svg .none { fill: var(--bad); } svg .wanted { fill: var(--warn); }
h3 { margin: .9rem 0 .3rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: .4rem 2rem; }
.key i.box { height: .7rem; width: .7rem; border: 0; background: var(--accent); }
.key i.box.second { background: var(--accent-soft); } .key i.box.none { background: var(--bad); }
.key i.box.wanted { background: var(--warn); width: 3px; height: .9rem; }
"""
_WIDTH, _LEFT, _RIGHT, _ROW = 740, 200, 240, 24
_NAME_CHARACTERS = 28


class Bar(NamedTuple):
    """One bar: its name, its length as a share of the axis, what is written behind it, where it should end."""

    name: str
    share: float
    text: str
    wanted: float | None = None


def page(figures: Figures) -> str:
    """Returns the page."""
    manifest = figures.manifest
    sections = [
        _section("", _headline(figures)),
        _section(
            "Is it the mixture that was asked for?", _mixture(figures), _key(("bar", "got"), ("wanted", "asked for"))
        ),
        _section(
            "How full are the rows?",
            _fill(figures.streams),
            _key(("bar", "carries loss"), ("second", "read only"), ("none", "padding")),
        ),
        _section(
            "Is it the noise that was asked for?", _denoisers(figures), _key(("bar", "got"), ("wanted", "asked for"))
        ),
        _section(
            "How long are the documents?", _lengths(figures.sources), _key(("bar", "documents"), ("second", "tokens"))
        ),
        _section("What was left out?", _left_out(figures.sources)),
        _section("What is it?", _facts(figures)),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">',
            f"<title>data {manifest.data_id[:16]}</title>\n<style>{STYLE.read_text()}{_OWN_STYLE}</style>",
            f'<header class="top"><h1>data {manifest.data_id[:16]}</h1></header>\n<main>',
            *sections,
            "</main>\n</html>\n",
        ]
    )


def _section(title: str, content: str, note: str = "") -> str:
    header = f"<header><h2>{escape(title)}</h2></header>\n" if title else ""
    return f"<section>\n{header}{content}\n{note}</section>"


def _key(*entries: tuple[str, str]) -> str:
    spans = "".join(f'<span><i class="box {kind}"></i>{text}</span>' for kind, text in entries)
    return f'<p class="key note">{spans}</p>\n'


def _headline(figures: Figures) -> str:
    manifest, streams = figures.manifest, figures.streams
    stored = sum(stream.rows for stream in streams)
    fill = sum(stream.fill * stream.rows for stream in streams) / max(stored, 1)
    loss = sum(stream.loss * stream.rows for stream in streams) / max(stored, 1)
    documents = sum(source.trained for source in figures.sources)
    bad = sum(sum(source.bad.values()) for source in figures.sources)
    tiles = [
        ("rows that can be read", f"{figures.rows:,}", f"{facts.short(figures.rows * manifest.seq_len)} tokens"),
        ("rows packed", f"{stored:,}", f"of {manifest.seq_len:,} tokens"),
        ("slots used", f"{fill:.2%}", f"{loss:.1%} carry loss"),
        ("documents a pass", f"{documents:,}", f"from {len(figures.sources)} sources"),
        ("left out", f"{bad:,}", "documents that were unusable"),
    ]
    return f'<dl class="tiles">{"".join(_tile(*tile) for tile in tiles)}</dl>'


def _tile(name: str, value: str, note: str) -> str:
    return f'<div class="tile"><dt>{name}</dt><dd>{value}</dd><dd>{escape(note)}</dd></div>'


def _mixture(figures: Figures) -> str:
    if not figures.stages:
        return '<p class="empty">No row can be read yet: a stream has no rows.</p>'
    numbers = [f"stage {number}: " if figures.manifest.stages else "" for number in range(1, len(figures.stages) + 1)]
    return "\n".join(_stage(number, stage) for number, stage in zip(numbers, figures.stages, strict=True))


def _stage(number: str, stage: StageFigures) -> str:
    rows = stage.end - stage.first
    bars = [
        Bar(
            share.stream,
            share.rows / rows,
            f"{share.rows / rows:.2%} of {share.wanted:.2%}, {share.rows:,} rows",
            share.wanted,
        )
        for share in stage.shares
    ]
    title = f"{number}rows {stage.first:,} to {stage.end - 1:,}"
    return f"<h3>{title}</h3>\n{_bars(bars, f'shares of the rows of {title}')}"


def _denoisers(figures: Figures) -> str:
    parts = []
    for stream, wanted in zip(figures.streams, figures.denoisers, strict=True):
        names = dict.fromkeys([*wanted, *stream.denoisers])
        both = [(name, stream.denoisers.get(name, 0.0), wanted.get(name, 0.0)) for name in names]
        bars = [Bar(name, got, f"{got:.1%} of {asked:.0%}", asked) for name, got, asked in both]
        drawn = _bars(bars, f"denoisers of {stream.name}") if stream.rows else '<p class="empty">nothing is packed</p>'
        parts.append(f"<div><h3>{escape(stream.name)}</h3>\n{drawn}</div>")
    note = "Shares of the pieces into which documents are cut."
    return f'<p class="note">{note}</p><div class="pair">{"".join(parts)}</div>'


def _bars(bars: Sequence[Bar], label: str) -> str:
    """Returns horizontal bars, on an axis that ends with the longest, and a tick where each should end."""
    longest = max([bar.share for bar in bars] + [bar.wanted or 0 for bar in bars] + [1e-9])
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    lines = []
    for index, bar in enumerate(bars):
        y = index * _ROW
        lines.append(_name(y, bar.name) + _rect("bar", _LEFT, y + 5, bar.share * scale, _ROW - 10))
        if bar.wanted is not None:
            lines.append(_rect("wanted", _LEFT + bar.wanted * scale - 1, y + 2, 3, _ROW - 4))
        lines.append(f'<text class="soft" x="{_WIDTH - _RIGHT + 12}" y="{y + 16}">{escape(bar.text)}</text>')
    return _svg(len(bars) * _ROW, label, lines)


def _fill(streams: Sequence[StreamSummary]) -> str:
    lines = []
    width = _WIDTH - _LEFT - _RIGHT
    for index, stream in enumerate(streams):
        y, x = index * _ROW, float(_LEFT)
        lines.append(_name(y, stream.name) + _rect("ground", _LEFT, y + 5, width, _ROW - 10))
        parts = (("bar", stream.loss), ("second", stream.fill - stream.loss), ("none", 1 - stream.fill))
        for kind, share in parts if stream.rows else ():
            lines.append(_rect(kind, x, y + 5, share * width, _ROW - 10))
            x += share * width
        text = f"{stream.fill:.2%} used, {stream.loss:.1%} loss" if stream.rows else "nothing is packed"
        lines.append(f'<text class="soft" x="{_WIDTH - _RIGHT + 12}" y="{y + 16}">{text}</text>')
    return _svg(len(streams) * _ROW, "used slots of the rows of each stream", lines)


def _lengths(sources: Sequence[SourceFigures]) -> str:
    drawn = [f"<div><h3>{escape(source.name)}</h3>\n{_histogram(source)}</div>" for source in sources]
    note = "Tokens of a document, in powers of two; the share of the documents, and of their tokens."
    return f'<p class="note">{note}</p><div class="pair">{"".join(drawn)}</div>'


def _histogram(source: SourceFigures) -> str:
    lengths = source.lengths
    used = [octave for octave, count in enumerate(lengths.documents) if count]
    if not used:
        return '<p class="empty">no document</p>'
    octaves = range(used[0], used[-1] + 1)
    documents, tokens = sum(lengths.documents), sum(lengths.tokens)
    shares = [(lengths.documents[k] / documents, lengths.tokens[k] / tokens) for k in octaves]
    height, step = 130, (_WIDTH - 20) / len(octaves)
    scale = height / max(max(pair) for pair in shares)
    lines = []
    for index, (octave, (of_documents, of_tokens)) in enumerate(zip(octaves, shares, strict=True)):
        x = 10 + index * step
        lines.append(
            _title(f"{2**octave:,} to {2 ** (octave + 1) - 1:,} tokens: {lengths.documents[octave]:,} documents")
        )
        for kind, share, at in (("bar", of_documents, 0.1), ("second", of_tokens, 0.5)):
            lines.append(_rect(kind, x + at * step, 18 + height - share * scale, 0.4 * step, share * scale))
        lines.append(f'<text class="soft mid" x="{x + step / 2:.1f}" y="{height + 34}">{_octave(octave)}</text>')
        lines.append("</g>")
    part = "" if lengths.units_read == source.units else f"; of {lengths.units_read:,} of {source.units:,} units"
    half = _median_octave(lengths.documents)
    text = (
        f"{documents:,} documents, {tokens / documents:,.0f} tokens in the mean, half of them have fewer than "
        f"{2 ** (half + 1):,}, the longest {lengths.longest:,}{part}"
    )
    return _svg(height + 40, f"lengths of the documents of {source.name}", lines) + f'\n<p class="note">{text}</p>'


def _octave(octave: int) -> str:
    return f"{2**octave}" if octave < 10 else f"{2 ** (octave - 10)}k" if octave < 20 else f"{2 ** (octave - 20)}M"


def _median_octave(documents: Sequence[int]) -> int:
    """Returns the first octave up to whose end there are half of the documents."""
    held, total = 0, sum(documents)
    for octave, count in enumerate(documents):
        held += count
        if 2 * held >= total:
            return octave
    return 0


def _left_out(sources: Sequence[SourceFigures]) -> str:
    columns = ("source", "trained on", "duplicates", "validation", "unusable", "repaired", "units", "quarantined")
    rows = [
        (s.name, s.trained, s.duplicates, s.validation, sum(s.bad.values()), s.repaired, s.units, len(s.quarantined))
        for s in sources
    ]
    reasons = [(f"{s.name}: {reason}", count) for s in sources for reason, count in s.bad.items()]
    total = sum(count for _, count in reasons)
    bars = [Bar(name, count / total, f"{count:,}") for name, count in sorted(reasons, key=lambda each: -each[1])]
    drawn = f"<h3>Unusable documents, by reason</h3>\n{_bars(bars, 'unusable documents by reason')}" if bars else ""
    units = [f"{source.name}: {unit}" for source in sources for unit in source.quarantined]
    listed = f"<h3>Quarantined units</h3><pre>{escape(chr(10).join(units))}</pre>" if units else ""
    return _table(columns, rows) + drawn + listed


def _facts(figures: Figures) -> str:
    manifest = figures.manifest
    sizes = [
        (s.name, s.tokens, s.text_bytes, f"{s.text_bytes / s.tokens:.2f}" if s.tokens else "") for s in figures.sources
    ]
    entries = [
        ("manifest", manifest.path),
        ("rows", f"{manifest.data_id}: equal ids, equal rows"),
        ("tokenizer", f"{manifest.tokenizer} ({manifest.tokenizer_fingerprint[:16]})"),
        ("row length", f"{manifest.seq_len:,} tokens"),
        ("packing", manifest.packing),
        ("seed", str(manifest.seed)),
        ("duplicates", manifest.dedup),
        ("validation", f"{manifest.validation_share:g} of the documents"),
        *([("missing sources", ", ".join(manifest.missing))] if manifest.missing else ()),
    ]
    told = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in entries)
    passes = [(s.name, s.passes, s.rows, s.tokens) for s in figures.streams]
    return (
        f'<dl class="facts">{told}</dl>'
        + _table(("source", "tokens", "bytes of text", "bytes a token"), sizes)
        + _table(("stream", "finished passes", "rows packed", "tokens a pass"), passes)
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[int | str]]) -> str:
    kinds = ["", *['class="num"'] * (len(columns) - 1)]
    head = "".join(f"<th {kind}>{name}</th>" for kind, name in zip(kinds, columns, strict=True))
    lines = []
    for row in rows:
        texts = [f"{value:,}" if isinstance(value, int) else escape(value) for value in row]
        lines.append(f"<tr>{''.join(f'<td {kind}>{text}</td>' for kind, text in zip(kinds, texts, strict=True))}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>\n{chr(10).join(lines)}\n</table></div>\n'


def _svg(height: int, label: str, lines: Sequence[str]) -> str:
    drawn = "\n".join(lines)
    opened = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return f'<div class="scroll">{opened}\n{drawn}\n</svg></div>'


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"/>'


def _name(y: int, name: str) -> str:
    shown = name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…"
    return f'<text class="end" x="{_LEFT - 10}" y="{y + 16}">{escape(shown)}</text>'


def _title(text: str) -> str:
    """Returns the beginning of a group that says this to a pointer that rests on it."""
    return f"<g><title>{escape(text)}</title>"
