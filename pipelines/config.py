"""Settings of the data build, and the error every part of it raises. Imports nothing heavy."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

# The mixture is exact in every block of this many rows; OpenMoE's weights come out whole in it.
BLOCK_ROWS = 2000

# A line or file above this is left out as too long; books reach tens of MB.
MAX_DOCUMENT_BYTES = 128 * 2**20

FORMATS = ("redpajama", "the_stack", "text", "chat")
# How documents become inputs and targets: `ul2` with its six denoisers, `next_token` with every token a target,
# `prefix_lm` with the last of the six alone, `chat` with the answers of conversations.
Objective = Literal["ul2", "next_token", "prefix_lm", "chat"]

_SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class DataError(ValueError):
    """Data, sources or shards that cannot be used; one line: where, what, the value, the remedy."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents.

    Attributes:
      name: lower-case letters, digits, `_` and `-`; keys the source's randomness, so renaming reshuffles it.
      format: `redpajama` reads field `text` of .jsonl, .jsonl.zst and .jsonl.gz lines; `the_stack` reads
        column `content` of Parquet; `text` takes every .txt, .txt.zst or .txt.gz file for one document; `chat`
        reads field `messages` of lines as `redpajama` has them, and makes a document of each answer (objective `chat`).
      paths: globs, local or gs://; every one must match at least one file.
      weight: share of the mixture's rows, relative to the other sources' weights; left out where `stages` say it.
      max_bad_share: the build stops when more than this share of the source's documents is unusable.
      missing: what happens when no path matches any file: the build stops, or goes on without the source, whose
        share the others take in proportion.
      max_quarantined_units: work units that the build may go on without because they always kill their worker.
      max_document_bytes: a longer line, row or file (uncompressed) is left out and counted as too long.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    name: str
    format: Literal["redpajama", "the_stack", "text", "chat"]
    paths: tuple[str, ...]
    weight: float | None = None
    max_bad_share: float = 0.01
    max_quarantined_units: int = 0
    missing: Literal["stop", "renormalize"] = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __post_init__(self) -> None:
        if not _SOURCE_NAME.fullmatch(self.name):
            raise ValueError(f"name: lower-case letters, digits, _ and - wanted, got {self.name!r}")
        if self.format not in FORMATS:
            raise ValueError(f"format: redpajama, the_stack, text or chat, got {self.format!r}")
        if not self.paths or not all(self.paths):
            raise ValueError(f"paths: at least one non-empty glob wanted, got {list(self.paths)}")
        for path in self.paths:
            if "://" in path and not path.startswith("gs://"):
                raise ValueError(f"paths: local files and gs:// are read, got {path}; copy them")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight: must be above 0, got {self.weight}; leave the source out instead")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share: must be in [0, 1], got {self.max_bad_share}")
        if self.max_quarantined_units < 0:
            raise ValueError(f"max_quarantined_units: must be at least 0, got {self.max_quarantined_units}")
        if self.missing not in ("stop", "renormalize"):
            raise ValueError(f"missing: stop or renormalize, got {self.missing!r}")
        if not 1 <= self.max_document_bytes < 2**31:
            raise ValueError(f"max_document_bytes: must be in [1, 2^31), got {self.max_document_bytes}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of the run with a mixture of its own; every source goes on where the stage before left it.

    Attributes:
      until_tokens: where it ends, in tokens from the start of the run, whole rows; the last stage has no end.
      weights: shares of the stage's rows by source; a source that is not named, or has 0, is not read in it.
      objective: how documents become inputs and targets: `ul2`, `next_token`, `prefix_lm` or `chat`. A source
        begins anew, with passes of its own, under an objective that it was not read with before.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    until_tokens: int | None = None
    weights: Mapping[str, float]
    objective: Objective = "ul2"


class Stream(NamedTuple):
    """A source under an objective: it has passes, an order and noise of its own."""

    source: int  # index into the sources
    objective: str


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the rows of a run are made of; together with the sources' bytes it determines every row.

    Attributes:
      tokenizer: `builtin:small_8192`, or a path or gs:// URI of a SentencePiece model that gives no text id 0, which is
        padding: by default SentencePiece trains one that gives it to what is unknown.
      num_sentinels: ids above the tokenizer's that mark UL2's masked spans.
      seq_len: tokens a row.
      objective: how documents become inputs and targets: `ul2`, `next_token`, `prefix_lm` or `chat`, whose loss is on
        answers only; `stages` have their own.
      packing: how `ul2` fills rows: `budgeted` to the last slots, or `reference` as the original did, 67 % full.
      seed: keys every permutation and every noise mask.
      sources: what is mixed.
      stages: mixtures that follow one another, or the name of an original model, whose stages they are then; without
        them the sources' weights hold for the whole run.
      dedup: `exact` leaves out a document that was there before, byte for byte, in any source; the first stays, in
        the order of `sources`, files and lines.
      validation_share: share of the documents, chosen by their hash, that are kept apart and never trained on.
      unit_bytes: input bytes that one work unit tokenizes; a compressed file is one, in parts of 64 MiB of text.
      group_tokens: tokens that are shuffled and packed together; one shard file each.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    tokenizer: str
    num_sentinels: int = 300
    seq_len: int
    objective: Objective = "ul2"
    packing: Literal["budgeted", "reference"] = "budgeted"
    seed: int
    sources: tuple[SourceConfig, ...]
    stages: tuple[StageConfig, ...] = ()
    dedup: Literal["none", "exact"] = "none"
    validation_share: float = 0.0
    unit_bytes: int = 64 * 2**20
    group_tokens: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective: ul2, next_token, prefix_lm or chat, got {self.objective!r}")
        if not 64 <= self.seq_len <= 32768:
            raise ValueError(f"seq_len: must be in [64, 32768], got {self.seq_len}")
        if self.num_sentinels < self.seq_len // 8:
            raise ValueError(
                f"num_sentinels: {self.seq_len} tokens can hold {self.seq_len // 8} masked spans, each "
                f"with its own sentinel, got {self.num_sentinels}; raise num_sentinels or shorten seq_len"
            )
        for field in ("unit_bytes", "group_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, got {getattr(self, field)}")
        if self.dedup not in ("none", "exact"):
            raise ValueError(f"dedup: none or exact, got {self.dedup!r}")
        if not 0 <= self.validation_share <= 0.5:
            raise ValueError(f"validation_share: must be in [0, 0.5], got {self.validation_share}")
        self._check_sources()
        self._check_stages()
        self._check_packing()
        self._check_chat()

    def streams(self) -> list[Stream]:
        """Returns what is read: by objective as the stages bring them up, then in the order of `sources`."""
        if not self.stages:
            return [Stream(index, self.objective) for index in range(len(self.sources))]
        read = {(name, stage.objective) for stage in self.stages for name, weight in stage.weights.items() if weight}
        return [
            Stream(index, objective)
            for objective in dict.fromkeys(stage.objective for stage in self.stages)
            for index, source in enumerate(self.sources)
            if (source.name, objective) in read
        ]

    def objective_at(self, tokens: int) -> str:
        """Returns the objective under which token number `tokens`, counted from 1, is read."""
        if not self.stages:
            return self.objective
        return next(s.objective for s in self.stages if s.until_tokens is None or tokens <= s.until_tokens)

    def stream_names(self) -> list[str]:
        """Returns names for people: the source's, with the objective where the data has several."""
        return stream_names([source.name for source in self.sources], self.streams())

    def weights_by_stage(self) -> list[tuple[float, ...]]:
        """Returns the weight of each stream in each stage; one stage if none is given."""
        if not self.stages:
            return [tuple(source.weight or 0 for source in self.sources)]
        names = [source.name for source in self.sources]
        return [
            tuple(
                stage.weights.get(names[stream.source], 0) if stream.objective == stage.objective else 0
                for stream in self.streams()
            )
            for stage in self.stages
        ]

    def _check_packing(self) -> None:
        if self.packing not in ("budgeted", "reference"):
            raise ValueError(f"packing: budgeted or reference, got {self.packing!r}")
        if self.packing == "reference" and "ul2" not in {stream.objective for stream in self.streams()}:
            raise ValueError("packing: reference is a way to pack objective ul2, which is not used; remove it")
        if self.packing == "reference" and self.seq_len % 2:
            wanted = "packing reference gives inputs and targets half a row each, an even number"
            raise ValueError(f"seq_len: {wanted}, got {self.seq_len}")

    def _check_chat(self) -> None:
        for stream in self.streams():
            source = self.sources[stream.source]
            if (source.format == "chat") != (stream.objective == "chat"):
                wanted = "format chat and objective chat belong together"
                raise ValueError(
                    f"sources.{stream.source}.format: {wanted}, got {source.format} under {stream.objective}"
                )

    def without(self, names: Collection[str]) -> DataConfig:
        """Returns the configuration without these sources; raises ValueError when a stage then reads nothing."""
        stages = tuple(
            replace(stage, weights={name: weight for name, weight in stage.weights.items() if name not in names})
            for stage in self.stages
        )
        sources = tuple(source for source in self.sources if source.name not in names)
        return replace(self, sources=sources, stages=stages)

    def _check_sources(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources: at least one is needed, got none")
        if len(set(names)) < len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        for index, source in enumerate(self.sources):
            if source.weight is None and not self.stages:
                raise ValueError(f"sources.{index}.weight: missing; add `weight:` to the source")
            if source.weight is not None and self.stages:
                raise ValueError(f"sources.{index}.weight: the weights are in `stages`; remove this one")
        if not self.stages:
            _check_weights("sources", names, self.weights_by_stage()[0])

    def _check_stages(self) -> None:
        names = [source.name for source in self.sources]
        if self.stages and self.objective != "ul2":
            raise ValueError(f"objective: the objectives are in `stages`; remove this one, got {self.objective!r}")
        for index, stage in enumerate(self.stages):
            where, weights = f"stages.{index}.weights", [stage.weights.get(name, 0) for name in names]
            unknown = [name for name in stage.weights if name not in names]
            if unknown:
                raise ValueError(f"{where}: no source is named {unknown[0]!r}; the sources are {', '.join(names)}")
            for name, weight in stage.weights.items():
                if not (math.isfinite(weight) and weight >= 0):
                    raise ValueError(f"{where}: {name} must be at least 0, got {weight}")
            if not any(weights):
                raise ValueError(f"{where}: at least one source needs a weight above 0, got none")
            _check_weights(where, names, weights)
        for name in names if self.stages else ():
            if not any(stage.weights.get(name) for stage in self.stages):
                raise ValueError(f"sources: {name} has no weight in any stage; give it one or leave it out")
        self._check_ends()

    def _check_ends(self) -> None:
        ends = [stage.until_tokens for stage in self.stages]
        for index, end in enumerate(ends):
            where, is_last = f"stages.{index}.until_tokens", index == len(ends) - 1
            if is_last and end is not None:
                raise ValueError(f"{where}: the last stage goes on to the end of the run; remove it, got {end}")
            if not is_last and end is None:
                raise ValueError(f"{where}: missing; only the last stage has no end")
            if end is not None and (end < 1 or end % self.seq_len):
                down = max(end // self.seq_len, 1) * self.seq_len
                raise ValueError(f"{where}: must be whole rows of seq_len={self.seq_len}, such as {down}, got {end}")
        for index, (before, end) in enumerate(itertools.pairwise(ends), 1):
            if before is not None and end is not None and end <= before:
                raise ValueError(f"stages.{index}.until_tokens: must be > {before}, the end before it, got {end}")


def stream_names(sources: Sequence[str], streams: Sequence[Stream]) -> list[str]:
    """Returns names for people; see `DataConfig.stream_names`."""
    if len({stream.objective for stream in streams}) == 1:
        return [sources[stream.source] for stream in streams]
    return [f"{sources[stream.source]} {stream.objective}" for stream in streams]


# What came after the first builds and runs, which keep their names and hashes where these are as if there were none.
_LATER: Mapping[type, tuple[str, ...]] = {
    DataConfig: ("stages", "packing", "dedup", "validation_share"),
    SourceConfig: ("missing", "max_quarantined_units", "max_document_bytes"),
}


def identity(config: DataConfig) -> dict[str, Any]:
    """Returns all settings, without later ones that have their default."""
    settings = {**asdict(config), "sources": [_changed(source) for source in config.sources]}
    return {name: value for name, value in settings.items() if name in _changed(config)}


def _changed(config: DataConfig | SourceConfig) -> dict[str, Any]:
    later = _LATER[type(config)]
    is_default = {field.name for field in fields(config) if getattr(config, field.name) == field.default}
    return {name: value for name, value in asdict(config).items() if name not in later or name not in is_default}


def _check_weights(where: str, names: Sequence[str], weights: Sequence[float]) -> None:
    """Raises ValueError when a source has a weight, but too small a one for a row in every block."""
    total = sum(weights)
    for name, weight in zip(names, weights, strict=True):
        if weight and weight / total * BLOCK_ROWS < 1:
            raise ValueError(
                f"{where}: {name} has weight {weight} of {total:g}, less than one row in "
                f"{BLOCK_ROWS}; give it at least {total / BLOCK_ROWS:g} or leave it out"
            )
