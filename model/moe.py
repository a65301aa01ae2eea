"""The mixture-of-experts layer (ST-MoE, arXiv:2202.08906): tokens travel to their experts and back.

Each device holds whole groups of tokens and its share of the experts. It routes its own tokens, exchanges them
along the mesh's `expert` axis so that each expert meets all tokens that chose it, and exchanges the results back:

    route -> dispatch -> all_to_all -> experts -> all_to_all -> combine

Nothing else is exchanged. Dispatch and combine move rows by index, in both directions of the derivative; at
equal choices this is the one-hot matrix product of the original, without its arithmetic.

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

from openmoe.model import routing
from openmoe.model.config import ModelConfig
from openmoe.model.layers import GatedKernels, GatedWeights, gated_mlp
from openmoe.model.routing import RouterStatistics, Routing
from openmoe.model.sharding import AXES


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
    def __call__(self, x: Array) -> MoEOutput:
        """Applies the layer to [b, t, d], rows divided over all devices of the mesh."""
        router = routing.Router(self.config, name="router")()
        experts = GatedKernels(self.config, self.config.num_experts, name="expert")()
        on_each_device = functools.partial(mixture_of_experts, config=self.config, train=self.train)
        by_rows = P(AXES)
        return jax.shard_map(on_each_device, mesh=self.mesh, in_specs=(by_rows, P(), P("expert")), out_specs=by_rows)(
            x, router, experts
        )


def mixture_of_experts(
    x: Array, router: Array, experts: GatedWeights, *, config: ModelConfig, train: bool
) -> MoEOutput:
    """Routes one device's tokens through the experts of all devices along the `expert` axis.

    Args:
      x: [b, t, d], this device's rows, a whole number of groups.
      router: float32[d, E], the same on all devices.
      experts: this device's E / n experts.
      config: of the model.
      train: which of the two capacities holds.
    """
    groups = x.reshape(-1, config.group_size, config.d_model)  # [g, S, d]
    logits = groups.astype(jnp.float32) @ router  # float32[g, S, E]
    probs = jax.nn.softmax(logits)
    assign = functools.partial(routing.route, top_k=config.top_k, capacity=config.capacity(train=train))
    routed = jax.vmap(assign)(probs)

    sent = jax.vmap(dispatch)(groups, routed)  # [g, E, C, d]
    received = jax.lax.all_to_all(sent, "expert", split_axis=1, concat_axis=0, tiled=True)  # [n*g, E/n, C, d]
    answers = gated_mlp(received, experts)
    returned = jax.lax.all_to_all(answers, "expert", split_axis=0, concat_axis=1, tiled=True)  # [g, E, C, d]
    y = jax.vmap(combine)(returned, routed)  # float32[g, S, d]

    return MoEOutput(y.reshape(x.shape), jax.vmap(routing.statistics)(logits, probs, routed), routed)


def dispatch(tokens: Array, routed: Routing) -> Array:
    """Puts the tokens [S, d] of a group into the places they got, [E, C, d]; empty places are zero."""
    top_k = routed.place.shape[-1]
    return gather_rows(tokens, routed.choice // top_k, routed.place)


def combine(answers: Array, routed: Routing) -> Array:
    """Sums the answers [E, C, d] to each token's choices, weighted by their gates: float32[S, d].

    The gates are not normalised, neither over a token's choices nor over those that were kept.
    """
    places = answers.reshape(-1, answers.shape[-1])  # [E*C, d]
    answered = gather_rows(places, routed.place, routed.choice.reshape(-1, 1))  # [S, K, d]
    return jnp.einsum("sk,skd->sd", routed.gate, answered)


@jax.custom_vjp
def gather_rows(rows: Array, source: Array, readers: Array) -> Array:
    """Returns rows[source], with zeros where source is len(rows).

    Its derivative is again a gather, because the readers of each row are known: unlike the scatter-add that
    autodiff would write, it is quick on a CPU and always sums in the same order on a GPU.

    Args:
      rows: [n, d].
      source: int32[...], the row that each output reads, or n for none.
      readers: int32[n, m], the (flattened) outputs that read each row, or their number for none.
    """
    return rows.at[source].get(mode="fill", fill_value=0)


def _gather_rows_forward(rows: Array, source: Array, readers: Array) -> tuple[Array, Array]:
    return gather_rows(rows, source, readers), readers


def _gather_rows_backward(readers: Array, cotangent: Array) -> tuple[Array, None, None]:
    flat = cotangent.reshape(-1, cotangent.shape[-1])
    return flat.at[readers].get(mode="fill", fill_value=0).sum(axis=1), None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)
