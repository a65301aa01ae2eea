"""What a data build would do, before it reads anything: the files, what is done of them, what is left, how far it goes.

Files are listed, receipts are read; no document is, and there is no Ray.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from openmoe.pipelines import limits, passes, selection, sources, storage, token_cache, tokenizer
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataError, SourceConfig
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.passes import Passes
from openmoe.pipelines.sources import Unit
from openmoe.platform.run_file import run_length, validate_data
from openmoe.platform.run_file.spec import RunSpec

# Bytes of a source for one token, until units of it are tokenized: umT5 makes one of 2.9 bytes of text, and zstd, gzip
# and Parquet a third of the bytes.
ASSUMED_TOKEN_BYTES, ASSUMED_COMPRESSED_TOKEN_BYTES = 3.0, 1.0
_COMPRESSED = (".zst", ".gz", ".parquet")

Report = Callable[[str, int, int, str], None]


class SourcePlan(NamedTuple):
    """One source.

    Attributes:
      name: as in the run file.
      missing: it has no file, and the others take its rows.
      files: that its paths match.
      compressed: those of them that are.
      bytes: of all files, as they are.
      units: that they are cut into.
      tokenized: units that have a receipt.
      documents: to train on, of those units; before duplicates and the validation split are known all of them.
      tokens: of these documents.
      estimated_tokens: of all units.
      measured: the estimate is by the tokenized units; else by how many bytes a token usually has.
    """

    name: str
    missing: bool
    files: int
    compressed: int
    bytes: int
    units: int
    tokenized: int
    documents: int
    tokens: int
    estimated_tokens: int
    measured: bool


class StreamPlan(NamedTuple):
    """One stream.

    Attributes:
      name: of its source, with the objective where the run has several.
      rows: that the run reads of it; None for a run in epochs whose first passes are not packed.
      packed_rows: of finished passes, and of the groups of the one that is begun.
      packed_groups: of the same.
      groups_left: to be packed for the run's rows, an estimate; None where these are not known.
      passes: that the run's rows reach, an estimate until the first is packed; None where they are not known.
    """

    name: str
    rows: int | None
    packed_rows: int
    packed_groups: int
    groups_left: int | None
    passes: float | None


class Plan(NamedTuple):
    """What is there and what is to do; `manifest` is the path of the build of these files, if all are tokenized."""

    manifest: str | None
    sources: list[SourcePlan]
    streams: list[StreamPlan]


def plan(spec: RunSpec, say: Callable[[str], None], report: Report = lambda *progress: None) -> Plan:
    """Returns what a build of a run's data would do.

    Args:
      spec: of the run, its local paths absolute.
      say: told who takes the rows of a source that is missing.
      report: told of progress.

    Raises:
      DataError: the build would not begin; a line for each reason.
    """
    _check_present(spec)
    config, missing = limits.present(spec.data, say)
    text = tokenizer.load(config.tokenizer)
    units: dict[str, list[Unit]] = {}
    for number, source in enumerate(config.sources, 1):
        units[source.name] = sources.inventory(source, config.unit_bytes)
        report("list", number, len(config.sources), "sources")
    everything = [unit for source in config.sources for unit in units[source.name]]
    path = manifests.manifest_path(spec.data_dir, config, text, everything, missing)
    built = Passes(manifests.load(path)) if storage.exists(path) else None
    keys = [token_cache.key(unit, text) for unit in everything]
    folder = storage.join(spec.data_dir, "tokens")
    found = _units_of(built.manifest) if built else storage.receipts(folder, keys).values()
    receipts: dict[str, list[dict[str, Any]]] = {}
    for part in (part for receipt in found for part in token_cache.parts(receipt)):
        receipts.setdefault(token_cache.unit_key(part), []).append(part)
    of_sources = [
        _source_plan(source, [(unit, receipts.get(token_cache.key(unit, text))) for unit in units[source.name]])
        for source in config.sources
    ]
    absent = [SourcePlan(name, True, *([0] * 8), measured=False) for name in missing]
    spec = spec.model_copy(update={"data": config})
    return Plan(path if built else None, [*of_sources, *absent], _stream_plans(spec, of_sources, built))


def _check_present(spec: RunSpec) -> None:
    """Raises DataError with a line for each source whose files are missing and may not be."""
    problems = []
    for source in spec.data.sources:
        try:
            sources.find(source)
        except DataError as error:
            problems.append(str(error))
    if problems and spec.sample_corpus and not storage.exists(spec.sample_corpus):
        raise DataError(
            f"sample_corpus: {spec.sample_corpus} is written when the data is built; "
            f"`openmoe data corpus {spec.sample_corpus}` writes it before"
        )
    if problems:
        raise DataError("\n".join(problems))


def _units_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [unit for source in manifest.sources for unit in source.units]


def _source_plan(source: SourceConfig, units: list[tuple[Unit, list[dict[str, Any]] | None]]) -> SourcePlan:
    """Returns the plan of a source, given its units with the receipts of their parts; None where there is none."""
    sizes = {path: size for unit, _ in units for path, size in _files(unit)}
    ends = {unit.path: unit.stop for unit, _ in units}  # of a file of row groups, how many it has
    weights = [_unit_bytes(unit, sizes, ends) for unit, _ in units]
    tokenized = [(parts, size) for (_, parts), size in zip(units, weights, strict=True) if parts is not None]
    done = [part for parts, _ in tokenized for part in parts]
    tokens, done_bytes = sum(map(selection.trained_tokens, done)), sum(size for _, size in tokenized)
    left = sum(weights) - done_bytes
    if done_bytes:
        estimated = tokens + left * tokens / done_bytes
    else:
        compressed = sum(size for path, size in sizes.items() if path.endswith(_COMPRESSED))
        estimated = compressed / ASSUMED_COMPRESSED_TOKEN_BYTES + (left - compressed) / ASSUMED_TOKEN_BYTES
    return SourcePlan(
        name=source.name,
        missing=False,
        files=len(sizes),
        compressed=sum(path.endswith(_COMPRESSED) for path in sizes),
        bytes=sum(sizes.values()),
        units=len(units),
        tokenized=len(tokenized),
        documents=sum(selection.count(part, "train") for part in done),
        tokens=tokens,
        estimated_tokens=round(estimated),
        measured=bool(done_bytes),
    )


def _files(unit: Unit) -> list[tuple[str, int]]:
    """Returns path and size of a unit's files; the size is the beginning of a fingerprint."""
    files = unit.files or ((unit.path, unit.fingerprint),)
    return [(path, int(fingerprint.split(":")[0])) for path, fingerprint in files]


