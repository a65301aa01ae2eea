"""Follows a run directory while it grows: every file is read once, and what the pages need of it is kept in columns."""

from __future__ import annotations

import bisect
import json
import math
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openmoe.pipelines import storage
from openmoe.platform.run import lineage
from openmoe.platform.run.attempt_log import DriversReader
from openmoe.platform.run.goodput import Driver
from openmoe.platform.run.journal import JournalReader
from openmoe.platform.run.lineage import Claim
from openmoe.platform.run.run_dir import RunDir

COLUMNS = (
    *("step", "time_s", "step_s", "data_wait_s", "loss", "text_loss"),
    *("drop_fraction", "router_entropy", "grad_norm"),
)
MAX_LOAD_COLUMNS = 400
# Every process journals these alike; once a worker group is enough.
OF_LEADER_ONLY = frozenset({"started", "restored", "save_started", "waits_for_data", "charged", "compiled"})


class StepColumns:
    """The metric records of one incarnation, 8 bytes a number."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in COLUMNS}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record; what it lacks is NaN, and a run that knows no text loss has its loss there.

        The routers' entropy is that of the layer where it is least: it is one router that goes wrong.
        """
        known: dict[str, Any] = {"text_loss": record.get("loss", math.nan), **record}
        known["router_entropy"] = min(record.get("router_entropy", ()), default=math.nan)
        for name, column in self._columns.items():
            column.append(known.get(name, math.nan))

    def at(self, name: str, index: int) -> float:
        """Returns one value of a column; -1 is the newest."""
        return self._columns[name][index]

    def get(self, name: str, part: slice) -> np.ndarray:
        """Returns a copy of a part of a column, float64."""
        return np.frombuffer(self._columns[name][part], np.float64)

    def up_to(self, step: float) -> int:
        """Returns how many records have at most this step."""
        return bisect.bisect_right(self._columns["step"], step)


