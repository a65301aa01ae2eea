"""One training step: (state, batch) -> (state, metrics), and the state it starts from.

A batch is an array [microbatches, rows, seq] for each key. Losses, their normalisers and routing groups are
formed inside each microbatch; the gradients of the microbatches are summed, not averaged, as the original does.
No randomness: the original trains without dropout and jitter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from openmoe.model import losses, optimizer, parameters, sharding, transformer
from openmoe.model.config import ModelConfig, OptimizerConfig
from openmoe.model.routing import RouterStatistics
from openmoe.model.transformer import Transformer

Batch = dict[str, Array]  # input_ids, target_ids, segment_ids, positions int32; loss_weights float32
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that a run carries from step to step, besides its position in the data."""

    step: Array  # int32[], steps taken
    params: Any  # float32, named as in T5X checkpoints
    opt_state: Any  # optimizer.AdafactorState


def init_state(config: ModelConfig, optimizer_config: OptimizerConfig, seed: int, mesh: Mesh) -> TrainState:
    """Draws the parameters where they will live; the same numbers on any mesh."""
    layout = _layout(config, optimizer_config, mesh)
    params = parameters.draw(declarations(config, mesh), layout.params, seed)
    transform = optimizer.adafactor(optimizer_config, parameters.roles_of(declarations(config, mesh)))
    opt_state = jax.jit(transform.init, out_shardings=layout.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), layout.step), params, opt_state)


def state_shapes(config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Returns the state's shapes, types and shardings without its numbers, for restoring one."""
    declared = declarations(config, mesh)
    params, roles = nn.unbox(declared), parameters.roles_of(declared)
    opt_state = jax.eval_shape(optimizer.adafactor(optimizer_config, roles).init, params)
    opt_roles = optimizer.state_roles(optimizer_config, roles, params)

    def on_mesh(shapes: Any, roles: Any) -> Any:
        layout = sharding.shardings(mesh, roles)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layout)

    count = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(on_mesh(count, PartitionSpec()), on_mesh(params, roles), on_mesh(opt_state, opt_roles))


def _layout(config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state_shapes(config, optimizer_config, mesh))


@functools.cache
def declarations(config: ModelConfig, mesh: Mesh) -> Any:
    """Returns the parameters' tree with an abstract `parameters.Parameter` in place of arrays."""
    ids = jax.ShapeDtypeStruct((mesh.size, config.group_size), jnp.int32)  # any whole groups do
    init = Transformer(config, mesh, train=True).init
    return jax.eval_shape(init, jax.random.key(0), ids, ids, ids)["params"]


