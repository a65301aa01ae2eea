"""What the page about a data build shows, as numbers: from its manifest, receipts, and the token cache's lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from openmoe.pipelines import audit, selection, storage, token_cache, ul2
from openmoe.pipelines.manifest import Manifest, SourceManifest
from openmoe.pipelines.mixture import one_stage
from openmoe.pipelines.passes import Passes
from openmoe.platform.data import data_summary
from openmoe.platform.data.data_summary import StreamSummary

# Units of a source whose documents are measured; of more, these many are taken at equal distances.
LENGTH_UNITS = 32
MAX_OCTAVES = 32

Report = Callable[[str, int, int, str], None]


class Lengths(NamedTuple):
    """How long a source's documents are, in tokens, whether they are trained on or not.

    Attributes:
      documents: with 2^k to 2^(k+1) - 1 tokens, by k.
      tokens: of those documents.
      longest: tokens of the longest one.
      units_read: that were measured.
    """

    documents: list[int]
    tokens: list[int]
    longest: int
    units_read: int


class SourceFigures(NamedTuple):
    """One source.

    Attributes:
      name: as in the run file.
      units: that it was cut into.
      trained: documents that every pass contains.
      duplicates: left out because they were there before.
      validation: kept apart.
      repaired: documents in which characters that are none were replaced.
      text_bytes: of all usable documents, in UTF-8.
      tokens: of the same.
      bad: unusable ones, by reason.
      quarantined: units that were left out, with the reason.
      lengths: of its usable documents.
    """

    name: str
    units: int
    trained: int
    duplicates: int
    validation: int
    repaired: int
    text_bytes: int
    tokens: int
    bad: dict[str, int]
    quarantined: list[str]
    lengths: Lengths


class Share(NamedTuple):
    """A stream's part of some rows."""

    stream: str
    wanted: float
    rows: int


class StageFigures(NamedTuple):
    """The rows of a stage that can be read, [first, end), by stream."""

    first: int
    end: int
    shares: list[Share]


class Figures(NamedTuple):
    """All of a build; `denoisers` are the shares of pieces that each stream should have."""

    manifest: Manifest
    rows: int  # that can be read
    streams: list[StreamSummary]
    denoisers: list[dict[str, float]]
    stages: list[StageFigures]
    sources: list[SourceFigures]


def collect(manifest: Manifest, report: Report = lambda *progress: None) -> Figures:
    """Returns the figures of a build; of a large one, document lengths of a part of it."""
    rows = manifest.mixture.rows_available(Passes(manifest).total_rows())
    chosen = [_spread(len(source.units)) for source in manifest.sources]
    total, done, sources = sum(map(len, chosen)), 0, []
    for source, units in zip(manifest.sources, chosen, strict=True):
        counts = []
        for unit in units:
            counts.append(_unit_lengths(manifest, source.units[unit]["key"]))
            done += 1
            report("lengths", done, total, "units")
        sources.append(_source(manifest, source, counts))
    return Figures(
        manifest=manifest,
        rows=rows,
        streams=data_summary.summarize(manifest),
        denoisers=[wanted_denoisers(stream.objective) for stream in manifest.streams],
        stages=_stages(manifest, rows),
        sources=sources,
    )


def to_json(figures: Figures) -> dict[str, Any]:
    """Returns the figures as JSON has them, with the path of the manifest for itself."""
    return {
        "manifest": figures.manifest.path,
        "data_id": figures.manifest.data_id,
        "rows": figures.rows,
        "streams": [
            {**stream._asdict(), "wanted_denoisers": wanted}
            for stream, wanted in zip(figures.streams, figures.denoisers, strict=True)
        ],
        "stages": [{**s._asdict(), "shares": [share._asdict() for share in s.shares]} for s in figures.stages],
        "sources": [{**source._asdict(), "lengths": source.lengths._asdict()} for source in figures.sources],
    }


def wanted_denoisers(objective: str) -> dict[str, float]:
    """Returns the share of the pieces that each denoiser should have."""
    if objective == "ul2":
        return {denoiser.name: denoiser.tenths / 10 for denoiser in ul2.DENOISERS}
    return {ul2.DENOISERS[ul2.PREFIX_LM].name: 1.0} if objective == "prefix_lm" else {objective: 1.0}


def _spread(num_units: int) -> list[int]:
    """Returns at most LENGTH_UNITS numbers of units, at equal distances from the first to the last."""
    return np.unique(np.linspace(0, num_units - 1, min(num_units, LENGTH_UNITS)).astype(int)).tolist()


def _unit_lengths(manifest: Manifest, key: str) -> np.ndarray:
    """Returns documents and tokens by octave, and the length of the longest: int64[2 * MAX_OCTAVES + 1]."""
    path = storage.join(manifest.data_dir, "tokens", f"{key}.parquet")
    documents, tokens, longest = np.zeros(MAX_OCTAVES, np.int64), np.zeros(MAX_OCTAVES, np.int64), 0
    for lengths in token_cache.lengths(path):
        octaves = octave_of(lengths)
        documents += np.bincount(octaves, minlength=MAX_OCTAVES)
        tokens += np.bincount(octaves, weights=lengths, minlength=MAX_OCTAVES).astype(np.int64)
        longest = max(longest, int(lengths.max(initial=0)))
    return np.concatenate([documents, tokens, [longest]])


def octave_of(lengths: np.ndarray) -> np.ndarray:
    """Returns k with 2^k <= length < 2^(k+1), int64[n]; lengths are at least 1."""
    return np.frexp(lengths)[1].astype(np.int64) - 1


def _source(manifest: Manifest, source: SourceManifest, counts: list[np.ndarray]) -> SourceFigures:
    measured = np.asarray(counts, np.int64).reshape(-1, 2 * MAX_OCTAVES + 1)
    documents, tokens = np.split(measured[:, :-1].sum(axis=0), 2)
    parts = {part: sum(selection.count(unit, part) for unit in source.units) for part in selection.PARTS}
    return SourceFigures(
        name=source.name,
        units=len(source.units),
        trained=parts["train"],
        duplicates=parts["duplicate"],
        validation=parts["validation"],
        repaired=sum(unit["repaired"] for unit in source.units),
        text_bytes=sum(unit["text_bytes"] for unit in source.units),
        tokens=sum(unit["tokens"] for unit in source.units),
        bad=audit.bad_of(source),
        quarantined=audit.quarantined_of(source),
        lengths=Lengths(documents.tolist(), tokens.tolist(), int(measured[:, -1].max(initial=0)), len(counts)),
    )


def _stages(manifest: Manifest, rows: int) -> list[StageFigures]:
    """Returns the stages of which there are rows."""
    stages = manifest.stages or one_stage(source.weight or 0 for source in manifest.sources)
    first, found = 0, []
    for stage in stages:
        end = rows if stage.end is None else min(stage.end, rows)
        if end > first:
            held = manifest.mixture.rows_needed(end) - manifest.mixture.rows_needed(first)
            each = zip(manifest.stream_names, stage.weights, held.tolist(), strict=True)
            shares = [Share(name, weight / sum(stage.weights), n) for name, weight, n in each if weight or n]
            found.append(StageFigures(first, end, shares))
            first = end
    return found
