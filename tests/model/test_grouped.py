"""Products of rows sorted by expert: the ways of a CPU and of a GPU, held against one product for each expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.model import grouped

R, A, B, E = 300, 16, 24, 5
PLACES = 64  # of a round, so that an expert with all rows takes five

WAYS = {
    "blocks": (grouped.product_by_blocks, grouped.kernel_gradient_by_blocks),
    "rounds": (
        lambda *given, **options: grouped.product_by_rounds(*given, places=PLACES, **options),
        lambda *given: grouped.kernel_gradient_by_rounds(*given, places=PLACES),
    ),
}


@pytest.fixture(scope="module", params=WAYS)
def three_products(request):
    """Returns f(rows, kernels, cotangent, group_sizes): the product and both of its derivatives."""
    product, kernel_gradient = WAYS[request.param]

    def all_three(rows, kernels, cotangent, group_sizes):
        d_rows = product(cotangent, kernels, group_sizes, contracted=1)
        return product(rows, kernels, group_sizes), d_rows, kernel_gradient(rows, cotangent, group_sizes)

    return jax.jit(all_three)


def operands(dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in ((R, A), (E, A, B), (R, B)))


def expert_by_expert(rows, kernels, cotangent, group_sizes):
    """The same in float64, without the rows of no expert."""
    ends = np.cumsum(group_sizes)
    of_expert = [slice(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]
    rows, kernels, cotangent = (np.asarray(x, np.float64) for x in (rows, kernels, cotangent))
    product = np.concatenate([rows[of] @ kernel for of, kernel in zip(of_expert, kernels, strict=True)])
    d_rows = np.concatenate([cotangent[of] @ kernel.T for of, kernel in zip(of_expert, kernels, strict=True)])
    return product, d_rows, np.stack([rows[of].T @ cotangent[of] for of in of_expert])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, R), min_size=E - 1, max_size=E - 1), st.integers(0, R))
def test_every_row_is_multiplied_by_its_experts_kernel_whatever_the_loads(three_products, cuts, end):
    group_sizes = np.diff([0, *sorted(min(cut, end) for cut in cuts), end]).astype(np.int32)
    found = three_products(*operands(), group_sizes)
    for got, wanted in zip(found, expert_by_expert(*operands(), group_sizes), strict=True):
        kept = got[:end] if got.shape[0] == R else got
        np.testing.assert_allclose(kept, wanted, rtol=0, atol=1e-4)


def test_rows_of_no_expert_reach_nothing(three_products):
    rows, kernels, cotangent = operands()
    rows[200:], cotangent[200:] = 1e9, 1e9
    group_sizes = np.array([100, 0, 70, 0, 30], np.int32)
    product, d_rows, d_kernels = three_products(rows, kernels, cotangent, group_sizes)
    wanted = expert_by_expert(rows, kernels, cotangent, group_sizes)
    for got, exact in zip((product[:200], d_rows[:200], d_kernels), wanted, strict=True):
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4)


def test_bfloat16_products_are_summed_in_float32():
    rng = np.random.default_rng(0)
    rows, kernels, cotangent = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((640, A), (2, A, B), (640, B)))
    product, pull = jax.vjp(lambda *given: grouped.grouped_product(*given, jnp.array([600, 40]), 640), rows, kernels)
    d_rows, d_kernels = pull(jnp.asarray(cotangent))
    wide_rows, wide_kernels, wide_cotangent = (x.astype(np.float64) for x in (rows, kernels, cotangent))
    wanted = {
        "product": (product[:600], wide_rows[:600] @ wide_kernels[0]),
        "rows": (d_rows[600:], wide_cotangent[600:] @ wide_kernels[1].T),
        "kernels": (d_kernels[0], wide_rows[:600].T @ wide_cotangent[:600]),
    }
    for name, (found, exact) in wanted.items():
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-3, err_msg=name)
