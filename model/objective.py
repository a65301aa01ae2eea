"""What a step differentiates: the loss of each microbatch, in parts, and the metrics that come with it.

Losses, their normalisers and routing groups are formed inside each microbatch; the gradients of the microbatches are
summed, not averaged, as the original does. What a microbatch is cut into besides changes only the order of sums.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from openmoe.model import layers, losses, routing, sharding, transformer
from openmoe.model.config import PLAIN, ExecutionConfig, ModelConfig
from openmoe.model.routing import RouterStatistics

Batch = dict[str, Array]  # input_ids, target_ids, segment_ids, positions int32; loss_weights float32
Metrics = dict[str, Array]


def gradients(
    config: ModelConfig, mesh: Mesh, params: Any, batch: Batch, execution: ExecutionConfig = PLAIN
) -> tuple[Any, Metrics]:
    """Returns the gradients summed over the microbatches, and the metrics of the whole batch."""
    parts_each = execution.accumulation_steps
    normalizers = jnp.sum(batch["loss_weights"], axis=(1, 2))
    if not config.normalize_loss:
        normalizers = jnp.ones_like(normalizers)
    asking = jnp.sum(jax.vmap(layers.real_positions)(batch["input_ids"]), axis=(1, 2))
    of_microbatch = {"normalizers": normalizers, "asking": jnp.maximum(asking, 1)}
    parts = in_parts(batch, parts_each, mesh) | {k: jnp.repeat(v, parts_each) for k, v in of_microbatch.items()}

    def one_more(summed: Any, part: Batch) -> tuple[Any, LossParts]:
        loss = functools.partial(total_loss, config, mesh, num_parts=parts_each, execution=execution)
        (_, of_part), grads = jax.value_and_grad(loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, summed, grads), of_part

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, of_parts = jax.lax.scan(one_more, zeros, parts)
    return grads, _metrics_of_batch(config, of_parts, parts_each)


def in_parts(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Cuts [microbatches, rows, seq] into [microbatches * parts, rows / parts, seq].

    Each device cuts its own rows, so that nothing is exchanged and routing groups stay as they are.
    """
    if parts == 1:
        return batch
    shares = sharding.num_batch_shares(mesh)

    def cut(x: Array) -> Array:
        num_micro, num_rows, seq_len = x.shape
        apart = x.reshape(num_micro, shares, parts, -1, seq_len).swapaxes(1, 2)
        joined = apart.reshape(num_micro * parts, num_rows // parts, seq_len)
        return jax.lax.with_sharding_constraint(joined, sharding.batch_sharding(mesh))

    return jax.tree.map(cut, batch)


class LossParts(NamedTuple):
    """What the loss of a microbatch, or of a part of it, is made of. Sums are over loss-carrying positions."""

    total: Array  # float32[], what is differentiated
    cross_entropy: Array  # float32[], sum
    text_cross_entropy: Array  # float32[], sum where the target is a piece of text, not a sentinel
    z: Array  # float32[], sum of the z-losses, before their weight
    tokens: Array  # float32[], loss-carrying positions
    text_tokens: Array  # float32[], those whose target is a piece of text
    router: tuple[RouterStatistics, ...]  # of each MoE layer, over its groups, before their weights


def total_loss(
    config: ModelConfig, mesh: Mesh, params: Any, batch: Batch, *, num_parts: int, execution: ExecutionConfig
) -> tuple[Array, LossParts]:
    """Returns the loss of a microbatch, or of one of the equal parts that it is cut into; these sum to it.

    Args:
      config: of the model.
      mesh: over whose devices rows, experts and parameters are divided.
      params: of the model, as `execution` arranges them.
      batch: arrays [rows, seq], and of the whole microbatch `normalizers`, float32[], the sum of its loss weights, or
        1, and `asking`, int32[], its tokens that are more than padding.
      num_parts: parts of a microbatch.
      execution: how it is carried out.
    """
    output = transformer.forward(config, mesh, params, batch, train=True, execution=execution)
    head, weights = transformer.head_of(params), batch["loss_weights"]
    total, per_token = losses.vocabulary_loss(
        output.hidden, head, batch["target_ids"], weights, z_loss_weight=config.z_loss_weight, mesh=mesh
    )
    text_weights = weights * (batch["target_ids"] < config.text_vocab_size)
    router = tuple(routing.mean_over_groups(layer.statistics, config) for layer in output.moe)

    total /= batch["normalizers"]
    for layer in router:
        of_layer = config.aux_loss_weight * layer.aux_loss + config.router_z_loss_weight * layer.router_z_loss
        if not config.route_padding:
            of_layer *= num_parts * layer.asking / batch["asking"]  # parts count as groups do
        total += of_layer / (config.num_moe_layers * num_parts)
    return total, LossParts(
        total=total,
        cross_entropy=jnp.sum(weights * per_token.cross_entropy),
        text_cross_entropy=jnp.sum(text_weights * per_token.cross_entropy),
        z=jnp.sum(weights * per_token.z),
        tokens=jnp.sum(weights),
        text_tokens=jnp.sum(text_weights),
        router=router,
    )


def _metrics_of_batch(config: ModelConfig, parts: LossParts, parts_each: int) -> Metrics:
    """Sums up all parts of all microbatches (leading axis). Losses are means over positions, unweighted.

    A dense model has none of the router's metrics.
    """
    tokens = jnp.sum(parts.tokens)
    metrics = {
        "loss": jnp.sum(parts.cross_entropy) / tokens,
        "text_loss": jnp.sum(parts.text_cross_entropy) / jnp.sum(parts.text_tokens),
        "z_loss": jnp.sum(parts.z) / tokens,
        "total_loss": jnp.mean(parts.total) * parts_each,
        "loss_tokens": tokens,
    }
    return metrics | _router_metrics(config, parts.router) if parts.router else metrics


def _router_metrics(config: ModelConfig, of_layers: tuple[RouterStatistics, ...]) -> Metrics:
    """Means over parts and MoE layers; the load of each expert and the router's entropy layer by layer."""
    means = [routing.mean_over_groups(parts, config) for parts in of_layers]
    by_layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *means)  # [num_moe_layers, ...]
    return {
        "aux_loss": jnp.mean(by_layer.aux_loss),
        "router_z_loss": jnp.mean(by_layer.router_z_loss),
        "drop_fraction": 1 - jnp.mean(by_layer.kept),
        "tokens_left_behind": jnp.mean(by_layer.left_behind),
        "router_confidence": jnp.mean(by_layer.kept_gate / by_layer.kept),
        "expert_usage": jnp.mean(by_layer.usage),
        "expert_load": by_layer.load,
        "router_entropy": by_layer.entropy,
    }
