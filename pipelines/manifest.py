"""What a build consists of: the manifest of the token cache, and the passes that were packed from it.

    <data_dir>/tokens/...                              the token cache, shared by all builds
    <data_dir>/passes/<source>-<key>/0000/...          one pass of a stream: a shard and a receipt for each group
    <data_dir>/passes/<source>-<key>/0000/pass.json    the pass is complete; created if absent
    <data_dir>/manifests/<id>.json                     the build; created if absent, after its token cache

A row is a pure function of (manifest, row number): passes are added later without changing the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from openmoe.pipelines import selection, shards, storage, ul2
from openmoe.pipelines.config import DataConfig, DataError, Stream, identity, stream_names
from openmoe.pipelines.mixture import Mixture, Stage, one_stage
from openmoe.pipelines.permute import Permutation
from openmoe.pipelines.sources import Unit
from openmoe.pipelines.tokenizer import Tokenizer, Vocabulary

# Part of every pass's key: raise it when the same tokens would be shuffled, cut or masked differently.
RECIPE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SourceManifest:
    """One source of a build.

    Attributes:
      name: as in the run file.
      weight: share of rows, relative to the other sources'; None where the build has stages.
      units: receipts of the tokenized units, in the order of their files; `split` says what is trained on of each.
    """

    name: str
    weight: float | None
    units: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StreamManifest:
    """A source under an objective.

    Attributes:
      source: index into the build's sources.
      objective: as in the run file.
      passes: folder of its passes, below the data directory.
    """

    source: int
    objective: str
    passes: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A build: tokenized sources, and how rows are made of them.

    Attributes:
      path: where this manifest lies.
      data_id: identifies the rows; depends on the documents' tokens and the recipe, not on paths.
      tokenizer: as in the run file.
      objective: where there are no stages.
      packing: of the streams with objective ul2.
      streams: what the mixture mixes; without stages one for each source, in their order.
      stages: none when the sources' weights hold throughout.
      missing: sources of the run file that had no file, and whose rows the others took as it says.
      dedup: as in the run file, like the next.
    """

    path: str
    data_id: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocabulary: Vocabulary
    seq_len: int
    objective: str
    seed: int
    group_tokens: int
    sources: list[SourceManifest]
    streams: list[StreamManifest]
    packing: str = "budgeted"
    stages: tuple[Stage, ...] = ()
    missing: tuple[str, ...] = ()
    dedup: str = "none"
    validation_share: float = 0.0

    @property
    def mixture(self) -> Mixture:
        """Which stream, and which row of it, each global row is."""
        return Mixture(self.stages or one_stage(source.weight or 0 for source in self.sources), self.seed)

    @property
    def data_dir(self) -> str:
        """The directory of the build's artefacts."""
        return self.path.rsplit("/", 2)[0]

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams for people."""
        streams = [Stream(stream.source, stream.objective) for stream in self.streams]
        return stream_names([source.name for source in self.sources], streams)

    @property
    def first_streams(self) -> list[int]:
        """The stream that first reads each source: its pass 0 belongs to the epoch."""
        firsts: dict[int, int] = {}
        for index, stream in enumerate(self.streams):
            firsts.setdefault(stream.source, index)
        return sorted(firsts.values())

    def source_of(self, stream: int) -> SourceManifest:
        """Returns the source that a stream reads."""
        return self.sources[self.streams[stream].source]

    def stream_key(self, stream: int) -> str:
        """Returns the name that keys a stream's order and noise; what no source can be named comes after the space."""
        recipe = _recipe_name(self.streams[stream].objective, self.packing)
        return self.source_of(stream).name + ("" if recipe == "ul2" else f" {recipe}")

    def is_reference(self, stream: int) -> bool:
        """Returns whether a stream is packed as the original packed, which loses tokens."""
        return _recipe_name(self.streams[stream].objective, self.packing) == "ul2 reference"

    def pass_folder(self, stream: int, number: int) -> str:
        """Returns the folder of a pass."""
        return storage.join(self.data_dir, self.streams[stream].passes, f"{number:04d}")

    def groups(self, stream: int, number: int) -> list[list[int]]:
        """Returns the units (indices) of each group of a pass: the shuffled units, cut by tokens."""
        return self._cut(stream, number, "train")

    def validation_groups(self, stream: int) -> list[list[int]]:
        """Returns the units (indices) of each group of what was kept apart of a stream's source; none if nothing was.

        What fits into one group has its units in their order, as all had when there was one group alone.
        """
        groups = self._cut(stream, "validation", "validation")
        return groups if len(groups) > 1 else [sorted(group) for group in groups if group]

    def _cut(self, stream: int, order: int | str, part: str) -> list[list[int]]:
        units, name = self.source_of(stream).units, self.stream_key(stream)
        groups: list[list[int]] = [[]]
        held = 0
        for unit in Permutation(len(units), "units", self.seed, name, order)(np.arange(len(units))).tolist():
            tokens = selection.count_tokens(units[unit], part)
            if not tokens and ("split" in units[unit] or part != "train"):
                continue
            if held >= self.group_tokens:
                groups.append([])
                held = 0
            groups[-1].append(unit)
            held += tokens
        return groups


