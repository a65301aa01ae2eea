"""Reads rows by number: the content of global row i is a pure function of (manifest, i).

What nobody has packed yet is rendered when it is wanted (`Loader.make_ready`), to the same bytes. Who may only read
the data directory keeps what it renders on its host.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from openmoe.pipelines import local_cache, passes, shards
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataError
from openmoe.pipelines.mixture import shuffle_pass
from openmoe.pipelines.passes import Group, Passes
from openmoe.pipelines.storage import StorageDenied

log = logging.getLogger(__name__)

COUNTED_ROWS = 1024  # rows whose tokens are counted at a time
OPENED_AT_ONCE = 8  # shards that are downloaded together
MAX_OPEN_SHARDS = 512  # files; a window of rows lies in far fewer


class Record(NamedTuple):
    """Where a row is stored."""

    stream: int
    number: int  # of the pass
    group: int
    row: int  # in the group's shard


class Loader:
    """Random access to the rows of a build; keeps open what it has read from."""

    def __init__(
        self, manifest_path: str, *, cache_dir: str | None = None, cache_bytes: int = local_cache.DEFAULT_BYTES
    ) -> None:
        """Opens a build.

        Args:
          manifest_path: of a manifest, local or gs://.
          cache_dir: local folder for shards of gs://; None: a folder of this machine's temporary ones.
          cache_bytes: how large that folder may become; shards that are open stay, at most so many bytes of them.
        """
        self._manifest = manifests.load(manifest_path)
        self._cache_dir = cache_dir or local_cache.default_folder()
        self._cache_bytes = cache_bytes
        self._mixture = self._manifest.mixture
        self._passes = Passes(self._manifest)
        self._count_rows()
        self._shards: dict[Group, shards.Shard] = {}
        self._denied: StorageDenied | None = None  # why groups that were rendered here are not committed

    @property
    def data_id(self) -> str:
        """Identifies the rows; a run must resume on the same."""
        return self._manifest.data_id

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self._manifest.seq_len

    @property
    def num_rows(self) -> int:
        """Global rows that the packed groups serve."""
        return self._num_rows

    @property
    def epoch_rows(self) -> int | None:
        """Rows of pass 0 of all sources together; None while one is not finished."""
        return self._passes.epoch_rows()

    def _count_rows(self) -> None:
        # By stream, then by pass, then by group.
        streams = range(len(self._manifest.streams))
        self._group_rows = [[[g["rows"] for g in groups] for groups in self._passes.receipts(s)] for s in streams]
        self._pass_ends = [np.cumsum(self._passes.readable(s)) for s in streams]
        self._num_rows = self._mixture.rows_available(self._passes.total_rows())

    def make_ready(self, hi: int, on_render: Callable[[str], None] = lambda group: None) -> int:
        """Sees to it that the global rows [0, hi) can be read, and packs groups that nobody has packed.

        A group costs its part of the token cache, read once, and the CPU time of packing it. It is committed like any
        other, so that no one has to do it again: hosts that lack the same groups begin with different ones, and take
        what the others have finished. Two may do the same group at the same time, to the same bytes.

        Args:
          hi: rows wanted.
          on_render: told, in words, which group is packed next.

        Returns:
          How many groups were packed here; 0 when the rows were there.
        """
        rendered = 0
        while hi > self._num_rows:
            self._passes.refresh()
            self._count_rows()
            wanted = passes.lacking(self._passes, hi)
            for group in random.SystemRandom().sample(wanted, len(wanted)):
                if not self._passes.is_own(group) and not passes.is_packed(self._manifest, *group):
                    on_render(self._words(group))
                    self._render(group)
                    rendered += 1
        if rendered and self._denied is None:
            self._passes.record()
        return rendered

    def _render(self, group: Group) -> None:
        """Commits a group, or keeps it on this host where the data directory may not be written."""
        rendered = passes.render_group(self._manifest, *group)
        try:
            passes.commit_group(self._manifest, group, rendered)
        except StorageDenied as error:
            if self._denied is None:
                log.warning("%s; rows that nobody has packed are rendered for this process alone", error)
            self._denied = error
            self._passes.adopt(group, rendered.facts)
            self._shard(group, rendered.facts["sha256"], lambda: rendered.content).close()

    def _words(self, group: Group) -> str:
        words = f"group {group.group} of pass {group.number} of {self._manifest.stream_names[group.stream]}"
        return words if self._denied is None else f"{words}, for this process alone"

    def rows(self, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns the batch of global rows [lo, hi): see `shards.batch`."""
        return shards.batch(self.records(lo, hi), self.seq_len)

    def locate(self, lo: int, hi: int) -> list[Record]:
        """Returns where the global rows [lo, hi) are stored."""
        if not 0 <= lo < hi <= self.num_rows:
            raise DataError(
                f"{self._manifest.path}: rows [{lo}, {hi}) were asked for, [0, {self.num_rows}) are built; "
                "`openmoe data build RUN` builds what a run reads"
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
        by_shard: dict[Group, list[tuple[int, int]]] = {}
        for at, record in enumerate(self.locate(lo, hi)):
            by_shard.setdefault(Group(*record[:3]), []).append((at, record.row))
        for keys in self._parts(by_shard):
            for key, shard in self._opened(keys).items():
                wanted = by_shard[key]
                for (at, _), content in zip(wanted, shard.read([row for _, row in wanted]), strict=True):
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
        pass_ends = self._pass_ends[stream]
        number = np.searchsorted(pass_ends, rows, side="right")
        found = [Record(0, 0, 0, 0)] * len(rows)
        for current in np.unique(number).tolist():
            of_pass = np.flatnonzero(number == current)
            groups = self._group_rows[stream][current]
            name, seed = self._manifest.stream_key(stream), self._manifest.seed
            in_pass = rows[of_pass] - (pass_ends[current - 1] if current else 0)
            # Of a pass that is begun, the known rows end in a whole window: the rows after it shuffle none before it.
            stored = shuffle_pass(in_pass, sum(groups), seed, name, current)
            group_ends = np.cumsum(groups)
            group = np.searchsorted(group_ends, stored, side="right")
            in_group = stored - (group_ends - groups)[group]
            for at, g, row in zip(of_pass, group, in_group, strict=True):
                found[at] = Record(stream, current, int(g), int(row))
        return found

    def _parts(self, keys: Iterable[Group]) -> Iterator[list[Group]]:
        """Yields groups in parts whose shards may all be open at the same time."""
        part: list[Group] = []
        part_bytes = 0
        for key in keys:
            num_bytes = self._receipt(key)["bytes"]
            if part and (len(part) == OPENED_AT_ONCE or part_bytes + num_bytes > self._cache_bytes):
                yield part
                part, part_bytes = [], 0
            part.append(key)
            part_bytes += num_bytes
        if part:
            yield part

    def _opened(self, keys: list[Group]) -> dict[Group, shards.Shard]:
        """Returns the shards of groups; those that are not open yet are downloaded and checked at the same time."""
        opened = {key: self._shards.pop(key) for key in keys if key in self._shards}
        self._make_room([self._receipt(key)["bytes"] for key in keys])
        missing = [key for key in keys if key not in opened]
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            opened |= zip(missing, pool.map(self._open, missing), strict=True)
        self._shards |= opened  # at the end: those not read for the longest time are the first
        return opened

    def _open(self, key: Group) -> shards.Shard:
        again = (lambda: passes.render_group(self._manifest, *key).content) if self._passes.is_own(key) else None
        return self._shard(key, self._receipt(key)["sha256"], again)

    def _shard(self, key: Group, sha256: str, render: Callable[[], bytes] | None) -> shards.Shard:
        return shards.Shard(
            passes.shard_path(self._manifest, *key),
            sha256=sha256,
            cache_dir=self._cache_dir,
            cache_bytes=self._cache_bytes,
            render=render,
        )

    def _receipt(self, key: Group) -> dict[str, Any]:
        return self._passes.receipts(key.stream)[key.number][key.group]

    def _make_room(self, wanted_bytes: list[int]) -> None:
        """Closes the shards not read for the longest time, as long as there are too many or too large ones."""
        open_bytes = sum(wanted_bytes) + sum(shard.num_bytes for shard in self._shards.values())
        while self._shards and (
            len(self._shards) + len(wanted_bytes) > MAX_OPEN_SHARDS or open_bytes > self._cache_bytes
        ):
            oldest = self._shards.pop(next(iter(self._shards)))
            open_bytes -= oldest.num_bytes
            oldest.close()
