"""Documents of RedPajama and The Stack files, read in units that workers share out.

Files are read as bytes and split on newlines only; every line is parsed by itself, so that one bad line costs
one line. `meta` is never looked at: copies carry it as an object, as JSON text, or as Python's repr.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError, SourceConfig

_COMPRESSION = {".jsonl": None, ".jsonl.zst": "zstd", ".jsonl.gz": "gzip"}
_COLUMN = "content"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work: bytes [start, stop) of a plain file, row groups of Parquet, a whole compressed file.

    A unit of lines owns those that start in its range.
    """

    source: str
    format: Literal["redpajama", "the_stack"]
    path: str
    fingerprint: str  # of the file: size, and time of change or checksum
    start: int
    stop: int

    def key(self, *parts: str) -> str:
        """Returns the name of what is made of this unit with `parts` (tokenizer, versions)."""
        text = json.dumps([asdict(self), parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class Document(NamedTuple):
    """A document's text, valid Unicode."""

    offset: int  # byte of its line, in the uncompressed file; row of a Parquet file
    text: str
    repaired: bool  # lone surrogates were replaced by U+FFFD


class BadLine(NamedTuple):
    """What was left out, and why."""

    offset: int
    reason: Literal["bad_json", "not_utf8", "no_text", "not_string", "empty"]
    raw: bytes


def inventory(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """Returns the units of all files of a source, in the order of their paths."""
    paths: set[str] = set()
    for pattern in source.paths:
        found = storage.glob(pattern)
        if not found:
            raise DataError(
                f"sources.{source.name}.paths: {pattern} matches no file; correct it or leave the source out"
            )
        paths.update(found)
    return [unit for path in sorted(paths) for unit in _cut(source, path, unit_bytes)]


def read(unit: Unit) -> Iterator[Document | BadLine]:
    """Returns every document of a unit and every line or row that is none, in order."""
    if unit.format == "the_stack":
        return (_parse_text(row, content) for row, content in _rows(unit))
    return (_parse_line(offset, line) for offset, line in _lines(unit))


def _cut(source: SourceConfig, path: str, unit_bytes: int) -> Iterator[Unit]:
    size, changed = storage.info(path)

    def unit(start: int, stop: int) -> Unit:
        return Unit(
            source=source.name,
            format=source.format,
            path=path,
            fingerprint=f"{size}:{changed}",
            start=start,
            stop=stop,
        )

    if source.format == "the_stack":
        with _parquet(path) as file:
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        start, held = 0, 0
        for stop, group_bytes in enumerate(groups, 1):
            held += group_bytes
            if held >= unit_bytes or stop == len(groups):
                yield unit(start, stop)
                start, held = stop, 0
    elif _compression(path):
        yield unit(0, size)
    else:
        for start in range(0, size, unit_bytes):
            yield unit(start, min(start + unit_bytes, size))


def _compression(path: str) -> str | None:
    for suffix, codec in sorted(_COMPRESSION.items(), key=lambda item: -len(item[0])):
        if path.endswith(suffix):
            return codec
    raise DataError(f"{path}: format redpajama reads {', '.join(_COMPRESSION)}; narrow the source's paths")


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line) of the lines that start in the unit's range."""
    codec = _compression(unit.path)
    with storage.open_read(unit.path) as file:
        if codec:
            yield from _decompressed_lines(unit.path, file, codec)
            return
        offset = unit.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < unit.stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _decompressed_lines(path: str, file: BinaryIO, codec: str) -> Iterator[tuple[int, bytes]]:
    offset = 0
    try:
        for line in io.BufferedReader(pa.CompressedInputStream(file, codec), 2**20):
            yield offset, line
            offset += len(line)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {codec} stream damaged after {offset:,} bytes of text; get it again") from error


@contextlib.contextmanager
def _parquet(path: str) -> Generator[pq.ParquetFile]:
    """Opens a Parquet file whose column `content` is text."""
    with storage.open_read(path) as raw:
        try:
            file = pq.ParquetFile(raw)
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:120]})") from error
        names = file.schema_arrow.names
        if _COLUMN not in names:
            raise DataError(f"{path}: the_stack needs column {_COLUMN}, the file has {', '.join(names)}")
        kind = file.schema_arrow.field(_COLUMN).type
        if kind not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            raise DataError(f"{path}: column {_COLUMN} must hold text, it holds {kind}")
        yield file


def _rows(unit: Unit) -> Iterator[tuple[int, bytes | None]]:
    """Yields (row of the file, content) of the unit's row groups."""
    with _parquet(unit.path) as file:
        row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        for group in range(unit.start, unit.stop):
            try:
                column = file.read_row_group(group, columns=[_COLUMN]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{unit.path}: row group {group} is damaged; fetch the file again") from error
            for value in column.cast(pa.large_binary()).to_pylist():
                yield row, value
                row += 1


def _parse_line(offset: int, line: bytes) -> Document | BadLine:
    raw = line.rstrip(b"\r\n")
    if not raw.strip():
        return BadLine(offset, "empty", raw)
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return BadLine(offset, "not_utf8", raw)
    except (ValueError, RecursionError):
        return BadLine(offset, "bad_json", raw)
    if not isinstance(record, dict) or record.get("text") is None:
        return BadLine(offset, "no_text", raw)
    if not isinstance(record["text"], str):
        return BadLine(offset, "not_string", raw)
    return _sanitize(offset, record["text"], raw)


def _parse_text(row: int, raw: bytes | None) -> Document | BadLine:
    if raw is None:
        return BadLine(row, "no_text", b"")
    try:
        return _sanitize(row, raw.decode("utf-8"), raw)
    except UnicodeDecodeError:
        return BadLine(row, "not_utf8", raw)


def _sanitize(offset: int, text: str, raw: bytes) -> Document | BadLine:
    """Returns the document; ASCII-escaped JSON carries lone surrogates, on which tokenizers fail."""
    if not text.strip():
        return BadLine(offset, "empty", raw)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Document(offset, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True)
    return Document(offset, text, False)
