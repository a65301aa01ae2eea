"""What an incarnation on a layout will need, compiled before there is one, and kept in the run's compile cache.

All processes of a group of that layout take one step from a fresh state, on rows of zeros, evaluate such rows where
the run does, and throw the results away: a CPU's programs are for one rank of one group each, so nothing less than
the group itself can compile them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from openmoe.model import checkpoint, sharding, step
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import compile_cache, evaluation, train_loop


class Counted:
    """Takes a recorder's place: keeps the newest facts of each kind of event."""

    def __init__(self) -> None:
        self.newest: dict[str, dict[str, Any]] = {}

    def event(self, kind: str, **facts: Any) -> None:
        """Takes something that happened."""
        self.newest[kind] = facts


def compile_ahead(spec: RunSpec) -> dict[str, dict[str, Any]]:
    """Compiles and keeps the programs of a run on this process group; returns the events of the cache."""
    train_loop.check_process_group(spec)
    mesh, events = sharding.make_mesh(**spec.mesh.model_dump()), Counted()
    plan = (spec.model, spec.optimizer, mesh, spec.execution)
    with compile_cache.used(spec, events) as programs:
        state = step.arranged(*plan, step.init_state(spec.model, spec.optimizer, spec.seed, mesh))
        train_step: Any = step.make_train_step(*plan, skip_bad_numbers=spec.health.on_bad_numbers == "skip")
        micro_rows = spec.train.batch_rows // spec.train.microbatches
        zeros = _zeros(spec.train.microbatches, micro_rows, spec.data.seq_len)
        state, metrics = train_step(state, sharding.put_batch(mesh, zeros))
        jax.block_until_ready(metrics)
        if spec.eval is not None:
            zeros = _zeros(1, evaluation.rows_at_once(spec), spec.data.seq_len)
            zeros["kinds"] = np.zeros_like(zeros["input_ids"])
            jax.block_until_ready(evaluation.eval_step(spec, mesh)(state.params, sharding.put_batch(mesh, zeros)))
        checkpoint.examine(step.plain(*plan, state))
        programs.tell()
    return events.newest


def _zeros(*shape: int) -> dict[str, np.ndarray]:
    """Returns a batch [microbatches, rows, seq] without any data."""
    return {key: np.zeros(shape, np.float32 if key == "loss_weights" else np.int32) for key in train_loop.BATCH_KEYS}
