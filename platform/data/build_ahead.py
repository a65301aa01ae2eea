"""Builds a run's data: what it needs to begin, then, while it trains, each stream's coming groups.

A thread of the driver keeps of each stream the window of rows that is being read and the one after it ready, as far as
the run comes to them soon, until its last row is covered; what the mixture comes to first is packed first. The loaders
of the training workers find packed groups by themselves. One that has caught up packs what it needs itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from openmoe.pipelines import build, passes
from openmoe.pipelines.build import Report, Workplace
from openmoe.pipelines.config import BLOCK_ROWS
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.mixture import WINDOW_ROWS
from openmoe.pipelines.storage import StorageDenied, StorageUnavailable
from openmoe.platform.run import lineage
from openmoe.platform.run.lineage import Incident
from openmoe.platform.run_file import run_length
from openmoe.platform.run_file.spec import RunSpec

POLL_S = 2.0
# What the run comes to later than so many rows is not built yet, as of a stage that is far off.
AHEAD_ROWS = 8 * WINDOW_ROWS
CLOSE_S = 1.0  # a group that is being packed is not waited for; it is packed again, to the same bytes


def build_first(
    spec: RunSpec, step: int, report: Report, say: Callable[[str], None], incidents: Sequence[Incident] = ()
) -> tuple[Manifest, RunSpec]:
    """Builds what training wants to find: for a run in epochs pass 0 of all sources, and what it reads first.

    Args:
      spec: of the run.
      step: steps the run has done.
      report: told of progress.
      say: told when the driver does what the cluster has no CPU for.
      incidents: whose rows the run leaves out.

    Returns:
      The manifest, and the run with its length in steps.
    """
    place = _place(spec, say=_once(say))
    manifest = build.tokenize(spec.data, spec.data_dir, report, place)
    if spec.eval is not None:
        passes.check_validation(manifest, range(len(manifest.streams)))
    try:
        build.pack_validation(manifest, report, place)
    except StorageDenied as error:
        place.say(_left_to_workers(error))
    built = passes.Passes(manifest)
    if spec.train.epochs is not None:
        build.pack(built, built.first_passes(), report, place)
    spec = run_length.resolved(spec, built.epoch_rows())
    row, last_row = (lineage.row_after(n, spec.train.batch_rows, incidents) for n in (step, spec.train.total_steps))
    try:
        while wanted := passes.coming(built, row, min(row + BLOCK_ROWS, last_row), ahead=0):
            build.pack(built, wanted, report, place)
    except StorageDenied as error:
        place.say(_left_to_workers(error))
    return manifest, spec


def tokenize(spec: RunSpec, report: Report, say: Callable[[str], None]) -> Manifest:
    """Tokenizes a run's sources, as every build of them begins, and packs nothing."""
    return build.tokenize(spec.data, spec.data_dir, report, _place(spec, say=_once(say)))


def build_all(spec: RunSpec, report: Report, say: Callable[[str], None]) -> Manifest:
    """Builds all that a run reads from its first step to its last."""
    manifest, spec = build_first(spec, 0, report, say)
    rows = spec.train.total_steps * spec.train.batch_rows
    build.extend(passes.Passes(manifest), rows, report, _place(spec, say=_once(say)))
    return manifest


class BuildAhead:
    """The thread, from `with` to its end; `check` says whether it failed."""

    def __init__(
        self,
        spec: RunSpec,
        manifest: Manifest,
        position_steps: Callable[[], int],
        report: Report,
        say: Callable[[str], None],
        incidents: Callable[[], Sequence[Incident]] = tuple,
    ) -> None:
        """Takes what to build for.

        Args:
          spec: of the run, its length in steps.
          manifest: of the build whose passes are extended.
          position_steps: says, whenever asked, how many steps the run has done.
          report: told of progress as groups are packed.
          say: told, once, when the driver packs because the cluster has no CPU for it.
          incidents: says, whenever asked, for what the run leaves rows out: it reads as many more at its end.
        """
        self._passes = passes.Passes(manifest)
        self._batch_rows, self._total_steps = spec.train.batch_rows, spec.train.total_steps
        self._position_steps, self._incidents, self._report, self._told = position_steps, incidents, report, say
        workers_cpus = spec.cluster.num_workers * spec.cluster.cpus_per_worker
        self._stop = threading.Event()
        self._place = _place(spec, reserved_cpus=workers_cpus, say=_once(self._say), is_left=self._stop.is_set)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="build-ahead", daemon=True)

    def __enter__(self) -> BuildAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; what it has not finished is built by the next attempt."""
        self._stop.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():  # Ray Data will lose its Ray, and say so at length
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)

    def check(self) -> None:
        """Raises what stopped the building, if anything did: DataError when the data cannot be used."""
        if self._failure is not None:
            raise self._failure

    def _say(self, line: str) -> None:
        if not self._stop.is_set():  # what Ray says when it is shut down is no news
            self._told(line)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._pack_coming()
                self._stop.wait(POLL_S)  # also when all is packed: an incident makes the run read on
        except StorageDenied as error:
            self._say(_left_to_workers(error))
        except Exception as error:
            if not self._stop.is_set():
                self._failure = error

    def _pack_coming(self) -> None:
        """Packs what the run comes to soon."""
        try:
            while not self._stop.is_set():
                row, last_row = map(self._row_after, (self._position_steps(), self._total_steps))
                wanted = passes.coming(self._passes, row, min(row + AHEAD_ROWS, last_row), ahead=1)
                if not wanted:
                    return
                build.pack(self._passes, wanted, self._report, self._place)
        except StorageUnavailable as error:
            self._place.say(f"{error}; trying on")  # a worker that needs the rows meanwhile packs them, or ends

    def _row_after(self, steps: int) -> int:
        return lineage.row_after(steps, self._batch_rows, self._incidents())


def _left_to_workers(error: StorageDenied) -> str:
    return f"{error}; what is not packed is rendered by the workers, each for itself"


def _place(spec: RunSpec, **settings: Any) -> Workplace:
    cluster = spec.cluster
    return Workplace(num_workers=cluster.data_cpus, task_memory_bytes=cluster.data_task_memory_bytes, **settings)


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Returns `say` for lines that it has not been told yet."""
    said: set[str] = set()

    def say_new(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return say_new
