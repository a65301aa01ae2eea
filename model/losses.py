"""The parts of the training loss, each a plain function; their weights are the caller's.

Axes: b batch, t positions, d d_model, v vocabulary, n positions of a block; in the router's losses S tokens of a
group, K = top_k, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from openmoe.model import sharding
from openmoe.model.counts import BLOCK_LOGITS, CPU_BLOCK_POSITIONS
from openmoe.model.products import product
from openmoe.model.sharding import BATCH_AXES


class TokenLosses(NamedTuple):
    """Losses at every position, not yet weighted."""

    cross_entropy: Array  # float32[...]
    z: Array  # float32[...], the squared logarithm of the softmax's denominator


def token_losses(logits: Array, target_ids: Array, axis: str | None = None) -> TokenLosses:
    """Returns the cross-entropy and the z-loss (arXiv:2204.02311, section 5) at every position.

    Args:
      logits: float32[..., v], or a device's slice of the vocabulary.
      target_ids: int32[...].
      axis: of the mesh, over which the vocabulary is divided; inside a `shard_map`.
    """
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    first_id = 0
    if axis is not None:
        largest = jax.lax.pmax(largest, axis)
        first_id = jax.lax.axis_index(axis) * logits.shape[-1]
    # A comparison, not a gather: its gradient fuses with that of logsumexp and needs no scatter.
    is_target = first_id + jnp.arange(logits.shape[-1]) == target_ids[..., None]  # [..., v]
    sums = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    denominator, target_logit = sums if axis is None else jax.lax.psum(sums, axis)
    log_z = largest + jnp.log(denominator)
    return TokenLosses(cross_entropy=log_z - target_logit, z=jnp.square(log_z))


def vocabulary_loss(
    hidden: Array,
    head: Array,
    target_ids: Array,
    weights: Array,
    *,
    z_loss_weight: float,
    mesh: Mesh,
    block_logits: int = BLOCK_LOGITS,
) -> tuple[Array, TokenLosses]:
    """Sums weights * (cross-entropy + z_loss_weight * z-loss) without ever holding the logits of all positions.

    Each device takes its positions block by block and, where a gradient is wanted, forms that of a block while it
    has the block's logits: as many products as without blocks, none of them twice.

    Args:
      hidden: float32[b, t, d], rows divided over the batch axes of the mesh.
      head: float32[d, v], the vocabulary divided over its tensor axis.
      target_ids: int32[b, t].
      weights: float32[b, t].
      z_loss_weight: of the z-loss.
      mesh: over whose devices rows are divided.
      block_logits: most logits that a device forms at a time, unless a single position has more; see `num_blocks`.

    Returns:
      The sum, float32[], whose gradient flows to `hidden` and `head` alone, and the losses at every position,
      float32[b, t], through which none flows.
    """
    tensor = sharding.tensor_axis(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    blocks_of = functools.partial(num_blocks, block_logits=block_logits, on_cpu=on_cpu)
    of_device = functools.partial(_loss_of_device, z_loss_weight, blocks_of, tensor)
    by_rows = P(BATCH_AXES)
    in_specs = (by_rows, P(None, tensor), by_rows, by_rows)
    head = sharding.whole(head, ("embed", "vocab"), mesh)
    sums, per_token = jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=by_rows)(
        hidden, head, target_ids, weights
    )
    return jnp.sum(sums), jax.lax.stop_gradient(per_token)


def _loss_of_device(
    z_loss_weight: float,
    blocks_of: Callable[[int, int], int],
    tensor: str | None,
    hidden: Array,
    head: Array,
    target_ids: Array,
    weights: Array,
) -> tuple[Array, TokenLosses]:
    """Returns the sum over this device's positions, float32[1], and their losses, float32[b, t]."""
    blocks = blocks_of(target_ids.size, head.shape[1])
    by_block = [x.reshape(blocks, -1, *x.shape[2:]) for x in (hidden, target_ids, weights)]
    head = jax.lax.pcast(head, BATCH_AXES, to="varying")  # so that the devices' gradients are summed once, at the end
    total, per_token = _loss_of_blocks(z_loss_weight, tensor, head, *by_block)
    return total[None], jax.tree.map(lambda x: x.reshape(target_ids.shape), per_token)


