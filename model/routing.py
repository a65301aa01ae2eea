"""Which token goes to which expert: tokens choose, experts have limited places (arXiv:2202.08906).

Everything here is about one group of tokens, which compete for the same places.
Axes: S tokens of the group, K = top_k choices of a token, E experts, C places of an expert (its capacity).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from openmoe.model import losses
from openmoe.model.config import ModelConfig
from openmoe.model.layers import Kernel
from openmoe.model.parameters import Normal, Zeros, declare

LEAST_SUM = 1e-18  # of a token's scores, to divide by


class Choices(NamedTuple):
    """What a group's tokens ask for."""

    expert_index: Array  # int32[S, K], best first; E where a token asks for none
    gate: Array  # float32[S, K], weight of each choice's answer
    asks: Array | None  # bool[S], whether a token asks at all; None: all do


class Routing(NamedTuple):
    """The choices of a group's tokens and the places they got.

    `place` and `choice` are each other's inverse. A choice has the number token * K + k, a place the number
    expert * C + c; the number S * K stands for no choice and E * C for no place.
    """

    expert_index: Array  # int32[S, K], best first; E where a token asks for none
    gate: Array  # float32[S, K], weight of each choice's answer
    kept: Array  # bool[S, K], whether the expert had a place left
    place: Array  # int32[S, K], where each choice went
    choice: Array  # int32[E, C], who sits in each place


def scores(logits: Array, config: ModelConfig) -> Array:
    """Returns float32[S, E], how well tokens and experts match, from the router's logits."""
    return jax.nn.softmax(logits) if config.router == "softmax" else jax.nn.sigmoid(logits)


def shares(scores: Array) -> Array:
    """Divides scores by their sum over the last axis; where sigmoids are so small that they have none, they stay so.

    Below about -41 in every logit the sum's square, by which the derivative divides, leaves float32, and then the sum.

    Args:
      scores: float32[..., n], none below 0.

    Returns:
      float32[..., n].
    """
    return scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), LEAST_SUM)


def choose(scores: Array, bias: Array | None, real: Array, config: ModelConfig) -> Choices:
    """Lets each token choose its top_k experts; equal scores go to the lower expert.

    Args:
      scores: float32[S, E].
      bias: float32[E], added to the scores for the choice alone, or None.
      real: bool[S], whether a token is more than padding.
      config: of the model.
    """
    if bias is None:
        gate, expert_index = jax.lax.top_k(scores, config.top_k)
    else:
        _, expert_index = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), config.top_k)
        gate = jnp.take_along_axis(scores, expert_index, axis=-1)
    if config.renormalize_gates:
        gate = shares(gate)
    if config.route_padding:
        return Choices(expert_index, gate, None)
    return Choices(jnp.where(real[:, None], expert_index, config.num_experts), gate, real)


