"""What a data build consists of, stream by stream: its manifest and the receipts of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import selection, storage
from openmoe.pipelines.config import DataConfig, DataError
from openmoe.pipelines.manifest import Manifest, SourceManifest
from openmoe.pipelines.passes import Passes, packed_validation
from openmoe.platform.run_file import spec, spec_paths


class StreamSummary(NamedTuple):
    """One stream of a build.

    Attributes:
      name: of its source, with the objective where the build has several.
      share: of the mixture's rows; where it has stages, of those that are built.
      documents: usable ones of the source that every pass contains.
      bad: unusable ones.
      duplicates: usable ones left out because they were there before.
      validation: usable ones kept apart.
      validation_rows: that these were packed into, beside the passes; 0 while they are not.
      tokens: of text, in one pass.
      passes: finished ones.
      rows: of all finished passes, and of the groups of the one that is begun.
      fill: share of the rows' tokens that are not padding.
      loss: share of the rows' tokens that carry loss.
      denoisers: share of the pieces, by UL2's denoisers; those that no piece has are left out.
      cut_off: tokens that packing `reference` cut off its examples; of rows from before it was counted none.
      lone: tokens of text that it made no example of.
    """

    name: str
    share: float
    documents: int
    bad: int
    duplicates: int
    validation: int
    validation_rows: int
    tokens: int
    passes: int
    rows: int
    fill: float
    loss: float
    denoisers: dict[str, float]
    cut_off: int
    lone: int


def builds_of(place: str, overrides: Sequence[str] = ()) -> list[Manifest]:
    """Returns the builds of a run's data, or the one whose manifest is given.

    Args:
      place: a run file, the name of a shipped one, or the path of a manifest.
      overrides: settings that win over the run file.

    Raises:
      DataError: there is none.
    """
    if place.endswith(".json"):
        if overrides:
            raise DataError(f"{overrides[0]}: a manifest has no settings to change; give a run file, or leave it out")
        return [manifests.load(place)]
    loaded = spec_paths.with_absolute_paths(spec.load(place, overrides))
    return builds(loaded.data, loaded.data_dir)


def build_of(place: str, overrides: Sequence[str] = ()) -> Manifest:
    """Returns the only build of a run's data, or the one whose manifest is given; see `builds_of`."""
    found = builds_of(place, overrides)
    if len(found) > 1:
        paths = ", ".join(manifest.path for manifest in found)
        raise DataError(f"{place}: its data has {len(found)} builds, of other files each; name the manifest: {paths}")
    return found[0]


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
    fields = ("tokenizer", "seq_len", "objective", "packing", "seed", "group_tokens", "dedup", "validation_share")
    same = all(getattr(manifest, field) == getattr(config, field) for field in fields)
    if manifest.missing:
        may_be = {source.name for source in config.sources if source.missing == "renormalize"}
        if not may_be.issuperset(manifest.missing) or len(manifest.missing) == len(config.sources):
            return False
        config = config.without(manifest.missing)
    mixture = [(source.name, source.weight) for source in config.sources]
    built = [(source.name, source.weight) for source in manifest.sources]
    streams = [(stream.source, stream.objective) for stream in manifest.streams]
    mixed = built == mixture and streams == config.streams() and manifest.stages == manifests.stages_of(config)
    return same and mixed


def summarize(manifest: Manifest) -> list[StreamSummary]:
    """Returns the streams of a build, in the order in which the run file brings them up."""
    passes = Passes(manifest)
    shares = _shares(manifest, passes)
    return [
        _stream(name, manifest.source_of(index), passes, index, share=shares[index])
        for index, name in enumerate(manifest.stream_names)
    ]


def _shares(manifest: Manifest, passes: Passes) -> list[float]:
    if not manifest.stages:
        weights = [source.weight or 0 for source in manifest.sources]
        return [weight / sum(weights) for weight in weights]
    rows = manifest.mixture.rows_available(passes.total_rows())
    return [int(needed) / max(rows, 1) for needed in manifest.mixture.rows_needed(rows)]


def _stream(name: str, source: SourceManifest, passes: Passes, index: int, *, share: float) -> StreamSummary:
    groups = [group for groups in passes.receipts(index) for group in groups]
    rows = sum(group["rows"] for group in groups)
    slots = max(rows * passes.manifest.seq_len, 1)
    kinds = groups[0]["pieces"] if groups else ()
    pieces = {kind: sum(group["pieces"][kind] for group in groups) for kind in kinds}
    num_pieces = max(sum(pieces.values()), 1)
    return StreamSummary(
        name=name,
        share=share,
        documents=sum(selection.count(unit, "train") for unit in source.units),
        bad=sum(sum(unit["bad"].values()) for unit in source.units),
        duplicates=sum(selection.count(unit, "duplicate") for unit in source.units),
        validation=sum(selection.count(unit, "validation") for unit in source.units),
        validation_rows=sum(group["rows"] for group in packed_validation(passes.manifest, index) if group),
        tokens=sum(selection.trained_tokens(unit) for unit in source.units),
        passes=len(passes.groups[index]),
        rows=rows,
        fill=sum(group["slots_used"] for group in groups) / slots,
        loss=sum(group["loss_slots"] for group in groups) / slots,
        denoisers={kind: count / num_pieces for kind, count in pieces.items() if count},
        cut_off=sum(group.get("cut_off_tokens", 0) for group in groups),
        lone=sum(group.get("lone_tokens", 0) for group in groups),
    )
