"""What a data build consists of, source by source: its manifest and the receipts of its passes."""

from __future__ import annotations

from typing import NamedTuple

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import storage
from openmoe.pipelines.config import DataConfig, DataError
from openmoe.pipelines.manifest import Manifest, SourceManifest
from openmoe.pipelines.passes import Passes


class SourceSummary(NamedTuple):
    """One source of a build.

    Attributes:
      share: of the mixture's rows; where it has stages, of those that are built.
      documents: usable ones, all of which every pass contains.
      bad: documents left out.
      tokens: of text, in one pass.
      passes: finished ones.
      rows: of all finished passes, and of the groups of the one that is begun.
      fill: share of the rows' tokens that are not padding.
      loss: share of the rows' tokens that carry loss.
      denoisers: share of the pieces, by UL2's denoisers.
    """

    name: str
    share: float
    documents: int
    bad: int
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
    fields = ("tokenizer", "seq_len", "objective", "seed", "group_tokens")
    same = all(getattr(manifest, field) == getattr(config, field) for field in fields)
    mixture = [(source.name, source.weight) for source in config.sources]
    built = [(source.name, source.weight) for source in manifest.sources]
    return same and built == mixture and manifest.stages == manifests.stages_of(config)


def summarize(manifest: Manifest) -> list[SourceSummary]:
    """Returns the sources of a build, in the order of the run file."""
    passes = Passes(manifest)
    shares = _shares(manifest, passes)
    return [_source(source, passes, index, share=shares[index]) for index, source in enumerate(manifest.sources)]


def _shares(manifest: Manifest, passes: Passes) -> list[float]:
    if not manifest.stages:
        weights = [source.weight or 0 for source in manifest.sources]
        return [weight / sum(weights) for weight in weights]
    rows = manifest.mixture.rows_available(passes.total_rows())
    return [int(needed) / max(rows, 1) for needed in manifest.mixture.rows_needed(rows)]


def _source(source: SourceManifest, passes: Passes, index: int, *, share: float) -> SourceSummary:
    groups = [group for groups in passes.receipts(index) for group in groups]
    rows = sum(group["rows"] for group in groups)
    slots = max(rows * passes.manifest.seq_len, 1)
    names = groups[0]["pieces"] if groups else ()
    pieces = {name: sum(group["pieces"][name] for group in groups) for name in names}
    num_pieces = max(sum(pieces.values()), 1)
    return SourceSummary(
        name=source.name,
        share=share,
        documents=sum(unit["documents"] for unit in source.units),
        bad=sum(sum(unit["bad"].values()) for unit in source.units),
        tokens=sum(unit["tokens"] for unit in source.units),
        passes=len(passes.groups[index]),
        rows=rows,
        fill=sum(group["slots_used"] for group in groups) / slots,
        loss=sum(group["loss_slots"] for group in groups) / slots,
        denoisers={name: count / num_pieces for name, count in pieces.items()},
    )
