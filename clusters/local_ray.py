"""One machine's own Ray: what must be set before Ray is imported, and what `ray.init` is told.

And the folder of its logs. The callers (driver, tests) do the starting; Ray is not imported here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")
LOGS_STAY_S = 7 * 24 * 3600.0


class LocalRayError(ValueError):
    """This machine cannot start the Ray that was asked for; the message says what is missing."""


def environment() -> dict[str, str]:
    """Returns the environment that Ray reads when it is imported; children inherit it.

    Token authentication is switched on explicitly with a token of this process's own: left alone, Ray
    2.60 turns it on for `ray.init`, writes ~/.ray/auth_token, and later commands disagree about it.
    """
    return {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_preload_python_modules": "openmoe.clusters.rare_garbage",
        # Otherwise as many as there are CPUs: workers waited until helpers of Ray Train had imported theirs.
        "RAY_worker_maximum_startup_concurrency": "16",
    }


@contextlib.contextmanager
def without_api_server() -> Generator[None]:
    """Lets a Ray that is started inside the block, without a dashboard, know that it has no API server.

    Ray Train's PlacementGroupCleaner else looks for one for 40 s, and a group that dies meanwhile waits 12 s for that.
    An address of no known kind fails at once, and ends the search. It does not stay: nobody else is to read it.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = "none://none"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({name: before} if before is not None else {})


def init_arguments(*, num_cpus: int, object_store_bytes: int, dashboard_port: int | None = None) -> dict[str, Any]:
    """Returns the keyword arguments of `ray.init` for a Ray on this machine alone.

    Args:
      num_cpus: CPU slots to offer; two workers need two, however few cores there are.
      object_store_bytes: size of the object store. Receipts and metrics pass through it, never token data.
      dashboard_port: serves Ray's dashboard on this loopback port; None starts none.

    Raises:
      LocalRayError: too little shared memory, the dashboard's port is taken, or somebody else has the folder of logs.
    """
    check_shared_memory(object_store_bytes)
    make_private(Path(log_dir()).parent)
    if dashboard_port is not None:
        check_port_free(dashboard_port)
    arguments: dict[str, Any] = {
        "num_cpus": max(num_cpus, os.cpu_count() or 1),
        "object_store_memory": object_store_bytes,
        "include_dashboard": dashboard_port is not None,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "_temp_dir": log_dir(),
    }
    if dashboard_port is not None:
        arguments |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    return arguments


def log_dir() -> str:
    """Returns the folder of Ray's logs and sockets; short, since a socket's path has at most 103 bytes on macOS.

    Ray opens it to everybody on the machine, and its sockets ask for no token: the folder above keeps others out.
    """
    return f"/tmp/openmoe-ray-{os.getuid()}/ray"


def make_private(folder: Path) -> None:
    """Makes a folder that its owner alone may enter; raises LocalRayError if somebody else has made it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise LocalRayError(
            f"{folder}: another user of this machine has made it; Ray's files go there, have it removed"
        )
    folder.chmod(0o700)  # earlier versions left it to Ray


def remove_old_sessions(folder: Path, now_s: float) -> list[str]:
    """Removes what Rays of at least a week ago left in their folder of logs, which Ray never does; returns their names.

    A living Ray writes into its logs every 10 s. One that slept as long with its machine is known by the process that
    its session is named after. The newest stays: Ray does not replace a link to a session that is gone.
    """
    latest, removed = (folder / "session_latest").resolve(), []
    for session in sorted(folder.glob("session_*_*_*_*")):
        pid = session.name.rpartition("_")[2]
        if session.is_symlink() or session == latest or not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(OSError):  # another process removes it at the moment
            newest_s = max(path.stat().st_mtime for path in (session, *session.glob("logs/*")))
            if newest_s <= now_s - LOGS_STAY_S:
                shutil.rmtree(session, ignore_errors=True)
                removed.append(session.name)
    return removed


def check_shared_memory(object_store_bytes: int) -> None:
    """Raises LocalRayError when the object store would not fit into shared memory (Linux only)."""
    if not SHARED_MEMORY.is_dir():
        return
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    if free_bytes < object_store_bytes:
        raise LocalRayError(
            f"cluster.object_store_bytes: {SHARED_MEMORY} has {free_bytes:,} bytes free, Ray's object store "
            f"needs {object_store_bytes:,}; free some, mount a larger {SHARED_MEMORY}, or set a smaller "
            "cluster.object_store_bytes (at least 80,000,000)"
        )


def check_port_free(port: int) -> None:
    """Raises LocalRayError when `port` of the loopback address is in use."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LocalRayError(
                f"cluster.dashboard_port: 127.0.0.1:{port} cannot be used ({error.strerror}); "
                "choose another port, or leave it out to start no dashboard"
            ) from error