def num_blocks(num_positions: int, vocab_size: int, block_logits: int = BLOCK_LOGITS, *, on_cpu: bool = False) -> int:
    """Returns into how many equal blocks the positions divide.

    As few as have at most block_logits logits. On a CPU as many as still have CPU_BLOCK_POSITIONS positions, if that is
    more: there the logits' way to memory and back takes longer than one more addition to the head's gradient.
    """
    most = max(block_logits // vocab_size, 1)  # positions of a block
    divisors = [k for k in range(1, num_positions + 1) if num_positions % k == 0]
    fewest = next(k for k in divisors if num_positions // k <= most)
    if not on_cpu:
        return fewest
    return max(fewest, *(k for k in divisors if num_positions // k >= min(CPU_BLOCK_POSITIONS, num_positions)))


def _loss_of_block(
    z_loss_weight: float, tensor: str | None, head: Array, hidden: Array, target_ids: Array, weights: Array
) -> tuple[Array, TokenLosses]:
    per_token = token_losses(product(hidden, head), target_ids, tensor)
    return jnp.sum(weights * (per_token.cross_entropy + z_loss_weight * per_token.z)), per_token


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_of_blocks(
    z_loss_weight: float, tensor: str | None, head: Array, hidden: Array, target_ids: Array, weights: Array
) -> tuple[Array, TokenLosses]:
    """Returns the sum, float32[], and the losses [blocks, n] of hidden [blocks, n, d] and its like."""
    of_block = functools.partial(_loss_of_block, z_loss_weight, tensor, head)
    totals, per_token = jax.lax.map(lambda block: of_block(*block), (hidden, target_ids, weights))
    return jnp.sum(totals), per_token


def _loss_of_blocks_forward(
    z_loss_weight: float, tensor: str | None, head: Array, hidden: Array, target_ids: Array, weights: Array
) -> tuple[tuple[Array, TokenLosses], tuple[Array, Array]]:
    of_block = functools.partial(_loss_of_block, z_loss_weight, tensor)
    with_gradient = jax.value_and_grad(of_block, argnums=(0, 1), has_aux=True)

    def one_more(of_head: Array, block: tuple[Array, ...]) -> tuple[Array, Any]:
        (total, per_token), (more_of_head, of_hidden) = with_gradient(head, *block)
        return of_head + more_of_head, (total, per_token, of_hidden)

    of_head, (totals, per_token, of_hidden) = jax.lax.scan(
        one_more, jnp.zeros_like(head), (hidden, target_ids, weights)
    )
    return (jnp.sum(totals), per_token), (of_head, of_hidden)


def _loss_of_blocks_backward(
    z_loss_weight: float,
    tensor: str | None,
    gradient: tuple[Array, Array],
    cotangents: tuple[Array, TokenLosses],
) -> tuple[Array, Array, None, None]:
    of_head, of_hidden = gradient
    return cotangents[0] * of_head, cotangents[0] * of_hidden, None, None


_loss_of_blocks.defvjp(_loss_of_blocks_forward, _loss_of_blocks_backward)


def load_balancing_loss(scores: Array, load: Array, asking: Array | None = None) -> Array:
    """Auxiliary loss of one group (arXiv:2101.03961, equation 4); K at perfect balance.

    Args:
      scores: float32[S, E], the router's, of which a token's sum to 1.
      load: float32[E], share of the tokens that ask for each expert, before any is dropped; sums to K.
      asking: float32[S], 1 for tokens that count and 0 for others; None: all do.

    Returns:
      float32[]; its gradient flows through `scores` alone.
    """
    return scores.shape[-1] * jnp.sum(load * mean_over(scores, asking))


def router_z_loss(logits: Array, asking: Array | None = None) -> Array:
    """Mean squared logarithm of the softmax's denominator (arXiv:2202.08906, equation 5).

    Args:
      logits: float32[S, E], the router's.
      asking: as above.
    """
    return mean_over(jnp.square(jax.nn.logsumexp(logits, axis=-1)), asking)


def mean_over(values: Array, asking: Array | None) -> Array:
    """Returns the mean over the first axis, of those that `asking` weighs with 1; 0 where there are none."""
    if asking is None:
        return jnp.mean(values, axis=0)
    return jnp.tensordot(asking, values, axes=1) / jnp.maximum(jnp.sum(asking), 1)
