"""Continues prompts: draws the next token of each, reads it, draws the next."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from openmoe.model import decode, sharding
from openmoe.model.config import ModelConfig

LEAST_TEMPERATURE = 1e-30  # a logit over less may be infinite in float32; at this the likeliest token is certain
_LEAST_WIDTH = 16  # of the prompts, BOS included; wider ones are padded to the next power of two


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. The filters apply one after the other, in the order given here.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token, and so does what is too small to divide by.
      top_k: draws from so many likeliest tokens only, equal ones by id; 0 draws from all.
      top_p: draws from the fewest likeliest tokens that together have this probability (arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: must be finite and not negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 1, or 0 for all tokens; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be above 0 and at most 1, got {self.top_p}")


def stream(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    sampling: Sampling,
    eos_id: int,
    seed: int,
    mesh: Mesh,
) -> Iterator[np.ndarray]:
    """Continues all prompts together, one token of each at a time, until all have ended.

    What a prompt is continued with depends on the seed, its number and its own tokens, not on the other prompts
    (decode.py). The programs are compiled once for all prompts of one number and, rounded up, one greatest length.

    Args:
      params: of the model, on the mesh.
      config: of the model.
      prompts: ids of each, without the BOS that is put before them, the same on all processes; one may be empty.
      num_tokens: to draw for each prompt at most, at least 1.
      sampling: how.
      eos_id: ends a continuation.
      seed: of the draws.
      mesh: the prompts are divided over its devices.

    Yields:
      int32[prompts], on every process: the next token of each, 0 from its end on.

    Raises:
      ValueError: an id of a prompt is 0, which is BOS and padding, or not in the vocabulary.
    """
    _check_prompts(prompts, config.vocab_size)
    shares = sharding.num_batch_shares(mesh)
    rows = _rows(prompts, num_rows=-(-len(prompts) // shares) * shares)
    input_ids, num_real = jax.device_put(rows, sharding.replicated(mesh))
    key, row_len = jax.random.key(seed), input_ids.shape[1] + num_tokens
    token, cache = _begin(
        params, input_ids, num_real, key, config=config, mesh=mesh, sampling=sampling, row_len=row_len
    )
    going = np.ones(len(prompts), bool)
    for i in range(num_tokens):
        drawn = np.asarray(token)[: len(prompts)]
        going &= drawn != eos_id
        yield np.where(going, drawn, decode.BOS_ID)
        if i == num_tokens - 1 or not going.any():
            return
        token, cache = _next(params, cache, token, num_real, i, key, config=config, mesh=mesh, sampling=sampling)


def by_prompt(steps: Iterable[np.ndarray]) -> list[list[int]]:
    """Returns the ids that `stream` yields as one list for each prompt, without what is behind its end."""
    return [[int(token) for token in row if token != decode.BOS_ID] for row in np.stack(list(steps), axis=1)]


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for i, prompt in enumerate(prompts):
        if wrong := [token for token in prompt if not 0 < token < vocab_size]:
            raise ValueError(f"prompts[{i}]: ids must be in [1, vocab_size={vocab_size}), got {wrong[0]}")


def _rows(prompts: Sequence[Sequence[int]], *, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns input_ids int32[b, n], each BOS and a prompt, and how many of them are real, int32[b]."""
    longest = max(len(prompt) for prompt in prompts)
    width = max(_LEAST_WIDTH, 1 << longest.bit_length())  # the least power of two above `longest`
    input_ids = np.full((num_rows, width), decode.BOS_ID, np.int32)
    for row, prompt in zip(input_ids, prompts, strict=False):
        row[1 : 1 + len(prompt)] = prompt
    lengths = [1 + len(prompt) for prompt in prompts] + [1] * (num_rows - len(prompts))
    return input_ids, np.asarray(lengths, np.int32)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "sampling", "row_len"))
def _begin(
    params: Any,
    input_ids: Array,
    num_real: Array,
    key: Array,
    *,
    config: ModelConfig,
    mesh: Mesh,
    sampling: Sampling,
    row_len: int,
) -> tuple[Array, decode.Cache]:
    """Reads the prompts [b, n]; returns the tokens int32[b] that follow them, and the cache."""
    cache = decode.empty_cache(config, mesh, input_ids.shape[0], row_len)
    logits, cache = decode.extend(config, mesh, params, cache, input_ids, jnp.zeros_like(num_real), num_real)
    return _draw_on(mesh, logits, num_real, key, sampling), cache


@functools.partial(jax.jit, static_argnames=("config", "mesh", "sampling"), donate_argnames="cache")
def _next(
    params: Any,
    cache: decode.Cache,
    token: Array,
    num_real: Array,
    i: Array | int,
    key: Array,
    *,
    config: ModelConfig,
    mesh: Mesh,
    sampling: Sampling,
) -> tuple[Array, decode.Cache]:
    """Reads the i-th tokens int32[b] behind the prompts; returns the tokens that follow them, and the cache."""
    position = num_real + i
    logits, cache = decode.extend(config, mesh, params, cache, token[:, None], position, jnp.ones_like(position))
    return _draw_on(mesh, logits, position + 1, key, sampling), cache


def _draw_on(mesh: Mesh, logits: Array, position: Array, key: Array, sampling: Sampling) -> Array:
    """Returns the drawn tokens int32[b], which stand at positions int32[b], whole on every device."""
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(position.size))
    keys = jax.vmap(jax.random.fold_in)(row_keys, position)
    return jax.lax.with_sharding_constraint(draw(logits, keys, sampling), sharding.replicated(mesh))


def draw(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """Draws a token for each row, never id 0, which is no token: it starts rows and pads them.

    Args:
      logits: float32[b, v].
      keys: key[b], one for each row, so that rows do not depend on their number.
      sampling: how.

    Returns:
      int32[b].
    """
    logits = logits.at[:, decode.BOS_ID].set(-jnp.inf)
    if sampling.temperature < LEAST_TEMPERATURE:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    categorical = jax.vmap(jax.random.categorical)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return categorical(keys, logits).astype(jnp.int32)
    logits, ids = jax.lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    probs = jax.nn.softmax(logits)
    likelier = jnp.cumsum(probs, axis=-1) - probs  # probability of the tokens before each one
    chosen = categorical(keys, jnp.where(likelier < sampling.top_p, logits, -jnp.inf))
    return jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]
