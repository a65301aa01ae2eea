"""Reads of a run directory what `goodput.fold` charges, live or after its cluster is gone."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from typing import Any

from openmoe.pipelines import storage
from openmoe.platform.run import attempt_log, journal, lineage
from openmoe.platform.run.goodput import Records, Steps
from openmoe.platform.run.run_dir import RunDir, RunDirError


def read(run: RunDir) -> Records:
    """Returns what a run directory says.

    Raises:
      RunDirError: no run is there.
    """
    run.must_exist()
    claims = run.claims()
    ends = lineage.ends(claims, run.starts())
    steps: dict[int, Steps] = {}
    for n, _, record in journal.read(run.at("metrics")):
        steps[n] = _with(steps.get(n), record, counts=record["step"] <= ends.get(n, math.inf))
    events: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for n, process, record in journal.read(run.at("journal")):
        if process in (0, journal.DRIVER):
            events[n].append(record)
    for of_incarnation in events.values():
        of_incarnation.sort(key=lambda event: event["time_s"])
    return Records(claims=claims, events=events, steps=steps, drivers=attempt_log.DriversReader(run).read())


def _with(steps: Steps | None, record: dict[str, Any], *, counts: bool) -> Steps:
    end_s = record["time_s"]
    if steps is None:
        begin_s = end_s - record["step_s"]
        steps = Steps(begin_s, first_s=end_s, kept_s=begin_s, end_s=end_s, wait_s=0.0, last_step=0)
    steps = steps._replace(end_s=end_s, last_step=record["step"])
    if not counts:
        return steps
    wait_s = min(record.get("data_wait_s", 0.0), record["step_s"])
    return steps._replace(kept_s=end_s, wait_s=steps.wait_s + wait_s)


def capacity(path: str, begin_s: float) -> list[tuple[float, int]]:
    """Reads a capacity trace: lines "time,slices", the time in Unix seconds or ISO 8601, oldest first.

    Raises:
      RunDirError: a line cannot be read, or nothing is said about `begin_s`.
    """
    found: list[tuple[float, int]] = []
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RunDirError(f"{path}: no text in UTF-8; write lines of time,slices as 1764115200,2") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(("#", "time")):
            continue
        time_text, _, slices_text = line.partition(",")
        try:
            entry = _time(time_text.strip()), int(slices_text)
        except ValueError as error:
            raise RunDirError(f"{path}:{number}: {line!r}: {error}; write time,slices as 1764115200,2") from None
        if found and entry[0] < found[-1][0]:
            raise RunDirError(f"{path}:{number}: {line!r}: earlier than the line before; sort the lines by time")
        found.append(entry)
    if not found or found[0][0] > begin_s:
        began = datetime.datetime.fromtimestamp(begin_s, datetime.UTC).isoformat(timespec="seconds")
        raise RunDirError(f"{path}: says nothing about {began}, when the run began; add a line for that time")
    return found


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
