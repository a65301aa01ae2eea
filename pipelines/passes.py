"""The passes of a build: which of their groups are packed, which a run needs next, and how one is packed.

A pass of a stream holds every document of its source once, in an order and with noise of its own; a group of it is one
shard.
Rows are shuffled inside windows of a pass, so that a window can be read as soon as the groups up to its end are
packed: what a run needs first is packed first, and long before the pass is finished.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from openmoe.pipelines import mixture, objectives, reference, selection, shards, storage, token_cache, ul2
from openmoe.pipelines.config import DataError
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.permute import Permutation

_FAR = 2**40  # rows that no stream ever has


class Group(NamedTuple):
    """A group of a pass."""

    stream: int
    number: int  # of the pass
    group: int


class Passes:
    """What is packed of a build, each receipt read once.

    Attributes:
      manifest: of the build.
      groups: receipts of the finished passes, by stream and pass.
      begun: receipts of the pass after those, by stream: its groups from the first on, up to one that is missing.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.groups: list[list[list[dict[str, Any]]]] = [[] for _ in manifest.streams]
        self.begun: list[list[dict[str, Any]]] = [[] for _ in manifest.streams]
        self._unrecorded: list[tuple[int, int]] = []
        self._own: dict[Group, dict[str, Any]] = {}
        # Bound to this object: a manifest is not hashable, and its cut into groups takes a walk over all units.
        self._tokens_of = functools.cache(self._count_tokens)
        self.refresh()

    def refresh(self) -> None:
        """Takes note of what was packed since, from the first missing group on without a gap."""
        for stream, passes in enumerate(self.groups):
            while True:
                number, begun = len(passes), self.begun[stream]
                if found := storage.read_if_present(_record_of(self.manifest, stream, number)):
                    groups = json.loads(found)["groups"]
                else:
                    self._add_receipts(begun, stream, number)
                    if len(begun) < len(self._tokens_of(stream, number)):
                        break
                    groups = begun
                    if not any(group[:2] == (stream, number) for group in self._own):
                        self._unrecorded.append((stream, number))
                passes.append(groups)
                self.begun[stream] = []

    def _add_receipts(self, begun: list[dict[str, Any]], stream: int, number: int) -> None:
        folder = self.manifest.pass_folder(stream, number)
        begun += _receipts(folder, len(begun))
        while own := self._own.get(Group(stream, number, len(begun))):
            begun += [own, *_receipts(folder, len(begun) + 1)]

    def adopt(self, group: Group, facts: dict[str, Any]) -> None:
        """Takes note, until this process ends, of a group that it has rendered and could not commit."""
        self._own[group] = _receipt(self.manifest, group, facts)

    def is_own(self, group: Group) -> bool:
        """Returns whether a group was rendered here and could not be committed."""
        return group in self._own

    def record(self) -> None:
        """Says of the passes of which every group is packed that they are finished: from then on one read tells it."""
        for stream, number in self._unrecorded:
            finish(self.manifest, stream, number, self.groups[stream][number])
        self._unrecorded.clear()

    def receipts(self, stream: int) -> list[list[dict[str, Any]]]:
        """Returns the receipts of a stream by pass, the one that is begun last."""
        begun = self.begun[stream]
        return [*self.groups[stream], *([begun] if begun else [])]

    def rows(self, stream: int) -> list[int]:
        """Returns the rows of each finished pass of a stream."""
        return [_sum_rows(groups) for groups in self.groups[stream]]

    def readable(self, stream: int) -> list[int]:
        """Returns the rows of each pass of a stream that can be read: of the begun one its whole windows, if any."""
        windows = _sum_rows(self.begun[stream]) // mixture.WINDOW_ROWS * mixture.WINDOW_ROWS
        return [*self.rows(stream), *([windows] if windows else [])]

    def total_rows(self) -> np.ndarray:
        """Returns the rows that can be read, int64[streams]."""
        return np.asarray([sum(self.readable(stream)) for stream in range(len(self.groups))], np.int64)

    def window_ends(self, stream: int) -> np.ndarray:
        """Returns where the windows that can be read end, int64[windows], in rows of the stream over all passes."""
        starts = np.cumsum([0, *self.readable(stream)])
        steps = [np.arange(lo, hi, mixture.WINDOW_ROWS) for lo, hi in itertools.pairwise(starts)]
        return np.append(np.concatenate([np.empty(0, np.int64), *steps]), starts[-1])[1:].astype(np.int64)

    def epoch_rows(self) -> int | None:
        """Returns the rows of pass 0 of all sources together; None while one is not finished.

        Of a source with several objectives, the pass 0 that comes first.
        """
        firsts = [self.rows(stream) for stream in self.manifest.first_streams]
        return sum(rows[0] for rows in firsts) if all(firsts) else None

    def first_passes(self) -> list[Group]:
        """Returns the groups of pass 0 of the sources of which it is not finished; they make an epoch."""
        streams = [stream for stream in self.manifest.first_streams if not self.groups[stream]]
        return [Group(s, 0, group) for s in streams for group in range(len(self._tokens_of(s, 0)))]

    def missing(self, stream: int, until_row: int) -> list[tuple[int, Group]]:
        """Returns the groups with which the rows [0, until_row) of a stream can be read, and that are not packed.

        How many rows a group has is known when it is packed. Until then its tokens are a lower bound, so that there
        may be a group too many at the end of a window. Where several passes are wanted, they are taken to be as long
        as the last one. Whoever wants all rows asks again when these groups are packed.

        Returns:
          Each group with the row of the stream at which it begins to be read, as far as that is known; in order.
        """
        finished, packed = self.rows(stream), self.begun[stream]
        number, start, rows = len(finished), sum(finished), _sum_rows(packed)
        wanted = []
        for group, tokens in enumerate(self._tokens_of(stream, number)):
            window = start + rows // mixture.WINDOW_ROWS * mixture.WINDOW_ROWS
            if window >= until_row:
                return wanted
            if group >= len(packed):
                wanted.append((window, Group(stream, number, group)))
                rows += tokens // self.manifest.seq_len
        if packed or not finished:  # how long this pass is will be known before the next is wanted
            return wanted
        num_passes = math.ceil((until_row - start) / finished[-1])
        for extra in range(1, num_passes):
            begins, later = start + extra * finished[-1], number + extra
            wanted += [(begins, Group(stream, later, group)) for group in range(len(self._tokens_of(stream, later)))]
        return wanted

    def _count_tokens(self, stream: int, number: int) -> list[int]:
        """Returns the tokens of each group of a pass."""
        units = self.manifest.source_of(stream).units
        tokens = selection.trained_tokens
        return [sum(tokens(units[unit]) for unit in group) for group in self.manifest.groups(stream, number)]


