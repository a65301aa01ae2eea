"""Writes rows for other trainers: padded arrays of one row each, in Parquet or as tf.Example in ArrayRecord.

<folder>/plan.json                     what is exported; created if absent
<folder>/rows-00000-of-00007.parquet   (or .array_record) rows in the order in which a run reads them
<folder>/export.json                   digests of the files; created if absent and last: the export is complete

The features are those of MaxText's packed batches. There attention sees `inputs_segmentation`, and whatever has 0 in
`targets_segmentation` carries no loss: so prompts and inputs, which are no targets in UL2, have 0 in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module  # ty: ignore[missing-module-member]

from openmoe.pipelines import shards, storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.loader import Loader

Format = Literal["parquet", "array_record"]

FILE_ROWS = 4096
FEATURES = (
    *("inputs", "targets", "inputs_position", "targets_position"),
    *("inputs_segmentation", "targets_segmentation"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is exported.

    Attributes:
      data_id: identifies the rows.
      format: of the files.
      rows: the global rows [rows[0], rows[1]).
      file_rows: rows of a file; the last may have fewer.
    """

    data_id: str
    format: Format
    rows: tuple[int, int]
    file_rows: int = FILE_ROWS

    def __post_init__(self) -> None:
        if not 0 <= self.rows[0] < self.rows[1]:
            raise DataError(f"rows: the first must be at least 0 and below the end, got {self.rows[0]}:{self.rows[1]}")

    def files(self) -> dict[str, tuple[int, int]]:
        """Returns the global rows of each file, by its name."""
        starts = range(*self.rows, self.file_rows)
        return {
            f"rows-{number:05d}-of-{len(starts):05d}.{self.format}": (lo, min(lo + self.file_rows, self.rows[1]))
            for number, lo in enumerate(starts)
        }


def export(
    loader: Loader, folder: str, plan: Plan, report: Callable[[str, int, int, str], None] = lambda *progress: None
) -> dict[str, Any]:
    """Writes the rows of a plan into a folder, and returns what export.json says.

    One that was killed goes on when it is asked for again; nothing that is there is ever overwritten by other rows.

    Args:
      loader: of the build.
      folder: local or gs://; empty, or with a part of this very export.
      plan: what is exported.
      report: told of progress in rows.

    Raises:
      DataError: the folder holds something else, or rows are wanted that are not built.
    """
    if plan.rows[1] > loader.num_rows:
        loader.locate(*plan.rows)  # refuses, and says what to do
    _begin(folder, plan)
    first, end = plan.rows
    files = {}
    for name, (lo, hi) in plan.files().items():
        content = encode(features(loader.rows(lo, hi)), lo, plan.format)
        storage.write_durable(storage.join(folder, name), content)
        files[name] = {"rows": [lo, hi], "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        report("export", hi - first, end - first, "rows")
    receipt = {**_planned(plan), "seq_len": loader.seq_len, "features": FEATURES, "files": files}
    storage.create_if_absent(storage.join(folder, "export.json"), json.dumps(receipt, indent=1).encode())
    return receipt


def _planned(plan: Plan) -> dict[str, Any]:
    return {"data_id": plan.data_id, "format": plan.format, "rows": list(plan.rows), "file_rows": plan.file_rows}


def _begin(folder: str, plan: Plan) -> None:
    """Raises DataError unless the folder is empty or holds a part of this export."""
    present = storage.list_files(folder)
    if "export.json" in present:
        raise DataError(f"{folder}: holds a complete export; choose another folder, or remove it")
    if present and "plan.json" not in present:
        raise DataError(f"{folder}: holds {present[0]}, which is no export; choose an empty folder")
    path = storage.join(folder, "plan.json")
    storage.create_if_absent(path, json.dumps(_planned(plan)).encode())
    if json.loads(storage.read_bytes(path)) != _planned(plan):
        raise DataError(f"{folder}: holds a part of another export; choose another folder, or remove it")


def features(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a batch, as `shards.batch` gives it, under the names of FEATURES; int32[rows, seq_len] each."""
    has_loss = batch["loss_weights"] > 0
    values = (
        *(batch["input_ids"], batch["target_ids"], batch["positions"], batch["positions"]),
        *(batch["segment_ids"], np.where(has_loss, batch["segment_ids"], 0)),
    )
    return dict(zip(FEATURES, values, strict=True))


def encode(arrays: dict[str, np.ndarray], first_row: int, form: Format) -> bytes:
    """Returns the file of rows, int[rows, seq_len] by feature; the first is global row `first_row`."""
    return _parquet(arrays, first_row) if form == "parquet" else _array_record(arrays, first_row)


def _parquet(arrays: dict[str, np.ndarray], first_row: int) -> bytes:
    num_rows, seq_len = next(iter(arrays.values())).shape
    numbers = _buffer(pa.int64(), np.arange(first_row, first_row + num_rows))
    ends = _buffer(pa.int32(), np.arange(num_rows + 1, dtype=np.int32) * np.int32(seq_len))
    lists = [pa.ListArray.from_arrays(ends, _buffer(pa.int32(), values.reshape(-1))) for values in arrays.values()]
    file = io.BytesIO()
    table = pa.Table.from_arrays([numbers, *lists], names=["row", *arrays])
    pq.write_table(table, file, compression="zstd", row_group_size=256)
    return file.getvalue()


def _buffer(kind: pa.DataType, values: np.ndarray) -> pa.Array:
    """Returns an array over a buffer; `pa.array` would import pandas first, which takes seconds."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _array_record(arrays: dict[str, np.ndarray], first_row: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder) / "rows")
        try:
            writer = array_record_module.ArrayRecordWriter(local, shards.WRITER_OPTIONS)
            for at, row in enumerate(zip(*arrays.values(), strict=True)):
                example = {"row": np.asarray([first_row + at]), **dict(zip(arrays, row, strict=True))}
                writer.write(tf_example(example))
            writer.close()
        except RuntimeError as error:
            raise DataError(f"{folder}: a file cannot be prepared: {' '.join(str(error).split())}") from error
        return storage.read_bytes(local)


def tf_example(values: dict[str, np.ndarray]) -> bytes:
    """Returns a serialized tf.train.Example with an int64 list for each name; numbers of at least 0.

    Example.features = 1; Features.feature = 1, a map of key = 1 and value = 2; Feature.int64_list = 3;
    Int64List.value = 1, packed. All of them are length-delimited: tag 8 * field + 2, length, content.
    """
    entries = []
    for name, numbers in values.items():
        feature = _field(3, _field(1, varints(numbers)))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, content: bytes) -> bytes:
    return bytes([8 * number + 2]) + varints(np.asarray([len(content)])) + content


def varints(numbers: np.ndarray) -> bytes:
    """Returns int[n] of at least 0 in Protocol Buffers' encoding: 7 bits a byte, lowest first, the last below 128."""
    values = numbers.astype(np.uint64)
    num_bytes = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    shifts = np.arange(num_bytes, dtype=np.uint64) * np.uint64(7)
    parts = values[:, None] >> shifts
    has_more = parts > np.uint64(0x7F)
    is_used = np.concatenate([np.ones((len(values), 1), bool), has_more[:, :-1]], axis=1)
    return ((parts & np.uint64(0x7F)) | has_more * np.uint64(0x80)).astype(np.uint8)[is_used].tobytes()
