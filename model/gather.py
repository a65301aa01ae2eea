"""Moving rows by index, in both directions of the derivative."""

from __future__ import annotations

import jax
from jax import Array


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