def covers(passes: Passes, num_rows: int) -> bool:
    """Returns whether the global rows [0, num_rows) can be read."""
    return bool((passes.manifest.mixture.rows_needed(num_rows) <= passes.total_rows()).all())


def lacking(passes: Passes, num_rows: int) -> list[Group]:
    """Returns the groups that the global rows [0, num_rows) need and that are not packed, in the order of the need.

    How many rows a group has is known when it is packed, so that more may be lacking afterwards.
    """
    needed = passes.manifest.mixture.rows_needed(num_rows)
    short = np.flatnonzero(needed > passes.total_rows()).tolist()
    return _in_order(passes, [each for stream in short for each in passes.missing(stream, int(needed[stream]))])


def coming(passes: Passes, row: int, last_row: int, *, ahead: int) -> list[Group]:
    """Returns the groups that a run needs next and that are not packed: at most one window of each stream.

    Args:
      passes: what is packed.
      row: the next global row that the run reads.
      last_row: a window is left out when the run needs no row of it before this one.
      ahead: windows wanted of each stream after the one in which its next row lies.
    """
    held = passes.total_rows()
    needed = passes.manifest.mixture.rows_needed
    next_rows, ends = needed(row), needed(last_row)
    wanted = []
    for stream in np.flatnonzero((held < ends) & (next_rows < ends)).tolist():
        window_ends = passes.window_ends(stream)
        reading = int(np.searchsorted(window_ends, next_rows[stream], side="right"))
        if len(window_ends) <= reading + ahead:
            wanted += passes.missing(stream, int(held[stream]) + 1)
    return _in_order(passes, wanted)


def _in_order(passes: Passes, wanted: Iterable[tuple[int, Group]]) -> list[Group]:
    """Returns groups, given with the row of their stream, in the order in which the mixture comes to them."""

    @functools.cache
    def global_row(row: int, stream: int) -> int:
        rows = np.full(len(passes.groups), _FAR)
        rows[stream] = row
        return passes.manifest.mixture.rows_available(rows)

    return [group for _, group in sorted(wanted, key=lambda each: (global_row(each[0], each[1].stream), each[1]))]


