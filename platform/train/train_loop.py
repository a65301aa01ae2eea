"""What every training process does, from the newest accepted checkpoint to the last step.

All processes run this same function over the same global row numbers; process 0 alone writes records. The
order at a save, so that an accepted checkpoint always has its records beside it:

    step -> metrics, evaluation -> save begins (asynchronous) -> those durable -> save committed -> acceptance

kill -9 at any moment leaves the newest acceptance in force. The steps after it are done again, from the very
next row and, on the same topology, with the same bits.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import jax
import jaxlib
import numpy as np
from jax import Array
from jax.sharding import Mesh

from openmoe.model import checksum, sharding, step
from openmoe.pipelines.loader import Loader
from openmoe.platform.run.lineage import Claim, Incident, Position, first_rows
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run.stragglers import Pace
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import compile_cache, milestones, sampling
from openmoe.platform.train.cadence import NOTHING_SEEN, Seen
from openmoe.platform.train.evaluation import Evaluations
from openmoe.platform.train.health_watch import HealthWatch, Stopwatch, left_out
from openmoe.platform.train.notice import Notice
from openmoe.platform.train.prefetch import Prefetch
from openmoe.platform.train.profiling import Responder
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.train.saver import Saver
from openmoe.platform.train.train_step import TrainStep

BATCH_KEYS = checksum.KEYS


def train(
    spec: RunSpec,
    run: RunDir,
    claim: Claim,
    manifest_path: str,
    report: Callable[[dict[str, Any]], None],
    beat: Callable[..., None] = lambda **what: None,
    on_render: Callable[[], object] = lambda: None,
    seen: Seen = NOTHING_SEEN,
    announced: Callable[[], float | None] = lambda: None,
    tell_pace: Callable[[Pace], None] = lambda pace: None,
) -> step.TrainState:
    """Trains one incarnation, from the acceptance that its claim names to the last step.

    Args:
      spec, run, claim: the run, the same in all processes; its directory; this incarnation's claim.
      manifest_path: of the data build whose rows are trained on.
      report: called by process 0 with the record of each step, for those who watch.
      seen, announced: what earlier incarnations have shown, and when machines will be taken away, see `Notice`.
      beat, on_render, tell_pace: called by every process, see `Watchdog`, `Batches` and `Stopwatch`.

    Returns:
      The final train state in its plain form, sharded over the mesh.

    Raises:
      BadNumbers, DamagedCheckpoint, Superseded: the driver decides what follows.
    """
    check_process_group(spec)
    mesh = sharding.make_mesh(**spec.mesh.model_dump())
    plan = (spec.model, spec.optimizer, mesh, spec.execution)
    loader = Loader(manifest_path, cache_bytes=spec.cluster.shard_cache_bytes)
    watch, incidents, stopwatch = HealthWatch(spec, run), run.incidents(), Stopwatch(tell_pace, beat)
    with (
        recorded(spec, run, claim, report, watch) as recorder,
        compile_cache.used(spec, recorder) as programs,
        Notice(announced, seen.save_s or 0.0) as notice,
    ):
        recorder.event("started", **beginning(spec, mesh, loader))
        saver = Saver(spec, run, claim, recorder, data_id=loader.data_id, seen=seen)
        state, position = saver.restore(mesh)
        state, plain = step.arranged(*plan, state), functools.partial(step.plain, *plan)
        train_step = TrainStep(step.make_train_step(*plan, skip_bad_numbers=watch.skips), recorder, programs)
        evaluations = Evaluations(spec, run, mesh, manifest_path, recorder)
        with Responder(run, train_step), Batches(spec, mesh, loader, position, on_render, incidents) as coming:
            while position.step < spec.train.total_steps and not evaluations.is_saturated:
                stopwatch.begin()
                position = left_out(position, incidents, recorder)
                batch, data_metrics = coming.take(recorder, beat)
                state, metrics = train_step(state, batch)
                stopwatch.handed_over()
                position = position.after(rows=spec.train.batch_rows)
                recorder.record(position, {**metrics, **data_metrics})  # waits for the step before, not for this one
                stopwatch.end(position.step, data_metrics["data_wait_s"])
                evaluations.after_step(position, state, beat)
                saver.after_step(position, notice, functools.partial(plain, state), beat, ends=evaluations.is_saturated)
        saver.wait()
        beat()
        sampling.record_samples(spec, mesh, state := plain(state), recorder)
        programs.tell()
    return state


def recorded(
    spec: RunSpec, run: RunDir, claim: Claim, report: Callable[[dict[str, Any]], None], watch: HealthWatch
) -> Recorder:
    """Returns the recorder of an incarnation, whose records `watch` checks."""
    kept = {"row_tokens": spec.data.seq_len, "trackers": spec.trackers, "check": watch.check}
    return Recorder(run, claim, report, **kept)


def check_process_group(spec: RunSpec) -> None:
    """Raises RuntimeError unless all workers are in one JAX process group with the devices of the run file.

    On CPU, Ray's own JaxTrainer starts processes that each train alone, without a word.
    """
    wanted = (spec.cluster.num_workers, spec.cluster.num_workers * spec.cluster.devices_per_worker)
    found = (jax.process_count(), jax.device_count())
    if found != wanted:
        raise RuntimeError(
            f"cluster: the JAX process group has {found[0]} processes and {found[1]} devices, the run file says "
            f"num_workers={wanted[0]} x devices_per_worker={spec.cluster.devices_per_worker}"
        )
    slices = len({sharding.slice_of(device) for device in jax.devices()})
    fake = os.environ.get("JAX_PLATFORMS") == "cpu"  # as the hosts of `openmoe cluster up` on one machine say
    if spec.cluster.accelerator == "tpu" and jax.default_backend() != "tpu" and not fake:
        raise RuntimeError(f"cluster: accelerator is tpu, JAX found only {jax.default_backend()} on this host")
    if not fake and slices != spec.cluster.num_slices:
        raise RuntimeError(f"cluster: the run file says {spec.cluster.num_slices} TPU slices, JAX found {slices}")


class Batches:
    """The batches of the coming steps, read ahead of them; groups that nobody has packed yet are rendered for it."""

    def __init__(
        self,
        spec: RunSpec,
        mesh: Mesh,
        loader: Loader,
        position: Position,
        on_render: Callable[[], object] = lambda: None,
        incidents: Sequence[Incident] = (),
    ) -> None:
        self._spec, self._mesh, self._loader, self._on_render = spec, mesh, loader, on_render
        self._rendering: deque[str] = deque()  # groups, in words; from the thread that reads to the one that records
        steps = spec.train.total_steps - position.step
        self._coming = Prefetch(self._read, first_rows(position.next_row, steps, spec.train.batch_rows, incidents))

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._coming.__exit__(kind, error, trace)

    def take(self, recorder: Recorder, beat: Callable[[], None]) -> tuple[dict[str, Array], dict[str, float]]:
        """Returns the next step's batch; how long it was waited for, and how many groups had to be rendered."""

        def tell() -> None:
            while self._rendering:
                beat()  # once a group: a read that hangs is found out
                self._on_render()
                recorder.event("renders_data", missing=self._rendering.popleft())
                recorder.flush()

        (batch, rendered), data_wait_s = self._coming.take(tell)
        tell()
        return batch, {"data_wait_s": data_wait_s, "rendered_groups": rendered}

    def _read(self, first_row: int) -> tuple[dict[str, Array], int]:
        last_row = first_row + self._spec.train.batch_rows
        rendered = self._loader.make_ready(last_row, self._rendering.append)
        return global_batch(self._spec, self._mesh, self._loader, first_row=first_row), rendered


