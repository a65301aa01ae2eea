"""Muon (arXiv:2502.16982), parameter by parameter: matrices by their orthogonal momentum, all else by `adamw`.

A matrix is a kernel between the residual stream and attention or a feed-forward block; the embedding, the head, routers
and norms are none. `optax.contrib.scale_by_muon` sees each expert and each layer by itself, under vmap: with it as the
axis of a batch, which its own dimension numbers would merge with others, the devices keep the experts that they hold.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from openmoe.model import adamw
from openmoe.model.optimizer_config import MuonConfig
from openmoe.model.parameters import num_stacked

Moments = dict[str, Array]  # of a matrix {"mu"}, the mean gradient; of all else {"mu", "nu"}, as AdamW's
INNER_ROLES = ("joined_kv", "mlp", "two_mlp")
ADAM_RMS = 0.2  # of AdamW's updates, as measured in the paper


def is_matrix(spec: PartitionSpec) -> bool:
    """Returns whether a parameter, of these roles, is one that Muon updates, or many."""
    own = spec[num_stacked(spec) :]
    return len(own) == 2 and "embed" in own and any(role in INNER_ROLES for role in own)


def kept_axes(config: MuonConfig, spec: PartitionSpec, shape: tuple[int, ...]) -> dict[str, list[int]]:
    """Returns the moments that a parameter has, with those of its axes that each of them keeps: all."""
    return {"mu": list(range(len(shape)))} if is_matrix(spec) else adamw.kept_axes(config, spec, shape)


def update(
    config: MuonConfig,
    spec: PartitionSpec,
    count: Array,
    rate: Array,
    grad: Array,
    moments: Moments,
    param: Array,
) -> tuple[Array, Moments]:
    """Returns what to add to a parameter, and its next moments; see `optimizer.Rule`."""
    if not is_matrix(spec):
        return adamw.update(config, spec, count, rate, grad, moments, param)
    muon: Any = optax.contrib.scale_by_muon(beta=config.momentum, ns_steps=config.newton_schulz_steps)
    coefficients = muon.init(jnp.zeros(())).ns_coeffs

    def orthogonal(grad: Array, mu: Array) -> tuple[Array, Array]:
        direction, state = muon.update(grad, optax.contrib.MuonState(count, mu, coefficients))
        return direction, state.mu

    for _ in range(num_stacked(spec)):
        orthogonal = jax.vmap(orthogonal)
    direction, mu = orthogonal(grad, moments["mu"])
    scale = ADAM_RMS * math.sqrt(max(grad.shape[-2:]))
    return -rate * scale * direction, {"mu": mu}