def _sum_rows(groups: list[dict[str, Any]]) -> int:
    return sum(group["rows"] for group in groups)


def _receipts(folder: str, first: int) -> list[dict[str, Any]]:
    """Returns the receipts of the groups of a pass from `first` on, up to one that has none.

    One request when there is none; of thousands, as when a build is opened, many at a time.
    """
    found: list[dict[str, Any]] = []
    at_once = 1
    while True:
        for content in storage.read_all(_receipt_of(folder, first + len(found) + i) for i in range(at_once)):
            if content is None:
                return found
            found.append(json.loads(content))
        at_once = min(2 * at_once, storage.READS_AT_ONCE)


def finish(manifest: Manifest, stream: int, number: int, groups: list[dict[str, Any]]) -> None:
    """Says that a pass is complete, by the receipts of all its groups in order."""
    storage.create_if_absent(_record_of(manifest, stream, number), json.dumps({"groups": groups}).encode())


def _record_of(manifest: Manifest, stream: int, number: int) -> str:
    return storage.join(manifest.pass_folder(stream, number), "pass.json")


def _receipt_of(folder: str, group: int) -> str:
    return storage.join(folder, f"{group:05d}.json")


def shard_path(manifest: Manifest, stream: int, number: int, group: int) -> str:
    """Returns where the shard of a group lies, once it is packed."""
    return storage.join(manifest.pass_folder(stream, number), f"{group:05d}.array_record")


def is_packed(manifest: Manifest, stream: int, number: int, group: int) -> bool:
    """Returns whether a group has its receipt."""
    return storage.exists(_receipt_of(manifest.pass_folder(stream, number), group))


def unpacked(manifest: Manifest, wanted: list[Group]) -> list[Group]:
    """Returns those of the groups that have no receipt, by one listing of each pass."""
    folders = {each[:2]: manifest.pass_folder(*each[:2]) for each in wanted}
    packed = {storage.join(folder, name) for folder in folders.values() for name in storage.list_files(folder)}
    return [each for each in wanted if _receipt_of(folders[each[:2]], each.group) not in packed]


def pack_group(manifest: Manifest, stream: int, number: int, group: int) -> dict[str, Any]:
    """Renders and commits one shard, and returns its receipt."""
    return commit_group(manifest, Group(stream, number, group), render_group(manifest, stream, number, group))


def commit_group(manifest: Manifest, group: Group, rendered: shards.Rendered) -> dict[str, Any]:
    """Writes one shard, then the receipt that commits it, and returns that."""
    storage.write_durable(shard_path(manifest, *group), rendered.content)
    receipt = _receipt(manifest, group, rendered.facts)
    path = _receipt_of(manifest.pass_folder(group.stream, group.number), group.group)
    storage.create_if_absent(path, json.dumps(receipt).encode())
    return receipt


def _receipt(manifest: Manifest, group: Group, facts: dict[str, Any]) -> dict[str, Any]:
    units = manifest.groups(group.stream, group.number)[group.group]
    return {**group._asdict(), "units": units, **facts}


def render_group(manifest: Manifest, stream: int, number: int, group: int) -> shards.Rendered:
    """Returns one shard, a pure function of the arguments: the same bytes whoever renders it, and whenever.

    Args:
      manifest: of the build; the group's part of its token cache is read.
      stream: index of the stream in the manifest.
      number: of the pass.
      group: of the pass.
    """
    units = manifest.groups(stream, number)[group]
    return _render(manifest, stream, units, manifest.seed, manifest.stream_key(stream), number, group)


def pack_validation(manifest: Manifest, stream: int, group: int = 0) -> dict[str, Any]:
    """Packs a group of what was kept apart of a stream's source as one of a pass is packed, and returns its receipt.

    It lies beside the passes and is in none of them: no global row reads it. Its receipt is written last.
    """
    content, facts, _ = render_validation(manifest, stream, group)
    storage.write_durable(validation_path(manifest, stream, group), content)
    receipt = {"stream": stream, "units": validation_groups(manifest, stream)[group], **facts}
    storage.create_if_absent(_receipt_of(_validation_folder(manifest, stream), group), json.dumps(receipt).encode())
    return receipt


