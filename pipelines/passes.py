"""The passes of a build: which are finished, which a run needs, and how one group of a pass is packed.

A pass of a stream holds every document of its source once, in an order and with noise of its own; a group of it is one
shard.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from openmoe.pipelines import objectives, selection, shards, storage, token_cache, ul2
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.permute import Permutation


class Passes:
    """The finished passes of a build, each read once."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.groups: list[list[list[dict[str, Any]]]] = [[] for _ in manifest.streams]  # receipts by stream and pass
        self.refresh()

    def refresh(self) -> None:
        """Takes note of the passes that were finished since, from the first missing one on without a gap."""
        for stream, passes in enumerate(self.groups):
            while found := storage.read_if_present(_record_of(self.manifest, stream, len(passes))):
                passes.append(json.loads(found)["groups"])

    def rows(self, stream: int) -> list[int]:
        """Returns the rows of each finished pass of a stream."""
        return [sum(group["rows"] for group in groups) for groups in self.groups[stream]]

    def total_rows(self) -> np.ndarray:
        """Returns the rows of all finished passes, int64[streams]."""
        return np.asarray([sum(self.rows(stream)) for stream in range(len(self.groups))], np.int64)

    def epoch_rows(self) -> int | None:
        """Returns the rows of pass 0 of all sources together; None while one is not finished.

        Of a source with several objectives, the pass 0 that comes first.
        """
        firsts = [self.rows(stream) for stream in self.manifest.first_streams]
        return sum(rows[0] for rows in firsts) if all(firsts) else None


def lacking(passes: Passes, num_rows: int) -> list[tuple[int, int]]:
    """Returns passes (stream, number) that the global rows [0, num_rows) need and that are not finished.

    How many rows a pass has is known when it is packed, so that more may be lacking afterwards.
    """
    needed = passes.manifest.mixture.rows_needed(num_rows)
    wanted = []
    for stream, missing in enumerate((needed - passes.total_rows()).tolist()):
        if missing > 0:
            rows = passes.rows(stream)
            num_passes = -(-missing // rows[-1]) if rows else 1
            wanted += [(stream, len(rows) + extra) for extra in range(num_passes)]
    return sorted(wanted, key=lambda each: each[1])


def coming(passes: Passes, row: int, last_row: int, *, ahead: int) -> list[tuple[int, int]]:
    """Returns passes (stream, number) that a run needs next and that are not finished; at most one of each stream.

    Args:
      passes: what is finished.
      row: the next global row that the run reads.
      last_row: a pass is left out when the run needs no row of it before this one.
      ahead: passes wanted of each stream after the one in which its next row lies.
    """
    mixture, held = passes.manifest.mixture, passes.total_rows()
    next_rows, ends = mixture.rows_needed(row), mixture.rows_needed(last_row)
    wanted = []
    for stream in np.flatnonzero((held < ends) & (next_rows < ends)).tolist():
        pass_ends = np.cumsum(passes.rows(stream))
        reading = int(np.searchsorted(pass_ends, next_rows[stream], side="right"))
        if len(pass_ends) <= reading + ahead:
            wanted.append((stream, len(pass_ends)))
    return wanted


def finish(manifest: Manifest, stream: int, number: int, groups: list[dict[str, Any]]) -> None:
    """Says that a pass is complete, by the receipts of all its groups in order."""
    storage.create_if_absent(_record_of(manifest, stream, number), json.dumps({"groups": groups}).encode())


def _record_of(manifest: Manifest, stream: int, number: int) -> str:
    return storage.join(manifest.pass_folder(stream, number), "pass.json")


def packed_groups(manifest: Manifest, stream: int, number: int) -> dict[int, dict[str, Any]]:
    """Returns the receipts of the groups of a pass that are packed, by their numbers."""
    folder = manifest.pass_folder(stream, number)
    names = (name for name in storage.list_files(folder) if name.endswith(".json") and name != "pass.json")
    found = (json.loads(storage.read_bytes(storage.join(folder, name))) for name in names)
    return {receipt["group"]: receipt for receipt in found}


def pack_group(manifest: Manifest, stream: int, number: int, group: int) -> dict[str, Any]:
    """Writes one shard, a pure function of the arguments, and returns its receipt.

    Args:
      manifest: of the build.
      stream: index of the stream in the manifest.
      number: of the pass.
      group: of the pass.
    """
    units = manifest.groups(stream, number)[group]
    key = (manifest.seed, manifest.stream_key(stream), number, group)
    tokens, lengths, origin = _shuffled(manifest, stream, units, *key)
    pack = objectives.packer(manifest.streams[stream].objective, manifest.packing)
    rows = pack(tokens, lengths, manifest.seq_len, manifest.vocabulary, *key)
    name = storage.join(manifest.pass_folder(stream, number), f"{group:05d}")
    facts = shards.write(f"{name}.array_record", rows, origin)
    receipt = {"stream": stream, "number": number, "group": group, "units": units, **facts}
    storage.create_if_absent(f"{name}.json", json.dumps(receipt).encode())
    return receipt


def _shuffled(
    manifest: Manifest, stream: int, units: list[int], *key: int | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a group's documents in shuffled order: tokens, lengths, and (unit, document) of each."""
    folder = storage.join(manifest.data_dir, "tokens")
    receipts = [manifest.source_of(stream).units[unit] for unit in units]
    parts = [token_cache.read(folder, r["key"], sha256=r["sha256"]) for r in receipts]
    tokens = np.concatenate([part.tokens for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    counts = [len(part.lengths) for part in parts]
    origin = np.stack([np.repeat(units, counts), np.concatenate([np.arange(n) for n in counts])], axis=1)
    starts = np.cumsum(lengths) - lengths
    wanted = np.concatenate([selection.read(manifest.data_dir, r) for r in receipts]) == selection.TRAIN
    starts, lengths, origin = starts[wanted], lengths[wanted], origin[wanted]
    order = Permutation(len(lengths), "documents", *key)(np.arange(len(lengths)))
    return tokens[ul2.ranges(starts[order], lengths[order])], lengths[order], origin[order]
