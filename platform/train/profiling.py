"""Looks into a live run when asked: a trace of some steps, the program, memory, stacks.

    profiles/request.json                  the newest request: its id, and what is wanted of which processes
    profiles/<id>/<process>/...            what a process gave
    profiles/<id>/<process>.json           it is done: what it gave, or why not

A thread of each worker reads the request every few seconds. It works beside the training thread, so a loop that is
stuck still gives its stacks, and a step waits for nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import psutil

from openmoe.pipelines import storage
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.train import stacks
from openmoe.platform.train.train_step import TrainStep

FOLDER = "profiles"
POLL_S = 5.0
STEP_POLL_S = 0.002
STEPS_TIMEOUT_S = 600.0


class Request(NamedTuple):
    """What `openmoe profile` asks for."""

    id: str
    processes: tuple[int, ...]  # none: all
    steps: int = 0  # of a trace
    hlo: bool = False
    memory: bool = False
    stacks: bool = False


def ask(run: RunDir, request: Request) -> None:
    """Leaves a request for the run's workers; it replaces one that nobody has answered."""
    storage.write_durable(run.at(FOLDER, "request.json"), json.dumps(request._asdict()).encode())


def asked(run: RunDir) -> Request | None:
    """Returns the newest request."""
    data = storage.read_if_present(run.at(FOLDER, "request.json"))
    if data is None:
        return None
    record = json.loads(data)
    return Request(**record | {"processes": tuple(record["processes"])})


def answers(run: RunDir, request_id: str) -> dict[int, dict[str, Any]]:
    """Returns the answers that are there, by process."""
    names = storage.list_files(run.at(FOLDER, request_id))
    return {int(name[:5]): run.read_json(FOLDER, request_id, name) for name in names if name.endswith(".json")}


class Responder:
    """Answers the requests of one worker, from `with` to its end."""

    def __init__(self, run: RunDir, train_step: TrainStep) -> None:
        self._run, self._train_step = run, train_step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._respond, name="profiling", daemon=True)

    def __enter__(self) -> Responder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _respond(self) -> None:
        answered = ""
        before = True  # what was asked before this worker came up was meant for another
        while True:
            try:
                request = asked(self._run)
                if request and request.id != answered:
                    answered = request.id
                    if not before and (not request.processes or jax.process_index() in request.processes):
                        self._answer(request)
            except (storage.StorageError, ValueError, TypeError) as error:
                print(f"profiling: {error}", file=sys.stderr)
            before = False
            if self._stop.wait(POLL_S):
                return

    def _answer(self, request: Request) -> None:
        process = f"{jax.process_index():05d}"
        record: dict[str, Any] = {"process": jax.process_index(), "first_step": self._train_step.calls, "error": ""}
        with tempfile.TemporaryDirectory(prefix="openmoe-profile-") as folder:
            try:
                for name, content in self._contents(request, Path(folder)):
                    (Path(folder) / name).write_text(content)
            except Exception as error:  # whatever it was, whoever asked must hear it
                record["error"] = f"{type(error).__name__}: {error}"
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
            for path, name in zip(files, names, strict=True):
                storage.write_durable(self._run.at(FOLDER, request.id, process, name), path.read_bytes())
        record |= {"files": names, "last_step": self._train_step.calls}
        storage.write_durable(self._run.at(FOLDER, request.id, f"{process}.json"), json.dumps(record).encode())

    def _contents(self, request: Request, folder: Path) -> Iterator[tuple[str, str]]:
        """Yields file names and texts; JAX itself writes into `folder`. Stacks first: they may be all."""
        if request.stacks:
            yield "stacks.txt", stacks.of_all_threads()
        if request.memory:
            yield "memory.json", json.dumps(memory(), indent=1)
            jax.profiler.save_device_memory_profile(folder / "memory.prof")
        if request.steps:
            self._trace(request.steps, folder)
        if request.hlo:
            yield "step.hlo.txt", self._train_step.text()

    def _trace(self, steps: int, folder: Path) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would hide the steps
        jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)
        try:
            self._wait_for_steps(1 + steps)  # one may have begun before, one is in flight
        finally:
            jax.profiler.stop_trace()

    def _wait_for_steps(self, steps: int) -> None:
        first, deadline_s = self._train_step.calls, time.monotonic() + STEPS_TIMEOUT_S
        while self._train_step.calls <= first + steps:  # the last of them has ended when the next one began
            if self._stop.wait(STEP_POLL_S):
                raise RuntimeError(f"training ended {self._train_step.calls - first} step(s) after the trace began")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no {steps} steps in {STEPS_TIMEOUT_S:.0f} s; ask for --stacks")


def memory() -> dict[str, Any]:
    """Returns what this process and its devices use, in bytes; JAX's CPU devices keep no figures of their own."""
    devices = {str(device): device.memory_stats() for device in jax.local_devices()}
    arrays = sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)
    return {"resident_bytes": psutil.Process().memory_info().rss, "live_array_bytes": arrays, "devices": devices}
