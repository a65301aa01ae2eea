"""The dense parts of a layer: RMSNorm, rotary attention, gated feed-forward.

Each is a plain function on arrays, below it a module that only declares its parameters, under T5X's names.
Axes: b batch, t and s positions, d d_model, h heads, k head_dim, f d_ff.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from openmoe.model import attention, sharding
from openmoe.model.config import PLAIN, ExecutionConfig, ModelConfig
from openmoe.model.parameters import Initializer, Normal, Ones, TruncatedNormal, declare, fan_in_deviation
from openmoe.model.products import product


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
      kernel: float32[d, n], or already in the type of x.

    Returns:
      [b, t, n].
    """
    flat = x.reshape(-1, x.shape[-1])
    return product(flat, kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


class Rows(NamedTuple):
    """Where the positions at hand stand in their rows, and what they see there."""

    position: Array | None  # int32[t] or int32[b, t], index in the row, or in the segment; None: index in the row
    real: Array  # bool[b, t, 1], whether it is more than padding
    segments: Array | None = None  # int32[b, t], see attention.segments_of; None where there is a cache
    mask: Array | None = None  # bool[b, 1, t, s], which positions of the cache it sees, if there is one


def rotate(x: Array, position: Array | None, *, theta: float) -> Array:
    """Rotary position embedding (arXiv:2104.09864): turns x[i] with x[i + k/2] by an angle that grows with t.

    The original's position is the index in the row. Packed segments need not start anew, because only differences of
    positions matter and segments do not see each other.

    Args:
      x: [b, t, h, k], queries or keys.
      position: int32[t] or int32[b, t], index in the row, or in the segment; None: index in the row.
      theta: longest timescale.
    """
    half = x.shape[-1] // 2
    tables = _turns_of_row(x.shape[1], half, theta) if position is None else _turns(position, half, theta)
    sin, cos = (table.astype(x.dtype)[..., None, :] for table in tables)  # [..., t, 1, k/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _turns(position: Array, half: int, theta: float) -> tuple[Array, Array]:
    """Returns sine and cosine of the angles, float32[..., t, half] each."""
    timescale = theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None] / timescale
    return jnp.sin(angle), jnp.cos(angle)


def _turns_of_row(row_len: int, half: int, theta: float) -> tuple[Array, Array]:
    """`_turns` of a whole row; constants on a CPU, whose XLA computes them in each layer and its gradient."""

    def constants() -> tuple[Array, Array]:
        with jax.ensure_compile_time_eval():
            return jax.jit(_turns, static_argnums=(1, 2))(jnp.arange(row_len), half, theta)

    return jax.lax.platform_dependent(cpu=constants, default=lambda: _turns(jnp.arange(row_len), half, theta))


def segment_positions(segment_ids: Array) -> Array:
    """Returns int32[b, t], each position's distance from the start of its segment.

    Args:
      segment_ids: int32[b, t], equal within a segment and different in the next one.
    """
    index = jnp.arange(segment_ids.shape[1])
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def real_positions(input_ids: Array) -> Array:
    """Returns bool[b, t]: all but trailing padding. The first position, whose input is always 0, is real.

    Args:
      input_ids: int32[b, t]; 0 is padding, but also starts every packed segment.
    """
    following = jnp.pad(input_ids[:, 1:], ((0, 0), (0, 1)))
    first = jnp.arange(input_ids.shape[1]) == 0
    return (input_ids > 0) | (following > 0) | first


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

    wi_0: Array  # float32[..., d, 2f], or float32[..., d, 2, f] with its halves apart; swiglu: float32[..., d, f]
    wi_1: Array  # float32[..., d, f]
    wo: Array  # float32[..., f, d]


Multiply = Callable[[Array, Array], Array]  # [..., n, a], [..., a, b] to [..., n, b]


def gated_mlp(x: Array, weights: GatedWeights, ffn: str, multiply: Multiply = jnp.matmul) -> Array:
    """A feed-forward block with a gate.

    OpenMoE's (`ffn` openmoe): wi_0's first half, times swish of its second, times wi_1. Its authors call it SwiGLU, but
    that (arXiv:2002.05202, equation 6) has one factor and one matrix less: swish of wi_0 times wi_1 (`ffn` swiglu).

    Args:
      x: [..., n, d].
      weights: with the leading axes of x, or fewer.
      ffn: which of the two.
      multiply: how vectors meet kernels.

    Returns:
      [..., n, d], in the type of x.
    """
    wi_0, wi_1, wo = (kernel.astype(x.dtype) for kernel in weights)
    if ffn == "swiglu":
        return multiply(jax.nn.swish(multiply(x, wi_0)) * multiply(x, wi_1), wo)
    if wi_0.ndim > wi_1.ndim:
        linear, gate = (multiply(x, wi_0[..., half, :]) for half in (0, 1))
    else:
        linear, gate = jnp.split(multiply(x, wi_0), 2, axis=-1)
    return multiply(linear * jax.nn.swish(gate) * multiply(x, wi_1), wo)


