"""Documents of RedPajama, The Stack and plain text files, read in units that workers share out.

Files are read as bytes and split on newlines only; every line is parsed by itself, so that one bad line costs
one line. `meta` is never looked at: copies carry it as an object, as JSON text, or as Python's repr.
No document is held that is longer than its source allows, not even to find out where it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from openmoe.pipelines import documents, storage
from openmoe.pipelines.config import MAX_DOCUMENT_BYTES, DataError, SourceConfig
from openmoe.pipelines.documents import BadLine, Document
from openmoe.pipelines.storage import FileInfo

_SUFFIX = {"redpajama": ".jsonl", "chat": ".jsonl", "text": ".txt", "the_stack": ".parquet"}
_CODECS = {"": None, ".zst": "zstd", ".gz": "gzip"}
_COLUMN = "content"
# What pyarrow raises over a damaged file, found by trying: not only its own errors.
_DAMAGE = (OSError, ValueError, LookupError, pa.ArrowException)
_SKIPPED_AT_ONCE = 2**20
# Text of a compressed file that is held, and becomes a part of the token cache of its own.
WINDOW_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work: bytes [start, stop) of a plain file, row groups of Parquet, a whole compressed file, texts.

    A unit of lines owns those that start in its range. A unit of texts is `files`, the first of which is its path.
    """

    source: str
    format: Literal["redpajama", "the_stack", "text", "chat"]
    path: str
    fingerprint: str  # of the file: size, and time of change or checksum
    start: int
    stop: int
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    files: Sequence[Sequence[str]] = ()  # of format text: path and fingerprint of each
    window_bytes: int = WINDOW_BYTES  # of compressed lines

    def identity(self) -> dict[str, Any]:
        """Returns what tells this unit from others; without what is as it was when there was no choice."""
        fields = asdict(self)
        if self.max_document_bytes == MAX_DOCUMENT_BYTES:
            del fields["max_document_bytes"]
        if not self.files:
            del fields["files"]
        if self.window_bytes == WINDOW_BYTES:
            del fields["window_bytes"]
        return fields

    def key(self, *parts: str) -> str:
        """Returns the name of what is made of this unit with `parts` (tokenizer, versions)."""
        text = json.dumps([self.identity(), parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def __str__(self) -> str:
        if self.files:
            return f"{len(self.files)} files from {self.path} on"
        return f"{self.path} [{self.start}, {self.stop})"


def inventory(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """Returns the units of all files of a source, in the order of their paths."""
    files = find(source)
    if source.format == "text":
        return list(_grouped(source, files, unit_bytes))
    if source.format != "the_stack":
        return [unit for path, info in files.items() for unit in _cut(source, path, info, unit_bytes)]
    with ThreadPoolExecutor(storage.READS_AT_ONCE) as pool:  # the end of each file says what row groups it has
        cut = pool.map(lambda path: list(_cut_row_groups(source, path, files[path], unit_bytes)), files)
        return [unit for units in cut for unit in units]


def find(source: SourceConfig) -> dict[str, FileInfo]:
    """Returns a source's files by their sorted paths, one listing a pattern; none when it is missing and may be.

    Raises:
      DataError: a pattern matches nothing, unless none does and `missing` is `renormalize`.
    """
    found = {pattern: storage.glob(pattern) for pattern in source.paths}
    if source.missing == "renormalize" and not any(found.values()):
        return {}
    for pattern, files in found.items():
        if not files:
            raise DataError(f"sources.{source.name}.paths: {_why_nothing(source, pattern)}")
        for path in files:
            if not _is_unicode(path):
                raise DataError(f"sources.{source.name}.paths: {path!a}: its name is not UTF-8; rename it")
    return dict(sorted((path, info) for files in found.values() for path, info in files.items()))


def _why_nothing(source: SourceConfig, pattern: str) -> str:
    folder = pattern.rstrip("/")
    if storage.exists(folder):
        return f"{pattern} is a folder; name its files, such as {folder}/*{_SUFFIX[source.format]}"
    return f"{pattern} matches no file; correct it or leave the source out"


def _is_unicode(path: str) -> bool:
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False


def check_unchanged(unit: Unit) -> None:
    """Raises DataError when a file of the unit is another by now than its fingerprint says."""
    files = unit.files or ((unit.path, unit.fingerprint),)
    for (path, before), info in zip(files, storage.look_up(path for path, _ in files), strict=True):
        if _fingerprint(info) != before:
            raise DataError(f"{path}: changed while it was read; build again when nothing writes to it any more")


def read(unit: Unit) -> Iterator[Document | BadLine]:
    """Yields every document of a unit and every line, row or file that is none, in order."""
    match unit.format:
        case "redpajama" | "chat":
            records = ((unit.path, offset, line) for offset, line in _lines(unit))
        case "the_stack":
            records = ((unit.path, row, content) for row, content in _rows(unit))
        case "text":
            records = ((path, 0, content) for path, content in _texts(unit))
    for path, offset, raw in records:
        if raw is None:
            yield BadLine(path, offset, "no_text", b"")
        elif len(raw) > unit.max_document_bytes:
            yield BadLine(path, offset, "too_long", raw)
        elif unit.format == "redpajama":
            yield documents.parse_line(path, offset, raw)
        elif unit.format == "chat":
            yield from documents.parse_chat(path, offset, raw)
        else:
            yield documents.parse_text(path, offset, raw)


def is_compressed(unit: Unit) -> bool:
    """Returns whether a unit is a whole compressed file of lines, of unknown length."""
    return unit.format in ("redpajama", "chat") and _codec(unit.format, unit.path) is not None


def windows(unit: Unit) -> Iterator[Iterator[Document | BadLine]]:
    """Yields what `read` does in parts that can be held: of a compressed file the lines that begin in each window.

    Each part must be read up before the next one is asked for.
    """
    if is_compressed(unit):
        yield from (records for _, records in itertools.groupby(read(unit), lambda r: r.offset // unit.window_bytes))
    else:
        yield read(unit)


def _unit(source: SourceConfig, path: str, info: FileInfo, start: int, stop: int, **files: Any) -> Unit:
    return Unit(
        source=source.name,
        format=source.format,
        path=path,
        fingerprint=_fingerprint(info),
        start=start,
        stop=stop,
        max_document_bytes=source.max_document_bytes,
        **files,
    )


def _fingerprint(info: FileInfo) -> str:
    return f"{info.size}:{info.fingerprint}"


def _grouped(source: SourceConfig, files: dict[str, FileInfo], unit_bytes: int) -> Iterator[Unit]:
    """Yields units of whole files, in order; each but the last holds at least `unit_bytes`."""
    held: list[tuple[str, FileInfo]] = []
    held_bytes = 0
    for number, (path, info) in enumerate(files.items(), 1):
        _codec(source.format, path)
        held.append((path, info))
        held_bytes += info.size
        if held_bytes >= unit_bytes or number == len(files):
            named = tuple((each, _fingerprint(of_each)) for each, of_each in held)
            first, of_first = held[0]
            yield _unit(source, first, of_first, 0, len(held), files=named)
            held, held_bytes = [], 0


def _cut(source: SourceConfig, path: str, info: FileInfo, unit_bytes: int) -> Iterator[Unit]:
    if _codec(source.format, path):
        yield _unit(source, path, info, 0, info.size)
        return
    for start in range(0, info.size, unit_bytes):
        yield _unit(source, path, info, start, min(start + unit_bytes, info.size))


def _cut_row_groups(source: SourceConfig, path: str, info: FileInfo, unit_bytes: int) -> Iterator[Unit]:
    with _parquet(path) as file:
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    start, held = 0, 0
    for stop, group_bytes in enumerate(groups, 1):
        held += group_bytes
        if held >= unit_bytes or stop == len(groups):
            yield _unit(source, path, info, start, stop)
            start, held = stop, 0


def _codec(kind: str, path: str) -> str | None:
    suffixes = {f"{_SUFFIX[kind]}{ending}": codec for ending, codec in _CODECS.items()}
    for suffix, codec in suffixes.items():
        if path.endswith(suffix):
            return codec
    raise DataError(f"{path}: format {kind} reads {', '.join(suffixes)}; narrow the source's paths")


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line without its end) of the lines that start in the unit's range; see `_bounded`."""
    codec, limit = _codec(unit.format, unit.path), unit.max_document_bytes
    with storage.open_read(unit.path) as file:
        if codec:
            yield from _decompressed_lines(unit.path, file, codec, limit)
            return
        offset = unit.start
        if offset:
            file.seek(offset - 1)
            offset += _skip_line(file, unit.stop - offset + 1) - 1
        yield from _bounded(file, offset, unit.stop, limit)


def _decompressed_lines(path: str, file: BinaryIO, codec: str, limit: int) -> Iterator[tuple[int, bytes]]:
    text = _Counted(pa.CompressedInputStream(file, codec))
    with _undamaged(path, codec, text):
        yield from _bounded(io.BufferedReader(text, 2**20), 0, 2**63, limit)


def _texts(unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Yields (path, content) of whole files; of one that is too long the beginning."""
    for path, _ in unit.files:
        codec = _codec(unit.format, path)
        with storage.open_read(path) as file:
            if not codec:
                yield path, file.read(unit.max_document_bytes + 1)
                continue
            text = _Counted(pa.CompressedInputStream(file, codec))
            with _undamaged(path, codec, text):
                content = io.BufferedReader(text, 2**20).read(unit.max_document_bytes + 1)
            yield path, content


def _bounded(file: BinaryIO, offset: int, stop: int, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line without its end) of the lines that start before `stop`.

    Args:
      file: at the first line.
      offset: of the first line.
      stop: where a line belongs to the next unit.
      limit: bytes of a line; of a longer one only the beginning is given, and it is longer than the limit.
    """
    while offset < stop and (line := file.readline(limit + 2)):
        start, offset = offset, offset + len(line)
        if len(line) == limit + 2 and not line.endswith(b"\n"):
            offset += _skip_line(file, stop - offset)
            yield start, line
        else:
            yield start, line.rstrip(b"\r\n")


def _skip_line(file: BinaryIO, most: int) -> int:
    """Returns how many bytes were left of a line, all of them read; about `most` if it is longer than that."""
    skipped = 0
    while skipped < most and (piece := file.readline(_SKIPPED_AT_ONCE)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


class _Counted(io.RawIOBase):
    """A stream that knows how much was read of it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self.count += count
        return count


@contextlib.contextmanager
def _undamaged(path: str, codec: str, text: _Counted) -> Generator[None]:
    """Names the file whose compressed stream turns out to be damaged."""
    try:
        yield
    except _DAMAGE as error:
        _only_damage(error)
        where, why = f"{text.count:,} bytes of text", " ".join(str(error).split())[:120]
        wanted = "get it again, or compress it anew"
        raise DataError(f"{path}: {codec} stream unreadable after {where} ({why}); {wanted}") from error


def _only_damage(error: Exception) -> None:
    """Raises failures of the file system or the network, which may pass, again."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


@contextlib.contextmanager
def _parquet(path: str) -> Generator[pq.ParquetFile]:
    """Opens a Parquet file whose column `content` is text."""
    with storage.open_read(path) as raw:
        try:
            file = pq.ParquetFile(raw, pre_buffer=False)  # one column of one row group is one read anyway
            names = file.schema_arrow.names
        except _DAMAGE as error:
            _only_damage(error)
            raise DataError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:120]})") from error
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
                column = file.read_row_group(group, columns=[_COLUMN], use_threads=False).column(0)
                values = column.cast(pa.large_binary()).to_pylist()
            except _DAMAGE as error:
                _only_damage(error)
                raise DataError(f"{unit.path}: row group {group} is damaged; fetch the file again") from error
            for value in values:
                yield row, value
                row += 1
