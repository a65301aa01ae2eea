import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from openmoe.model import gather, losses, moe, routing
from openmoe.model.config import PRESETS

DISPATCH, COMBINE, STATISTICS = jax.jit(moe.dispatch), jax.jit(moe.combine), jax.jit(routing.statistics)
NUM_TOKENS, NUM_EXPERTS, TOP_K, CAPACITY = 12, 4, 2, 4


@functools.partial(jax.jit, static_argnames=("capacity", "changes"))
def route(scores, real, bias=None, *, capacity, changes=()):
    config = replace(PRESETS["openmoe-nano"], **dict(changes))
    choices = routing.choose(scores, bias, real, config)
    return routing.route(choices, num_experts=scores.shape[1], capacity=capacity)


def routed(scores, *, top_k=TOP_K, capacity=CAPACITY, padding=(), bias=None, **changes):
    scores = np.asarray(scores, np.float32)
    real = ~np.isin(np.arange(len(scores)), padding)
    changes = {"top_k": top_k, "num_experts": scores.shape[1], **changes}
    return jax.device_get(route(scores, real, bias, capacity=capacity, changes=tuple(changes.items())))


def softmax(logits):
    return np.asarray(jax.nn.softmax(np.asarray(logits, np.float32)))


# Small integers as logits make ties common.
LOGITS = st.lists(
    st.lists(st.integers(0, 3), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    min_size=NUM_TOKENS,
    max_size=NUM_TOKENS,
)
quick = settings(max_examples=60, deadline=None)


def one_hot_reference(probs, top_k, capacity):
    """Places by the definition: first choices of all tokens in order, then second choices."""
    expert_index = np.argsort(-probs, axis=-1, kind="stable")[:, :top_k]
    taken, kept = np.zeros(probs.shape[1], int), np.zeros(expert_index.shape, bool)
    place = np.full(expert_index.shape, probs.shape[1] * capacity)
    for k in range(top_k):
        for token, expert in enumerate(expert_index[:, k]):
            if taken[expert] < capacity:
                kept[token, k], place[token, k] = True, expert * capacity + taken[expert]
                taken[expert] += 1
    return expert_index, kept, place


@quick
@given(LOGITS)
def test_places_go_to_first_choices_in_token_order_then_to_second_ones(logits):
    probs = softmax(logits)
    found = routed(probs)
    expert_index, kept, place = one_hot_reference(probs, TOP_K, CAPACITY)
    np.testing.assert_array_equal(found.expert_index, expert_index)
    np.testing.assert_array_equal(found.kept, kept)
    np.testing.assert_array_equal(found.place, place)


@quick
@given(LOGITS)
def test_no_expert_gets_more_tokens_than_it_has_places(logits):
    found = routed(softmax(logits))
    given_to = found.expert_index[found.kept]
    assert np.bincount(given_to, minlength=NUM_EXPERTS).max() <= CAPACITY


@quick
@given(LOGITS)
def test_place_and_choice_are_each_others_inverse(logits):
    found = routed(softmax(logits))
    choice = found.choice.reshape(-1)
    for number, place in enumerate(found.place.reshape(-1)):
        if place < choice.size:
            assert choice[place] == number
    assert (choice < found.place.size).sum() == found.kept.sum()


@pytest.mark.parametrize(("capacity", "dispatched"), [(4, [4, 4, 0, 0, 0, 0]), (10, [10, 10, 0, 0, 0, 0])])
def test_padding_asks_for_experts_0_and_1(capacity, dispatched):
    logits = np.zeros((10, 6), np.float32)
    found = routed(softmax(logits), capacity=capacity)
    assert np.bincount(found.expert_index[found.kept], minlength=6).tolist() == dispatched
    statistics = STATISTICS(logits, softmax(logits), None, found)
    assert statistics.aux_loss == pytest.approx(2.0)
    assert statistics.router_z_loss == pytest.approx(3.210402)


def test_statistics_of_a_group_by_hand():
    # Experts asked for: token 0 -> 0, 1; token 1 -> 0, 1; token 2 -> 0, 2. One place each.
    probs = np.asarray([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.1, 0.2]], np.float32)
    found = routed(probs, capacity=1)
    statistics = STATISTICS(np.log(probs), probs, None, found)
    assert found.kept.tolist() == [[True, True], [False, False], [False, True]]
    np.testing.assert_allclose(statistics.load, [3 / 6, 2 / 6, 1 / 6], rtol=1e-6)
    assert statistics.kept == pytest.approx(3 / 6)
    assert statistics.left_behind == pytest.approx(1 / 3)
    assert statistics.kept_gate == pytest.approx((0.6 + 0.3 + 0.2) / 6)
    assert statistics.usage == pytest.approx(1.0)
    of_tokens = (0.8979457, 0.9433483, 0.8018186)  # nats
    assert statistics.entropy == pytest.approx(sum(of_tokens) / 3 / np.log(3), rel=1e-6)
    assert statistics.aux_loss == pytest.approx(3 * (1 * 0.6 + 2 / 3 * 0.8 / 3 + 1 / 3 * 0.4 / 3))


