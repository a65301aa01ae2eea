"""The token cache: every unit of the sources tokenized once, in Parquet, one document a row.

<folder>/<unit key>.parquet     source, file, offset, hash, tokens
<folder>/<unit key>.bad.jsonl   lines that were left out, with file, offset and reason (only when there are any)
<folder>/<unit key>.json        receipt, created if absent and last: it is the commit

A compressed file with more text than a window has these of each window, <unit key>-00000 and so on, and at last a
receipt of the unit that holds those of its parts. Builds know parts alone.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openmoe.pipelines import sources, storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.sources import BadLine, Document, Unit
from openmoe.pipelines.tokenizer import Tokenizer

# Part of every unit's key: raise it when the same bytes would become other files, and the recipe's version too when
# the same text would become other tokens.
CLEANING_VERSION = 5
_BATCH_BYTES = 2**23  # of text, tokenized at a time: in batches of 2**19 SentencePiece takes 4 to 8 % longer
_ROW_GROUP_TOKENS = 2**18  # about so many, which stay in a CPU's caches: fresh memory costs as much as hashing
_READ_DOCUMENTS = 1024
_SAMPLES = 20  # bad lines that a receipt names
_KEPT_LINES = 1000  # bad lines that a unit keeps; the others are counted
_KEPT_BYTES = 4096  # of each of them
# Nothing is ever null: levels for it, and statistics of the ids, cost a third of what writing them does.
_TOKENS = pa.list_(pa.field("element", pa.uint32(), nullable=False))
_COLUMNS = {"source": pa.string(), "file": pa.string(), "offset": pa.uint64(), "hash": pa.binary(16), "tokens": _TOKENS}
_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])
# Ids as streams of their first, second, ... bytes, of which the upper two are next to nothing. With zstd files are two
# thirds as large, and the way to them takes a tenth longer. A dictionary is no gain either way.
_ENCODING: dict[str, Any] = {
    "compression": "lz4",
    "use_byte_stream_split": ["tokens.list.element"],
    "use_dictionary": ["source", "file"],
    "write_statistics": ["source", "file", "offset"],
}


class Tokens(NamedTuple):
    """Documents of a unit, one after the other."""

    tokens: np.ndarray  # uint32[total]
    lengths: np.ndarray  # int64[documents]


def key(unit: Unit, tokenizer: Tokenizer) -> str:
    """Returns the name of a unit's files: everything that shapes their bytes is in it."""
    return unit.key(tokenizer.fingerprint, f"cleaning {CLEANING_VERSION}", f"pyarrow {pa.__version__}")


def tokenize(unit: Unit, tokenizer: Tokenizer, folder: str) -> dict[str, Any]:
    """Tokenizes a unit into `folder` and returns its receipt; parts that have one are not done again."""
    with _kept_memory():
        return _tokenize(unit, tokenizer, folder)


@contextlib.contextmanager
def _kept_memory() -> Generator[None]:
    """Lets Arrow use malloc: its own pool gives back what it did not need for 10 ms, as while text is tokenized."""
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(pool)


def _tokenize(unit: Unit, tokenizer: Tokenizer, folder: str) -> dict[str, Any]:
    name, windows = key(unit, tokenizer), sources.windows(unit)
    done: list[dict[str, Any]] = []
    records = next(windows, iter(()))
    while records is not None:
        part = f"{name}-{len(done):05d}"
        found = storage.read_if_present(_receipt_of(folder, part)) if sources.is_compressed(unit) else None
        table = _Table(unit, tokenizer)
        for record in records:
            if found is None:
                table.add(record)
        records = next(windows, None)
        if not done and records is None:
            return _commit(folder, name, table)
        done.append(json.loads(found) if found else _commit(folder, part, table))
    return _create(folder, {"key": name, "source": unit.source, "path": unit.path, "parts": done})


