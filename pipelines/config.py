"""Settings of the data build, and the error every part of it raises. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

# The mixture is exact in every block of this many rows; OpenMoE's weights come out whole in it.
BLOCK_ROWS = 2000

_SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class DataError(ValueError):
    """Data, sources or shards that cannot be used; one line: where, what, the value, the remedy."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents.

    Attributes:
      name: lower-case letters, digits, `_` and `-`; keys the source's randomness, so renaming reshuffles it.
      format: `redpajama` reads field `text` of .jsonl, .jsonl.zst and .jsonl.gz lines; `the_stack` reads
        column `content` of Parquet.
      paths: globs, local or gs://; every one must match at least one file.
      weight: share of the mixture's rows, relative to the other sources' weights.
      max_bad_share: the build stops when more than this share of the source's documents is unusable.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    name: str
    format: Literal["redpajama", "the_stack"]
    paths: tuple[str, ...]
    weight: float
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if not _SOURCE_NAME.fullmatch(self.name):
            raise ValueError(f"name: lower-case letters, digits, _ and - wanted, got {self.name!r}")
        if self.format not in ("redpajama", "the_stack"):
            raise ValueError(f"format: redpajama or the_stack, got {self.format!r}")
        if not self.paths or not all(self.paths):
            raise ValueError(f"paths: at least one non-empty glob wanted, got {list(self.paths)}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight: must be above 0, got {self.weight}; leave the source out instead")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share: must be in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the rows of a run are made of; together with the sources' bytes it determines every row.

    Attributes:
      tokenizer: `builtin:small_8192`, or a path or gs:// URI of a SentencePiece model.
      num_sentinels: ids above the tokenizer's that mark UL2's masked spans.
      seq_len: tokens a row.
      objective: how documents become inputs and targets.
      seed: keys every permutation and every noise mask.
      sources: what is mixed.
      unit_bytes: input bytes that one work unit tokenizes; compressed files stay whole.
      group_tokens: tokens that are shuffled and packed together; one shard file each.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    tokenizer: str
    num_sentinels: int = 300
    seq_len: int
    objective: Literal["ul2"] = "ul2"
    seed: int
    sources: tuple[SourceConfig, ...]
    unit_bytes: int = 64 * 2**20
    group_tokens: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.objective != "ul2":
            raise ValueError(f"objective: ul2, got {self.objective!r}")
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
        self._check_sources()

    def _check_sources(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources: at least one is needed, got none")
        if len(set(names)) < len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        total = sum(source.weight for source in self.sources)
        for source in self.sources:
            if source.weight / total * BLOCK_ROWS < 1:
                raise ValueError(
                    f"sources: {source.name} has weight {source.weight} of {total:g}, less than one row in "
                    f"{BLOCK_ROWS}; give it at least {total / BLOCK_ROWS:g} or leave it out"
                )
