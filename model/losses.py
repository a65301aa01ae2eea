"""The parts of the training loss, each a plain function; their weights are the caller's.

Axes: b batch, t positions, v vocabulary; in the router's losses S tokens of a group, K = top_k, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class TokenLosses(NamedTuple):
    """Losses at every position, not yet weighted."""

    cross_entropy: Array  # float32[b, t]
    z: Array  # float32[b, t], the squared logarithm of the softmax's denominator


def token_losses(logits: Array, target_ids: Array) -> TokenLosses:
    """Returns the cross-entropy and the z-loss (arXiv:2204.02311, section 5) at every position.

    Args:
      logits: float32[b, t, v].
      target_ids: int32[b, t].
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: its gradient fuses with that of logsumexp and needs no scatter.
    is_target = jnp.arange(logits.shape[-1]) == target_ids[..., None]  # [b, t, v]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return TokenLosses(cross_entropy=log_z - target_logit, z=jnp.square(log_z))


def load_balancing_loss(probs: Array, load: Array) -> Array:
    """Auxiliary loss of one group (arXiv:2101.03961, equation 4); K at perfect balance.

    Args:
      probs: float32[S, E], the router's.
      load: float32[E], share of the tokens that ask for each expert, before any is dropped; sums to K.

    Returns:
      float32[]; its gradient flows through `probs` alone.
    """
    return probs.shape[-1] * jnp.sum(load * jnp.mean(probs, axis=0))


def router_z_loss(logits: Array) -> Array:
    """Mean squared logarithm of the softmax's denominator (arXiv:2202.08906, equation 5).

    Args:
      logits: float32[S, E], the router's.
    """
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