def parts(receipt: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the receipts of a unit's parts; most units are one."""
    return receipt.get("parts", [receipt])


def unit_key(receipt: dict[str, Any]) -> str:
    """Returns the key of the unit that a receipt is of, or a part of."""
    return receipt["key"].partition("-")[0]


def _commit(folder: str, name: str, table: _Table) -> dict[str, Any]:
    pieces, receipt = table.finish()
    sources.check_unchanged(table.unit)  # after the last of its bytes was read
    storage.write_durable(storage.join(folder, f"{name}.parquet"), *pieces)
    if table.kept_aside:
        lines = "".join(json.dumps(line) + "\n" for line in table.kept_aside)
        storage.write_durable(storage.join(folder, f"{name}.bad.jsonl"), lines.encode())
    return _create(folder, {"key": name, **receipt})


def _create(folder: str, receipt: dict[str, Any]) -> dict[str, Any]:
    storage.create_if_absent(_receipt_of(folder, receipt["key"]), json.dumps(receipt).encode())
    return receipt


def _receipt_of(folder: str, name: str) -> str:
    return storage.join(folder, f"{name}.json")


def quarantine(unit: Unit, tokenizer: Tokenizer, folder: str, *, reason: str) -> dict[str, Any]:
    """Gives a unit that cannot be tokenized an empty file and a receipt that says why; delete that to try again."""
    name = key(unit, tokenizer)
    pieces, receipt = _Table(unit, tokenizer).finish()
    storage.write_durable(storage.join(folder, f"{name}.parquet"), *pieces)
    return _create(folder, {"key": name, **receipt, "quarantined": reason})


def read(folder: str, name: str, *, sha256: str) -> Tokens:
    """Returns the documents of a tokenized unit, whose file must have the receipt's digest."""
    return parse(read_checked(storage.join(folder, f"{name}.parquet"), sha256=sha256))


def lengths(path: str) -> Iterator[np.ndarray]:
    """Yields the tokens of each document of a unit's Parquet file, int64[documents], some documents at a time.

    Raises:
      DataError: the file is no Parquet file of documents.
    """
    with storage.open_read(path) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(columns=["tokens"], batch_size=_READ_DOCUMENTS):
                yield np.diff(batch.column(0).offsets.to_numpy()).astype(np.int64)
        except pa.ArrowException as error:
            raise DataError(f"{path}: damaged ({error}); `openmoe data audit` says what else is") from error


def parse(content: bytes) -> Tokens:
    """Returns the documents of a unit's Parquet file."""
    [column] = _columns(content, ["tokens"])
    values = column.flatten().to_numpy(zero_copy_only=False)
    return Tokens(values.astype(np.uint32, copy=False), np.diff(column.offsets.to_numpy()).astype(np.int64))


def documents(folder: str, name: str, *, sha256: str) -> Documents:
    """Returns hashes and lengths of the documents of a tokenized unit, whose file must have the receipt's digest."""
    return parse_documents(read_checked(storage.join(folder, f"{name}.parquet"), sha256=sha256))


def parse_documents(content: bytes) -> Documents:
    """Returns hashes and lengths of the documents of a unit's Parquet file."""
    hashes, tokens = _columns(content, ["hash", "tokens"])
    halves = np.frombuffer(b"".join(hashes.to_pylist()), "<u8").reshape(-1, 2)
    return Documents(halves, np.diff(tokens.offsets.to_numpy()).astype(np.int64))


def read_checked(path: str, *, sha256: str) -> bytes:
    """Returns the content of a file, which must have the digest of its receipt."""
    content = storage.read_bytes(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: damaged, it does not match its receipt; delete both and build again")
    return content


def _columns(content: bytes, columns: list[str]) -> list[Any]:
    table = pq.read_table(io.BytesIO(content), columns=columns)
    return [table.column(column).combine_chunks() for column in columns]


class Documents(NamedTuple):
    """What tells the documents of a unit apart."""

    hashes: np.ndarray  # uint64[documents, 2]
    lengths: np.ndarray  # int64[documents], tokens

    def sha256(self) -> str:
        """Returns what their receipt says as `documents_sha256`."""
        return _digest(self.hashes.tobytes(), self.lengths)


class _Table:
    """Collects a unit's documents, tokenized in batches, and what was wrong with its lines."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer) -> None:
        self.unit = unit
        self._tokenizer = tokenizer
        # Path, offset, text and answer of documents that are not tokenized yet; in a list of documents Python would
        # look for garbage again and again, 2 ns a token.
        self._held: tuple[list[str], list[int], list[bytes], list[bytes | None]] = ([], [], [], [])
        self._held_bytes = self._text_bytes = self._repaired = 0
        self._reasons: collections.Counter[str] = collections.Counter()
        self._samples: list[dict[str, Any]] = []
        self._columns: dict[str, list[Any]] = {"file": [], "offset": [], "hash": [], "tokens": []}
        self.kept_aside: list[dict[str, Any]] = []

    def add(self, record: Document | BadLine) -> None:
        if isinstance(record, BadLine):
            self._reject(record)
            return
        paths, offsets, texts, answers = self._held
        paths.append(record.path)
        offsets.append(record.offset)
        texts.append(record.utf8)
        answers.append(record.answer)
        self._repaired += record.repaired
        self._held_bytes += len(record.utf8)
        if self._held_bytes >= _BATCH_BYTES:
            self._encode()

    def _encode(self) -> None:
        held, self._held, self._held_bytes = self._held, ([], [], [], []), 0
        _, _, texts, answers = held
        encoded = self._tokenizer.encode(texts)
        of_answers = iter(self._tokenizer.encode([answer for answer in answers if answer is not None]))
        files, offsets, hashes, tokens = self._columns.values()
        for path, offset, utf8, answer, ids in zip(*held, encoded, strict=True):
            if answer is not None:  # EOS, which no text becomes, lies between
                utf8 += answer
                ids = np.concatenate([ids, np.asarray([self._tokenizer.eos_id], np.uint32), next(of_answers)])
            if len(ids) < 2:  # nothing is left to predict of a single token
                self._reject(BadLine(path, offset, "one_token", utf8))
                continue
            self._text_bytes += len(utf8)
            files.append(path)
            offsets.append(offset)
            hashes.append(hashlib.blake2b(utf8, digest_size=16).digest())
            tokens.append(ids)

    def _reject(self, bad: BadLine) -> None:
        where = {"path": bad.path, "offset": bad.offset, "reason": bad.reason}
        self._reasons[bad.reason] += 1
        if len(self._samples) < _SAMPLES:
            self._samples.append(where)
        if len(self.kept_aside) < _KEPT_LINES:
            cut = {"bytes": len(bad.raw)} if len(bad.raw) > _KEPT_BYTES else {}
            self.kept_aside.append({**where, **_exactly(bad.raw[:_KEPT_BYTES]), **cut})

    def finish(self) -> tuple[list[bytes], dict[str, Any]]:
        """Returns the Parquet file, in pieces, and the receipt, which holds nothing but facts about the content."""
        self._encode()
        lengths = np.asarray([len(tokens) for tokens in self._columns["tokens"]], np.int64)
        file = _Pieces()
        with pq.ParquetWriter(file, _SCHEMA, **_ENCODING) as writer:
            _, firsts = np.unique((np.cumsum(lengths) - lengths) // _ROW_GROUP_TOKENS, return_index=True)
            for first, end in itertools.pairwise([*firsts.tolist(), len(lengths)]):
                rows = slice(first, end)
                values = np.concatenate(self._columns["tokens"][rows])
                writer.write_table(self._row_group(rows, values, lengths[rows]))
        return file.pieces, {
            "source": self.unit.source,
            "path": self.unit.path,
            "start": self.unit.start,
            "stop": self.unit.stop,
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "text_bytes": self._text_bytes,
            "bad": dict(sorted(self._reasons.items())),
            "bad_samples": self._samples,
            "repaired": self._repaired,
            "documents_sha256": _digest(b"".join(self._columns["hash"]), lengths),
            "sha256": file.digest.hexdigest(),
        }

    def _row_group(self, rows: slice, values: np.ndarray, lengths: np.ndarray) -> pa.Table:
        """Returns some documents as a table of their own: arrays of a whole unit would not stay in the CPU's caches."""
        count = len(lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        document_offsets = np.asarray(self._columns["offset"][rows], np.uint64)
        flat = _array(pa.uint32(), values, len(values))
        columns = [
            _strings([self.unit.source] * count),
            _strings(self._columns["file"][rows]),
            _array(pa.uint64(), document_offsets, count),
            _array(pa.binary(16), b"".join(self._columns["hash"][rows]), count),
            pa.ListArray.from_arrays(_array(pa.int32(), offsets, count + 1), flat, type=_TOKENS),
        ]
        return pa.Table.from_arrays(columns, schema=_SCHEMA)


class _Pieces(io.RawIOBase):
    """A file in memory as it was written: put together, each piece would be copied once more, to fresh memory."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.pieces.append(bytes(piece))
        self.digest.update(piece)
        return len(piece)


def _digest(hashes: bytes, lengths: np.ndarray) -> str:
    """Returns what identifies the tokens of documents under one tokenizer, whatever file they are in.

    Tokens follow from the text, and so from its hash: to hash them too would be 3 ns a token.
    """
    digest = hashlib.sha256(lengths.data)
    digest.update(hashes)
    return digest.hexdigest()


def _array(kind: pa.DataType, values: np.ndarray | bytes, count: int) -> pa.Array:
    """Returns an array over a buffer; `pa.array` would import pandas first, which takes seconds."""
    return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(values)])


def _strings(texts: list[str]) -> pa.Array:
    utf8 = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, utf8)]).astype(np.int32)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(utf8)))


def _exactly(raw: bytes) -> dict[str, str]:
    """Returns bytes as JSON can carry them: as the text they are, or in base64."""
    try:
        return {"line": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}
