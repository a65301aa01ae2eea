"""The token cache: every unit of the sources tokenized once, in Parquet, one document a row.

<folder>/<unit key>.parquet     source, file, offset, hash, tokens
<folder>/<unit key>.bad.jsonl   lines that were left out (only when there are any)
<folder>/<unit key>.json        receipt, created if absent and last: it is the commit
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openmoe.pipelines import sources, storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.sources import BadLine, Document, Unit
from openmoe.pipelines.tokenizer import Tokenizer

CLEANING_VERSION = 1
_BATCH_CHARACTERS = 4_000_000
_SAMPLES = 20  # bad lines that a receipt names
_QUARANTINED = 1000  # bad lines that a unit keeps, the first 4 KiB of each
_SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "file": pa.string(),
        "offset": pa.uint64(),
        "hash": pa.binary(16),
        "tokens": pa.list_(pa.uint32()),
    }
)


class Tokens(NamedTuple):
    """Documents of a unit, one after the other."""

    tokens: np.ndarray  # uint32[total]
    lengths: np.ndarray  # int64[documents]


def key(unit: Unit, tokenizer: Tokenizer) -> str:
    """Returns the name of a unit's files: everything that shapes their bytes is in it."""
    return unit.key(tokenizer.fingerprint, f"cleaning {CLEANING_VERSION}", f"pyarrow {pa.__version__}")


def tokenize(unit: Unit, tokenizer: Tokenizer, folder: str) -> dict[str, Any]:
    """Tokenizes a unit into `folder` and returns its receipt."""
    name = key(unit, tokenizer)
    table = _Table(unit, tokenizer)
    for record in sources.read(unit):
        table.add(record)
    content, receipt = table.finish()
    storage.write_durable(storage.join(folder, f"{name}.parquet"), content)
    if table.bad_lines:
        lines = "".join(json.dumps(line) + "\n" for line in table.bad_lines)
        storage.write_durable(storage.join(folder, f"{name}.bad.jsonl"), lines.encode())
    receipt = {"key": name, **receipt}
    storage.create_if_absent(storage.join(folder, f"{name}.json"), json.dumps(receipt).encode())
    return receipt


def read(folder: str, name: str, *, sha256: str) -> Tokens:
    """Returns the documents of a tokenized unit, whose file must have the receipt's digest."""
    path = storage.join(folder, f"{name}.parquet")
    content = storage.read_bytes(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: damaged, it does not match its receipt; delete both and build again")
    column = pq.read_table(io.BytesIO(content), columns=["tokens"]).column(0).combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return Tokens(values.astype(np.uint32, copy=False), np.diff(column.offsets.to_numpy()).astype(np.int64))


class _Table:
    """Collects a unit's documents, tokenized in batches, and what was wrong with its lines."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer) -> None:
        self._unit = unit
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._text_offsets: list[int] = []
        self._characters = self._text_bytes = self._repaired = 0
        self._reasons: collections.Counter[str] = collections.Counter()
        self._samples: list[dict[str, Any]] = []
        self._columns: dict[str, list[Any]] = {"offset": [], "hash": [], "tokens": []}
        self.bad_lines: list[dict[str, Any]] = []

    def add(self, record: Document | BadLine) -> None:
        if isinstance(record, BadLine):
            self._reject(record.offset, record.reason, record.raw)
            return
        self._texts.append(record.text)
        self._text_offsets.append(record.offset)
        self._repaired += record.repaired
        self._characters += len(record.text)
        if self._characters >= _BATCH_CHARACTERS:
            self._encode()

    def _encode(self) -> None:
        encoded = self._tokenizer.encode(self._texts)
        for offset, text, tokens in zip(self._text_offsets, self._texts, encoded, strict=True):
            utf8 = text.encode()
            if len(tokens) < 2:  # nothing is left to predict of a single token
                self._reject(offset, "one_token", utf8)
                continue
            self._text_bytes += len(utf8)
            self._columns["offset"].append(offset)
            self._columns["hash"].append(hashlib.blake2b(utf8, digest_size=16).digest())
            self._columns["tokens"].append(tokens)
        self._texts, self._text_offsets, self._characters = [], [], 0

    def _reject(self, offset: int, reason: str, raw: bytes) -> None:
        self._reasons[reason] += 1
        if len(self._samples) < _SAMPLES:
            self._samples.append({"offset": offset, "reason": reason})
        if len(self.bad_lines) < _QUARANTINED:
            line = raw[:4096].decode("utf-8", "backslashreplace")
            self.bad_lines.append({"offset": offset, "reason": reason, "line": line})

    def finish(self) -> tuple[bytes, dict[str, Any]]:
        """Returns the Parquet file and the receipt, which holds nothing but facts about the content."""
        self._encode()
        tokens = self._columns["tokens"]
        count = len(tokens)
        lengths = np.asarray([len(t) for t in tokens], np.int64)
        values = np.concatenate([np.empty(0, np.uint32), *tokens])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        document_offsets = np.asarray(self._columns["offset"], np.uint64)
        columns = [
            _repeated(self._unit.source, count),
            _repeated(self._unit.path, count),
            _array(pa.uint64(), document_offsets, count),
            _array(pa.binary(16), b"".join(self._columns["hash"]), count),
            pa.ListArray.from_arrays(_array(pa.int32(), offsets, count + 1), _array(pa.uint32(), values, len(values))),
        ]
        file = io.BytesIO()
        table = pa.Table.from_arrays(columns, schema=_SCHEMA)
        pq.write_table(table, file, compression="zstd", row_group_size=1024)
        content = file.getvalue()
        return content, {
            "source": self._unit.source,
            "path": self._unit.path,
            "start": self._unit.start,
            "stop": self._unit.stop,
            "documents": count,
            "tokens": len(values),
            "text_bytes": self._text_bytes,
            "bad": dict(sorted(self._reasons.items())),
            "bad_samples": sorted(self._samples, key=lambda sample: sample["offset"]),
            "repaired": self._repaired,
            "tokens_sha256": hashlib.sha256(lengths.tobytes() + values.tobytes()).hexdigest(),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def _array(kind: pa.DataType, values: np.ndarray | bytes, count: int) -> pa.Array:
    """Returns an array over a buffer; `pa.array` would import pandas first, which takes seconds."""
    return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(values)])


def _repeated(text: str, count: int) -> pa.Array:
    utf8 = text.encode()
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(len(utf8))
    return pa.StringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(utf8 * count))