def render_validation(manifest: Manifest, stream: int, group: int) -> shards.Rendered:
    """Returns what `pack_validation` writes, a pure function of the arguments."""
    check_validation(manifest, [stream])
    groups = validation_groups(manifest, stream)
    key = (manifest.seed, manifest.stream_key(stream), "validation", *([group] if len(groups) > 1 else []))
    return _render(manifest, stream, groups[group], *key, part=selection.VALIDATION)


def validation_groups(manifest: Manifest, stream: int) -> list[list[int]]:
    """Returns the units of each group of what was kept apart: one group where it was packed as one before."""
    groups = manifest.validation_groups(stream)
    if len(groups) > 1 and (first := _packed_validation(manifest, stream, 0)):
        everything = sorted(unit for group in groups for unit in group)
        return [everything] if first["units"] == everything else groups
    return groups


def packed_validation(manifest: Manifest, stream: int) -> list[dict[str, Any] | None]:
    """Returns the receipt of each group of what was kept apart of a stream's source, None of one that is not packed."""
    return [_packed_validation(manifest, stream, group) for group in range(len(validation_groups(manifest, stream)))]


def _packed_validation(manifest: Manifest, stream: int, group: int) -> dict[str, Any] | None:
    content = storage.read_if_present(_receipt_of(_validation_folder(manifest, stream), group))
    return json.loads(content) if content else None


def validation_path(manifest: Manifest, stream: int, group: int = 0) -> str:
    """Returns where the shard of a group of what was kept apart lies, once it is packed."""
    return storage.join(_validation_folder(manifest, stream), f"{group:05d}.array_record")


def _validation_folder(manifest: Manifest, stream: int) -> str:
    return storage.join(manifest.data_dir, manifest.streams[stream].passes, "validation")


def check_validation(manifest: Manifest, streams: Iterable[int]) -> None:
    """Raises DataError if nothing was kept apart of the source of one of the streams."""
    for stream in streams:
        if not manifest.validation_groups(stream):
            name = manifest.source_of(stream).name
            raise DataError(f"sources.{name}: no document is for validation; raise validation_share")


def _render(
    manifest: Manifest, stream: int, units: list[int], *key: int | str, part: int = selection.TRAIN
) -> shards.Rendered:
    tokens, lengths, origin = _shuffled(manifest, stream, units, *key, part=part)
    pack = objectives.packer(manifest.streams[stream].objective, manifest.packing)
    rendered = shards.render(pack(tokens, lengths, manifest.seq_len, manifest.vocabulary, *key), origin)
    if manifest.is_reference(stream):  # the one packing that loses something
        lost = {
            "cut_off_tokens": reference.cut_off(rendered.segments, manifest.vocabulary),
            "lone_tokens": int(lengths.sum()) - rendered.facts["raw_tokens"],
        }
        rendered = rendered._replace(facts=rendered.facts | lost)
    return rendered


def _shuffled(
    manifest: Manifest, stream: int, units: list[int], *key: int | str, part: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a part of units' documents in shuffled order: tokens, lengths, and (unit, document) of each."""
    found = [_documents(manifest, manifest.source_of(stream).units[unit], part) for unit in units]
    tokens = np.concatenate([own.tokens for own, _ in found])
    lengths = np.concatenate([own.lengths for own, _ in found])
    numbers = np.concatenate([documents for _, documents in found])
    origin = np.stack([np.repeat(units, [len(documents) for _, documents in found]), numbers], axis=1)
    order = Permutation(len(lengths), "documents", *key)(np.arange(len(lengths)))
    starts = np.cumsum(lengths) - lengths
    return tokens[ul2.ranges(starts[order], lengths[order])], lengths[order], origin[order]


def _documents(manifest: Manifest, receipt: dict[str, Any], part: int) -> tuple[token_cache.Tokens, np.ndarray]:
    """Returns the documents of a unit that belong to a part, and their numbers in it."""
    folder = storage.join(manifest.data_dir, "tokens")
    own = token_cache.read(folder, receipt["key"], sha256=receipt["sha256"])
    numbers = np.flatnonzero(selection.read(manifest.data_dir, receipt) == part)
    if len(numbers) == len(own.lengths):
        return own, numbers
    starts = np.cumsum(own.lengths) - own.lengths
    tokens = own.tokens[ul2.ranges(starts[numbers], own.lengths[numbers])]
    return token_cache.Tokens(tokens, own.lengths[numbers]), numbers
