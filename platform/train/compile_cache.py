"""Compiled programs of earlier incarnations, so that a restart loads what was compiled before it.

    <cluster.compile_cache>/<what they were compiled for>/<name>-<JAX's key>     SHA-256, then the program

JAX has such a cache, and its key holds all that a program depends on; what this adds is the way to it. JAX writes into
a folder of its own process, so that nobody ever reads half a program; whole ones are copied to storage, created if
absent, each after the digest of its bytes, and the next incarnation fetches those of its settings, layout and versions
before it compiles anything. JAX itself reads and writes gs:// too, but takes whatever is there for a program.

A program is machine code: whoever may write to that folder decides what the workers execute. It holds no pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import jax
import jaxlib
import psutil
from jax.experimental.compilation_cache import compilation_cache

from openmoe.pipelines import storage
from openmoe.platform.run_file.spec import RunSpec

OFF = "none"
KEEP_EVERY_S = 5.0
WRITTEN_AFTER_S = 2.0  # a file that has not changed for so long is whole
ASKED_AFTER_S = 0.2  # so is one that was there when it was asked for, so much later, with threads that may compile
FOLDER_PREFIX = "openmoe-programs-"
REQUESTED, LOADED = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"


class Records(Protocol):
    """Who is told of events: an incarnation's recorder, or whoever compiles ahead of it."""

    def event(self, kind: str, **facts: Any) -> None:
        """Takes something that happened."""


@contextlib.contextmanager
def used(spec: RunSpec, recorder: Records) -> Generator[Programs]:
    """Uses the run's compile cache in this process, unless JAX_COMPILATION_CACHE_DIR names one already, as tests do.

    What cannot be fetched or kept is compiled again: the cache saves time, and a run does not end for it.
    """
    programs = Programs(recorder)
    jax.monitoring.register_event_listener(programs.count)
    try:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            with _all_ranks_write():
                yield programs
            return
        if spec.cluster.compile_cache == OFF:
            yield programs
            return
        folder = storage.join(spec.cluster.compile_cache or storage.join(spec.run_dir, "compile_cache"), key(spec))
        with _process_folder() as local, _jax_uses(local), _all_ranks_write():
            programs.fetch(folder, local)
            with programs.kept(folder, local):
                yield programs
    finally:
        jax.monitoring.unregister_event_listener(programs.count)


def key(spec: RunSpec) -> str:
    """Returns the folder of the programs of a run's settings on this process group: what is worth fetching."""
    cluster = spec.cluster
    parts = {
        "model": asdict(spec.model),
        "optimizer": asdict(spec.optimizer),
        "step": [spec.train.batch_rows, spec.train.microbatches, spec.data.seq_len],
        "execution": asdict(spec.execution),
        "mesh": spec.mesh.model_dump(),
        "workers": [cluster.num_workers, cluster.devices_per_worker, cluster.topology],
        "versions": [jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS", "")],
        "device": [jax.devices()[0].device_kind, *(_processor() if jax.default_backend() == "cpu" else ())],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _processor() -> tuple[str, ...]:
    """Returns what code for this kind of processor may rely on; another one may not know its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (platform.machine(), next((line for line in lines if line.startswith(("flags", "Features"))), ""))
    return (platform.machine(), platform.processor())


class Programs:
    """The programs of one process: counted, fetched, kept."""

    def __init__(self, recorder: Records) -> None:
        self._recorder = recorder
        self._requested = self._loaded = self._fetched = self._refused = 0
        self._asked_for, self._asked_s = 0, 0.0
        self._not_kept, self._error = 0, ""
        self._known: set[str] = set()
        self._wake = threading.Event()

    def count(self, event: str, **facts: object) -> None:
        """Takes an event of JAX."""
        self._requested += event == REQUESTED
        self._loaded += event == LOADED

    def tell(self) -> None:
        """Journals how many programs were needed since the process began, and how many were there already."""
        self._recorder.event(
            "compiled",
            programs=self._requested,
            loaded=self._loaded,
            fetched=self._fetched,
            refused=self._refused,
        )

    def keep_new(self) -> None:
        """Lets what was compiled since the last call be kept at once: the process may be killed at any step."""
        if self._requested > self._asked_for:
            self._asked_for, self._asked_s = self._requested, time.time()
            self._wake.set()

    def fetch(self, folder: str, local: Path) -> None:
        """Copies the programs of `folder` to where JAX looks for them; one of another digest is left out."""
        try:
            names = storage.list_files(folder)
            for name, data in zip(names, storage.read_all(storage.join(folder, n) for n in names), strict=True):
                digest, program = (data or b"")[:32], (data or b"")[32:]
                if hashlib.sha256(program).digest() != digest:
                    self._refused += 1
                    continue
                self._known.add(name)
                (local / name).write_bytes(program)
        except (storage.StorageError, OSError) as error:  # JAX compiles anew what is there in part
            self._recorder.event("compile_cache_failed", error=str(error))
        self._fetched = len(self._known)

    @contextlib.contextmanager
    def kept(self, folder: str, local: Path) -> Generator[None]:
        """Copies new programs to storage now and then while the block runs, and the last ones at its end."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.is_set():
                asked = self._wake.wait(KEEP_EVERY_S)
                self._wake.clear()
                if asked:
                    stop.wait(ASKED_AFTER_S)
                self._keep(folder, local, before_s=self._asked_s if asked else time.time() - WRITTEN_AFTER_S)

        thread = threading.Thread(target=keep, name="compile_cache", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            self._wake.set()
            thread.join()
        self._keep(folder, local, before_s=time.time() + 1)
        if self._not_kept:
            self._recorder.event("compile_cache_failed", not_kept=self._not_kept, error=self._error)

    def _keep(self, folder: str, local: Path, before_s: float) -> None:
        for path in local.iterdir():
            if path.name in self._known or path.stat().st_mtime > before_s:
                continue
            self._known.add(path.name)
            program = path.read_bytes()
            try:
                storage.create_if_absent(storage.join(folder, path.name), hashlib.sha256(program).digest() + program)
            except storage.StorageError as error:
                self._not_kept, self._error = self._not_kept + 1, str(error)


@contextlib.contextmanager
def _process_folder() -> Generator[Path]:
    """Gives a folder of this process alone; those of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        pid = left.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _all_ranks_write() -> Generator[None]:
    """Lets a rank other than 0 keep its programs on CPU, where those of rank 0 are of no use to it.

    There JAX's key tells processes apart, and JAX lets rank 0 alone write: the others would compile anew in every
    incarnation. The only place that reaches into JAX; one that has changed there compiles more, and that is all.
    """
    from jax._src import compiler, distributed

    write = getattr(compiler, "_cache_write", None)
    if jax.process_index() == 0 or jax.default_backend() != "cpu" or write is None:
        yield
        return

    def as_rank_0(*arguments: Any) -> None:
        state = distributed.global_state
        rank, state.process_id = state.process_id, 0
        try:
            write(*arguments)
        finally:
            state.process_id = rank

    compiler._cache_write = as_rank_0  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        compiler._cache_write = write


@contextlib.contextmanager
def _jax_uses(local: Path) -> Generator[None]:
    """Makes JAX keep all programs in a folder, small ones too: a restart compiles some hundred of them."""
    settings = {
        "jax_compilation_cache_dir": str(local),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # else this folder's name is part of JAX's key
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
