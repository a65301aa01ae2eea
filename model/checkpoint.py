"""Saves and restores the train state, together with the loader's position, through Orbax.

What Orbax does: asynchronous writing by all processes, one atomic commit of a step, local paths and gs://,
restoring onto any mesh. What is added here: the layout of a step, and a digest that proves what was restored.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from openmoe.model.step import TrainState


class Checkpointer:
    """The checkpoints in one folder, `<directory>/<step>` each. All processes make the same calls."""

    def __init__(self, directory: str) -> None:
        """Opens a folder: a local path, absolute or relative, or gs://..."""
        path = directory if "://" in directory else os.path.abspath(directory)  # noqa: PTH100, not for gs://
        self._manager = ocp.CheckpointManager(path)

    def save(self, step: int, state: TrainState, loader_state: dict[str, Any]) -> None:
        """Copies the state off the devices and goes on writing in the background.

        Args:
          step: names the checkpoint.
          state: may be given away (donated) as soon as this returns.
          loader_state: JSON, the same on all processes.

        Raises:
          FileExistsError: the step has been saved before.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), loader=ocp.args.JsonSave(loader_state))
        if not self._manager.save(step, args=items):
            raise FileExistsError(f"{self._manager.directory}/{step}: saved before; use another folder")

    def is_saving(self) -> bool:
        """Returns whether a save has not been committed yet."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the save in progress is committed; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state of a step, laid out as `abstract_state` says (`state_shapes`), and the loader's.

        Raises:
          FileNotFoundError: there is no such step, or it was never committed.
          ValueError: its shapes are others, or its bytes are damaged.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), loader=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["loader"]


def checksum(state: Any) -> str:
    """Returns a digest of all bits of a tree of arrays, the same however they are laid out on devices."""
    leaves = jax.tree.leaves_with_path(state)
    sums = jax.device_get(_position_weighted_sums([leaf for _, leaf in leaves]))
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {total}"
        for (path, leaf), total in zip(leaves, sums, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _position_weighted_sums(leaves: list[Array]) -> list[Array]:
    # One program: several small ones in flight, each waiting for all devices, can deadlock XLA's CPU threads.
    return [_position_weighted_sum(leaf) for leaf in leaves]


@jax.jit
def _position_weighted_sum(leaf: Array) -> Array:
    """Returns uint32[], the sum of each element's bits times an odd weight of its own, modulo 2**32.

    Integers, so the order of summation does not matter; odd, so that no single wrong element goes unseen.
    """
    bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    index = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)
