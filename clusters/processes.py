"""Processes of this machine that outlive the command that started them, found again and ended without a mistake.

Every process of a host carries `OPENMOE_TWIN_HOST=<cluster>/<host>` in its environment and so do all it starts. Process
ids come round again, above all after a reboot, and what a Ray job starts leaves its process group; the mark does
neither, so the mark says whom to end.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

MARK = "OPENMOE_TWIN_HOST"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that is told from a later one of the same id by the time of its start."""

    pid: int
    started: str
    """On Linux "<boot id>/<clock ticks from that boot to its start>", elsewhere psutil's Unix time in seconds."""

    @property
    def alive(self) -> bool:
        """Whether it still runs; a process that ended and was not waited for does not."""
        try:
            return _look(self.pid) == (self.started, False)
        except psutil.NoSuchProcess:
            return False


class _Look(NamedTuple):
    started: str
    is_zombie: bool


def _look(pid: int) -> _Look:
    """Returns what a process is known by, as in `Process`, and whether it ended and was not waited for.

    psutil would add the boot's Unix time to the ticks, and that moves whenever the clock is set.

    Raises:
      psutil.NoSuchProcess: there is none of this id.
    """
    if not sys.platform.startswith("linux"):
        process = psutil.Process(pid)
        return _Look(repr(process.create_time()), process.status() == psutil.STATUS_ZOMBIE)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    fields = stat.rpartition(")")[2].split()  # from the third on: the second, its name, may hold spaces and brackets
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return _Look(f"{boot_id}/{fields[22 - 3]}", fields[0] == "Z")


def start(command: Sequence[str], *, mark: str, environment: Mapping[str, str], log: Path, folder: Path) -> Process:
    """Starts a command in a session of its own, with the mark in its environment and its output in `log`."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            command,
            env={**environment, MARK: mark, "SPT_NOENV": "1"},  # the latter: Ray's process titles spare the environment
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    return identify(started.pid)


def identify(pid: int) -> Process:
    """Names a living process so that it is recognised later."""
    return Process(pid=pid, started=_look(pid).started)


def children(process: Process, names: Sequence[str]) -> list[Process]:
    """Returns the direct children with one of these names, as the kernel has them."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() in names:
                    found.append(identify(child.pid))
    return found


def marked(wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """Returns the processes whose mark is `wanted`, and whatever they started; never the calling process."""
    below: dict[int, list[psutil.Process]] = {}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            below.setdefault(process.ppid(), []).append(process)
            mark = process.environ().get(MARK)
            if mark and wanted(mark):  # never one without a mark, whatever is asked for
                found[process.pid] = process
    unseen = list(found)
    while unseen:
        for child in below.get(unseen.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                unseen.append(child.pid)
    found.pop(os.getpid(), None)
    return list(found.values())


def kill(wanted: Callable[[str], bool], timeout_s: float = 20) -> int:
    """Kills all processes whose mark is `wanted`, at once (SIGKILL); returns how many there were.

    Raises:
      TimeoutError: some do not die, as when the kernel holds them.
    """
    ended: set[int] = set()
    deadline_s = time.monotonic() + timeout_s
    while found := marked(wanted):  # again, for those that were being started meanwhile
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"processes that do not end: {', '.join(str(process.pid) for process in found)}")
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        ended.update(process.pid for process in found)
        psutil.wait_procs(found, timeout=2)
    return len(ended)
