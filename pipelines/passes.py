"""The passes of a build: which are finished, which a run needs, and how one group of a pass is packed.

A pass holds every document of a source once, in an order and with noise of its own; a group of it is one shard.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from openmoe.pipelines import packing, selection, shards, storage, token_cache, ul2
from openmoe.pipelines.config import DataError
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.permute import Permutation


class Passes:
    """The finished passes of a build, each read once."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.groups: list[list[list[dict[str, Any]]]] = [[] for _ in manifest.sources]  # receipts by source and pass
        self.refresh()

    def refresh(self) -> None:
        """Takes note of the passes that were finished since, from the first missing one on without a gap."""
        for source, passes in enumerate(self.groups):
            while found := storage.read_if_present(_record_of(self.manifest, source, len(passes))):
                passes.append(json.loads(found)["groups"])

    def rows(self, source: int) -> list[int]:
        """Returns the rows of each finished pass of a source."""
        return [sum(group["rows"] for group in groups) for groups in self.groups[source]]

    def total_rows(self) -> np.ndarray:
        """Returns the rows of all finished passes, int64[sources]."""
        return np.asarray([sum(self.rows(source)) for source in range(len(self.groups))], np.int64)

    def epoch_rows(self) -> int | None:
        """Returns the rows of pass 0 of all sources together; None while one is not finished."""
        return sum(self.rows(source)[0] for source in range(len(self.groups))) if all(self.groups) else None


def lacking(passes: Passes, num_rows: int) -> list[tuple[int, int]]:
    """Returns passes (source, number) that the global rows [0, num_rows) need and that are not finished.

    How many rows a pass has is known when it is packed, so that more may be lacking afterwards.
    """
    needed = passes.manifest.mixture.rows_needed(num_rows)
    wanted = []
    for source, missing in enumerate((needed - passes.total_rows()).tolist()):
        if missing > 0:
            rows = passes.rows(source)
            num_passes = -(-missing // rows[-1]) if rows else 1
            wanted += [(source, len(rows) + extra) for extra in range(num_passes)]
    return sorted(wanted, key=lambda each: each[1])


def coming(passes: Passes, row: int, last_row: int, *, ahead: int) -> list[tuple[int, int]]:
    """Returns passes (source, number) that a run needs next and that are not finished; at most one of each source.

    Args:
      passes: what is finished.
      row: the next global row that the run reads.
      last_row: a pass is left out when the run needs no row of it before this one.
      ahead: passes wanted of each source after the one in which its next row lies.
    """
    mixture, held = passes.manifest.mixture, passes.total_rows()
    next_rows, ends = mixture.rows_needed(row), mixture.rows_needed(last_row)
    wanted = []
    for source in np.flatnonzero((held < ends) & (next_rows < ends)).tolist():
        pass_ends = np.cumsum(passes.rows(source))
        reading = int(np.searchsorted(pass_ends, next_rows[source], side="right"))
        if len(pass_ends) <= reading + ahead:
            wanted.append((source, len(pass_ends)))
    return wanted


def finish(manifest: Manifest, source: int, number: int, groups: list[dict[str, Any]]) -> None:
    """Says that a pass is complete, by the receipts of all its groups in order."""
    storage.create_if_absent(_record_of(manifest, source, number), json.dumps({"groups": groups}).encode())


def _record_of(manifest: Manifest, source: int, number: int) -> str:
    return storage.join(manifest.pass_folder(source, number), "pass.json")


def packed_groups(manifest: Manifest, source: int, number: int) -> dict[int, dict[str, Any]]:
    """Returns the receipts of the groups of a pass that are packed, by their numbers."""
    folder = manifest.pass_folder(source, number)
    names = (name for name in storage.list_files(folder) if name.endswith(".json") and name != "pass.json")
    found = (json.loads(storage.read_bytes(storage.join(folder, name))) for name in names)
    return {receipt["group"]: receipt for receipt in found}


def pack_group(manifest: Manifest, source: int, number: int, group: int) -> dict[str, Any]:
    """Writes one shard, a pure function of the arguments, and returns its receipt.

    Args:
      manifest: of the build.
      source: index of the source in the manifest.
      number: of the pass.
      group: of the pass.
    """
    units = manifest.groups(source, number)[group]
    key = (manifest.seed, manifest.sources[source].name, number, group)
    name = storage.join(manifest.pass_folder(source, number), f"{group:05d}")
    return _pack(manifest, name, {"source": source, "number": number, "group": group, "units": units}, *key)


def pack_validation(manifest: Manifest, source: int) -> dict[str, Any]:
    """Packs what was kept apart of a source as a pass is packed, into one shard, and returns its receipt.

    It lies beside the passes and is none of them: no global row reads it. Its receipt is written last.
    """
    units = [i for i, unit in enumerate(manifest.sources[source].units) if selection.count(unit, "validation")]
    if not units:
        raise DataError(
            f"sources.{manifest.sources[source].name}: no document is for validation; raise validation_share"
        )
    key = (manifest.seed, manifest.sources[source].name, "validation")
    name = storage.join(manifest.data_dir, manifest.sources[source].passes, "validation", "00000")
    return _pack(manifest, name, {"source": source, "units": units}, *key, part=selection.VALIDATION)


def _pack(
    manifest: Manifest, name: str, facts: dict[str, Any], *key: int | str, part: int = selection.TRAIN
) -> dict[str, Any]:
    """Writes the shard of a part of units, and its receipt, which begins with these facts."""
    tokens, lengths, origin = _shuffled(manifest, facts["source"], facts["units"], *key, part=part)
    rows = packing.rows(tokens, lengths, manifest.seq_len, manifest.vocabulary, *key)
    receipt = {**facts, **shards.write(f"{name}.array_record", rows, origin)}
    storage.create_if_absent(f"{name}.json", json.dumps(receipt).encode())
    return receipt


def _shuffled(
    manifest: Manifest, source: int, units: list[int], *key: int | str, part: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a part of units' documents in shuffled order: tokens, lengths, and (unit, document) of each."""
    found = [_documents(manifest, manifest.sources[source].units[unit], part) for unit in units]
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
