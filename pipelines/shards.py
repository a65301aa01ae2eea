"""Shards: ArrayRecord files of group size 1, one packed row a record; version 1 of a record, little-endian:

    u8 version | u8 0 | u16 segments | u32 tokens | u32 token[tokens] | 7 x u32 segment[segments]

Padding, masks, positions and shifted inputs are not stored: `batch` rebuilds them.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module  # ty: ignore[missing-module-member]

from openmoe.pipelines import local_cache, packing, storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.packing import Row

VERSION = 1
WRITER_OPTIONS = "group_size:1,zstd:1"
# Denoiser is an index into packing.KINDS. Unit is an index into the source's units in the manifest, document and start
# count from that unit's first. An entry without inputs and targets: the segment before it runs on into this text.
SEGMENT = np.dtype([(name, "<u4") for name in ("inputs", "targets", "denoiser", "unit", "document", "start", "length")])
_HEADER = struct.Struct("<BBHI")


def encode(tokens: np.ndarray, segments: np.ndarray) -> bytes:
    """Returns the record of uint32[used] tokens and SEGMENT[segments]."""
    header = _HEADER.pack(VERSION, 0, len(segments), len(tokens))
    return header + tokens.astype("<u4").tobytes() + segments.tobytes()


def decode(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens, uint32[used], and SEGMENT[segments] of a record."""
    version, _, num_segments, num_tokens = _HEADER.unpack_from(record)
    if version != VERSION:
        raise DataError(f"shard: record version {version}, this program reads {VERSION}; upgrade it")
    tokens = np.frombuffer(record, "<u4", num_tokens, _HEADER.size)
    return tokens, np.frombuffer(record, SEGMENT, num_segments, _HEADER.size + tokens.nbytes)


class Rendered(NamedTuple):
    """A shard as bytes, what its receipt says of it, and what its rows are made of."""

    content: bytes
    facts: dict[str, Any]  # digest and statistics
    segments: np.ndarray  # SEGMENT[segments of all rows]


def render(rows: Iterable[Row], origin: np.ndarray) -> Rendered:
    """Returns the shard of rows: the same bytes for the same rows, with the same versions of the libraries.

    Args:
      rows: in the order of the records.
      origin: int64[documents, 2], unit and document in the unit of each document that rows refer to.
    """
    statistics, tables = _Statistics(), []
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder) / "shard")
        try:
            writer = array_record_module.ArrayRecordWriter(local, WRITER_OPTIONS)
            for row in rows:
                tables.append(statistics.add(row, origin))
                writer.write(encode(row.tokens, tables[-1]))
            writer.close()
        except RuntimeError as error:
            raise DataError(f"{folder}: a shard cannot be prepared: {' '.join(str(error).split())}") from error
        content = storage.read_bytes(local)
    digest = hashlib.sha256(content).hexdigest()
    facts = {"sha256": digest, "bytes": len(content), **statistics.counts()}
    return Rendered(content, facts, _joined(tables))


class _Statistics:
    """Counts over the rows of a shard."""

    def __init__(self) -> None:
        self.rows = self.slots_used = self.loss_slots = self.raw_tokens = 0
        self.pieces = np.zeros(len(packing.KINDS), np.int64)

    def add(self, row: Row, origin: np.ndarray) -> np.ndarray:
        """Counts a row and returns its SEGMENT table."""
        pieces = row.pieces
        columns = row.num_inputs, row.num_targets, pieces.kind, *origin[pieces.document].T
        table = np.stack([*columns, pieces.start, pieces.length], axis=1).astype("<u4")
        segments = table.view(SEGMENT).reshape(-1)
        self.rows += 1
        self.slots_used += len(row.tokens)
        self.loss_slots += int(row.num_targets.sum())
        self.raw_tokens += int(row.pieces.length.sum())
        kinds = row.pieces.kind[row.num_inputs + row.num_targets > 0]
        self.pieces += np.bincount(kinds, minlength=len(self.pieces))
        return segments

    def counts(self) -> dict[str, Any]:
        pieces = dict(zip(packing.KINDS, self.pieces.tolist(), strict=True))
        others = {kind: number for kind in ("next_token", "chat") if (number := pieces.pop(kind))}
        return {
            "rows": self.rows,
            "slots_used": self.slots_used,
            "loss_slots": self.loss_slots,
            "raw_tokens": self.raw_tokens,
            "pieces": others or pieces,
        }


