"""Experts without capacity: every choice of every token is answered (MegaBlocks, arXiv:2211.15841).

A device sorts its tokens' choices by expert and sends them along the mesh's `expert` axis to where their experts
are; those sort what arrives by expert, multiply each expert's rows by its own kernels, and send the answers back:

    sort -> send -> sort -> grouped products -> unsort -> send back -> unsort

Nothing is dropped, however unevenly experts are chosen: arrays have room for the worst case, that all choices of all
devices meet on one. With a single device along the axis that is no more than the choices themselves, and nothing is
exchanged. All moves are gathers, in both directions of the derivative,
and sums have one order: results repeat bit by bit.

JAX cannot run `ragged_all_to_all` on CPU, and its `ragged_dot` multiplies all rows by all kernels on CPUs and NVIDIA's
GPUs. Both have a substitute here, which is chosen when a program is compiled for such a device.

Axes: n tokens of the device, K = top_k, d d_model, m = n * K choices of the device; p devices along the axis,
E experts, e = E / p experts of the device, r rows at them (m for one device, else p * m); [a, b] one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from openmoe.model import sharding
from openmoe.model.gather import gather_rows
from openmoe.model.layers import GatedWeights, Multiply
from openmoe.model.products import kernel_gradient
from openmoe.model.routing import choices_per_expert

BLOCK_ROWS = 256  # of one product: enough that a CPU runs at full speed, and a GPU at more than half of it
STRIP_ROWS = 64  # the same at the end of an expert's rows, where half of them are wasted

KERNEL_GRADIENT = jax.lax.RaggedDotDimensionNumbers(  # [r, a], [r, b] to [e, a, b]: r is contracted, in e pieces
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def dropless_answers(
    tokens: Array,
    expert_index: Array,
    asks: Array,
    experts: GatedWeights,
    *,
    num_experts: int,
    mlp: Callable[[Array, GatedWeights, Multiply], Array],
    axis: str = "expert",
) -> Array:
    """Answers each choice of one device's tokens, inside a `shard_map`.

    Args:
      tokens: [n, d].
      expert_index: int32[n, K].
      asks: bool[n, K]; a choice that does not ask is not computed, and its answer is zero.
      experts: this device's e experts, or its slice of their inner width.
      num_experts: E.
      mlp: maps rows [r, d] by the experts' kernels to [r, d], with multiply(rows, kernels) for each of its products.
      axis: of the mesh, along which experts are divided.

    Returns:
      [n, K, d], in the type of tokens.
    """
    tokens, *_ = sharding.varying_alike(
        tokens, *experts
    )  # sums its gradient over slices of experts here, where rows are few
    top_k = expert_index.shape[1]
    expert_index = jnp.where(asks, expert_index, num_experts)
    counts = choices_per_expert(expert_index, num_experts)  # int32[E]
    order, place = _sorted(expert_index.reshape(-1), num_experts)  # of m choices
    chosen = gather_rows(tokens, order // top_k, place.reshape(-1, top_k))  # [m, d]
    if jax.lax.axis_size(axis) == 1:
        answers = mlp(chosen, experts, _multiply(counts))
    else:
        answers = _answers_from_afar(chosen, counts, experts, mlp, axis)
    return gather_rows(answers, place.reshape(-1, top_k), order[:, None])


def _answers_from_afar(
    chosen: Array,
    counts: Array,
    experts: GatedWeights,
    mlp: Callable[[Array, GatedWeights, Multiply], Array],
    axis: str,
) -> Array:
    """Answers rows [m, d], sorted by expert, of which int32[E] go to each expert."""
    num_devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    all_counts = jax.lax.all_gather(counts, axis).reshape(num_devices, num_devices, -1)  # [from, to, e]
    sent = jnp.sum(all_counts, axis=2)  # [from, to]
    start = jnp.cumsum(sent, axis=1) - sent
    traffic = Traffic(sent[me], start[me], sent[:, me], start[:, me])
    arrived = send(chosen, traffic, axis)  # [p*m, d]

    arriving = all_counts[:, me]  # [from, e], and sorted by e
    slot = jnp.arange(chosen.shape[0])[:, None]
    expert = jnp.sum(slot >= jnp.cumsum(arriving, axis=1)[:, None], axis=2)  # [p, m]; e where a slot is empty
    order, place = _sorted(expert.reshape(-1), arriving.shape[1])
    rows = gather_rows(arrived, order, place[:, None])
    answers = mlp(rows, experts, _multiply(jnp.sum(arriving, axis=0)))
    return send_back(gather_rows(answers, place, order[:, None]), traffic, axis)


def _sorted(key: Array, num_keys: int) -> tuple[Array, Array]:
    """Returns which of the keys int32[m] goes to each place, and the place of each; m stands for none.

    Keys from num_keys on have no place.
    """
    order = jnp.argsort(key, stable=True)
    has_place = key < num_keys
    taken = jnp.arange(key.size) < jnp.sum(has_place)
    return jnp.where(taken, order, key.size), jnp.where(has_place, jnp.argsort(order), key.size)


class Traffic(NamedTuple):
    """How many rows this device exchanges with each of the p devices, and where they lie before they are sent."""

    sent: Array  # int32[p], its own to them
    start: Array  # int32[p], where those begin
    received: Array  # int32[p], theirs to it
    their_start: Array  # int32[p], where those begin, on them


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: Array, traffic: Traffic, axis: str) -> Array:
    """Sends rows [m, d] to their devices; returns [p * m, d], where those from device i begin at i * m, then zeros."""
    num_devices, num_rows = jax.lax.axis_size(axis), rows.shape[0]

    def padded(rows: Array, traffic: Traffic) -> Array:
        slot = jnp.arange(num_rows)
        source = jnp.where(slot < traffic.sent[:, None], traffic.start[:, None] + slot, num_rows)  # [p, m]
        apart = rows.at[source].get(mode="fill", fill_value=0)
        return jax.lax.all_to_all(apart, axis, 0, 0, tiled=True).reshape(-1, rows.shape[1])

    def ragged(rows: Array, traffic: Traffic) -> Array:
        room = _zeros((num_devices * num_rows, rows.shape[1]), rows)
        target = jnp.full_like(traffic.start, num_rows) * jax.lax.axis_index(axis)
        return jax.lax.ragged_all_to_all(
            rows, room, traffic.start, traffic.sent, target, traffic.received, axis_name=axis
        )

    return jax.lax.platform_dependent(rows, traffic, cpu=padded, default=ragged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: Array, traffic: Traffic, axis: str) -> Array:
    """Sends rows [p * m, d] back to where `send` had them from, [m, d], with zeros beyond those."""
    num_devices = jax.lax.axis_size(axis)
    num_rows = rows.shape[0] // num_devices

    def padded(rows: Array, traffic: Traffic) -> Array:
        apart = jax.lax.all_to_all(rows.reshape(num_devices, num_rows, -1), axis, 0, 0, tiled=True)
        end = traffic.start + traffic.sent
        row = jnp.arange(num_rows)
        device = jnp.sum(row[:, None] >= end, axis=1)
        source = jnp.where(row < end[-1], device * num_rows + row - traffic.start[device], num_devices * num_rows)
        return apart.reshape(rows.shape).at[source].get(mode="fill", fill_value=0)

    def ragged(rows: Array, traffic: Traffic) -> Array:
        room = _zeros((num_rows, rows.shape[1]), rows)
        start = jnp.arange(num_devices) * num_rows
        return jax.lax.ragged_all_to_all(
            rows, room, start, traffic.received, traffic.their_start, traffic.sent, axis_name=axis
        )

    return jax.lax.platform_dependent(rows, traffic, cpu=padded, default=ragged)


send.defvjp(
    lambda rows, traffic, axis: (send(rows, traffic, axis), traffic),
    lambda axis, traffic, cotangent: (send_back(cotangent, traffic, axis), None),
)
send_back.defvjp(
    lambda rows, traffic, axis: (send_back(rows, traffic, axis), traffic),
    lambda axis, traffic, cotangent: (send(cotangent, traffic, axis), None),
)


def _multiply(group_sizes: Array) -> Multiply:
    return lambda rows, kernels: grouped_product(*sharding.varying_alike(rows, kernels, group_sizes))


@jax.custom_vjp
def grouped_product(rows: Array, kernels: Array, group_sizes: Array) -> Array:
    """Multiplies each expert's rows by its kernel.

    Args:
      rows: [r, a], sorted by expert.
      kernels: [e, a, b], in the same type.
      group_sizes: int32[e], rows of each expert; those beyond their sum mean nothing, here and in the result.

    Returns:
      [r, b], in the type of rows.
    """
    return _by_platform(_product_by_blocks, jax.lax.ragged_dot, rows, kernels, group_sizes)


def _grouped_product_forward(
    rows: Array, kernels: Array, group_sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(rows, kernels, group_sizes), (rows, kernels, group_sizes)


def _grouped_product_backward(saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    rows, kernels, group_sizes = saved
    d_rows = _by_platform(_transposed_product_by_blocks, _transposed_product, cotangent, kernels, group_sizes)
    d_kernels = _by_platform(_kernel_gradient_by_blocks, _kernel_gradient, rows, cotangent, group_sizes)
    return d_rows, d_kernels.astype(kernels.dtype), None


grouped_product.defvjp(_grouped_product_forward, _grouped_product_backward)


def _by_platform(by_blocks: Callable[..., Array], ragged: Callable[..., Array], *given: Array) -> Array:
    return jax.lax.platform_dependent(*given, cpu=by_blocks, cuda=by_blocks, default=ragged)


def _transposed_product(rows: Array, kernels: Array, group_sizes: Array) -> Array:
    """Returns [r, a] from [r, b] and [e, a, b]."""
    return jax.lax.ragged_dot(rows, kernels.swapaxes(1, 2), group_sizes)


def _kernel_gradient(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Returns float32[e, a, b] from [r, a] and [r, b]."""
    return jax.lax.ragged_dot_general(rows, cotangent, group_sizes, KERNEL_GRADIENT, preferred_element_type=jnp.float32)