def global_batch(spec: RunSpec, mesh: Mesh, loader: Loader, *, first_row: int) -> dict[str, Array]:
    """Reads one step's rows onto the mesh.

    Each device asks for the index ranges that the sharding gives it, so no rank arithmetic is needed and hosts
    may share rows.

    Returns:
      The batch keys, each [microbatches, rows per microbatch, seq]; row r of microbatch m is global row
      first_row + m * rows_per_microbatch + r.
    """
    num_micro, rows_per_micro = spec.train.microbatches, spec.train.batch_rows // spec.train.microbatches
    shape = (num_micro, rows_per_micro, spec.data.seq_len)
    read = functools.cache(loader.rows)

    def block(key: str, index: Any) -> np.ndarray:  # index: a slice for each axis
        start, stop, _ = index[1].indices(rows_per_micro)
        bases = [first_row + m * rows_per_micro for m in range(*index[0].indices(num_micro))]
        return np.stack([read(base + start, base + stop)[key] for base in bases])[..., index[2]]

    layout = sharding.batch_sharding(mesh)
    return {key: jax.make_array_from_callback(shape, layout, functools.partial(block, key)) for key in BATCH_KEYS}


def beginning(spec: RunSpec, mesh: Mesh, loader: Loader) -> dict[str, Any]:
    """Returns what an incarnation says of itself when it starts."""
    facts = {"steps": spec.train.total_steps, "mesh": dict(mesh.shape), "data_id": loader.data_id}
    facts |= {"execution": asdict(spec.execution), "checkpoint_every_steps": spec.train.checkpoint_every_steps}
    return {**facts, **fingerprint(), **milestones.times()}


def fingerprint() -> dict[str, Any]:
    """Returns what the bits of a step depend on besides the state and the batch; a change is an event."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
