"""The passes of a build: which of their groups are packed, which a run needs next, and how one is packed.

A pass holds every document of a source once, in an order and with noise of its own; a group of it is one shard.
Rows are shuffled inside windows of a pass, so that a window can be read as soon as the groups up to its end are
packed: what a run needs first is packed first, and long before the pass is finished.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from openmoe.pipelines import mixture, packing, shards, storage, token_cache, ul2
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.permute import Permutation

RECEIPTS_AT_ONCE = 64  # requests in flight
_FAR = 2**40  # rows that no source ever has


class Group(NamedTuple):
    """A group of a pass."""

    source: int
    number: int  # of the pass
    group: int


class Passes:
    """What is packed of a build, each receipt read once.

    Attributes:
      manifest: of the build.
      groups: receipts of the finished passes, by source and pass.
      begun: receipts of the pass after those, by source: its groups from the first on, up to one that is missing.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.groups: list[list[list[dict[str, Any]]]] = [[] for _ in manifest.sources]
        self.begun: list[list[dict[str, Any]]] = [[] for _ in manifest.sources]
        self._unrecorded: list[tuple[int, int]] = []
        # Bound to this object: a manifest is not hashable, and its cut into groups takes a walk over all units.
        self._tokens_of = functools.cache(self._count_tokens)
        self.refresh()

    def refresh(self) -> None:
        """Takes note of what was packed since, from the first missing group on without a gap."""
        for source, passes in enumerate(self.groups):
            while True:
                number, begun = len(passes), self.begun[source]
                if found := storage.read_if_present(_record_of(self.manifest, source, number)):
                    groups = json.loads(found)["groups"]
                else:
                    begun += _receipts(self.manifest.pass_folder(source, number), len(begun))
                    if len(begun) < len(self._tokens_of(source, number)):
                        break
                    groups = begun
                    self._unrecorded.append((source, number))
                passes.append(groups)
                self.begun[source] = []

    def record(self) -> None:
        """Says of the passes of which every group is packed that they are finished: from then on one read tells it."""
        for source, number in self._unrecorded:
            finish(self.manifest, source, number, self.groups[source][number])
        self._unrecorded.clear()

    def receipts(self, source: int) -> list[list[dict[str, Any]]]:
        """Returns the receipts of a source by pass, the one that is begun last."""
        begun = self.begun[source]
        return [*self.groups[source], *([begun] if begun else [])]

    def rows(self, source: int) -> list[int]:
        """Returns the rows of each finished pass of a source."""
        return [_sum_rows(groups) for groups in self.groups[source]]

    def readable(self, source: int) -> list[int]:
        """Returns the rows of each pass of a source that can be read: of the begun one its whole windows, if any."""
        windows = _sum_rows(self.begun[source]) // mixture.WINDOW_ROWS * mixture.WINDOW_ROWS
        return [*self.rows(source), *([windows] if windows else [])]

    def total_rows(self) -> np.ndarray:
        """Returns the rows that can be read, int64[sources]."""
        return np.asarray([sum(self.readable(source)) for source in range(len(self.groups))], np.int64)

    def window_ends(self, source: int) -> np.ndarray:
        """Returns where the windows that can be read end, int64[windows], in rows of the source over all passes."""
        starts = np.cumsum([0, *self.readable(source)])
        steps = [np.arange(lo, hi, mixture.WINDOW_ROWS) for lo, hi in itertools.pairwise(starts)]
        return np.append(np.concatenate([np.empty(0, np.int64), *steps]), starts[-1])[1:].astype(np.int64)

    def epoch_rows(self) -> int | None:
        """Returns the rows of pass 0 of all sources together; None while one is not finished."""
        return sum(self.rows(source)[0] for source in range(len(self.groups))) if all(self.groups) else None

    def first_passes(self) -> list[Group]:
        """Returns the groups of pass 0 of the sources of which it is not finished."""
        sources = [source for source, finished in enumerate(self.groups) if not finished]
        return [Group(s, 0, group) for s in sources for group in range(len(self._tokens_of(s, 0)))]

    def missing(self, source: int, until_row: int) -> list[tuple[int, Group]]:
        """Returns the groups with which the rows [0, until_row) of a source can be read, and that are not packed.

        How many rows a group has is known when it is packed. Until then its tokens are a lower bound, so that there
        may be a group too many at the end of a window. Where several passes are wanted, they are taken to be as long
        as the last one. Whoever wants all rows asks again when these groups are packed.

        Returns:
          Each group with the row of the source at which it begins to be read, as far as that is known; in order.
        """
        finished, packed = self.rows(source), self.begun[source]
        number, start, rows = len(finished), sum(finished), _sum_rows(packed)
        wanted = []
        for group, tokens in enumerate(self._tokens_of(source, number)):
            window = start + rows // mixture.WINDOW_ROWS * mixture.WINDOW_ROWS
            if window >= until_row:
                return wanted
            if group >= len(packed):
                wanted.append((window, Group(source, number, group)))
                rows += tokens // self.manifest.seq_len
        if packed or not finished:  # how long this pass is will be known before the next is wanted
            return wanted
        num_passes = math.ceil((until_row - start) / finished[-1])
        for extra in range(1, num_passes):
            begins, later = start + extra * finished[-1], number + extra
            wanted += [(begins, Group(source, later, group)) for group in range(len(self._tokens_of(source, later)))]
        return wanted

    def _count_tokens(self, source: int, number: int) -> list[int]:
        """Returns the tokens of each group of a pass."""
        units = self.manifest.sources[source].units
        return [sum(units[unit]["tokens"] for unit in group) for group in self.manifest.groups(source, number)]