def _product_by_blocks(rows: Array, kernels: Array, group_sizes: Array, *, contracted: int = 0) -> Array:
    """`ragged_dot` in a loop over the experts and the blocks of their rows; rows of no expert are zero.

    Args:
      rows: [r, a], or [r, b].
      kernels: [e, a, b].
      group_sizes: int32[e].
      contracted: which axis of a kernel is; to transpose them all before would take a copy.
    """
    end = jnp.cumsum(group_sizes)

    def of_expert(y: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        kernel, start, end = expert

        def of_block(y: Array, block: Block) -> Array:
            product = jax.lax.dot_general(block.of(rows), kernel, (((1,), (contracted,)), ((), ())))
            if block.mine is not None:
                product = jnp.where(block.mine, product, block.of(y))
            return jax.lax.dynamic_update_slice_in_dim(y, product, block.first, axis=0)

        return _for_each_block(of_block, y, start, end, rows.shape[0]), None

    y = _zeros((rows.shape[0], kernels.shape[2 - contracted]), rows)
    return jax.lax.scan(of_expert, y, (kernels, end - group_sizes, end))[0]


_transposed_product_by_blocks = functools.partial(_product_by_blocks, contracted=1)


def _kernel_gradient_by_blocks(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """`_kernel_gradient` in a loop over the experts and the blocks of their rows."""
    end = jnp.cumsum(group_sizes)

    def of_expert(_: None, expert: tuple[Array, Array]) -> tuple[None, Array]:
        def of_block(total: Array, block: Block) -> Array:
            right = block.of(cotangent)
            if block.mine is not None:
                right = jnp.where(block.mine, right, 0)
            return total + kernel_gradient(block.of(rows), right, jnp.float32)

        zero = _zeros((rows.shape[1], cotangent.shape[1]), rows).astype(jnp.float32)
        return None, _for_each_block(of_block, zero, *expert, rows.shape[0])

    return jax.lax.scan(of_expert, None, (end - group_sizes, end))[1]


class Block(NamedTuple):
    """Consecutive rows: all of one expert, or those that `mine` tells."""

    first: Array  # int32[]
    size: int
    mine: Array | None  # bool[size, 1]

    def of(self, rows: Array) -> Array:
        """Returns these of all rows, [size, ...]."""
        return jax.lax.dynamic_slice_in_dim(rows, self.first, self.size)


def _for_each_block(step: Callable[[Any, Block], Any], carry: Any, start: Array, end: Array, num_rows: int) -> Any:
    """Returns carry after carry = step(carry, block) for the rows from start to end, of num_rows in all."""
    size, strip_size = min(BLOCK_ROWS, num_rows), min(STRIP_ROWS, num_rows)
    num_blocks = (end - start) // size
    rest = start + num_blocks * size

    def on_block(i: Array, carry: Any) -> Any:
        return step(carry, Block(start + i * size, size, None))

    def on_strip(i: Array, carry: Any) -> Any:
        wanted = rest + i * strip_size
        first = jnp.minimum(wanted, num_rows - strip_size)  # as a slice does; the last strip may reach back
        row = first + jnp.arange(strip_size)[:, None]
        return step(carry, Block(first, strip_size, (wanted <= row) & (row < end)))

    carry = jax.lax.fori_loop(0, num_blocks, on_block, carry)
    return jax.lax.fori_loop(0, (end - rest + strip_size - 1) // strip_size, on_strip, carry)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Returns zeros in the type of an array, which differ from device to device where it does."""
    return sharding.varying_alike(jnp.zeros(shape, like.dtype), like)[0]