@pytest.mark.parametrize(
    ("probs", "asks", "entropy"),
    [
        ([[0.25] * 4] * 2, None, 1.0),
        ([[1.0, 0.0, 0.0, 0.0]] * 2, None, 0.0),  # no NaN
        ([[0.5, 0.5, 0.0, 0.0]] * 2, None, 0.5),
        ([[0.5, 0.5, 0.0, 0.0], [0.25] * 4], None, 0.75),
        ([[0.5, 0.5, 0.0, 0.0], [0.25] * 4], [True, False], 0.5),  # padding counts for nothing
    ],
)
def test_the_router_s_entropy_is_that_of_each_token_and_not_of_the_load(probs, asks, entropy):
    probs = np.asarray(probs, np.float32)
    asks = None if asks is None else np.asarray(asks)
    found = STATISTICS(np.log(probs + 1e-9), probs, asks, routed(probs, capacity=4))
    assert found.entropy == pytest.approx(entropy, abs=1e-6)


@quick
@given(LOGITS, st.integers(0, 2**31 - 1))
def test_dispatch_and_combine_equal_the_one_hot_product(logits, seed):
    probs = softmax(logits)
    found = routed(probs)
    tokens = np.random.default_rng(seed).normal(size=(NUM_TOKENS, 3)).astype(np.float32)
    dispatch_mask = np.zeros((NUM_TOKENS, NUM_EXPERTS * CAPACITY), np.float32)
    for token, k in zip(*np.nonzero(found.kept), strict=True):
        dispatch_mask[token, found.place[token, k]] = 1
    gates = np.repeat(probs, CAPACITY, axis=1) * dispatch_mask

    sent = np.asarray(DISPATCH(tokens, found))
    np.testing.assert_array_equal(sent.reshape(-1, 3), dispatch_mask.T @ tokens)
    np.testing.assert_allclose(COMBINE(2 * sent, found), gates @ (2 * sent.reshape(-1, 3)), rtol=1e-5)


@pytest.mark.parametrize(("capacity", "num_zero"), [(1, 4), (2, 3), (5, 0)])
def test_tokens_over_capacity_get_zero_output(capacity, num_zero):
    found = routed([[0.9, 0.1]] * 5, top_k=1, capacity=capacity)
    y = COMBINE(np.ones((2, capacity, 3), np.float32), found)
    np.testing.assert_allclose(y, [[0.9] * 3] * (5 - num_zero) + [[0.0] * 3] * num_zero)


def test_gather_rows_has_the_derivative_of_the_gather():
    source, readers = jnp.asarray([2, 0, 3, 2]), jnp.asarray([[1, 4], [4, 4], [0, 3]])
    rows = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(gather.gather_rows(rows, source, readers), [[4, 5], [0, 1], [0, 0], [4, 5]])
    check_grads(jax.jit(lambda x: gather.gather_rows(x, source, readers)), (rows,), order=1, modes=["rev"])


def test_cross_entropy_and_z_loss_by_hand():
    logits = jnp.log(jnp.asarray([[[1.0, 2.0, 5.0], [8.0, 1.0, 1.0]]]))
    found = losses.token_losses(logits, jnp.asarray([[1, 0]]))
    np.testing.assert_allclose(found.cross_entropy, [[np.log(8 / 2), np.log(10 / 8)]], rtol=1e-5)
    np.testing.assert_allclose(found.z, [[np.log(8) ** 2, np.log(10) ** 2]], rtol=1e-5)
