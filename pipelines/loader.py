"""Reads rows by number: the content of global row i is a pure function of (manifest, i)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import shards, storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.mixture import Mixture, shuffle_pass


class Record(NamedTuple):
    """Where a row is stored."""

    source: int
    number: int  # of the pass
    group: int
    row: int  # in the group's shard


class Loader:
    """Random access to the rows of a build; keeps open what it has read from."""

    def __init__(self, manifest_path: str, *, cache_dir: str | None = None) -> None:
        """Opens a build.

        Args:
          manifest_path: of a manifest, local or gs://.
          cache_dir: local folder for shards of gs://; None: a folder of this machine's temporary ones.
        """
        self._manifest = manifests.load(manifest_path)
        self._cache_dir = cache_dir or str(Path(tempfile.gettempdir()) / "openmoe-shards")
        self._passes = [self._manifest.finished_passes(i) for i in range(len(self._manifest.sources))]
        # Row counts: by source, then by pass, then by group.
        self._group_rows = [[[g["rows"] for g in groups] for groups in passes] for passes in self._passes]
        self._mixture = Mixture([source.weight for source in self._manifest.sources], self._manifest.seed)
        source_rows = np.asarray([sum(map(sum, rows)) for rows in self._group_rows])
        self._num_rows = self._mixture.rows_available(source_rows)
        self._shards: dict[tuple[int, int, int], shards.Shard] = {}

    @property
    def data_id(self) -> str:
        """Identifies the rows; a run must resume on the same."""
        return self._manifest.data_id

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self._manifest.seq_len

    @property
    def source_names(self) -> list[str]:
        """The sources, as numbered by `sources_of`."""
        return [source.name for source in self._manifest.sources]

    @property
    def num_rows(self) -> int:
        """Global rows that the finished passes serve."""
        return self._num_rows

    def rows(self, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns the batch of global rows [lo, hi): see `shards.batch`."""
        return shards.batch(self.records(lo, hi), self.seq_len)

    def sources_of(self, lo: int, hi: int) -> np.ndarray:
        """Returns the source of each global row in [lo, hi), int64[hi - lo], an index into `source_names`."""
        return self._mixture.locate(lo, hi).source

    def locate(self, lo: int, hi: int) -> list[Record]:
        """Returns where the global rows [lo, hi) are stored."""
        if not 0 <= lo < hi <= self.num_rows:
            raise DataError(
                f"{self._manifest.path}: rows [{lo}, {hi}) were asked for, [0, {self.num_rows}) are built; "
                "build more passes"
            )
        source, row = self._mixture.locate(lo, hi)
        found = [Record(0, 0, 0, 0)] * (hi - lo)
        for index in np.unique(source):
            of_source = np.flatnonzero(source == index)
            for at, record in zip(of_source, self._stored(int(index), row[of_source]), strict=True):
                found[at] = record
        return found

    def records(self, lo: int, hi: int) -> list[bytes]:
        """Returns the stored records of the global rows [lo, hi)."""
        found: list[bytes] = [b""] * (hi - lo)
        by_shard: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for at, record in enumerate(self.locate(lo, hi)):
            by_shard.setdefault(record[:3], []).append((at, record.row))
        for shard, wanted in by_shard.items():
            contents = self._shard(*shard).read([row for _, row in wanted])
            for (at, _), content in zip(wanted, contents, strict=True):
                found[at] = content
        return found

    def text_token_counts(self, lo: int, hi: int) -> np.ndarray:
        """Returns how often each text id carries loss in the global rows [lo, hi), int64[text_vocab_size]."""
        batch = self.rows(lo, hi)
        targets = batch["target_ids"][batch["loss_weights"] > 0]
        size = self._manifest.vocabulary.text_vocab_size
        return np.bincount(targets[targets < size], minlength=size)

    def unigram_entropy(self, lo: int, hi: int) -> float:
        """Returns the entropy in nats of the loss-carrying text ids of [lo, hi); sentinels are left out."""
        counts = self.text_token_counts(lo, hi)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def _stored(self, source: int, rows: np.ndarray) -> list[Record]:
        """Returns where rows of a source, int64[n] counted over its passes, are stored."""
        pass_ends = np.cumsum([sum(groups) for groups in self._group_rows[source]])
        number = np.searchsorted(pass_ends, rows, side="right")
        found = [Record(0, 0, 0, 0)] * len(rows)
        for current in np.unique(number):
            of_pass = np.flatnonzero(number == current)
            groups = self._group_rows[source][current]
            name, seed = self._manifest.sources[source].name, self._manifest.seed
            in_pass = rows[of_pass] - (pass_ends[current] - sum(groups))
            stored = shuffle_pass(in_pass, sum(groups), seed, name, int(current))
            group_ends = np.cumsum(groups)
            group = np.searchsorted(group_ends, stored, side="right")
            in_group = stored - (group_ends - groups)[group]
            for at, g, row in zip(of_pass, group, in_group, strict=True):
                found[at] = Record(source, int(current), int(g), int(row))
        return found

    def _shard(self, source: int, number: int, group: int) -> shards.Shard:
        key = (source, number, group)
        if key not in self._shards:
            folder = self._manifest.pass_folder(source, number)
            self._shards[key] = shards.Shard(
                storage.join(folder, f"{group:05d}.array_record"),
                sha256=self._passes[source][number][group]["sha256"],
                cache_dir=self._cache_dir,
            )
        return self._shards[key]
