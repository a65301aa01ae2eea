"""The mixture-of-experts layer (ST-MoE, arXiv:2202.08906): tokens travel to their experts and back.

Each device holds whole groups of tokens and its share of the experts. It routes its own tokens, exchanges them
along the mesh's `expert` axis so that each expert meets all tokens that chose it, and exchanges the results back:

    route -> dispatch -> all_to_all -> experts -> all_to_all -> combine

Nothing else is exchanged, unless experts themselves are divided along `tensor`, whose parts of the result are then
summed. Dispatch and combine move rows by index, in both directions of the derivative; at equal choices this is the
one-hot matrix product of the original, without its arithmetic.

Axes: b rows, t positions, d d_model; g groups of a device, S tokens of a group, K = top_k, E experts, C places
of an expert for one group, n devices along the `expert` axis.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from openmoe.model import counts, dropless, routing, sharding
from openmoe.model.config import ModelConfig
from openmoe.model.counts import Groups
from openmoe.model.gather import gather_rows
from openmoe.model.layers import GatedKernels, GatedWeights, gated_mlp
from openmoe.model.products import product
from openmoe.model.routing import Choices, RouterStatistics, RouterWeights, Routing
from openmoe.model.sharding import BATCH_AXES


class MoEOutput(NamedTuple):
    """The layer's output, and how it came about group by group."""

    y: Array  # float32[b, t, d]; zeros for a token that all its experts dropped
    statistics: RouterStatistics  # each with a leading axis of all groups
    routing: Routing  # each with a leading axis of all groups


class MoE(nn.Module):
    """The layer with its parameters: a router and `num_experts` gated blocks."""

    config: ModelConfig
    mesh: Mesh
    train: bool

    @nn.compact
    def __call__(self, x: Array, real: Array) -> MoEOutput:
        """Applies the layer to [b, t, d], rows divided over the batch axes of the mesh.

        Args:
          x: [b, t, d], normed.
          real: bool[b, t, 1], which of them are more than padding.
        """
        router = routing.Router(self.config, self.mesh, name="router")()
        experts = GatedKernels(self.config, self.mesh, self.config.num_experts, name="expert")()
        num_rows, row_len, _ = x.shape
        groups = counts.groups_of(self.config, num_rows, row_len)
        if groups.pad_rows or groups.pad_cols:
            padding = ((0, groups.pad_rows), (0, groups.pad_cols), (0, 0))
            x, real = jnp.pad(x, padding), jnp.pad(real, padding)

        tensor = sharding.tensor_axis(self.mesh)
        on_each_device = functools.partial(
            mixture_of_experts, config=self.config, groups=groups, train=self.train, tensor=tensor
        )
        by_rows = P(BATCH_AXES)
        output = jax.shard_map(
            on_each_device,
            mesh=self.mesh,
            in_specs=(by_rows, by_rows, P(), expert_specs(experts, tensor)),
            out_specs=by_rows,
        )(x, real, router, experts)
        return output._replace(y=output.y[:num_rows, :row_len])


def expert_specs(experts: GatedWeights, tensor: str | None) -> GatedWeights:
    """Returns how the kernels of experts lie on the mesh: by expert, and their inner width along tensor."""
    between = (None,) * (experts.wi_0.ndim - 2)  # d, and the two halves where they are apart
    return GatedWeights._make((P("expert", *between, tensor), P("expert", None, tensor), P("expert", tensor, None)))