def manifest_path(
    data_dir: str, config: DataConfig, tokenizer: Tokenizer, units: list[Unit], missing: Sequence[str] = ()
) -> str:
    """Returns where the manifest of this configuration over these very files lies; see `assemble`."""
    parts: list[Any] = [identity(config), tokenizer.fingerprint, [unit.identity() for unit in units]]
    parts += _recipe() + _formats() + ([{"missing": list(missing)}] if missing else [])
    return storage.join(data_dir, "manifests", f"{_digest(parts)[:24]}.json")


def assemble(
    path: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    receipts: dict[str, list[dict[str, Any]]],
    *,
    missing: Sequence[str] = (),
) -> Manifest:
    """Returns the manifest of tokenized sources.

    Args:
      path: where it will lie.
      config: without the sources that are missing.
      tokenizer: of the configuration.
      receipts: by source, in the order of its units.
      missing: sources that were left out.
    """
    vocabulary = tokenizer.vocabulary(config.num_sentinels)
    streams, identities = [], []
    for stream in config.streams():
        source, recipe = config.sources[stream.source], _recipe_name(stream.objective, config.packing)
        made_by = [*_recipe(), tokenizer.fingerprint, vocabulary, config.seq_len, recipe, config.seed]
        units = receipts[source.name]
        identity = [*made_by, config.group_tokens, source.name, [unit["documents_sha256"] for unit in units]]
        if splits := [unit["split"]["sha256"] for unit in units if "split" in unit]:
            identity.append({"splits": splits})
        identities.append([*identity, source.weight])  # None with stages, which follow
        folder = f"passes/{source.name}-{_digest([*identity, *_formats()])[:16]}"
        streams.append(StreamManifest(source=stream.source, objective=stream.objective, passes=folder))
    stages = stages_of(config)
    return Manifest(
        path=path,
        data_id=_digest([*identities, *stages])[:32],
        tokenizer=config.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocabulary=vocabulary,
        seq_len=config.seq_len,
        objective=config.objective,
        seed=config.seed,
        group_tokens=config.group_tokens,
        sources=[SourceManifest(name=s.name, weight=s.weight, units=receipts[s.name]) for s in config.sources],
        streams=streams,
        packing=config.packing,
        stages=stages,
        missing=tuple(missing),
        dedup=config.dedup,
        validation_share=config.validation_share,
    )


def stages_of(config: DataConfig) -> tuple[Stage, ...]:
    """Returns the stages of a configuration, in rows; none when it has none."""
    ends = [stage.until_tokens and stage.until_tokens // config.seq_len for stage in config.stages]
    return tuple(Stage(end, weights) for end, weights in zip(ends, config.weights_by_stage(), strict=False))


def commit(manifest: Manifest) -> None:
    """Writes a manifest; one that is there already is the same."""
    fields = {**asdict(manifest), "vocabulary": manifest.vocabulary._asdict()}
    del fields["path"]
    for name, default in {"missing": (), "dedup": "none", "validation_share": 0}.items():
        if fields[name] == default:  # as in builds from before there was a choice
            del fields[name]
    storage.create_if_absent(manifest.path, json.dumps(fields, indent=1).encode())


def load(path: str) -> Manifest:
    """Reads a manifest."""
    try:
        fields = json.loads(storage.read_bytes(path))
        vocabulary = fields.pop("vocabulary")
        vocabulary["prompts"] = {mode: tuple(ids) for mode, ids in vocabulary["prompts"].items()}
        of_sources = fields.pop("sources")
        if "streams" not in fields:  # from before there were several objectives
            passes = [source.pop("passes") for source in of_sources]
            old = [{"source": n, "objective": fields["objective"], "passes": p} for n, p in enumerate(passes)]
            fields["streams"] = old
        sources = [SourceManifest(**source) for source in of_sources]
        streams = [StreamManifest(**stream) for stream in fields.pop("streams")]
        stages = tuple(Stage(end, tuple(weights)) for end, weights in fields.pop("stages", ()))
        fields["vocabulary"], fields["missing"] = Vocabulary(**vocabulary), tuple(fields.pop("missing", ()))
        return Manifest(path=path, sources=sources, streams=streams, stages=stages, **fields)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of this version ({error}); delete it and build again") from error


def _recipe_name(objective: str, packing: str) -> str:
    return "ul2 reference" if (objective, packing) == ("ul2", "reference") else objective


def _recipe() -> list[Any]:
    """Returns what else shapes rows."""
    return [RECIPE_VERSION, ul2.DENOISERS]


def _formats() -> list[Any]:
    """Returns what else shapes the bytes of shards."""
    return [shards.VERSION, version("array-record"), shards.WRITER_OPTIONS]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
