"""What an incarnation on a layout will need, compiled before there is one, and kept in the run's compile cache.

All processes of a group of that layout take one step from a fresh state, on rows of zeros, and throw the result away: a
CPU's programs are for one rank of one group each, so nothing less than the group itself can compile them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from openmoe.model import checkpoint, sharding, step
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import compile_cache, train_loop


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
        state, metrics = train_step(state, _zeros(spec, mesh))
        jax.block_until_ready(metrics)
        checkpoint.examine(step.plain(*plan, state))
        programs.tell()
    return events.newest


def _zeros(spec: RunSpec, mesh: Mesh) -> dict[str, Array]:
    """Returns a batch as `train_loop.global_batch` does, without any data."""
    num_micro, rows = spec.train.microbatches, spec.train.batch_rows // spec.train.microbatches
    zeros = {
        key: np.zeros((num_micro, rows, spec.data.seq_len), np.float32 if key == "loss_weights" else np.int32)
        for key in train_loop.BATCH_KEYS
    }
    layout = sharding.batch_sharding(mesh)
    return {key: jax.make_array_from_callback(all_.shape, layout, all_.__getitem__) for key, all_ in zeros.items()}
