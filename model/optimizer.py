"""The optimizers, as one transformation of gradients over one form of state.

Each of them is a rule for a single parameter: `adafactor`, `adamw`, `muon`. What they share is here: the schedule, the
clipping of gradients, weight decay, and groups of parameters with rates of their own.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec

from openmoe.model import adafactor, adamw, muon, schedule
from openmoe.model.optimizer_config import AdafactorConfig, OptimizerConfig
from openmoe.model.parameters import num_stacked


class OptimizerState(NamedTuple):
    """What an optimizer remembers.

    Attributes:
      count: int32[], updates so far.
      moments: the parameters' tree with {name: float32 array} in place of arrays: a rule's means over past gradients,
        of all of a parameter's axes or of some.
    """

    count: Array
    moments: Any


_RULES: dict[str, Any] = {"adafactor": adafactor, "adamw": adamw, "muon": muon}


class Rule(NamedTuple):
    """What an optimizer does with one parameter. Experts, and layers that are stacked, are parameters of their own."""

    # (roles of its axes, its shape) -> which of its axes each moment keeps
    kept_axes: Callable[[PartitionSpec, tuple[int, ...]], dict[str, list[int]]]
    # (roles, updates so far, learning rate, gradient, moments, parameter) -> (what to add to it, next moments)
    update: Callable[..., tuple[Array, dict[str, Array]]]


class Treatment(NamedTuple):
    """What a parameter has of its own; of layers that are stacked a number each, float32[blocks]."""

    rate_factor: Any
    weight_decay: Any


def make(config: OptimizerConfig, roles: Any, treatments: Any) -> optax.GradientTransformation:
    """Returns the optimizer.

    Args:
      config: its settings.
      roles: the parameters' tree with a PartitionSpec of axis roles in place of arrays; a leading role "expert"
        makes each slice along it a parameter of its own, and so does "block".
      treatments: the same tree with a Treatment in place of arrays (`treatments_of`).
    """
    rule, rate_of = _rule(config), schedule.learning_rate(config)

    def init(params: Any) -> OptimizerState:
        def zeros(spec: PartitionSpec, param: Array) -> dict[str, Array]:
            kept = rule.kept_axes(spec, param.shape)
            return {name: jnp.zeros([param.shape[axis] for axis in axes], jnp.float32) for name, axes in kept.items()}

        return OptimizerState(jnp.zeros((), jnp.int32), _over_parameters(zeros, roles, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, OptimizerState]:
        if config.max_grad_norm is not None:
            updates, _ = optax.clip_by_global_norm(config.max_grad_norm).update(updates, optax.EmptyState())
        one = functools.partial(_update, rule, state.count, jnp.asarray(rate_of(state.count)))
        both = _over_parameters(one, roles, treatments, updates, state.moments, params)
        additions, moments = (_over_parameters(lambda _, of_one, i=i: of_one[i], roles, both) for i in range(2))
        return additions, OptimizerState(state.count + 1, moments)

    return optax.GradientTransformation(init, update)


def state_roles(config: OptimizerConfig, roles: Any, params: Any) -> OptimizerState:
    """Returns the axis roles of the optimizer's state, for parameters (or their shapes) of the given roles."""

    def moment_roles(spec: PartitionSpec, param: Array) -> dict[str, PartitionSpec]:
        kept = _rule(config).kept_axes(spec, param.shape)
        return {name: PartitionSpec(*(spec[axis] for axis in axes)) for name, axes in kept.items()}

    return OptimizerState._make((PartitionSpec(), _over_parameters(moment_roles, roles, params)))


def treatments_of(config: OptimizerConfig, roles: Any) -> Any:
    """Returns a tree of Treatment for parameters under their own names, which are not stacked."""
    usual_decay = 0.0 if isinstance(config, AdafactorConfig) else config.weight_decay

    def of_one(path: Any, spec: PartitionSpec) -> Treatment:
        name = "/".join(key.key for key in path)
        is_matrix = len(spec) - num_stacked(spec) >= 2
        decay = usual_decay if is_matrix else 0.0
        for group in config.groups:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in group.match):
                return Treatment(
                    group.learning_rate_factor, decay if group.weight_decay is None else group.weight_decay
                )
        return Treatment(1.0, decay)

    return jax.tree.map_with_path(of_one, roles, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _rule(config: OptimizerConfig) -> Rule:
    module = _RULES[config.name]
    return Rule(functools.partial(module.kept_axes, config), functools.partial(module.update, config))


def _update(
    rule: Rule,
    count: Array,
    rate: Array,
    spec: PartitionSpec,
    treatment: Treatment,
    grad: Array,
    moments: dict[str, Array],
    param: Array,
) -> tuple[Array, dict[str, Array]]:
    factor, decay = (_along_blocks(value, param.ndim) for value in treatment)
    if np.any(factor != 1):
        rate = rate * factor
    addition, moments = rule.update(spec, count, rate, grad, moments, param)
    return addition - rate * decay * param if np.any(decay) else addition, moments


def _along_blocks(value: Any, num_axes: int) -> np.ndarray:
    """Returns a number, or a number for each block, float32[blocks, 1, ...]."""
    array = np.asarray(value, np.float32)
    return array.reshape(-1, *[1] * (num_axes - 1)) if array.ndim else array


def _over_parameters(function: Any, roles: Any, *trees: Any) -> Any:
    """Maps over parameters: `roles` has a leaf for each, the trees may have a subtree there."""
    return jax.tree.map(function, roles, *trees, is_leaf=lambda x: isinstance(x, PartitionSpec))
