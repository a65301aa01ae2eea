"""Adam's direction (arXiv:1412.6980), parameter by parameter; weight decay is `optimizer`'s."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from openmoe.model.optimizer_config import AdamWConfig, MuonConfig

Moments = dict[str, Array]  # {"mu", "nu"}: means of the gradient and of its square, as the parameter


def kept_axes(config: AdamWConfig | MuonConfig, spec: PartitionSpec, shape: tuple[int, ...]) -> dict[str, list[int]]:
    """Returns the moments that a parameter has, with those of its axes that each of them keeps: all."""
    del config, spec
    return {"mu": list(range(len(shape))), "nu": list(range(len(shape)))}


def update(
    config: AdamWConfig | MuonConfig,
    spec: PartitionSpec,
    count: Array,
    rate: Array,
    grad: Array,
    moments: Moments,
    param: Array,
) -> tuple[Array, Moments]:
    """Returns what to add to a parameter, and its next moments; see `optimizer.Rule`."""
    del spec, param
    adam: Any = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    direction, state = adam.update(grad, optax.ScaleByAdamState(jnp.asarray(count), moments["mu"], moments["nu"]))
    return -rate * direction, {"mu": state.mu, "nu": state.nu}
