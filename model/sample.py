"""Continues prompts, for a look at what a run has learned. Each token recomputes the whole row."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openmoe.model import sharding, transformer
from openmoe.model.config import ModelConfig


def sample(
    params: Any,
    config: ModelConfig,
    prompts: np.ndarray,
    num_tokens: int,
    *,
    temperature: float,
    seed: int,
    mesh: Mesh,
) -> np.ndarray:
    """Draws continuations from the model.

    Each row is a routing group of its own, with the capacity of evaluation, so that what it says does not depend
    on the other rows.

    Args:
      params: of the model, on the mesh.
      config: of the model.
      prompts: int32[b, n], the same on all processes; 0 is padding and must not occur.
      num_tokens: to draw for each prompt.
      temperature: divides the logits; 0 takes the likeliest token.
      seed: of the draws.
      mesh: the rows are divided over its devices.

    Returns:
      int32[b, n + num_tokens], prompts included, on every process.
    """
    num_prompts, prompt_len = prompts.shape
    missing = -num_prompts % mesh.size
    tokens = np.pad(np.asarray(prompts, np.int32), ((0, missing), (0, num_tokens)))
    config = replace(config, group_size=prompt_len + num_tokens)
    tokens = jax.device_put(tokens, sharding.replicated(mesh))
    continued = _continue(params, tokens, jax.random.key(seed), config, mesh, prompt_len, temperature)
    return np.asarray(continued)[:num_prompts]


@functools.partial(jax.jit, static_argnames=("config", "mesh", "prompt_len", "temperature"))
def _continue(
    params: Any,
    tokens: Array,
    key: Array,
    config: ModelConfig,
    mesh: Mesh,
    prompt_len: int,
    temperature: float,
) -> Array:
    """Fills tokens [b, t] from prompt_len on, one position at a time."""
    rows = NamedSharding(mesh, sharding.mesh_axes(PartitionSpec("batch")))
    position = jnp.arange(tokens.shape[1])

    def fill(i: Array, tokens: Array) -> Array:
        known = position <= i
        input_ids = jnp.where(known, jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))), 0)
        is_real = jnp.broadcast_to(known, tokens.shape).astype(jnp.int32)
        batch = {"input_ids": input_ids, "target_ids": is_real, "segment_ids": is_real}
        batch = jax.lax.with_sharding_constraint(batch, rows)
        logits = transformer.forward(config, mesh, params, batch, train=False).logits[:, i]
        if temperature == 0:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return tokens.at[:, i].set(drawn)

    tokens = jax.lax.fori_loop(prompt_len, tokens.shape[1], fill, tokens)
    return jax.lax.with_sharding_constraint(tokens, sharding.replicated(mesh))
