"""The layer of experts on a whole batch: what its groups of tokens share, and what they do not."""

import jax
import numpy as np
import pytest

from openmoe.model import moe

ROWS, SEQ = 8, 32  # two rows make a group of 64 tokens


@pytest.fixture(scope="module")
def layer(moe_config, mesh_of, moe_params):
    """The second layer's experts of the golden model, float32[b, t, d] to MoEOutput."""
    module = moe.MoE(moe_config, mesh_of(1, 1), train=True)
    params = {"params": moe_params["decoder"]["layers_1"]["mlp"]}
    return jax.jit(lambda x: module.apply(params, x, np.ones((ROWS, SEQ, 1), bool)))


@pytest.fixture(scope="module")
def tokens(moe_config):
    return np.random.default_rng(0).normal(size=(ROWS, SEQ, moe_config.d_model)).astype(np.float32)


def test_groups_are_consecutive_rows_and_know_nothing_of_each_other(layer, tokens):
    changed = tokens.copy()
    changed[2] = changed[2, ::-1]
    y, y_changed = np.asarray(layer(tokens).y), np.asarray(layer(changed).y)
    np.testing.assert_array_equal(y_changed[[0, 1, 4, 5, 6, 7]], y[[0, 1, 4, 5, 6, 7]])
    assert (y_changed[2] != y[2]).any()


def test_a_row_can_take_every_place_that_the_next_row_of_its_group_asks_for(layer, tokens):
    crowded = tokens.copy()
    crowded[2] = tokens[2, 0]  # 32 tokens with the same first choice, for 20 places
    first_choice = np.asarray(layer(crowded).routing.expert_index).reshape(ROWS, SEQ, 2)[2, 0, 0]

    def num_kept(x):
        routed = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(ROWS, SEQ, 2)[3], layer(x).routing[:3])
        return routed[2][routed[0] == first_choice].sum()

    assert num_kept(tokens) == 7
    assert num_kept(crowded) == 0