def make_train_step(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled step, which consumes the state it is given.

    Rows of a microbatch must divide over the mesh's devices so that each holds whole routing groups.
    """
    transform = optimizer.adafactor(optimizer_config, parameters.roles_of(declarations(config, mesh)))
    rate = optimizer.learning_rate(optimizer_config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(config, mesh, state.params, batch)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        metrics["grad_norm"] = jnp.asarray(optax.tree.norm(grads))
        metrics["learning_rate"] = jnp.asarray(rate(state.step))
        metrics["batch_checksum"] = batch_checksum(batch)
        return TrainState(state.step + 1, params, opt_state), metrics

    layout = _layout(config, optimizer_config, mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(layout, sharding.replicated(mesh)),
    )


def gradients(config: ModelConfig, mesh: Mesh, params: Any, batch: Batch) -> tuple[Any, Metrics]:
    """Returns the gradients summed over the microbatches, and the metrics of the whole batch."""

    def one_more(summed: Any, microbatch: Batch) -> tuple[Any, LossParts]:
        (_, parts), grads = jax.value_and_grad(total_loss, argnums=2, has_aux=True)(config, mesh, params, microbatch)
        return jax.tree.map(jnp.add, summed, grads), parts

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, parts = jax.lax.scan(one_more, zeros, batch)
    return grads, _metrics_of_batch(parts)


class LossParts(NamedTuple):
    """What one microbatch's loss is made of. Sums are over loss-carrying positions."""

    total: Array  # float32[], what is differentiated
    cross_entropy: Array  # float32[], sum
    text_cross_entropy: Array  # float32[], sum where the target is a piece of text, not a sentinel
    z: Array  # float32[], sum of the z-losses, before their weight
    tokens: Array  # float32[], loss-carrying positions
    text_tokens: Array  # float32[], those whose target is a piece of text
    router: tuple[RouterStatistics, ...]  # of each MoE layer, means over its groups, before their weights


def total_loss(config: ModelConfig, mesh: Mesh, params: Any, batch: Batch) -> tuple[Array, LossParts]:
    """Returns the loss of one microbatch [rows, seq], and its parts."""
    output = transformer.forward(config, mesh, params, batch, train=True)
    head, weights = transformer.head_of(params), batch["loss_weights"]
    total, per_token = losses.vocabulary_loss(
        output.hidden, head, batch["target_ids"], weights, z_loss_weight=config.z_loss_weight, mesh=mesh
    )
    text_weights = weights * (batch["target_ids"] < config.text_vocab_size)
    router = tuple(jax.tree.map(lambda groups: groups.mean(axis=0), layer.statistics) for layer in output.moe)

    total /= jnp.sum(weights) if config.normalize_loss else 1.0
    for layer in router:
        of_layer = config.aux_loss_weight * layer.aux_loss + config.router_z_loss_weight * layer.router_z_loss
        total += of_layer / config.num_moe_layers
    return total, LossParts(
        total=total,
        cross_entropy=jnp.sum(weights * per_token.cross_entropy),
        text_cross_entropy=jnp.sum(text_weights * per_token.cross_entropy),
        z=jnp.sum(weights * per_token.z),
        tokens=jnp.sum(weights),
        text_tokens=jnp.sum(text_weights),
        router=router,
    )


def _metrics_of_batch(parts: LossParts) -> Metrics:
    """Sums up the microbatches (leading axis of every part). Losses are means over positions, unweighted.

    A dense model has none of the router's metrics.
    """
    tokens = jnp.sum(parts.tokens)
    metrics = {
        "loss": jnp.sum(parts.cross_entropy) / tokens,
        "text_loss": jnp.sum(parts.text_cross_entropy) / jnp.sum(parts.text_tokens),
        "z_loss": jnp.sum(parts.z) / tokens,
        "total_loss": jnp.mean(parts.total),
        "loss_tokens": tokens,
    }
    return metrics | _router_metrics(parts.router) if parts.router else metrics


def _router_metrics(layers: tuple[RouterStatistics, ...]) -> Metrics:
    """Means over microbatches and MoE layers; the load of each expert also layer by layer."""
    by_layer = jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(axis=1), *layers)  # [num_moe_layers, ...]
    return {
        "aux_loss": jnp.mean(by_layer.aux_loss),
        "router_z_loss": jnp.mean(by_layer.router_z_loss),
        "drop_fraction": 1 - jnp.mean(by_layer.kept),
        "tokens_left_behind": jnp.mean(by_layer.left_behind),
        "router_confidence": jnp.mean(by_layer.kept_gate / by_layer.kept),
        "expert_usage": jnp.mean(by_layer.usage),
        "expert_load": by_layer.load,
    }


def batch_checksum(batch: Batch) -> Array:
    """Returns uint32[2], two wrapping sums of hashes of the rows: inputs, targets and loss weights.

    It does not depend on the order of the rows nor on how they lie on devices, and can be taken of NumPy arrays
    as well.
    """
    position = jnp.arange(batch["input_ids"].shape[-1], dtype=jnp.uint32)
    word = _mix(batch["input_ids"].astype(jnp.uint32) ^ _mix(position))
    word = _mix(batch["target_ids"].astype(jnp.uint32) ^ word)
    word = _mix(batch["loss_weights"].astype(jnp.float32).view(jnp.uint32) ^ word)
    row = word.sum(axis=-1, dtype=jnp.uint32)
    return jnp.stack([_mix(row ^ jnp.uint32(salt)).sum(dtype=jnp.uint32) for salt in (0, 0x9E3779B9)])


def _mix(word: Array) -> Array:
    """Spreads every bit of uint32 words over all others (the finaliser of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