def route(choices: Choices, *, num_experts: int, capacity: int) -> Routing:
    """Gives each token's choices places in the experts, first come, first served.

    All first choices come before any second choice, and tokens in their order within those. A choice whose expert is
    full is dropped.

    Args:
      choices: of the group's tokens.
      num_experts: E.
      capacity: places of an expert.
    """
    expert_index = choices.expert_index
    num_tokens, top_k = expert_index.shape
    num_choices = num_tokens * top_k

    queue = expert_index.T.reshape(num_choices)  # experts asked for, in order of precedence
    by_expert = jnp.argsort(queue, stable=True)  # places in the queue, experts together, precedence kept
    asked = choices_per_expert(expert_index, num_experts)
    start = jnp.cumsum(asked) - asked  # [E], where each expert's choices begin in by_expert

    rank = (jnp.argsort(by_expert) - start[queue]).reshape(top_k, num_tokens).T  # [S, K], before it in line
    kept = rank < capacity
    if choices.asks is not None:
        kept &= choices.asks[:, None]
    place = jnp.where(kept, expert_index * capacity + rank, num_experts * capacity)

    occupant = by_expert.at[start[:, None] + jnp.arange(capacity)].get(mode="fill", fill_value=0)  # [E, C]
    occupied = jnp.arange(capacity) < asked[:, None]
    choice = jnp.where(occupied, occupant % num_tokens * top_k + occupant // num_tokens, num_choices)
    return Routing(expert_index, choices.gate, kept, place, choice)


def route_all(choices: Choices, *, num_experts: int) -> Routing:
    """Keeps every choice, as dropless experts do; places are not told apart."""
    shape = choices.expert_index.shape
    kept = jnp.ones(shape, bool) if choices.asks is None else jnp.broadcast_to(choices.asks[:, None], shape)
    nowhere = jnp.zeros(shape, jnp.int32)
    return Routing(choices.expert_index, choices.gate, kept, nowhere, jnp.zeros((num_experts, 0), jnp.int32))


def choices_per_expert(expert_index: Array, num_experts: int) -> Array:
    """Returns int32[E], how many of the choices int32[S, K] ask for each expert."""
    return jnp.sum(expert_index[..., None] == jnp.arange(num_experts), axis=(0, 1))


class RouterStatistics(NamedTuple):
    """What the losses and metrics need to know of one group, or of many (`mean_over_groups`)."""

    asking: Array  # float32[], tokens that ask
    aux_loss: Array  # float32[], K at perfect balance
    router_z_loss: Array  # float32[]
    load: Array  # float32[E], share of the choices that ask for each expert
    kept: Array  # float32[], share of the choices that got a place
    left_behind: Array  # float32[], share of the tokens none of whose choices got a place
    kept_gate: Array  # float32[], sum of the gates of the choices that got a place, per choice
    usage: Array  # float32[], share of the places that are taken
    entropy: Array  # float32[], mean over tokens of `entropies`


def statistics(logits: Array, scores: Array, asks: Array | None, routing: Routing) -> RouterStatistics:
    """Returns the statistics of one group; tokens that do not ask count in none of them.

    Args:
      logits: float32[S, E], the router's.
      scores: float32[S, E], of which a token's sum to 1 (`shares`).
      asks: bool[S], or None: all tokens do.
      routing: of the group.
    """
    num_tokens, num_experts = scores.shape
    top_k = routing.expert_index.shape[1]
    asking = None if asks is None else asks.astype(jnp.float32)
    tokens = num_tokens if asking is None else jnp.maximum(jnp.sum(asking), 1)
    asked = choices_per_expert(routing.expert_index, num_experts).astype(jnp.float32)
    kept = jnp.sum(routing.kept, dtype=jnp.float32)
    served = jnp.sum(jnp.any(routing.kept, axis=-1), dtype=jnp.float32)
    places = routing.choice.size or tokens * top_k
    return RouterStatistics(
        asking=jnp.float32(num_tokens) if asking is None else jnp.sum(asking),
        aux_loss=losses.load_balancing_loss(scores, asked / tokens, asking),
        router_z_loss=losses.router_z_loss(logits, asking),
        load=asked / (tokens * top_k),
        kept=kept / (tokens * top_k),
        left_behind=1 - served / tokens,
        kept_gate=jnp.sum(routing.gate * routing.kept) / (tokens * top_k),
        usage=kept / places,
        entropy=jnp.sum(entropies(scores) if asking is None else entropies(scores) * asking) / tokens,
    )


def mean_over_groups(groups: RouterStatistics, config: ModelConfig) -> RouterStatistics:
    """Returns the statistics of many groups together, or of parts of a batch.

    Where padding does not ask, they count by the tokens that do: one of nothing but padding counts for nothing.

    Args:
      groups: theirs, along a leading axis.
      config: of the model.

    Returns:
      Means over that axis; of `asking` the sum.
    """
    asking = jnp.sum(groups.asking)
    if config.route_padding:
        means = jax.tree.map(lambda values: values.mean(axis=0), groups)
    else:
        shares = groups.asking / jnp.maximum(asking, 1)
        means = jax.tree.map(functools.partial(jnp.tensordot, shares, axes=1, precision="highest"), groups)
    return means._replace(asking=asking)


def entropies(scores: Array) -> Array:
    """Returns the entropy of each token's shares float32[S, E] of the experts, over an even one's: float32[S].

    It is 1 where a token could as well go to any expert, 0 where but one comes into question. It has no derivative.
    """
    shares = jax.lax.stop_gradient(scores)
    return jnp.sum(jax.scipy.special.entr(shares), axis=-1) / math.log(max(scores.shape[-1], 2))


class RouterWeights(NamedTuple):
    """The router's parameters."""

    kernel: Array  # float32[d_model, E]
    bias: Array | None  # float32[E], of the choice; moved by `step.balanced`, not by gradients


class Router(nn.Module):
    """Declares the router's kernel where T5X keeps it, router_weights/w/kernel, and the bias if there is one."""

    config: ModelConfig
    mesh: Mesh

    @nn.compact
    def __call__(self) -> RouterWeights:
        """Returns the parameters."""
        kernel = _RouterKernel(self.config, self.mesh, name="router_weights")()
        if not self.config.router_bias_rate:
            return RouterWeights(kernel, None)
        bias = self.param("bias", declare((self.config.num_experts,), ("unmodeled",), Zeros()))
        return RouterWeights(kernel, bias)


class _RouterKernel(nn.Module):
    config: ModelConfig
    mesh: Mesh

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.config.d_model, self.config.num_experts)
        return Kernel(shape, ("embed", "unmodeled"), Normal(0.02), self.mesh, name="w")()
