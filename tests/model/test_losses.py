"""The loss over the vocabulary, block by block, against the same formulas on all logits at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.model import losses, objective, step
from openmoe.model.optimizer_config import AdafactorConfig

ROWS, SEQ, D_MODEL, VOCAB, Z_LOSS_WEIGHT = 8, 6, 5, 24, 0.01


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, SEQ, D_MODEL)).astype(np.float32)
    head = rng.normal(size=(D_MODEL, VOCAB)).astype(np.float32)
    target_ids = rng.integers(0, VOCAB, (ROWS, SEQ), dtype=np.int32)
    return hidden, head, target_ids, rng.choice(np.float32([0, 1, 0.5]), (ROWS, SEQ))


def at_once(hidden, head, target_ids, weights):
    per_token = losses.token_losses(hidden @ head, target_ids)
    return jnp.sum(weights * (per_token.cross_entropy + Z_LOSS_WEIGHT * per_token.z)), per_token


def assert_near(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()), found, wanted)


@pytest.mark.parametrize(
    ("shape", "block_logits"),
    [((1, 1), 8 * 6 * 24), ((1, 1), 10 * 24), ((1, 1), 1), ((2, 4), 6 * 24), ((2, 4), 2 * 24), ((8, 1), 1)],
)
def test_value_and_gradient_do_not_depend_on_blocks_and_devices(inputs, mesh_of, shape, block_logits):
    settings = {"z_loss_weight": Z_LOSS_WEIGHT, "mesh": mesh_of(*shape), "block_logits": block_logits}

    def in_blocks(*arrays):
        total, per_token = losses.vocabulary_loss(*arrays, **settings)
        return total / 3, per_token  # so that the gradient that comes from behind is not 1

    (total, per_token), grads = jax.jit(jax.value_and_grad(in_blocks, argnums=(0, 1), has_aux=True))(*inputs)
    (wanted, wanted_per_token), wanted_grads = jax.value_and_grad(at_once, argnums=(0, 1), has_aux=True)(*inputs)
    assert_near((3 * total, per_token), (wanted, wanted_per_token))
    assert_near(jax.tree.map(lambda x: 3 * x, grads), wanted_grads)
    assert_near(jax.jit(in_blocks)(*inputs), (wanted / 3, wanted_per_token))  # and without a gradient


@pytest.mark.parametrize(
    ("num_positions", "vocab_size", "blocks"),
    [(512, 8576, 1), (2048, 8576, 1), (512, 256_384, 1), (2048, 256_384, 4), (3072, 256_384, 6), (521 * 2, 256_384, 2)],
)
def test_positions_are_cut_into_few_equal_blocks(num_positions, vocab_size, blocks):
    assert losses.num_blocks(num_positions, vocab_size) == blocks


@pytest.mark.parametrize(
    ("num_positions", "vocab_size", "blocks"),
    [
        (100, 8576, 1),
        (512, 8576, 2),
        (2048, 8576, 8),
        (2048, 256_384, 8),
        (521 * 2, 8576, 2),
        (521, 8576, 1),
        (6, 2**26, 3),
    ],
)
def test_on_a_cpu_blocks_are_as_small_as_256_positions(num_positions, vocab_size, blocks):
    assert losses.num_blocks(num_positions, vocab_size, on_cpu=True) == blocks


def test_gradients_of_the_published_vocabulary_hold_one_block_of_logits_and_its_derivative(dense_config, mesh_of):
    config = replace(dense_config, num_layers=1, d_model=16, vocab_size=256_384, text_vocab_size=256_000)
    params = step.state_shapes(config, AdafactorConfig(), mesh_of(1, 1)).params
    names = ("input_ids", "target_ids", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((1, 8, 512), jnp.int32) for name in names}
    batch["loss_weights"] = jax.ShapeDtypeStruct((1, 8, 512), jnp.float32)
    gradients = jax.jit(lambda params, batch: objective.gradients(config, mesh_of(1, 1), params, batch))
    temporary_bytes = gradients.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    # 1.2e9; logits, their exponentials and derivative at all 4,096 positions at once: 12.7e9.
    assert temporary_bytes < 1.4e9