def _unit_bytes(unit: Unit, sizes: dict[str, int], ends: dict[str, int]) -> float:
    """Returns a unit's bytes; of row groups their part of the file, as if all were alike."""
    if unit.format == "the_stack":
        return sizes[unit.path] * (unit.stop - unit.start) / ends[unit.path]
    return sum(size for _, size in _files(unit)) if unit.files else unit.stop - unit.start


def _stream_plans(spec: RunSpec, of_sources: list[SourcePlan], built: Passes | None) -> list[StreamPlan]:
    """Returns the streams of a run without its missing sources."""
    train = run_length.resolved(spec, built.epoch_rows() if built else None).train
    rows = None if train.steps is None else train.steps * train.batch_rows
    streams, names = spec.data.streams(), spec.data.stream_names()
    needed = [None] * len(streams) if rows is None else validate_data.mixture(spec).rows_needed(rows).tolist()
    left = Counter(group.stream for group in passes.lacking(built, rows)) if built and rows is not None else None
    plans = []
    for index, (name, stream) in enumerate(zip(names, streams, strict=True)):
        packed = [group for groups in built.receipts(index) for group in groups] if built else []
        text_tokens = (needed[index] or 0) * spec.data.seq_len * validate_data.text_share(spec, stream.objective)
        groups_left = math.ceil(text_tokens / spec.data.group_tokens) if left is None else left[index]
        passes_reached = text_tokens / max(of_sources[stream.source].estimated_tokens, 1)
        if built and built.rows(index):
            passes_reached = validate_data.passes_of(built.rows(index), needed[index] or 0)
        plans.append(
            StreamPlan(
                name=name,
                rows=needed[index],
                packed_rows=sum(group["rows"] for group in packed),
                packed_groups=len(packed),
                groups_left=None if rows is None else groups_left,
                passes=None if rows is None else passes_reached,
            )
        )
    return plans
