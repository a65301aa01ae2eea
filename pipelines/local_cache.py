"""Shards of gs://, and those that could not be stored, on this host: a folder of bounded size for all its processes.

<folder>/<sha256>-<name>      a whole shard; its time of change is that of its last use
<folder>/.lock-<digit>        held while a shard whose digest begins so is downloaded

Whoever uses a shard holds a shared lock on its file. What nobody holds is removed when there is too much, the least
recently used first. A lock ends with its process, so kill -9 leaves nothing but a temporary file, which is removed
when it is old.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO

from openmoe.pipelines import storage
from openmoe.pipelines.storage import StorageError

DEFAULT_BYTES = 16 * 2**30
STALE_S = 3600.0  # a download takes less
TRIES = 3  # a disk that damages what was just written will do it again


def default_folder() -> str:
    """Returns the folder of this host that all processes of this user share; others have theirs."""
    return str(Path(tempfile.gettempdir()) / f"openmoe-shards-{os.getuid()}")


def hold(path: str, folder: str, *, sha256: str, max_bytes: int, render: Callable[[], bytes] | None = None) -> BinaryIO:
    """Returns an open local file with the content of `path`, proven by its digest; it stays until it is closed.

    Args:
      path: a local file, which is checked where it is, or an object of gs://.
      folder: local, for objects.
      sha256: digest of the content.
      max_bytes: size of `folder` above which what nobody holds is removed; a shard more while one is written.
      render: returns the content of what is stored nowhere else; None: `path` is read.

    Raises:
      StorageError: the content is another, or cannot be read or written.
    """
    if render is None and not storage.is_remote(path):
        _check(path, storage.read_bytes(path), sha256)
        return Path(path).open("rb")
    local = Path(folder) / f"{sha256}-{path.rpartition('/')[2]}"
    num_damaged = 0
    while num_damaged < TRIES:
        with _one_download(Path(folder), sha256):
            if not local.exists():
                content = render() if render else storage.read_bytes(path)
                _check(path, content, sha256)
                _write(local, content)
            held = _held(local)
        if held is None:
            continue  # removed by another process in between
        if hashlib.sha256(held.read()).hexdigest() == sha256:
            os.utime(local)
            _trim(Path(folder), max_bytes)
            return held
        held.close()
        local.unlink(missing_ok=True)
        num_damaged += 1
    raise StorageError(f"{local}: damaged as soon as it is written; check the disk, or choose another folder")


def _write(local: Path, content: bytes) -> None:
    """Writes a shard; on a disk that is full before `max_bytes` are reached, what nobody holds makes room for it."""
    try:
        storage.write_durable(str(local), content)
    except StorageError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ENOSPC:
            raise
        _trim(local.parent, 0)
        storage.write_durable(str(local), content)


def _check(path: str, content: bytes, sha256: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise StorageError(
            f"{path}: damaged or replaced: sha256 is {digest[:16]}, recorded was {sha256[:16]}; "
            "delete its folder and build again"
        )


@contextlib.contextmanager
def _one_download(folder: Path, sha256: str) -> Generator[None]:
    """Lets one process at a time download a shard: the others find it afterwards."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / f".lock-{sha256[0]}").open("wb")
    except OSError as error:
        raise StorageError(f"{folder}: cannot keep shards: {error.strerror}; make it writable") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _held(local: Path) -> BinaryIO | None:
    """Returns the open file under a shared lock; None when it is gone."""
    try:
        file = local.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        if local.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
    file.close()  # removed before it was locked
    return None


def _trim(folder: Path, max_bytes: int) -> None:
    """Removes what nobody holds, the least recently used first, until the rest fits; and old temporary files."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process trims too
            status = path.stat()
            if path.suffix == ".tmp" and time.time() - status.st_mtime > STALE_S:
                path.unlink()
            elif not path.name.startswith("."):
                found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            return
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            total -= size