def mixture_of_experts(
    x: Array,
    real: Array,
    router: RouterWeights,
    experts: GatedWeights,
    *,
    config: ModelConfig,
    groups: Groups,
    train: bool,
    tensor: str | None,
) -> MoEOutput:
    """Routes one device's tokens through the experts of all devices along the `expert` axis.

    Args:
      x: [b, t, d], this device's rows, a whole number of groups.
      real: bool[b, t, 1], which of them are more than padding.
      router: the same on all devices.
      experts: this device's E / n experts, or its slice of their inner width.
      config: of the model.
      groups: how rows are cut into them.
      train: which of the two capacities holds.
      tensor: the mesh axis over which experts are divided in themselves, if they are.
    """
    tokens = x.reshape(-1, groups.size, config.d_model)  # [g, S, d]
    logits = tokens.astype(jnp.float32) @ router.kernel  # float32[g, S, E]
    scores = routing.scores(logits, config)
    choose = functools.partial(routing.choose, bias=router.bias, config=config)
    choices = jax.vmap(lambda scores, real: choose(scores, real=real))(scores, real.reshape(tokens.shape[:2]))

    if config.dropless:
        routed, y = _without_drops(tokens, choices, experts, config)
    else:
        capacity = config.capacity(train=train, group_size=groups.size)
        routed, y = _within_capacity(tokens, choices, experts, config, capacity)
    if config.router == "sigmoid":
        scores = routing.shares(scores)
    statistics = jax.vmap(routing.statistics)(logits, scores, choices.asks, routed)
    if tensor is not None:
        y = jax.lax.psum(y, tensor)
    return MoEOutput(y.reshape(x.shape), statistics, routed)


def _within_capacity(
    tokens: Array, choices: Choices, experts: GatedWeights, config: ModelConfig, capacity: int
) -> tuple[Routing, Array]:
    """Answers those of the tokens [g, S, d] that get a place: float32[g, S, d]."""
    assign = functools.partial(routing.route, num_experts=config.num_experts, capacity=capacity)
    routed = jax.vmap(assign)(choices)
    sent = jax.vmap(dispatch, out_axes=1)(tokens, routed)  # [E, g, C, d]
    received = jax.lax.all_to_all(sent, "expert", split_axis=0, concat_axis=1, tiled=True)  # [E/n, n*g, C, d]
    rows = received.reshape(received.shape[0], -1, config.d_model)
    answers = gated_mlp(rows, experts, config.ffn, product)
    answers = answers.reshape(received.shape)
    returned = jax.lax.all_to_all(answers, "expert", split_axis=1, concat_axis=0, tiled=True)  # [E, g, C, d]
    return routed, jax.vmap(combine, in_axes=(1, 0))(returned, routed)


def _without_drops(
    tokens: Array, choices: Choices, experts: GatedWeights, config: ModelConfig
) -> tuple[Routing, Array]:
    """Answers all of the tokens [g, S, d] that ask: float32[g, S, d]. Groups do not matter here."""
    routed = jax.vmap(functools.partial(routing.route_all, num_experts=config.num_experts))(choices)
    flat = tokens.reshape(-1, tokens.shape[-1])
    answers = dropless.dropless_answers(
        flat,
        routed.expert_index.reshape(-1, config.top_k),
        routed.kept.reshape(-1, config.top_k),
        experts,
        num_experts=config.num_experts,
        mlp=lambda rows, weights, multiply: gated_mlp(rows, weights, config.ffn, multiply),
    )
    y = jnp.einsum("nk,nkd->nd", routed.gate.reshape(-1, config.top_k), answers)
    return routed, y.reshape(tokens.shape)


def dispatch(tokens: Array, routed: Routing) -> Array:
    """Puts the tokens [S, d] of a group into the places they got, [E, C, d]; empty places are zero."""
    top_k = routed.place.shape[-1]
    return gather_rows(tokens, routed.choice // top_k, routed.place)


def combine(answers: Array, routed: Routing) -> Array:
    """Sums the answers [E, C, d] to each token's choices, weighted by their gates: float32[S, d].

    The gates are as they were chosen: those of the choices that were kept do not make up for the others'.
    """
    places = answers.reshape(-1, answers.shape[-1])  # [E*C, d]
    answered = gather_rows(places, routed.place, routed.choice.reshape(-1, 1))  # [S, K, d]
    return jnp.einsum("sk,skd->sd", routed.gate, answered)
