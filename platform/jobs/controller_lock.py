"""One controller a home: a lock that the kernel drops with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path

from openmoe.platform.jobs.job_events import JobError

_A_LOOK_S = 1.0  # `is_running` holds the lock for a moment; a controller that starts just then waits


class ControllerError(JobError):
    """The controller cannot run; one line with the remedy."""


@contextlib.contextmanager
def only_one(home: Path) -> Generator[None]:
    """Keeps other controllers of this home out as long as the block runs.

    Raises:
      ControllerError: there is one already.
    """
    with (home / "controller.lock").open("a+") as file:
        deadline_s = time.monotonic() + _A_LOOK_S
        while not _taken(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline_s:
                file.seek(0)
                raise ControllerError(
                    f"controller: process {file.read().strip() or 'unknown'} is one already for {home}; it serves "
                    "all clusters and jobs, see `openmoe jobs list`; for another set of jobs set OPENMOE_HOME"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def is_running(home: Path) -> bool:
    """Returns whether a controller serves this home now."""
    path = home / "controller.lock"
    if not path.exists():
        return False
    with path.open() as file:
        return not _taken(file.fileno(), fcntl.LOCK_SH)


def _taken(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
