"""Files, local or gs://, with the two writes that everything else relies on: durable, and create-if-absent.

Paths are strings. A local file is written under a temporary name (it begins with a dot and is never listed),
synced, then given its name; an object on gs:// appears under its name only when its upload is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import glob as local_glob
import io
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_GS = "gs://"
READS_AT_ONCE = 64  # requests in flight


class StorageError(ValueError):
    """A file cannot be read or written; one line: the path, the reason, the remedy where there is one."""


class StorageUnavailable(StorageError):
    """The storage did not answer, or not in time; trying again may help."""


class StorageDenied(StorageError):
    """The storage may not be used so, as by somebody who may only read."""


class FileInfo(NamedTuple):
    """What an inventory needs to know of a file without reading it."""

    size: int
    fingerprint: str  # changes when the content does: time of change locally, checksum and generation on gs://


def is_remote(path: str) -> bool:
    """Returns whether `path` lies on gs://."""
    return path.startswith(_GS)


def join(path: str, *parts: str) -> str:
    """Returns the path of `parts` below `path`."""
    return "/".join([path.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Returns whether a file or folder has this name now."""
    with _explained(path, "be looked up"):
        return _gcs().exists(path) if is_remote(path) else os.path.exists(path)  # noqa: PTH110


def read_bytes(path: str) -> bytes:
    """Returns the whole content."""
    with _explained(path, "be read"):
        return _gcs().cat_file(path) if is_remote(path) else Path(path).read_bytes()


def read_if_present(path: str) -> bytes | None:
    """Returns the whole content, or None when there is no such file."""
    with _explained(path, "be read"):
        try:
            return _gcs().cat_file(path) if is_remote(path) else Path(path).read_bytes()
        except FileNotFoundError:
            return None


def read_all(paths: Iterable[str]) -> Iterator[bytes | None]:
    """Yields the whole content of small files in order, None for one that is not there; many requests at a time."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        yield from pool.map(read_if_present, paths)


def receipts(folder: str, names: Iterable[str]) -> dict[str, Any]:
    """Returns the receipts, <name>.json, that a folder has, by name; one listing, then many requests at a time."""
    present = set(list_files(folder))
    done = [name for name in names if f"{name}.json" in present]
    found = zip(done, read_all(join(folder, f"{name}.json") for name in done), strict=True)
    return {name: json.loads(content) for name, content in found if content is not None}


def read_range(path: str, start: int, stop: int) -> bytes:
    """Returns the bytes [start, stop) of a file."""
    with _explained(path, "be read"):
        if is_remote(path):
            return _gcs().cat_file(path, start=start, end=stop)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


@contextlib.contextmanager
def open_read(path: str) -> Generator[BinaryIO]:
    """Opens a file for reading and seeking; failures while it is read are explained too."""
    with _explained(path, "be read"):
        raw: Any = _gcs().open(path, "rb") if is_remote(path) else open(path, "rb", buffering=0)  # noqa: SIM115
        with io.BufferedReader(raw, 2**20) as file:
            yield file


def write_durable(path: str, *pieces: bytes) -> None:
    """Writes or replaces a file of some pieces; when this returns, they survive a crash of the machine."""
    with _explained(path, f"be written ({sum(map(len, pieces)):,} bytes)"):
        if is_remote(path):
            _gcs().pipe_file(path, b"".join(pieces))
            return
        with _synced_temporary(Path(path), *pieces) as temporary:
            temporary.replace(path)
        _sync_folder(Path(path).parent)


def create_if_absent(path: str, data: bytes) -> bool:
    """Creates a file with its content at once, durably; returns False when the name is taken.

    On gs:// the client repeats a request whose answer was lost, and may then return False for a file that
    this call created: whoever must know compares the content.
    """
    with _explained(path, f"be written ({len(data):,} bytes)"):
        try:
            if is_remote(path):
                _gcs().pipe_file(path, data, mode="create")
                return True
            if Path(path).exists():
                return False
            with _synced_temporary(Path(path), data) as temporary:
                os.link(temporary, path)
            _sync_folder(Path(path).parent)
        except FileExistsError:
            return False
    return True


def list_files(folder: str) -> list[str]:
    """Returns the sorted names of the files directly in `folder`; none when it does not exist."""
    with _explained(folder, "be listed"):
        try:
            if is_remote(folder):
                entries = _gcs().ls(folder.rstrip("/") + "/", detail=True)
                names = [e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file"]
            else:
                names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
        except FileNotFoundError:
            return []
    return sorted(name for name in names if name and not name.startswith("."))


def list_folders(folder: str) -> list[str]:
    """Returns the sorted names of the folders directly in `folder`; none when it does not exist."""
    with _explained(folder, "be listed"):
        try:
            if is_remote(folder):
                entries = _gcs().ls(folder.rstrip("/") + "/", detail=True)
                names = [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"]
            else:
                names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
        except FileNotFoundError:
            return []
    return sorted(names)


def folder_bytes(folder: str) -> int:
    """Returns how many bytes the files in a folder and its folders have together."""
    with _explained(folder, "be measured"):
        if is_remote(folder):
            return _gcs().du(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def remove_folder(folder: str) -> None:
    """Removes a folder and all that is in it; nothing happens when there is none."""
    with _explained(folder, "be removed"), contextlib.suppress(FileNotFoundError):
        if is_remote(folder):
            _gcs().rm(folder, recursive=True)
        else:
            shutil.rmtree(folder)


def remove_files(paths: Iterable[str]) -> None:
    """Removes files; one that is gone already is no error."""
    for path in paths:
        with _explained(path, "be removed"), contextlib.suppress(FileNotFoundError):
            if is_remote(path):
                _gcs().rm_file(path)
            else:
                Path(path).unlink()


def for_pyarrow(folder: str) -> dict[str, Any]:
    """Returns what Ray Train's RunConfig needs to keep its own files in `folder`: our client on gs://."""
    if not is_remote(folder):
        return {"storage_path": folder}
    import pyarrow.fs

    client = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_gcs()))
    return {"storage_path": folder.removeprefix(_GS), "storage_filesystem": client}


def glob(pattern: str) -> dict[str, FileInfo]:
    """Returns the files that match, by their sorted paths; `**` crosses folders, but no links to folders.

    On gs:// that is one listing, however many files there are.
    """
    if is_remote(pattern):
        try:
            with _explained(pattern, "be listed"):
                found = {_GS + name: e for name, e in _gcs().glob(pattern, detail=True).items() if e["type"] == "file"}
        except ValueError as error:  # of fsspec's translation of patterns
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{pattern}: cannot be listed: {_reason(error)}") from error
        return {path: _remote_info(entry) for path, entry in sorted(found.items())}
    root = "/" if pattern.startswith("/") else ""
    return {path: _local_info(path) for path in sorted(set(_matching(root, pattern.removeprefix("/").split("/"))))}


def look_up(paths: Iterable[str]) -> Iterator[FileInfo]:
    """Yields what `glob` says of files, as they are now; many requests at a time."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        yield from pool.map(_info, paths)


def _info(path: str) -> FileInfo:
    if not is_remote(path):
        return _local_info(path)
    with _explained(path, "be looked up"):
        return _remote_info(_gcs().info(path))


def _remote_info(entry: dict[str, Any]) -> FileInfo:
    return FileInfo(int(entry["size"]), f"{entry.get('crc32c')}/{entry.get('generation')}")


def _local_info(path: str) -> FileInfo:
    with _explained(path, "be looked up"):
        status = os.stat(path)  # noqa: PTH116
        return FileInfo(status.st_size, str(status.st_mtime_ns))


def _matching(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Yields the local files below `folder` ("" or ending in a slash) that match, part by part.

    Unlike the standard library's glob it does not take a folder that cannot be read for an empty one.
    """
    part, rest = parts[0], parts[1:]
    if part == "**" and rest:
        yield from _matching(folder, rest)
    for name, kind in _entries(folder, part):
        if kind == "file" and not rest:
            yield f"{folder}{name}"
        elif part == "**" and kind == "folder":
            yield from _matching(f"{folder}{name}/", parts)
        elif part != "**" and kind != "file" and rest:
            yield from _matching(f"{folder}{name}/", rest)


def _entries(folder: str, part: str) -> Iterator[tuple[str, str]]:
    """Yields name and kind (file, folder, link to a folder) of what matches `part` in a local folder."""
    if local_glob.has_magic(part):
        with _explained(folder, "be listed"), os.scandir(folder or ".") as entries:
            for entry in entries:
                if fnmatch.fnmatchcase(entry.name, part) and not entry.name.startswith("."):
                    folder_kind = "link" if entry.is_symlink() else "folder"
                    yield entry.name, folder_kind if entry.is_dir() else "file"
        return
    with _explained(f"{folder}{part}", "be looked up"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        is_folder = stat.S_ISDIR(os.stat(f"{folder}{part}").st_mode)  # noqa: PTH116
        yield part, "folder" if is_folder else "file"


@functools.cache
def _gcs() -> Any:
    return _client()


def _client(**options: Any) -> Any:
    """Returns a client; without cached listings, since other processes create files all the time."""
    import fsspec

    logging.getLogger("gcsfs").addFilter(_without_traceback)
    return fsspec.filesystem("gs", use_listings_cache=False, **options)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves the line of what failed; the stacks, which gcsfs logs besides, bury the line that `_explained` raises."""
    record.exc_info = None
    return True


@contextlib.contextmanager
def _synced_temporary(path: Path, *pieces: bytes) -> Generator[Path]:
    """Gives a complete, synced file beside `path`, which is gone afterwards unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: str, verb: str) -> Generator[None]:
    """Turns every failure of the file system or the network into one StorageError line."""
    try:
        yield
    except (OSError, *_remote_failures(path)) as error:
        raise explanation(error, path, verb) from error


def explanation(error: BaseException, path: str, verb: str) -> StorageError:
    """Returns what a failure to `verb` a path says, in one line, by its kind."""
    if _is_denial(error):
        kind: type[StorageError] = StorageDenied
    else:
        may_pass = isinstance(error, _remote_failures(path)) and _may_pass(error)
        kind = StorageUnavailable if may_pass else StorageError
    return kind(f"{path}: cannot {verb}: {_reason(error)}")


def _remote_failures(path: str) -> tuple[type[Exception], ...]:
    if not is_remote(path):
        return ()
    import aiohttp
    import gcsfs.retry
    import google.auth.exceptions

    return gcsfs.retry.HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError


def _is_denial(error: BaseException) -> bool:
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return True
    return type(error) is OSError and str(error).startswith("Forbidden: ")  # how gcsfs says status 403


def _may_pass(error: BaseException) -> bool:
    """Returns whether a failure of the network or the service is one of those that pass by themselves."""
    if (retryable := getattr(error, "retryable", None)) is not None:  # of google.auth
        return retryable
    code = str(getattr(error, "code", None))  # of HTTP, where it came to an answer
    return not code.isdigit() or int(code) in (408, 429) or int(code) >= 500


def _reason(error: BaseException) -> str:
    match getattr(error, "errno", None):
        case errno.ENOSPC:
            return "the disk is full; free some space or choose another directory"
        case errno.EDQUOT:
            return "the disk quota is used up; free some space or choose another directory"
        case errno.EACCES | errno.EPERM:
            return "permission denied; change its permissions or run as its owner"
        case errno.ENOENT:
            return "no such file or folder"
        case errno.ENOTDIR:
            return "not a folder, or in none"
        case errno.EROFS:
            return "the file system is read-only; choose another directory"
    if isinstance(error, FileNotFoundError):
        return "no such file, folder or bucket"
    return " ".join(str(error).split()) or type(error).__name__