class Kernel(nn.Module):
    """A matrix, or a stack of one for each expert, named `kernel` below the module's own name."""

    shape: tuple[int, ...]
    roles: tuple[str, ...]
    initializer: Initializer
    mesh: Mesh

    @nn.compact
    def __call__(self) -> Array:
        """Returns float32[shape]."""
        kernel = self.param("kernel", declare(self.shape, self.roles, self.initializer))
        return sharding.whole(kernel, self.roles, self.mesh)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale, over the last axis."""

    config: ModelConfig
    role: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., d] to [..., d] in the activations' type."""
        scale = self.param("scale", declare(x.shape[-1:], (self.role,), Ones()))
        return rms_norm(x, scale, epsilon=self.config.norm_epsilon, dtype=self.config.dtype)


class Attention(nn.Module):
    """Causal self-attention with all heads of their own, rotated, without biases.

    If rows have a mask, there is a collection `cache` (decode.py): it adds the keys, already rotated, and values at
    hand to it and attends to all that are in it.
    """

    config: ModelConfig
    mesh: Mesh
    execution: ExecutionConfig = PLAIN

    @nn.compact
    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps [b, t, d] to [b, t, d]."""
        config = self.config
        d_inner = config.num_heads * config.head_dim
        deviation = fan_in_deviation(config, config.d_model)
        # Attention's 1/sqrt(head_dim) sits in the query's initialiser; its root is rounded as the original's is.
        root = float(np.asarray(math.sqrt(config.head_dim), config.dtype))

        def heads(name: str, initializer: Initializer) -> Array:
            shape, roles = (config.d_model, d_inner), ("embed", "joined_kv")
            kernel = Kernel(shape, roles, initializer, self.mesh, name=name)()
            return project(x, kernel).reshape(*x.shape[:2], config.num_heads, config.head_dim)

        query, key = heads("query", Normal(deviation / root)), heads("key", Normal(deviation))
        if config.qk_norm:
            query = RMSNorm(config, "head_dim", name="query_norm")(query) / jnp.asarray(root, query.dtype)
            key = RMSNorm(config, "head_dim", name="key_norm")(key)
        query = rotate(query, rows.position, theta=config.rope_theta)
        key = rotate(key, rows.position, theta=config.rope_theta)
        value = heads("value", Normal(deviation))
        if rows.mask is not None:
            key, value = self._remember("keys", key, rows), self._remember("values", value, rows)
            attended = attention.masked_attention(query, key, value, rows.mask)
        else:
            attended = self._attend(query, key, value, rows.segments)
        out_normal = Normal(fan_in_deviation(config, d_inner))
        out = Kernel((d_inner, config.d_model), ("joined_kv", "embed"), out_normal, self.mesh, name="out")()
        return project(attended.reshape(*x.shape[:2], d_inner), out)

    def _attend(self, query: Array, key: Array, value: Array, segments: Array | None) -> Array:
        assert segments is not None
        implementation = attention.implementation_for(
            self.mesh.devices.flat[0].platform,
            self.config,
            self.execution,
            row_len=query.shape[1],
            tensor=self.mesh.shape["tensor"],
        )
        return attention.attend(query, key, value, segments, implementation=implementation, mesh=self.mesh)

    def _remember(self, name: str, new: Array, rows: Rows) -> Array:
        assert rows.position is not None
        seen = remember(self.get_variable("cache", name), new, rows.position[:, 0])
        self.put_variable("cache", name, seen)
        return seen


class GatedKernels(nn.Module):
    """Declares the weights of a gated block, or of all experts of a layer (num_experts > 0)."""

    config: ModelConfig
    mesh: Mesh
    num_experts: int = 0

    @nn.compact
    def __call__(self) -> GatedWeights:
        """Returns the block's weights, stacked by expert if there are experts."""
        config, d_model = self.config, self.config.d_model
        d_ff = config.expert_width if self.num_experts else config.d_ff
        stack, roles = ((self.num_experts,), ("expert",)) if self.num_experts else ((), ())
        draw = Normal if self.num_experts else TruncatedNormal
        up, down = draw(fan_in_deviation(config, d_model)), draw(fan_in_deviation(config, d_ff))
        wide, wide_role = (d_ff, "mlp") if config.ffn == "swiglu" else (2 * d_ff, "two_mlp")
        wi_0 = Kernel((*stack, d_model, wide), (*roles, "embed", wide_role), up, self.mesh, name="wi_0")()
        return GatedWeights(
            wi_0=self._halves_apart(wi_0) if wide_role == "two_mlp" and self.mesh.shape["tensor"] > 1 else wi_0,
            wi_1=Kernel((*stack, d_model, d_ff), (*roles, "embed", "mlp"), up, self.mesh, name="wi_1")(),
            wo=Kernel((*stack, d_ff, d_model), (*roles, "mlp", "embed"), down, self.mesh, name="wo")(),
        )

    def _halves_apart(self, wi_0: Array) -> Array:
        """Divides both halves over the tensor axis, so that each device has the same columns of both."""
        apart = wi_0.reshape(*wi_0.shape[:-1], 2, -1)
        spec = P(*(("expert",) if self.num_experts else ()), None, None, "tensor")
        return jax.lax.with_sharding_constraint(apart, NamedSharding(self.mesh, spec))
