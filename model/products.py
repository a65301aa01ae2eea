"""Products whose derivatives are as quick on a CPU as they are themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from openmoe.model import sharding


def product(x: Array, kernel: Array) -> Array:
    """Returns x @ kernel; its derivative is the usual one.

    Args:
      x: [..., n, d].
      kernel: [..., d, m], of the same type and leading axes.
    """
    return _product(*sharding.varying_alike(x, kernel))


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = operands
    return cotangent @ kernel.swapaxes(-1, -2), kernel_gradient(x, cotangent)


_product.defvjp(_product_forward, _product_backward)


def kernel_gradient(x: Array, cotangent: Array, dtype: DTypeLike | None = None) -> Array:
    """Returns transposed x times cotangent.

    XLA's quick product on CPUs contracts the last axis of its left side, and XLA folds a plain transpose back into the
    product: twice as slow. One behind a barrier it carries out.

    Args:
      x: [..., n, d].
      cotangent: [..., n, m], of the same type.
      dtype: of the result, if it is another.

    Returns:
      [..., d, m].
    """

    def on_cpu(x: Array, cotangent: Array) -> Array:
        return jnp.matmul(jax.lax.optimization_barrier(x.swapaxes(-1, -2)), cotangent, preferred_element_type=dtype)

    def elsewhere(x: Array, cotangent: Array) -> Array:
        return jnp.matmul(x.swapaxes(-1, -2), cotangent, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, cotangent, cpu=on_cpu, default=elsewhere)
