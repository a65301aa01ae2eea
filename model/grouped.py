"""Products of rows, sorted by expert, with their experts' kernels, however many rows each expert has.

JAX's `ragged_dot` does it where it is quick, on TPUs. On CPUs and NVIDIA's GPUs it multiplies all rows by all kernels,
so both have a substitute here, which is chosen when a program is compiled for such a device:

- On a CPU, a loop over the experts and the blocks of their rows: no row is multiplied in vain.
- On a GPU, where each turn of a loop waits for the one before and small products leave the device idle, one product
  for all experts at once, of as many rows each as they have on average and a quarter more. Experts with more rows
  than that get a second round, and so on: one round while loads are balanced, and never too few.

Axes: r rows, e experts, [a, b] one kernel, c rows of an expert in a round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from openmoe.model import sharding
from openmoe.model.products import kernel_gradient

BLOCK_ROWS = 256  # of one product on a CPU: enough that it runs at full speed
STRIP_ROWS = 64  # the same at the end of an expert's rows, where half of them are wasted
ROUND_SLACK = 1.25  # rows of a round over those of an average expert: with more, more is multiplied in vain
ROUND_ROWS = 64  # whose multiple a round is, as a GPU's matrix units like them

KERNEL_GRADIENT = jax.lax.RaggedDotDimensionNumbers(  # [r, a], [r, b] to [e, a, b]: r is contracted, in e pieces
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(rows: Array, kernels: Array, group_sizes: Array, balanced_rows: int) -> Array:
    """Multiplies each expert's rows by its kernel.

    Args:
      rows: [r, a], sorted by expert.
      kernels: [e, a, b], in the same type.
      group_sizes: int32[e], rows of each expert; those beyond their sum are finite and mean nothing, here
        and in the result.
      balanced_rows: about what that sum is if no expert is more wanted than others; speed depends on it, the result
        does not.

    Returns:
      [r, b], in the type of rows.
    """
    by_rounds = functools.partial(product_by_rounds, places=_round_places(balanced_rows, kernels))
    return _by_platform(product_by_blocks, by_rounds, jax.lax.ragged_dot, rows, kernels, group_sizes)


def _forward(
    rows: Array, kernels: Array, group_sizes: Array, balanced_rows: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(rows, kernels, group_sizes, balanced_rows), (rows, kernels, group_sizes)


def _backward(balanced_rows: int, saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    rows, kernels, group_sizes = saved
    places = _round_places(balanced_rows, kernels)
    d_rows = _by_platform(
        functools.partial(product_by_blocks, contracted=1),
        functools.partial(product_by_rounds, places=places, contracted=1),
        _transposed_product,
        *(cotangent, kernels, group_sizes),
    )
    d_kernels = _by_platform(
        kernel_gradient_by_blocks,
        functools.partial(kernel_gradient_by_rounds, places=places),
        _kernel_gradient,
        *(rows, cotangent, group_sizes),
    )
    return d_rows, d_kernels.astype(kernels.dtype), None


grouped_product.defvjp(_forward, _backward)


def _by_platform(
    by_blocks: Callable[..., Array], by_rounds: Callable[..., Array], ragged: Callable[..., Array], *given: Array
) -> Array:
    return jax.lax.platform_dependent(*given, cpu=by_blocks, cuda=by_rounds, default=ragged)


def _transposed_product(rows: Array, kernels: Array, group_sizes: Array) -> Array:
    """Returns [r, a] from [r, b] and [e, a, b]."""
    return jax.lax.ragged_dot(rows, kernels.swapaxes(1, 2), group_sizes)


def _kernel_gradient(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Returns float32[e, a, b] from [r, a] and [r, b]."""
    return jax.lax.ragged_dot_general(rows, cotangent, group_sizes, KERNEL_GRADIENT, preferred_element_type=jnp.float32)


def product_by_blocks(rows: Array, kernels: Array, group_sizes: Array, *, contracted: int = 0) -> Array:
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

    y = sharding.zeros((rows.shape[0], kernels.shape[2 - contracted]), rows)
    return jax.lax.scan(of_expert, y, (kernels, end - group_sizes, end))[0]


def kernel_gradient_by_blocks(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """`_kernel_gradient` in a loop over the experts and the blocks of their rows."""
    end = jnp.cumsum(group_sizes)

    def of_expert(_: None, expert: tuple[Array, Array]) -> tuple[None, Array]:
        def of_block(total: Array, block: Block) -> Array:
            right = block.of(cotangent)
            if block.mine is not None:
                right = jnp.where(block.mine, right, 0)
            return total + kernel_gradient(block.of(rows), right, jnp.float32)

        zero = sharding.zeros((rows.shape[1], cotangent.shape[1]), rows).astype(jnp.float32)
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


def _round_places(balanced_rows: int, kernels: Array) -> int:
    """Returns c."""
    wanted = math.ceil(balanced_rows / kernels.shape[0] * ROUND_SLACK)
    return math.ceil(wanted / ROUND_ROWS) * ROUND_ROWS


def product_by_rounds(rows: Array, kernels: Array, group_sizes: Array, *, places: int, contracted: int = 0) -> Array:
    """`product_by_blocks` in one product for all experts, and more if an expert has more rows than places."""

    def of_round(i: Array, y: Array) -> Array:
        source, place = _round(i, group_sizes, rows.shape[0], places)
        contract = (((2,), (1 + contracted,)), ((0,), (0,)))
        product = jax.lax.dot_general(_taken(rows, source), kernels, contract)  # [e, c, b]
        return y + _taken(product.reshape(-1, y.shape[1]), place)

    y = sharding.zeros((rows.shape[0], kernels.shape[2 - contracted]), rows)
    return jax.lax.fori_loop(0, _num_rounds(group_sizes, places), of_round, y)


def kernel_gradient_by_rounds(rows: Array, cotangent: Array, group_sizes: Array, *, places: int) -> Array:
    """`_kernel_gradient` in one product for all experts, and more if an expert has more rows than places."""

    def of_round(i: Array, total: Array) -> Array:
        source, _ = _round(i, group_sizes, rows.shape[0], places)
        return total + kernel_gradient(_taken(rows, source), _taken(cotangent, source), jnp.float32)

    shape = (group_sizes.shape[0], rows.shape[1], cotangent.shape[1])
    zero = sharding.zeros(shape, rows).astype(jnp.float32)
    return jax.lax.fori_loop(0, _num_rounds(group_sizes, places), of_round, zero)


def _num_rounds(group_sizes: Array, places: int) -> Array:
    return (jnp.max(group_sizes) + places - 1) // places


def _round(i: Array, group_sizes: Array, num_rows: int, places: int) -> tuple[Array, Array]:
    """Returns which row goes to each place of a round, int32[e, c], and the place of each row, int32[r].

    A place without a row has num_rows, and a row without a place in this round e * c.
    """
    end = jnp.cumsum(group_sizes)
    first = end - group_sizes + i * places  # of each expert's rows in this round
    source = first[:, None] + jnp.arange(places)
    row = jnp.arange(num_rows)
    expert = jnp.sum(row[:, None] >= end, axis=1)  # e for rows of none
    within = row - first.at[expert].get(mode="fill", fill_value=num_rows)
    place = jnp.where((within >= 0) & (within < places), expert * places + within, group_sizes.size * places)
    return jnp.where(source < end[:, None], source, num_rows), place


def _taken(rows: Array, source: Array) -> Array:
    return rows.at[source].get(mode="fill", fill_value=0)
