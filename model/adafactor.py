"""Adafactor (arXiv:1804.04235) exactly as T5X runs it, parameter by parameter.

It differs from `optax.adafactor` in that every expert is a parameter of its own: factored whatever its size, and
scaled and clipped by its own root mean square. So is every layer where the layers of all blocks are stacked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.model.parameters import num_stacked

Moments = dict[str, Array]  # {"v": as the parameter}, or factored {"v_row", "v_col"}: means over the other side


def kept_axes(config: AdafactorConfig, spec: PartitionSpec, shape: tuple[int, ...]) -> dict[str, list[int]]:
    """Returns the moments that a parameter has, with those of its axes that each of them keeps."""
    axes = range(len(shape))
    if (sides := _factored_sides(config, spec, shape)) is None:
        return {"v": list(axes)}
    row, col = sides
    return {"v_row": [axis for axis in axes if axis != col], "v_col": [axis for axis in axes if axis != row]}


def update(
    config: AdafactorConfig,
    spec: PartitionSpec,
    count: Array,
    rate: Array,
    grad: Array,
    moments: Moments,
    param: Array,
) -> tuple[Array, Moments]:
    """Returns what to add to a parameter, and its next moments; see `optimizer.Rule`."""
    decay = 1 - (count.astype(jnp.float32) + 1) ** -config.decay_rate
    moments = _next_moments(config, decay, spec, grad, moments)
    return _addition(config, rate, spec, grad, moments, param), moments


def _next_moments(config: AdafactorConfig, decay: Array, spec: PartitionSpec, grad: Array, moments: Moments) -> Moments:
    """Mixes in the squared gradient; factored ones keep its mean over the column, and over the row."""
    square = jnp.square(grad) + config.epsilon_grad
    if (sides := _factored_sides(config, spec, grad.shape)) is None:
        return {"v": decay * moments["v"] + (1 - decay) * square}
    row, col = sides
    return {
        "v_row": decay * moments["v_row"] + (1 - decay) * jnp.mean(square, axis=col),
        "v_col": decay * moments["v_col"] + (1 - decay) * jnp.mean(square, axis=row),
    }


def _addition(
    config: AdafactorConfig, rate: Array, spec: PartitionSpec, grad: Array, moments: Moments, param: Array
) -> Array:
    """Returns what to add to the parameter: the scaled gradient, clipped, times its own size."""
    own_axes = tuple(range(num_stacked(spec), grad.ndim))
    if (sides := _factored_sides(config, spec, grad.shape)) is None:
        scaled = grad * jax.lax.rsqrt(moments["v"])
    else:
        row, col = sides
        v_row = jnp.expand_dims(moments["v_row"], col)
        v_col = jnp.expand_dims(moments["v_col"], row)
        scaled = grad * jax.lax.rsqrt(v_row / jnp.mean(v_row, axis=row, keepdims=True)) * jax.lax.rsqrt(v_col)
    clipped = scaled / jnp.maximum(1.0, _rms(scaled, own_axes) / config.clipping_threshold)
    return -rate * jnp.maximum(_rms(param, own_axes), config.epsilon_param) * clipped


def _factored_sides(config: AdafactorConfig, spec: PartitionSpec, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the (row, column) axes of a factored parameter, named as T5X does.

    The row of an expert's kernel is its `embed` axis, that of another matrix its shorter side.
    """
    stacked = num_stacked(spec)
    if "expert" in spec[:stacked]:
        return spec.index("embed"), next(axis for axis, role in enumerate(spec) if role in ("mlp", "two_mlp"))
    own = shape[stacked:]
    if len(own) < 2 or min(own) < config.min_dim_size_to_factor:
        return None
    row, col = (0, 1) if own[0] <= own[1] else (1, 0)
    return stacked + row, stacked + col


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