class LoadHistory:
    """Expert load over the steps in at most `MAX_LOAD_COLUMNS` columns, each the mean of `width` steps."""

    def __init__(self) -> None:
        self.width = 1
        self._sums: dict[int, np.ndarray] = {}
        self._counts: dict[int, int] = {}

    def add(self, step: int, load: Sequence[Sequence[float]]) -> None:
        """Adds one step's shares, [MoE layer][expert]."""
        self._put((step - 1) // self.width, np.asarray(load, np.float64), 1)
        while len(self._sums) > MAX_LOAD_COLUMNS:
            sums, counts = self._sums, self._counts
            self.width, self._sums, self._counts = 2 * self.width, {}, {}
            for column, total in sums.items():
                self._put(column // 2, total, counts[column])

    def _put(self, column: int, total: np.ndarray, count: int) -> None:
        self._sums[column] = self._sums.get(column, 0) + total
        self._counts[column] = self._counts.get(column, 0) + count

    def undo_after(self, step: int) -> None:
        """Forgets the columns that begin after `step`, which will be trained again."""
        for column in [c for c in self._sums if c * self.width >= step]:
            del self._sums[column], self._counts[column]

    def columns(self, since_step: int = 0) -> list[tuple[int, list[list[int]]]]:
        """Returns (column, [layer][expert]) from the column of `since_step` on; 100 is an even share."""
        first = max(since_step - 1, 0) // self.width
        return [(c, _percent_of_even(self._sums[c] / self._counts[c])) for c in sorted(self._sums) if c >= first]


def _percent_of_even(shares: np.ndarray) -> list[list[int]]:
    return np.nan_to_num(shares * shares.shape[1] * 100, posinf=0, neginf=0).round().astype(int).tolist()


class RunFollower:
    """What the files of one run say so far; `advance` reads what has been added since.

    Attributes:
      run: the run directory.
      record: run.json; empty before the first reading.
      tokens_per_step: rows x row length, padding included; None before the first reading.
      claims: oldest first.
      starts: step at which each incarnation starts, by its number.
      ends: the last step of each incarnation that counts, by its number.
      steps: metric records by incarnation, undone ones included.
      load: expert load along the line of truth.
      events: of the journal, in time order, each with its incarnation and process.
      drivers: what the driver of each attempt has marked.
      checkpoint: the newest "accepted" event, or None.
      finished: what finished.json says.
      problem: why reading does not go on, in one line; "" while it does.
      complete: everything that was there at some time has been read.
      version: grows whenever something was read.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.version = 0
        self._reset({})

    def _reset(self, record: dict[str, Any]) -> None:
        self.record = record
        self.tokens_per_step: int | None = None
        self.claims: list[Claim] = []
        self.starts: dict[int, int] = {}
        self.ends: dict[int, float] = {}
        self.steps: dict[int, StepColumns] = {}
        self.load = LoadHistory()
        self.events: list[dict[str, Any]] = []
        self.drivers: list[Driver] = []
        self.checkpoint: dict[str, Any] | None = None
        self.finished: dict[str, Any] | None = None
        self.problem = ""
        self.complete = False
        self._marks = DriversReader(self.run)
        self._journal, self._metrics = JournalReader(self.run.at("journal")), JournalReader(self.run.at("metrics"))
        self._unread: Iterator[tuple[int, int, dict[str, Any]]] | None = None

    def advance(self, budget_s: float = math.inf) -> None:
        """Reads what is new, for about `budget_s` seconds; the rest waits for the next call.

        A damaged file ends in `problem`, never in an error: the other runs are still to be shown.
        """
        try:
            self._read_records()
            self._read_journal()
            self.complete = self._read_metrics(time.monotonic() + budget_s) or self.complete
            problem = ""
        except (ValueError, TypeError, KeyError) as error:  # ours are ValueErrors; the rest is a damaged record
            self._unread = None
            problem = str(error) if isinstance(error, ValueError) else f"{self.run.path}: {error!r} in a record"
        if problem != self.problem:
            self.problem = problem
            self.version += 1

    def _read_records(self) -> None:
        record = self.run.record()
        if record != self.record:
            spec = record["spec"]
            tokens_per_step = spec["train"]["batch_rows"] * spec["data"]["seq_len"]
            self._reset(record)
            self.tokens_per_step = tokens_per_step
            self.version += 1
        for name in storage.list_files(self.run.at("incarnations"))[len(self.claims) :]:
            claim = Claim(**self.run.read_json("incarnations", name))
            accepted = self.run.read_json("accepted", f"{claim.resumes:06d}.json") if claim.resumes else {"step": 0}
            self.starts[claim.incarnation] = accepted["step"]
            self.claims.append(claim)
            self.ends = lineage.ends(self.claims, self.starts)
            self.load.undo_after(accepted["step"])
            self.version += 1
        if (drivers := self._marks.read()) != self.drivers:
            self.drivers = drivers
            self.version += 1
        data = storage.read_if_present(self.run.at("finished.json"))
        finished = json.loads(data) if data else None
        if finished != self.finished:
            self.finished = finished
            self.version += 1

    def _read_journal(self) -> None:
        new = []
        for incarnation, process, record in self._journal.new():
            kind = record["event"]
            if kind == "accepted" and (self.checkpoint is None or record["time_s"] > self.checkpoint["time_s"]):
                self.checkpoint = record
                self.version += 1
            if process and kind in OF_LEADER_ONLY:
                continue
            new.append({"incarnation": incarnation, "process": process, **record})
        if new:
            self.events = sorted([*self.events, *new], key=lambda event: event["time_s"])
            self.version += 1

    def _read_metrics(self, deadline_s: float) -> bool:
        """Returns whether all is read that was there."""
        self._unread = self._unread or self._metrics.new()
        for incarnation, _, record in self._unread:
            self.steps.setdefault(incarnation, StepColumns()).append(record)
            if "expert_load" in record and record["step"] <= self.ends.get(incarnation, math.inf):
                self.load.add(record["step"], record["expert_load"])
            self.version += 1
            if time.monotonic() > deadline_s:
                return False
        self._unread = None
        return True

    def kept(self, incarnation: int) -> int:
        """Returns how many of an incarnation's records lie on the line of truth; the later ones were undone."""
        return self.steps[incarnation].up_to(self.ends[incarnation]) if incarnation in self.steps else 0

    def line(self, *names: str, after_step: int = 0) -> dict[str, np.ndarray]:
        """Returns columns along the line of truth, as `lineage.trace` defines it, and "incarnation"."""
        parts = {n: slice(self.steps[n].up_to(after_step), self.kept(n)) for n in self._trained()}
        return self._gather(names, parts)

    def undone(self, *names: str) -> dict[str, np.ndarray]:
        """Returns columns of the steps that were trained and then given up, oldest incarnation first."""
        return self._gather(names, {n: slice(self.kept(n), None) for n in self._trained()})

    def newest(self) -> tuple[int, slice] | None:
        """Returns the incarnation of the newest step that counts, and which of its records count."""
        return next(((n, slice(0, kept)) for n in reversed(self._trained()) if (kept := self.kept(n))), None)

    def _trained(self) -> list[int]:
        return [claim.incarnation for claim in self.claims if claim.incarnation in self.steps]

    def _gather(self, names: Iterable[str], parts: Mapping[int, slice]) -> dict[str, np.ndarray]:
        found = {name: [self.steps[n].get(name, part) for n, part in parts.items()] for name in names}
        found["incarnation"] = [np.full(len(self.steps[n].get("step", part)), n) for n, part in parts.items()]
        return {name: np.concatenate([np.empty(0), *arrays]) for name, arrays in found.items()}
