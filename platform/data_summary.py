"""What a data build consists of, source by source: its manifest and the receipts of its passes."""

from __future__ import annotations

from typing import Any, NamedTuple

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import selection, storage
from openmoe.pipelines.config import DataConfig, DataError
from openmoe.pipelines.manifest import Manifest, SourceManifest
from openmoe.pipelines.passes import Passes


class SourceSummary(NamedTuple):
    """One source of a build.

    Attributes:
      share: of the mixture's rows; where it has stages, of those that are built.
      documents: those that every pass contains.
      bad: unusable ones.
      duplicates: usable ones left out because they were there before.
      validation: usable ones kept apart.
      tokens: of text, in one pass.
      passes: finished ones.
      rows: of all finished passes.
      fill: share of the rows' tokens that are not padding.
      loss: share of the rows' tokens that carry loss.
      denoisers: share of the pieces, by UL2's denoisers.
    """

    name: str
    share: float
    documents: int
    bad: int
    duplicates: int
    validation: int
    tokens: int
    passes: int
    rows: int
    fill: float
    loss: float
    denoisers: dict[str, float]


def builds(config: DataConfig, data_dir: str) -> list[Manifest]:
    """Returns the builds of these settings; more than one if files were added to a source in between.

    Raises:
      DataError: there is none.
    """
    folder = storage.join(data_dir, "manifests")
    found = [manifests.load(storage.join(folder, name)) for name in storage.list_files(folder)]
    matching = [manifest for manifest in found if _matches(manifest, config)]
    if not matching:
        raise DataError(f"{data_dir}: no build of these settings; `openmoe data build RUN` makes one")
    return matching


def _matches(manifest: Manifest, config: DataConfig) -> bool:
    fields = ("tokenizer", "seq_len", "objective", "seed", "group_tokens", "dedup", "validation_share")
    same = all(getattr(manifest, field) == getattr(config, field) for field in fields)
    if manifest.missing:
        may_be = {source.name for source in config.sources if source.missing == "renormalize"}
        if not may_be.issuperset(manifest.missing) or len(manifest.missing) == len(config.sources):
            return False
        config = config.without(manifest.missing)
    mixture = [(source.name, source.weight) for source in config.sources]
    built = [(source.name, source.weight) for source in manifest.sources]
    return same and built == mixture and manifest.stages == manifests.stages_of(config)


def summarize(manifest: Manifest) -> list[SourceSummary]:
    """Returns the sources of a build, in the order of the run file."""
    passes = Passes(manifest)
    shares = _shares(manifest, passes)
    return [
        _source(source, passes.groups[index], share=shares[index], seq_len=manifest.seq_len)
        for index, source in enumerate(manifest.sources)
    ]


def _shares(manifest: Manifest, passes: Passes) -> list[float]:
    if not manifest.stages:
        weights = [source.weight or 0 for source in manifest.sources]
        return [weight / sum(weights) for weight in weights]
    rows = manifest.mixture.rows_available(passes.total_rows())
    return [int(needed) / max(rows, 1) for needed in manifest.mixture.rows_needed(rows)]


def _source(source: SourceManifest, passes: list[list[dict[str, Any]]], *, share: float, seq_len: int) -> SourceSummary:
    groups = [group for groups in passes for group in groups]
    rows = sum(group["rows"] for group in groups)
    slots = max(rows * seq_len, 1)
    names = groups[0]["pieces"] if groups else ()
    pieces = {name: sum(group["pieces"][name] for group in groups) for name in names}
    num_pieces = max(sum(pieces.values()), 1)
    return SourceSummary(
        name=source.name,
        share=share,
        documents=sum(selection.count(unit, "train") for unit in source.units),
        bad=sum(sum(unit["bad"].values()) for unit in source.units),
        duplicates=sum(selection.count(unit, "duplicate") for unit in source.units),
        validation=sum(selection.count(unit, "validation") for unit in source.units),
        tokens=sum(selection.trained_tokens(unit) for unit in source.units),
        passes=len(passes),
        rows=rows,
        fill=sum(group["slots_used"] for group in groups) / slots,
        loss=sum(group["loss_slots"] for group in groups) / slots,
        denoisers={name: count / num_pieces for name, count in pieces.items()},
    )
