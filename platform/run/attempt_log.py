"""What a driver does before, between and after its worker groups: marks in <run_dir>/attempts/, for `openmoe goodput`.

attempts/<attempt>-00000-<sequence>.jsonl      segments (journal.py); attempts are numbered over the whole run
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from types import TracebackType

import psutil

from openmoe.pipelines import storage
from openmoe.platform.run import goodput, journal
from openmoe.platform.run.goodput import Driver, Mark
from openmoe.platform.run.run_dir import RunDir

FOLDER = "attempts"
LATELY_S = 120.0


class AttemptLog:
    """The marks of one attempt, from `with` to its end; each is durable at once."""

    def __init__(self, run: RunDir, name: str, began_s: float | None) -> None:
        """Takes the next number of the run.

        Args:
          run: the run directory.
          name: what whoever started this driver calls the attempt.
          began_s: Unix time, if its process began before it could keep a log.
        """
        folder = run.at(FOLDER)
        number = max((int(file[:6]) for file in storage.list_files(folder)), default=0) + 1
        record = {"phase": "start", "time_s": time.time() if began_s is None else began_s, "name": name}
        record |= {"host": socket.gethostname(), "pid": os.getpid()}
        while True:
            self._journal = journal.Journal(folder, incarnation=number, process=0)
            self._journal.append(record)
            try:
                self._journal.flush()
            except journal.JournalError:
                number += 1  # another driver began at the same moment
            else:
                break
        self.name, self._outcome = name, "failed"

    def mark(self, phase: str, incarnation: int = 0) -> None:
        """Says that from now on the attempt is in `phase`, a cause of `goodput.CAUSES`.

        What cannot be written now is written with the next mark: it must not hide what an incarnation ended of.
        """
        with contextlib.suppress(storage.StorageError):
            self._keep({"phase": phase, "incarnation": incarnation})

    def outcome(self, outcome: str) -> None:
        """Says how it will have ended; else it has failed, or stopped on request."""
        self._outcome = outcome

    def __enter__(self) -> AttemptLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self._outcome = "stopped"
        try:
            self._keep({"phase": goodput.OVER, "outcome": self._outcome})
        except (storage.StorageError, journal.JournalError) as failure:
            if error is None:
                raise
            error.add_note(f"and the end of the attempt is not recorded: {failure}")

    def _keep(self, record: dict[str, object]) -> None:
        self._journal.append({"time_s": time.time(), **record})
        self._journal.flush()


class DriversReader:
    """Reads the marks of a run's drivers again and again, while they are made."""

    def __init__(self, run: RunDir) -> None:
        self._reader = journal.JournalReader(run.at(FOLDER))
        self._drivers: dict[int, Driver] = {}

    def read(self) -> list[Driver]:
        """Returns what the drivers have marked so far, oldest first."""
        for number, _, record in self._reader.new():
            driver = self._drivers.get(number) or Driver(record.get("name", ""), ())
            mark = Mark(**{key: record[key] for key in Mark._fields if key in record})
            self._drivers[number] = driver._replace(marks=(*driver.marks, mark))
        return [self._drivers[number] for number in sorted(self._drivers)]


def seems_alive(run: RunDir) -> str:
    """Returns who trains a run already, as far as one can tell: its newest driver, in words; "" if that has ended.

    On this host its process is looked at. One on another host is alive if the run has a record of the last minutes.
    """
    try:
        _, newest = next(itertools.groupby(journal.newest_first(run.at(FOLDER)), lambda entry: entry[0]), (0, ()))
        marks = [record for _, _, record in newest]
        if not marks or marks[0]["phase"] == goodput.OVER or "pid" not in marks[-1]:
            return ""
        host, pid, incarnation = marks[-1]["host"], marks[-1]["pid"], max(mark.get("incarnation", 0) for mark in marks)
        who = f"incarnation {incarnation} of process {pid}" if incarnation else f"process {pid}"
        if host == socket.gethostname():
            return f"{who} on this host" if _lives(pid, marks[-1]["time_s"]) else ""
        silent_s = time.time() - max(marks[0]["time_s"], next(run.newest_steps(), {}).get("time_s", 0.0))
    except journal.JournalError:  # said where the records are needed
        return ""
    return f"{who} on {host} (newest record {max(silent_s, 0):.0f} s ago)" if silent_s < LATELY_S else ""


def _lives(pid: int, began_s: float) -> bool:
    """Returns whether a process is still the one that had this number at that time, Unix time."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.create_time() < began_s + 5.0 and process.status() != psutil.STATUS_ZOMBIE
    return False


def process_began_s() -> float:
    """Returns when this process began, Unix time."""
    return psutil.Process().create_time()