def covers(passes: Passes, num_rows: int) -> bool:
    """Returns whether the global rows [0, num_rows) can be read."""
    return bool((passes.manifest.mixture.rows_needed(num_rows) <= passes.total_rows()).all())


def lacking(passes: Passes, num_rows: int) -> list[Group]:
    """Returns the groups that the global rows [0, num_rows) need and that are not packed, in the order of the need.

    How many rows a group has is known when it is packed, so that more may be lacking afterwards.
    """
    needed = passes.manifest.mixture.rows_needed(num_rows)
    short = np.flatnonzero(needed > passes.total_rows()).tolist()
    return _in_order(passes, [each for source in short for each in passes.missing(source, int(needed[source]))])


def coming(passes: Passes, row: int, last_row: int, *, ahead: int) -> list[Group]:
    """Returns the groups that a run needs next and that are not packed: at most one window of each source.

    Args:
      passes: what is packed.
      row: the next global row that the run reads.
      last_row: a window is left out when the run needs no row of it before this one.
      ahead: windows wanted of each source after the one in which its next row lies.
    """
    held = passes.total_rows()
    needed = passes.manifest.mixture.rows_needed
    next_rows, ends = needed(row), needed(last_row)
    wanted = []
    for source in np.flatnonzero((held < ends) & (next_rows < ends)).tolist():
        window_ends = passes.window_ends(source)
        reading = int(np.searchsorted(window_ends, next_rows[source], side="right"))
        if len(window_ends) <= reading + ahead:
            wanted += passes.missing(source, int(held[source]) + 1)
    return _in_order(passes, wanted)


def _in_order(passes: Passes, wanted: Iterable[tuple[int, Group]]) -> list[Group]:
    """Returns groups, given with the row of their source, in the order in which the mixture comes to them."""

    @functools.cache
    def global_row(row: int, source: int) -> int:
        rows = np.full(len(passes.groups), _FAR)
        rows[source] = row
        return passes.manifest.mixture.rows_available(rows)

    return [group for _, group in sorted(wanted, key=lambda each: (global_row(each[0], each[1].source), each[1]))]


def _sum_rows(groups: list[dict[str, Any]]) -> int:
    return sum(group["rows"] for group in groups)


