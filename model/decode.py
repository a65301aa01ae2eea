"""Reads rows piece by piece: the keys and values of earlier positions are kept in a cache, not computed again.

The parameters are those of training, and so is the module: it is applied with one more collection, `cache`, a tree
that holds each attention's keys and values beside its parameters' names. A row is BOS (id 0) at position 0 and its
tokens from position 1 on, without gaps, so RoPE's positions are those of training; rows of different lengths end at
different positions, and what lies behind a row's end is never seen.

Experts: when rows are decoded, every position is a routing group of its own (`ungrouped`), so nothing is dropped and
no token depends on its neighbours in the batch. Then cached decoding equals full recomputation, up to the rounding of
sums, and so it does under any groups whose capacity drops nothing. Where something is dropped there is no such
equality, not even with a group for each row: first choices come before second ones, so a later token takes the place
of an earlier one, and recomputation would change what has been read already.

Axes: b rows, n positions read at once, s positions of the cache, v vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from openmoe.model import sharding
from openmoe.model.config import ModelConfig
from openmoe.model.layers import Rows
from openmoe.model.transformer import Transformer

BOS_ID = 0  # padding as well

Cache = Any  # {"decoder": {"layers_0": {"self_attention": {"keys": Array, "values": Array}}, ...}}


def ungrouped(config: ModelConfig) -> ModelConfig:
    """Returns the settings under which each position is routed alone: a place in each expert is always free.

    The price is that all experts compute for all positions, kept or not. That is little where one token of each row
    is read, which takes as long as the weights need to come from memory.
    """
    return replace(config, group_size=1, min_capacity=1, t5x_expert_copies=0)


def empty_cache(config: ModelConfig, mesh: Mesh, num_rows: int, row_len: int) -> Cache:
    """Returns the cache before anything was read: [b, s, h, k] arrays in the activations' type, rows divided."""
    shape = (num_rows, row_len, config.num_heads, config.head_dim)

    def layer() -> dict[str, dict[str, Array]]:
        return {"self_attention": {name: jnp.zeros(shape, config.dtype) for name in ("keys", "values")}}

    return sharding.by_rows({"decoder": {f"layers_{i}": layer() for i in range(config.num_layers)}}, mesh)


def extend(
    config: ModelConfig, mesh: Mesh, params: Any, cache: Cache, input_ids: Array, first: Array, num_real: Array
) -> tuple[Array, Cache]:
    """Reads further positions of each row: a prompt, or the one token that was drawn last.

    Args:
      config: of the model, as it was trained.
      mesh: over whose devices rows and experts are divided; b must be a multiple of their number.
      params: of the model, on the mesh.
      cache: of all earlier positions; may be given away (donated).
      input_ids: int32[b, n], padded with 0.
      first: int32[b], the position of input_ids[:, 0] in its row; first + n <= s.
      num_real: int32[b], in [1, n], how many of the n positions are no padding.

    Returns:
      float32[b, v], the logits of the token that follows the last real position, and the cache with these positions.
    """
    position = first[:, None] + jnp.arange(input_ids.shape[1])
    row_len = jax.tree.leaves(cache)[0].shape[1]
    rows = Rows(
        position=position,
        real=(position < (first + num_real)[:, None])[..., None],
        mask=(position[..., None] >= jnp.arange(row_len))[:, None],
    )
    input_ids, rows, last = sharding.by_rows((input_ids, rows, num_real - 1), mesh)
    logits, updated = Transformer(ungrouped(config), mesh, train=False).apply(
        {"params": params, "cache": cache}, input_ids, rows, last, method="extend", mutable=["cache"]
    )
    return logits, sharding.by_rows(updated["cache"], mesh)
