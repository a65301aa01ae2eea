"""Parameters of all blocks in one array each, for a scan over blocks, and apart again, as everything else has them.

    {"decoder": {"layers_0": A, "layers_1": B, "layers_2": C, "layers_3": D, ...}}        blocks of two layers
    {"decoder": {"blocks": {"layers_0": [A, C], "layers_1": [B, D]}, ...}}

Checkpoints, decoding and conversion know only the first form, so they do not depend on whether a run scans. The second
one lives in a training step's state alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from openmoe.model.config import ModelConfig


def stack(config: ModelConfig, tree: Any, join: Callable[[Sequence[Any]], Any] = jnp.stack) -> Any:
    """Puts the leaves of equal layers of all blocks together, along a new first axis.

    Args:
      config: of the model.
      tree: {"decoder": {"layers_0": ..., other parts}, other parts}.
      join: makes one leaf of those of all blocks, in order.
    """
    size, decoder = config.block_layers, dict(tree["decoder"])
    layers = [decoder.pop(f"layers_{i}") for i in range(config.num_layers)]
    blocks = {f"layers_{i}": _map(lambda *leaves: join(leaves), *layers[i::size]) for i in range(size)}
    return {**tree, "decoder": {**decoder, "blocks": blocks}}


def stack_roles(config: ModelConfig, roles: Any) -> Any:
    """`stack` for a tree of axis roles."""
    return stack(config, roles, join=lambda specs: PartitionSpec("block", *specs[0]))


def unstack(config: ModelConfig, tree: Any) -> Any:
    """Undoes `stack`."""
    size, decoder = config.block_layers, dict(tree["decoder"])
    blocks = decoder.pop("blocks")
    for i in range(config.num_layers):
        take = functools.partial(_block, i // size)
        decoder[f"layers_{i}"] = jax.tree.map(take, blocks[f"layers_{i % size}"])
    return {**tree, "decoder": decoder}


def repeat(config: ModelConfig, tree: Any) -> Any:
    """Gives all layers of a model what a tree in the first form has for those of one block: blocks are alike."""
    size, decoder = config.block_layers, tree["decoder"]
    layers = {f"layers_{i}": decoder[f"layers_{i % size}"] for i in range(config.num_layers)}
    return {**tree, "decoder": {**decoder, **layers}}


def _block(index: int, leaf: Array) -> Array:
    return leaf[index]


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, *trees, is_leaf=lambda x: isinstance(x, PartitionSpec))
