"""Experts that answer all that they are asked: the numbers, on one device and on several, and what these exchange."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from openmoe.model import dropless, sharding
from openmoe.model.layers import GatedWeights

N, K, D, F, E = 320, 2, 16, 24, 8  # the 640 choices that one device holds are two blocks and a half
WHOLE = P("expert")
SLICED = GatedWeights(P("expert", None, None, "tensor"), P("expert", None, "tensor"), P("expert", "tensor", None))
COLLECTIVE = re.compile(r"= (\(.*?\)|\S+) (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)\(")


def mlp(rows, experts, multiply):
    wi_0, wi_1, wo = experts
    if wi_0.ndim > wi_1.ndim:  # OpenMoE's, with its halves apart
        linear, gate = (multiply(rows, wi_0[..., half, :]) for half in (0, 1))
        return multiply(linear * jax.nn.swish(gate) * multiply(rows, wi_1), wo)
    return multiply(jax.nn.swish(multiply(rows, wi_0)) * multiply(rows, wi_1), wo)


def with_gradients(answer):
    """Turns answer(tokens, expert_index, asks, experts) into f(..., cotangent): answers and both gradients."""

    def both(tokens, expert_index, asks, experts, cotangent):
        answers, pull = jax.vjp(lambda tokens, experts: answer(tokens, expert_index, asks, experts), tokens, experts)
        return answers, *pull(cotangent)

    return jax.jit(both)


@with_gradients
def naive(tokens, expert_index, asks, experts):
    """Every expert answers every token; the choices pick."""
    answers = jnp.stack([mlp(tokens, GatedWeights(*(kernels[i] for kernels in experts)), jnp.matmul) for i in range(E)])
    return jnp.einsum("nke,end->nkd", jax.nn.one_hot(expert_index, E) * asks[..., None], answers)


def dropless_on(mesh, experts=WHOLE):
    def on_each(*given):
        answers = dropless.dropless_answers(*given, num_experts=E, mlp=mlp)
        return jax.lax.psum(answers, "tensor") if experts is SLICED else answers

    rows = P(sharding.BATCH_AXES)
    specs = (rows, rows, rows, experts)
    return with_gradients(jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=rows))


@pytest.fixture(scope="module")
def on_one(mesh_of):
    return dropless_on(mesh_of(1, 1))


@pytest.fixture(scope="module")
def traced_on_four(mesh_of):
    placed = jax.device_put(arguments(random_choices()), NamedSharding(mesh_of(1, 4), WHOLE))
    return dropless_on(mesh_of(1, 4)).trace(*placed)


@pytest.fixture(scope="module")
def on_four(traced_on_four):
    return traced_on_four.lower().compile()


def arguments(expert_index, asks=True, *, swiglu=False):
    """Tokens, expert_index, asks, experts and cotangent, of normal numbers."""
    rng = np.random.default_rng(0)
    kernels = (E, D, F) if swiglu else (E, D, 2, F), (E, D, F), (E, F, D)
    tokens, cotangent, *kernels = (rng.normal(size=s).astype(np.float32) for s in ((N, D), (N, K, D), *kernels))
    return tokens, expert_index, np.broadcast_to(asks, (N, K)), GatedWeights(*(k / 4 for k in kernels)), cotangent


def random_choices(shares=(1,) * E, seed=0):
    share = np.array(shares) / sum(shares)
    return np.random.default_rng(seed).choice(E, (N, K), p=share).astype(np.int32)


def assert_close(found, wanted):
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        tolerance = 1e-5 * np.abs(other).max()
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@settings(max_examples=20, deadline=None)
@given(
    shares=st.lists(st.integers(0, 3), min_size=E, max_size=E).filter(any),
    asking=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_answers_and_gradients_are_those_of_each_expert_by_itself(on_one, on_four, shares, asking, seed):
    asks = np.random.default_rng(seed).random((N, K)) < asking
    given = arguments(random_choices(shares, seed), asks)
    wanted = naive(*given)
    assert_close(on_one(*given), wanted)
    assert_close(on_four(*given), wanted)


def test_the_plain_gated_block_has_the_same_answers_too(on_one):
    given = arguments(random_choices(), swiglu=True)
    assert_close(on_one(*given), naive(*given))


def test_slices_of_experts_sum_to_the_same_answers_and_gradients(mesh_of):
    given = arguments(random_choices())
    assert_close(dropless_on(mesh_of(2, 2, tensor=2), SLICED)(*given), naive(*given))


@pytest.mark.parametrize("expert", [0, 5])
def test_all_devices_may_ask_for_one_expert_alone(on_one, on_four, expert):
    given = arguments(np.full((N, K), expert, np.int32))
    answers, *gradients = on_four(*given)
    wanted_answers, *wanted_gradients = on_one(*given)
    np.testing.assert_allclose(answers, wanted_answers, rtol=0, atol=1e-6)
    assert_close(gradients, wanted_gradients)
    assert (np.asarray(answers) != 0).all()


@pytest.mark.parametrize("devices", ["on_one", "on_four"])
def test_what_does_not_ask_is_never_read(request, devices):
    asks = np.random.default_rng(0).random((N, K)) < 0.7
    asks[[0, 100, 319]] = False
    tokens, expert_index, _, experts, cotangent = arguments(np.where(asks, random_choices(), E).astype(np.int32), asks)
    tokens[[0, 100, 319]] = np.nan
    answers, d_tokens, d_experts = jax.device_get(
        request.getfixturevalue(devices)(tokens, expert_index, asks, experts, cotangent)
    )
    assert (answers[~asks] == 0).all()
    assert (d_tokens[[0, 100, 319]] == 0).all()
    assert all(np.isfinite(gradient).all() for gradient in (answers, d_tokens, *d_experts))


@pytest.mark.parametrize("devices", ["on_one", "on_four"])
def test_experts_that_nobody_chose_have_no_gradient(request, devices):
    chosen = random_choices(shares=(0, 0, 3, 1, 0, 1, 1, 0))
    _, _, gradients = jax.device_get(request.getfixturevalue(devices)(*arguments(chosen)))
    for gradient in gradients:
        assert [bool(gradient[i].any()) for i in range(E)] == [False, False, True, True, False, True, True, False]


@pytest.mark.parametrize("devices", ["on_one", "on_four"])
def test_repeats_bit_by_bit(request, devices):
    given = arguments(random_choices(), np.random.default_rng(0).random((N, K)) < 0.7)
    first, second = (jax.device_get(request.getfixturevalue(devices)(*given)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def exchanged(program):
    """Returns (kind, numbers that a device gets) of each collective."""
    return [
        (kind, sum(math.prod(map(int, re.findall(r"\d+", axes))) for axes in re.findall(r"\[(.*?)\]", shapes)))
        for shapes, kind in COLLECTIVE.findall(program)
    ]


def test_rows_travel_twice_forward_and_twice_backward_and_with_them_counts(on_four):
    worst_case = 4 * 160 * D  # from each of four devices, all of its 80 tokens' choices
    gradients = 2 * 4 * D * F  # of two experts, summed over the devices that also hold them, here none
    assert sorted(exchanged(on_four.as_text())) == [
        ("all-gather", 4 * E),
        ("all-reduce", gradients),
        *[("all-to-all", worst_case)] * 4,
    ]


def test_on_a_tpu_only_rows_that_are_asked_for_travel(traced_on_four):
    lowered = traced_on_four.lower(lowering_platforms=("tpu",)).as_text()
    assert len(re.findall(r"custom_call @ragged_all_to_all", lowered)) == 4
    assert "stablehlo.all_to_all" not in lowered
    assert len(re.findall(r'"chlo.ragged_dot"\(', lowered)) == 3 * 4