def _joined(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Returns one SEGMENT table of several; NumPy joins numbers ten times as fast as records."""
    return np.concatenate([np.empty(0, "<u4"), *(table.view("<u4") for table in tables)]).view(SEGMENT)


def records(content: bytes) -> list[bytes]:
    """Returns all records of a shard that is held as bytes."""
    with tempfile.NamedTemporaryFile() as file:  # ArrayRecord reads files alone
        file.write(content)
        file.flush()
        reader = array_record_module.ArrayRecordReader(file.name, "readahead_buffer_size:0")
        try:
            return reader.read(list(range(reader.num_records()))) if reader.num_records() else []
        finally:
            reader.close()


def count(records: list[bytes]) -> tuple[dict[str, Any], np.ndarray]:
    """Returns what a receipt says of these records but for digest and size, and their SEGMENT tables in one."""
    decoded = [decode(record) for record in records]
    segments = _joined([table for _, table in decoded])
    statistics = _Statistics()
    statistics.rows = len(decoded)
    statistics.slots_used = sum(len(tokens) for tokens, _ in decoded)
    statistics.loss_slots, statistics.raw_tokens = int(segments["targets"].sum()), int(segments["length"].sum())
    kinds = segments["denoiser"][segments["inputs"] + segments["targets"] > 0]
    statistics.pieces = np.bincount(kinds, minlength=len(packing.KINDS))
    return statistics.counts(), segments


class Shard:
    """An open shard whose content was checked against its receipt."""

    def __init__(
        self,
        path: str,
        *,
        sha256: str,
        cache_dir: str,
        cache_bytes: int = local_cache.DEFAULT_BYTES,
        render: Callable[[], bytes] | None = None,
    ) -> None:
        # ArrayRecord accepts a gs:// name and then waits for ever, so it only ever sees a local file.
        self._held = local_cache.hold(path, cache_dir, sha256=sha256, max_bytes=cache_bytes, render=render)
        self.num_bytes = os.fstat(self._held.fileno()).st_size
        self._reader = array_record_module.ArrayRecordReader(self._held.name, "readahead_buffer_size:0")

    def read(self, rows: list[int]) -> list[bytes]:
        """Returns the records of rows of this shard."""
        return self._reader.read(rows)

    def close(self) -> None:
        """Lets go of the file, which may then be removed from the cache."""
        self._reader.close()
        self._held.close()


def batch(records: list[bytes], seq_len: int) -> dict[str, np.ndarray]:
    """Returns the arrays that a trainer wants, [rows, seq_len] int32; loss_weights float32.

    Within a segment the input ids are its inputs and targets shifted by one, with 0 at its start. Loss is on targets.
    """
    tables = [decode(record) for record in records]
    tokens, segments = np.concatenate([own for own, _ in tables]), _joined([table for _, table in tables])
    has_slots = segments["inputs"] + segments["targets"] > 0
    row = np.repeat(np.arange(len(records)), [len(table) for _, table in tables])[has_slots]
    inputs, targets = (segments[key][has_slots].astype(np.int32) for key in ("inputs", "targets"))
    starts = np.cumsum(inputs + targets, dtype=np.int32) - inputs - targets
    number = np.arange(1, len(row) + 1, dtype=np.int32) - np.searchsorted(row, row).astype(np.int32)  # in its row
    sizes = inputs + targets
    positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(starts, sizes)
    shifted = np.concatenate([[0], tokens[:-1]], dtype=np.int32)
    shifted[starts] = 0
    is_used = np.arange(seq_len) < np.asarray([len(own) for own, _ in tables])[:, None]

    def padded(values: np.ndarray, kind: type = np.int32) -> np.ndarray:
        array = np.zeros((len(records), seq_len), kind)
        array[is_used] = values
        return array

    return {
        "input_ids": padded(shifted),
        "target_ids": padded(tokens),
        "segment_ids": padded(np.repeat(number, sizes)),
        "positions": padded(positions),
        "loss_weights": padded(positions >= np.repeat(inputs, sizes), np.float32),
    }