def _receipts(folder: str, first: int) -> list[dict[str, Any]]:
    """Returns the receipts of the groups of a pass from `first` on, up to one that has none.

    One request when there is none; of thousands, as when a build is opened, many at a time.
    """
    found: list[dict[str, Any]] = []
    at_once = 1
    with ThreadPoolExecutor(RECEIPTS_AT_ONCE) as pool:
        while True:
            names = (_receipt_of(folder, first + len(found) + i) for i in range(at_once))
            for content in pool.map(storage.read_if_present, names):
                if content is None:
                    return found
                found.append(json.loads(content))
            at_once = min(2 * at_once, RECEIPTS_AT_ONCE)


def finish(manifest: Manifest, source: int, number: int, groups: list[dict[str, Any]]) -> None:
    """Says that a pass is complete, by the receipts of all its groups in order."""
    storage.create_if_absent(_record_of(manifest, source, number), json.dumps({"groups": groups}).encode())


def _record_of(manifest: Manifest, source: int, number: int) -> str:
    return storage.join(manifest.pass_folder(source, number), "pass.json")


def _receipt_of(folder: str, group: int) -> str:
    return storage.join(folder, f"{group:05d}.json")


def shard_path(manifest: Manifest, source: int, number: int, group: int) -> str:
    """Returns where the shard of a group lies, once it is packed."""
    return storage.join(manifest.pass_folder(source, number), f"{group:05d}.array_record")


def is_packed(manifest: Manifest, source: int, number: int, group: int) -> bool:
    """Returns whether a group has its receipt."""
    return storage.exists(_receipt_of(manifest.pass_folder(source, number), group))


def unpacked(manifest: Manifest, wanted: list[Group]) -> list[Group]:
    """Returns those of the groups that have no receipt, by one listing of each pass."""
    folders = {each[:2]: manifest.pass_folder(*each[:2]) for each in wanted}
    packed = {storage.join(folder, name) for folder in folders.values() for name in storage.list_files(folder)}
    return [each for each in wanted if _receipt_of(folders[each[:2]], each.group) not in packed]


def pack_group(manifest: Manifest, source: int, number: int, group: int) -> dict[str, Any]:
    """Writes one shard, then the receipt that commits it, and returns that; see `render_group`."""
    content, facts = render_group(manifest, source, number, group)
    storage.write_durable(shard_path(manifest, source, number, group), content)
    units = manifest.groups(source, number)[group]
    receipt = {"source": source, "number": number, "group": group, "units": units, **facts}
    storage.create_if_absent(_receipt_of(manifest.pass_folder(source, number), group), json.dumps(receipt).encode())
    return receipt


def render_group(manifest: Manifest, source: int, number: int, group: int) -> shards.Rendered:
    """Returns one shard, a pure function of the arguments: the same bytes whoever renders it, and whenever.

    Args:
      manifest: of the build; the group's part of its token cache is read.
      source: index of the source in the manifest.
      number: of the pass.
      group: of the pass.
    """
    units = manifest.groups(source, number)[group]
    key = (manifest.seed, manifest.sources[source].name, number, group)
    tokens, lengths, origin = _shuffled(manifest, source, units, *key)
    return shards.render(packing.rows(tokens, lengths, manifest.seq_len, manifest.vocabulary, *key), origin)


def _shuffled(
    manifest: Manifest, source: int, units: list[int], *key: int | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a group's documents in shuffled order: tokens, lengths, and (unit, document) of each."""
    folder = storage.join(manifest.data_dir, "tokens")
    receipts = [manifest.sources[source].units[unit] for unit in units]
    parts = [token_cache.read(folder, r["key"], sha256=r["sha256"]) for r in receipts]
    tokens = np.concatenate([part.tokens for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    counts = [len(part.lengths) for part in parts]
    origin = np.stack([np.repeat(units, counts), np.concatenate([np.arange(n) for n in counts])], axis=1)
    order = Permutation(len(lengths), "documents", *key)(np.arange(len(lengths)))
    starts = np.cumsum(lengths) - lengths
    return tokens[ul2.ranges(starts[order], lengths[order])], lengths[order], origin[order]
