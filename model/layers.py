"""The dense parts of a layer: RMSNorm, rotary attention, gated feed-forward.

Each is a plain function on arrays, below it a module that only declares its parameters, under T5X's names.
Axes: b batch, t and s positions, d d_model, h heads, k head_dim, f d_ff.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from openmoe.model.config import ModelConfig
from openmoe.model.parameters import Initializer, Normal, Ones, TruncatedNormal, declare, fan_in_deviation

MASKED = -1e10


def rms_norm(x: Array, scale: Array, *, epsilon: float, dtype: str) -> Array:
    """Divides by the root mean square (arXiv:1910.07467), in float32; no mean, no bias.

    Args:
      x: [..., d].
      scale: float32[d].
      epsilon: added to the mean square.
      dtype: of the result.
    """
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + epsilon)).astype(dtype) * scale.astype(dtype)


def project(x: Array, kernel: Array) -> Array:
    """Multiplies every position's vector by the kernel, in the type of x.

    Over flat positions: with two axes of them XLA's CPU compiler transposes both operands of the kernel's
    gradient, which for the head takes as long as the product.

    Args:
      x: [b, t, d].
      kernel: float32[d, n].

    Returns:
      [b, t, n].
    """
    flat = x.reshape(-1, x.shape[-1])
    return (flat @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


class Rows(NamedTuple):
    """Where the positions at hand stand in their rows, and what they see there."""

    position: Array  # int32[t] or int32[b, t], index in the row
    real: Array  # bool[b, t, 1], whether it is more than padding
    mask: Array  # bool[b, 1, t, s], which positions it sees: of those at hand, or of the cache


def rotate(x: Array, position: Array, *, theta: float) -> Array:
    """Rotary position embedding (arXiv:2104.09864): turns x[i] with x[i + k/2] by an angle that grows with t.

    The position is the index in the row. Packed segments do not start anew; they need not, because only
    differences of positions matter and segments do not see each other.

    Args:
      x: [b, t, h, k], queries or keys.
      position: int32[t] or int32[b, t], index in the row.
      theta: longest timescale.
    """
    half = x.shape[-1] // 2
    timescale = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None] / timescale  # [..., t, k/2]
    sin, cos = (table(angle).astype(x.dtype)[..., None, :] for table in (jnp.sin, jnp.cos))  # [..., t, 1, k/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_mask(target_ids: Array, segment_ids: Array) -> Array:
    """Returns bool[b, 1, t, s]: whether position t sees s: not later, both real, same packed segment.

    Args:
      target_ids: int32[b, t]; 0 is padding.
      segment_ids: int32[b, t].
    """
    real = target_ids > 0
    positions = jnp.arange(target_ids.shape[1])
    causal = positions[:, None] >= positions[None, :]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (causal & same_segment & real[:, :, None] & real[:, None, :])[:, None]


def real_positions(input_ids: Array) -> Array:
    """Returns bool[b, t]: all but trailing padding. The first position, whose input is always 0, is real.

    Args:
      input_ids: int32[b, t]; 0 is padding, but also starts every packed segment.
    """
    following = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1)))
    first = jnp.arange(input_ids.shape[1]) == 0
    return (input_ids > 0) | (following > 0) | first


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Softmax attention without the factor 1/sqrt(k), which the initialiser gives to the query kernel.

    The mask is added, not selected: a position that sees nothing attends to all positions equally, and its
    gradient passes through. That is what the original does with padding.

    Args:
      query: [b, t, h, k].
      key, value: [b, s, h, k].
      mask: bool[b, 1, t, s].

    Returns:
      [b, t, h, k], in the type of `value`.
    """
    logits = jnp.einsum("bthk,bshk->bhts", query, key)
    weights = jax.nn.softmax(logits + jnp.where(mask, 0, MASKED).astype(logits.dtype), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


def remember(seen: Array, new: Array, first: Array) -> Array:
    """Writes consecutive positions into a cache, in each row from a position of its own on.

    Args:
      seen: [b, s, h, k].
      new: [b, t, h, k].
      first: int32[b], where new[:, 0] stands; first + t <= s.
    """
    return jax.vmap(jax.lax.dynamic_update_slice)(seen, new, (first, *[jnp.zeros_like(first)] * 2))


class GatedWeights(NamedTuple):
    """Kernels of one gated block, or of several along leading axes."""

    wi_0: Array  # float32[..., d, 2f]
    wi_1: Array  # float32[..., d, f]
    wo: Array  # float32[..., f, d]


def gated_mlp(x: Array, weights: GatedWeights) -> Array:
    """OpenMoE's feed-forward: wi_0's first half, times swish of its second, times wi_1.

    Its authors call it SwiGLU (arXiv:2002.05202), but it has one factor and one matrix more.

    Args:
      x: [..., n, d].
      weights: with the leading axes of x, or fewer.

    Returns:
      [..., n, d], in the type of x.
    """
    wi_0, wi_1, wo = (kernel.astype(x.dtype) for kernel in weights)
    linear, gate = jnp.split(x @ wi_0, 2, axis=-1)
    return (linear * jax.nn.swish(gate) * (x @ wi_1)) @ wo


class Kernel(nn.Module):
    """A matrix, or a stack of one for each expert, named `kernel` below the module's own name."""

    shape: tuple[int, ...]
    roles: tuple[str, ...]
    initializer: Initializer

    @nn.compact
    def __call__(self) -> Array:
        """Returns float32[shape]."""
        return self.param("kernel", declare(self.shape, self.roles, self.initializer))


class RMSNorm(nn.Module):
    """`rms_norm` with its scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., d] to [..., d] in the activations' type."""
        scale = self.param("scale", declare((self.config.d_model,), ("embed",), Ones()))
        return rms_norm(x, scale, epsilon=self.config.norm_epsilon, dtype=self.config.dtype)


class Attention(nn.Module):
    """Causal self-attention with all heads of their own, rotated, without biases.

    If it is given a collection `cache` (decode.py), it adds the keys, already rotated, and values at hand to it and
    attends to all that are in it.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps [b, t, d] to [b, t, d]."""
        config = self.config
        d_inner = config.num_heads * config.head_dim
        deviation = fan_in_deviation(config, config.d_model)
        # Attention's 1/sqrt(head_dim) sits in the query's initialiser; its root is rounded as the original's is.
        root = float(np.asarray(math.sqrt(config.head_dim), config.dtype))

        def heads(name: str, initializer: Initializer) -> Array:
            kernel = Kernel((config.d_model, d_inner), ("embed", "joined_kv"), initializer, name=name)()
            return project(x, kernel).reshape(*x.shape[:2], config.num_heads, config.head_dim)

        query = rotate(heads("query", Normal(deviation / root)), rows.position, theta=config.rope_theta)
        key = rotate(heads("key", Normal(deviation)), rows.position, theta=config.rope_theta)
        value = heads("value", Normal(deviation))
        if self.has_variable("cache", "keys"):
            key, value = self._remember("keys", key, rows), self._remember("values", value, rows)
        out_normal = Normal(fan_in_deviation(config, d_inner))
        out = Kernel((d_inner, config.d_model), ("joined_kv", "embed"), out_normal, name="out")()
        return project(attend(query, key, value, rows.mask).reshape(*x.shape[:2], d_inner), out)

    def _remember(self, name: str, new: Array, rows: Rows) -> Array:
        seen = remember(self.get_variable("cache", name), new, rows.position[:, 0])
        self.put_variable("cache", name, seen)
        return seen


class GatedKernels(nn.Module):
    """Declares the weights of a gated block, or of all experts of a layer (num_experts > 0)."""

    config: ModelConfig
    num_experts: int = 0

    @nn.compact
    def __call__(self) -> GatedWeights:
        """Returns the block's weights, stacked by expert if there are experts."""
        config, d_model, d_ff = self.config, self.config.d_model, self.config.d_ff
        stack, roles = ((self.num_experts,), ("expert",)) if self.num_experts else ((), ())
        draw = Normal if self.num_experts else TruncatedNormal
        up, down = draw(fan_in_deviation(config, d_model)), draw(fan_in_deviation(config, d_ff))
        return GatedWeights(
            wi_0=Kernel((*stack, d_model, 2 * d_ff), (*roles, "embed", "mlp"), up, name="wi_0")(),
            wi_1=Kernel((*stack, d_model, d_ff), (*roles, "embed", "mlp"), up, name="wi_1")(),
            wo=Kernel((*stack, d_ff, d_model), (*roles, "mlp", "embed"), down, name="wo")(),
        )
