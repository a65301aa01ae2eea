"""Which token goes to which expert: tokens choose, experts have limited places (arXiv:2202.08906).

Everything here is about one group of tokens, which compete for the same places.
Axes: S tokens of the group, K = top_k choices of a token, E experts, C places of an expert (its capacity).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from openmoe.model import losses
from openmoe.model.config import ModelConfig
from openmoe.model.layers import Kernel
from openmoe.model.parameters import Normal


class Routing(NamedTuple):
    """The choices of a group's tokens and the places they got.

    `place` and `choice` are each other's inverse. A choice has the number token * K + k, a place the number
    expert * C + c; the number S * K stands for no choice and E * C for no place.
    """

    expert_index: Array  # int32[S, K], best first
    gate: Array  # float32[S, K], probabilities of those experts over all experts; they do not sum to 1
    kept: Array  # bool[S, K], whether the expert had a place left
    place: Array  # int32[S, K], where each choice went
    choice: Array  # int32[E, C], who sits in each place


def route(probs: Array, *, top_k: int, capacity: int) -> Routing:
    """Gives each token's choices places in the experts, first come, first served.

    All first choices come before any second choice, and tokens in their order within those. Equal probabilities
    go to the lower expert. A choice whose expert is full is dropped.

    Args:
      probs: float32[S, E], rows sum to 1.
      top_k: experts each token asks for.
      capacity: places of an expert.
    """
    num_tokens, num_experts = probs.shape
    num_choices = num_tokens * top_k
    gate, expert_index = jax.lax.top_k(probs, top_k)

    queue = expert_index.T.reshape(num_choices)  # experts asked for, in order of precedence
    by_expert = jnp.argsort(queue, stable=True)  # places in the queue, experts together, precedence kept
    asked = choices_per_expert(expert_index, num_experts)
    start = jnp.cumsum(asked) - asked  # [E], where each expert's choices begin in by_expert

    rank = (jnp.argsort(by_expert) - start[queue]).reshape(top_k, num_tokens).T  # [S, K], before it in line
    kept = rank < capacity
    place = jnp.where(kept, expert_index * capacity + rank, num_experts * capacity)

    occupant = by_expert.at[start[:, None] + jnp.arange(capacity)].get(mode="fill", fill_value=0)  # [E, C]
    occupied = jnp.arange(capacity) < asked[:, None]
    choice = jnp.where(occupied, occupant % num_tokens * top_k + occupant // num_tokens, num_choices)
    return Routing(expert_index, gate, kept, place, choice)


def choices_per_expert(expert_index: Array, num_experts: int) -> Array:
    """Returns int32[E], how many of the choices int32[S, K] ask for each expert."""
    return jnp.sum(expert_index[..., None] == jnp.arange(num_experts), axis=(0, 1))


class RouterStatistics(NamedTuple):
    """What the losses and metrics need to know of one group; groups are equal, so their mean is the batch's."""

    aux_loss: Array  # float32[], K at perfect balance
    router_z_loss: Array  # float32[]
    load: Array  # float32[E], share of the choices that ask for each expert
    kept: Array  # float32[], share of the choices that got a place
    left_behind: Array  # float32[], share of the tokens none of whose choices got a place
    kept_gate: Array  # float32[], sum of the gates of the choices that got a place, per choice
    usage: Array  # float32[], share of the places that are taken


def statistics(logits: Array, probs: Array, routing: Routing) -> RouterStatistics:
    """Returns the statistics of one group, whose router logits are float32[S, E]."""
    num_tokens, num_experts = probs.shape
    asked = choices_per_expert(routing.expert_index, num_experts).astype(jnp.float32)
    return RouterStatistics(
        aux_loss=losses.load_balancing_loss(probs, asked / num_tokens),
        router_z_loss=losses.router_z_loss(logits),
        load=asked / routing.expert_index.size,
        kept=jnp.mean(routing.kept, dtype=jnp.float32),
        left_behind=1 - jnp.mean(jnp.any(routing.kept, axis=-1), dtype=jnp.float32),
        kept_gate=jnp.mean(routing.gate * routing.kept),
        usage=jnp.sum(routing.kept, dtype=jnp.float32) / routing.choice.size,
    )


class Router(nn.Module):
    """Declares the router's kernel, float32[d_model, E], where T5X keeps it: router_weights/w/kernel."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        """Returns the kernel."""
        return _RouterWeights(self.config, name="router_weights")()


class _RouterWeights(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.d_model, self.config.num_experts)
        return Kernel(shape, ("embed", "unmodeled"), Normal(0.02), name="w")()
