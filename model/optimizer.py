"""Adafactor (arXiv:1804.04235) exactly as T5X runs it, as an optax transformation.

It differs from `optax.adafactor` in that every expert is a parameter of its own: factored whatever its size, and
scaled and clipped by its own root mean square. So is every layer where the layers of all blocks are stacked.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from openmoe.model.config import OptimizerConfig

Moments = dict[str, Array]  # {"v": as the parameter}, or factored {"v_row", "v_col"}: means over the other side


class AdafactorState(NamedTuple):
    """Running means of the squared gradients.

    Attributes:
      count: int32[], updates so far.
      moments: the parameters' tree with Moments, float32, in place of arrays.
    """

    count: Array
    moments: Any


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the schedule learning_rate / sqrt(max(step, warmup_steps)), steps counted from 0."""
    return lambda step: config.learning_rate * jax.lax.rsqrt(jnp.maximum(step, config.warmup_steps).astype(jnp.float32))


def adafactor(config: OptimizerConfig, roles: Any) -> optax.GradientTransformation:
    """Returns the optimizer.

    Args:
      config: its settings.
      roles: the parameters' tree with a PartitionSpec of axis roles in place of arrays; a leading role "expert"
        makes each slice along it a parameter of its own, and so does "block".
    """
    schedule = learning_rate(config)

    def init(params: Any) -> AdafactorState:
        moments = _over_parameters(functools.partial(_initial_moments, config), roles, params)
        return AdafactorState(jnp.zeros((), jnp.int32), moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        decay = 1 - (state.count.astype(jnp.float32) + 1) ** -config.decay_rate
        moments = _over_parameters(functools.partial(_next_moments, config, decay), roles, updates, state.moments)
        step_size = functools.partial(_update, config, jnp.asarray(schedule(state.count)))
        additions = _over_parameters(step_size, roles, updates, moments, params)
        return additions, AdafactorState(state.count + 1, moments)

    return optax.GradientTransformation(init, update)


def state_roles(config: OptimizerConfig, roles: Any, params: Any) -> AdafactorState:
    """Returns the axis roles of the optimizer's state, for parameters (or their shapes) of the given roles."""

    def moment_roles(spec: PartitionSpec, param: Array) -> dict[str, PartitionSpec]:
        kept = _kept_axes(config, spec, param.shape)
        return {name: PartitionSpec(*(spec[axis] for axis in axes)) for name, axes in kept.items()}

    return AdafactorState._make((PartitionSpec(), _over_parameters(moment_roles, roles, params)))


def _initial_moments(config: OptimizerConfig, spec: PartitionSpec, param: Array) -> Moments:
    kept = _kept_axes(config, spec, param.shape)
    return {name: jnp.zeros([param.shape[axis] for axis in axes], jnp.float32) for name, axes in kept.items()}


def _next_moments(config: OptimizerConfig, decay: Array, spec: PartitionSpec, grad: Array, moments: Moments) -> Moments:
    """Mixes in the squared gradient; factored ones keep its mean over the column, and over the row."""
    square = jnp.square(grad) + config.epsilon_grad
    if (sides := _factored_sides(config, spec, grad.shape)) is None:
        return {"v": decay * moments["v"] + (1 - decay) * square}
    row, col = sides
    return {
        "v_row": decay * moments["v_row"] + (1 - decay) * jnp.mean(square, axis=col),
        "v_col": decay * moments["v_col"] + (1 - decay) * jnp.mean(square, axis=row),
    }


def _update(
    config: OptimizerConfig, rate: Array, spec: PartitionSpec, grad: Array, moments: Moments, param: Array
) -> Array:
    """Returns what to add to the parameter: the scaled gradient, clipped, times its own size."""
    own_axes = tuple(range(_num_stacked(spec), grad.ndim))
    if (sides := _factored_sides(config, spec, grad.shape)) is None:
        scaled = grad * jax.lax.rsqrt(moments["v"])
    else:
        row, col = sides
        v_row = jnp.expand_dims(moments["v_row"], col)
        v_col = jnp.expand_dims(moments["v_col"], row)
        scaled = grad * jax.lax.rsqrt(v_row / jnp.mean(v_row, axis=row, keepdims=True)) * jax.lax.rsqrt(v_col)
    clipped = scaled / jnp.maximum(1.0, _rms(scaled, own_axes) / config.clipping_threshold)
    return -rate * jnp.maximum(_rms(param, own_axes), config.epsilon_param) * clipped


def _kept_axes(config: OptimizerConfig, spec: PartitionSpec, shape: tuple[int, ...]) -> dict[str, list[int]]:
    """Returns the moments that a parameter has, with those of its axes that each of them keeps."""
    axes = range(len(shape))
    if (sides := _factored_sides(config, spec, shape)) is None:
        return {"v": list(axes)}
    row, col = sides
    return {"v_row": [axis for axis in axes if axis != col], "v_col": [axis for axis in axes if axis != row]}


def _factored_sides(config: OptimizerConfig, spec: PartitionSpec, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the (row, column) axes of a factored parameter, named as T5X does.

    The row of an expert's kernel is its `embed` axis, that of another matrix its shorter side.
    """
    num_stacked = _num_stacked(spec)
    if "expert" in spec[:num_stacked]:
        return spec.index("embed"), next(axis for axis, role in enumerate(spec) if role in ("mlp", "two_mlp"))
    own = shape[num_stacked:]
    if len(own) < 2 or min(own) < config.min_dim_size_to_factor:
        return None
    row, col = (0, 1) if own[0] <= own[1] else (1, 0)
    return num_stacked + row, num_stacked + col


def _num_stacked(spec: PartitionSpec) -> int:
    """Returns the number of leading axes along which parameters are independent: blocks, experts."""
    return next((axis for axis, role in enumerate(spec) if role not in ("block", "expert")), len(spec))


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def _over_parameters(function: Any, roles: Any, *trees: Any) -> Any:
    """Maps over parameters: `roles` has a leaf for each, the trees may have a subtree there."""
    return jax.tree.map(function, roles, *trees, is_leaf=lambda x: isinstance(x, PartitionSpec))
