"""Held-out loss while a run trains: by source, by denoiser, and whether that is enough.

An evaluation belongs to the step after which it is made: it is recorded before a checkpoint of that step is accepted,
so whoever goes on from that checkpoint finds it made, and whoever does the step again makes it again, and that one
counts (`lineage.trace`, as for metrics). All processes compute the same sums and so agree on what follows from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from openmoe.model import sharding, step
from openmoe.pipelines import heldout
from openmoe.pipelines.heldout import HeldOut
from openmoe.platform.run.lineage import Position
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import sampling, saturation
from openmoe.platform.train.recorder import Recorder


class Evaluations:
    """The evaluations of one incarnation; none where the run has no `eval` section.

    Attributes:
      is_saturated: `train.stop_when` says that the run is to end.
    """

    def __init__(self, spec: RunSpec, run: RunDir, mesh: Mesh, manifest_path: str, recorder: Recorder) -> None:
        """Reads the rows, and what was evaluated before, along the line of truth."""
        self._spec, self._mesh, self._recorder = spec, mesh, recorder
        self.is_saturated = False
        if spec.eval is None:
            return
        self._held_out = heldout.read(manifest_path, spec.eval.rows, cache_bytes=spec.cluster.shard_cache_bytes)
        self._plan = (spec.model, spec.optimizer, mesh, spec.execution)
        self._eval_step = eval_step(spec, mesh)
        self._before = run.evaluations() if spec.train.stop_when else []
        self._judge()

    def after_step(self, position: Position, state: step.TrainState, beat: Callable[[], None]) -> None:
        """Evaluates if it is time to; all processes must call it.

        Args:
          position: after the step.
          state: as `step.arranged` has it.
          beat: called for each part of the work.
        """
        config, train = self._spec.eval, self._spec.train
        step_tokens = train.batch_rows * self._spec.data.seq_len
        if config is None or not (
            config.is_due(position.step, step_tokens=step_tokens) or position.step == train.total_steps
        ):
            return
        self._recorder.catch_up()
        start_s = time.time()
        with self._recorder.charged("evaluate"):
            losses = losses_of(self._held_out, self._sums(state.params, beat))
            facts: dict[str, Any] = {"rows": len(self._held_out.records), "losses": losses}
            if config.sample_tokens:
                beat()
                plain = step.plain(*self._plan, state)
                facts["samples"] = sampling.draw(self._spec, self._mesh, plain, config.sample_tokens)
        self._recorder.evaluated(position, seconds=time.time() - start_s, **facts)
        self._before.append({"step": position.step, "losses": losses})
        self._judge()

    def _judge(self) -> None:
        self.is_saturated = saturation.saturated_at(self._spec.train.stop_when, self._before) is not None

    def _sums(self, params: Any, beat: Callable[[], None]) -> list[np.ndarray]:
        """Returns the fields of EvalSums over all rows, float64[rows, kinds] each."""
        num_rows, parts = rows_at_once(self._spec), []
        for first in range(0, len(self._held_out.records), num_rows):
            beat()
            arrays = heldout.batch(self._held_out, first, num_rows)
            batch = sharding.put_batch(self._mesh, {key: values[None] for key, values in arrays.items()})
            parts.append(jax.device_get(self._eval_step(params, batch)))
        return [np.concatenate(sums).astype(np.float64) for sums in zip(*parts, strict=True)]


def eval_step(spec: RunSpec, mesh: Mesh) -> Callable[[Any, step.Batch], step.EvalSums]:
    """Returns the compiled function of `step.make_eval_step` for the run's kinds of noise."""
    return step.make_eval_step(spec.model, spec.optimizer, mesh, spec.execution, num_kinds=len(saturation.KINDS))


def rows_at_once(spec: RunSpec) -> int:
    """Returns how many rows are evaluated at a time: as many as a step holds at once."""
    return spec.train.batch_rows // spec.train.microbatches // spec.execution.accumulation_steps


def losses_of(held_out: HeldOut, sums: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns mean cross-entropies over loss-carrying positions, nats: of all, and of each source and denoiser.

    Those without any position are left out; so are denoisers where there is one alone.

    Args:
      held_out: the rows.
      sums: the fields of EvalSums, float64[rows, kinds] each; rows beyond those only fill the last part.
    """
    losses: dict[str, float] = {}

    def add(name: str, sum_of: np.ndarray, positions: np.ndarray) -> None:
        if positions.sum():
            losses[name] = float(sum_of.sum() / positions.sum())

    rows = len(held_out.records)
    cross_entropy, tokens, text_cross_entropy, text_tokens = (values[:rows] for values in sums)
    add("loss", cross_entropy, tokens)
    add("text_loss", text_cross_entropy, text_tokens)
    for stream, name in enumerate(held_out.streams):
        of_stream = held_out.stream == stream
        add(f"loss/{name}", cross_entropy[of_stream], tokens[of_stream])
    kinds = np.flatnonzero(tokens.any(axis=0)).tolist()
    for kind in kinds if len(kinds) > 1 else ():
        add(f"loss/{saturation.KINDS[kind]}", cross_entropy[:, kind], tokens[:, kind])
    return losses
