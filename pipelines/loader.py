"""Reads rows by number: the content of global row i is a pure function of (manifest, i)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import shards, storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.mixture import shuffle_pass
from openmoe.pipelines.passes import Passes

POLL_S = 1.0
COUNTED_ROWS = 1024  # rows whose tokens are counted at a time
MAX_OPEN_SHARDS = 512  # files; a window of rows lies in far fewer


class Record(NamedTuple):
    """Where a row is stored."""

    stream: int
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
        self._mixture = self._manifest.mixture
        self._passes = Passes(self._manifest)
        self._count_rows()
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

    @property
    def epoch_rows(self) -> int | None:
        """Rows of pass 0 of all sources together; None while one is not finished."""
        return self._passes.epoch_rows()

    def _count_rows(self) -> None:
        # By stream, then by pass, then by group.
        self._group_rows = [[[g["rows"] for g in groups] for groups in passes] for passes in self._passes.groups]
        self._num_rows = self._mixture.rows_available(self._passes.total_rows())

    def wait_for(self, hi: int, *, timeout_s: float, on_wait: Callable[[str], None] = lambda missing: None) -> float:
        """Waits until another process has built the global rows [0, hi).

        Args:
          hi: rows wanted.
          timeout_s: how long to wait at most.
          on_wait: told, each time it looks in vain, which pass is missing, in words.

        Returns:
          Seconds waited; 0 when the rows were there.

        Raises:
          DataError: they are not there in time; it names the missing pass.
        """
        start_s, waited_s = time.monotonic(), 0.0
        while hi > self._num_rows:
            self._passes.refresh()
            self._count_rows()
            if hi <= self._num_rows:
                break
            if waited_s > timeout_s:
                raise DataError(
                    f"{self._manifest.path}: {self._missing()} was not built within {timeout_s:g} s; "
                    "the driver's log says why"
                )
            on_wait(self._missing())
            time.sleep(POLL_S)
            waited_s = time.monotonic() - start_s
        return waited_s

    def _missing(self) -> str:
        """Returns in words which pass the first row that is not built belongs to."""
        stream = int(self._mixture.locate(self._num_rows, self._num_rows + 1).stream[0])
        name = self._manifest.stream_names[stream]
        return f"pass {len(self._group_rows[stream])} of {name} (global row {self._num_rows})"

    def rows(self, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns the batch of global rows [lo, hi): see `shards.batch`."""
        return shards.batch(self.records(lo, hi), self.seq_len)

    def sources_of(self, lo: int, hi: int) -> np.ndarray:
        """Returns the source of each global row in [lo, hi), int64[hi - lo], an index into `source_names`."""
        of_streams = np.asarray([stream.source for stream in self._manifest.streams])
        return of_streams[self._mixture.locate(lo, hi).stream]

    def locate(self, lo: int, hi: int) -> list[Record]:
        """Returns where the global rows [lo, hi) are stored."""
        if not 0 <= lo < hi <= self.num_rows:
            raise DataError(
                f"{self._manifest.path}: rows [{lo}, {hi}) were asked for, [0, {self.num_rows}) are built; "
                "build more passes"
            )
        stream, row = self._mixture.locate(lo, hi)
        found = [Record(0, 0, 0, 0)] * (hi - lo)
        for index in np.unique(stream):
            of_stream = np.flatnonzero(stream == index)
            for at, record in zip(of_stream, self._stored(int(index), row[of_stream]), strict=True):
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
        size = self._manifest.vocabulary.text_vocab_size
        counts = np.zeros(size, np.int64)
        for start in range(lo, hi, COUNTED_ROWS):
            batch = self.rows(start, min(start + COUNTED_ROWS, hi))
            targets = batch["target_ids"][batch["loss_weights"] > 0]
            counts += np.bincount(targets[targets < size], minlength=size)
        return counts

    def unigram_entropy(self, lo: int, hi: int) -> float:
        """Returns the entropy in nats of the loss-carrying text ids of [lo, hi); sentinels are left out."""
        counts = self.text_token_counts(lo, hi)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def _stored(self, stream: int, rows: np.ndarray) -> list[Record]:
        """Returns where rows of a stream, int64[n] counted over its passes, are stored."""
        pass_ends = np.cumsum([sum(groups) for groups in self._group_rows[stream]])
        number = np.searchsorted(pass_ends, rows, side="right")
        found = [Record(0, 0, 0, 0)] * len(rows)
        for current in np.unique(number):
            of_pass = np.flatnonzero(number == current)
            groups = self._group_rows[stream][current]
            name, seed = self._manifest.stream_key(stream), self._manifest.seed
            in_pass = rows[of_pass] - (pass_ends[current] - sum(groups))
            stored = shuffle_pass(in_pass, sum(groups), seed, name, int(current))
            group_ends = np.cumsum(groups)
            group = np.searchsorted(group_ends, stored, side="right")
            in_group = stored - (group_ends - groups)[group]
            for at, g, row in zip(of_pass, group, in_group, strict=True):
                found[at] = Record(stream, int(current), int(g), int(row))
        return found

    def _shard(self, stream: int, number: int, group: int) -> shards.Shard:
        key = (stream, number, group)
        shard = self._shards.pop(key, None)
        if shard is None:
            if len(self._shards) == MAX_OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]  # the one not read for the longest time
            folder = self._manifest.pass_folder(stream, number)
            shard = shards.Shard(
                storage.join(folder, f"{group:05d}.array_record"),
                sha256=self._passes.groups[stream][number][group]["sha256"],
                cache_dir=self._cache_dir,
            )
        self._shards[key] = shard
        return shard
