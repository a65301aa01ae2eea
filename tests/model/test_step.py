"""The step on several meshes of virtual devices: the same mathematics, the same initial numbers, the same bits."""

import re

import jax
import numpy as np
import pytest

from openmoe.model import objective, sharding, step
from openmoe.model.optimizer_config import AdafactorConfig

MESHES = [(1, 1), (2, 2)]  # more of them, forward and backward, in test_execution.py
OPTIMIZER = AdafactorConfig(warmup_steps=100)


def batch_of(rng, *, microbatches=1, rows=8, seq=32):
    """Two packed segments and some padding in each row."""
    shape = (microbatches, rows, seq)
    target_ids = rng.integers(2, 512, shape, dtype=np.int32)
    segment_ids = np.where(np.arange(seq) < seq // 2, 1, 2) * np.ones(shape, np.int32)
    target_ids[..., -4:], segment_ids[..., -4:] = 0, 0
    input_ids = np.roll(target_ids, 1, axis=-1)
    input_ids[..., [0, seq // 2]] = 0
    input_ids[..., -3:] = 0
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), shape)
    weights = (target_ids > 0).astype(np.float32)
    return {
        "input_ids": input_ids,
        "target_ids": target_ids,
        "loss_weights": weights,
        "segment_ids": segment_ids,
        "positions": positions,
    }


@pytest.fixture(scope="module")
def one_step_on(moe_config, mesh_of):
    """Returns one_step_on(mesh shape): compiled text, metrics and state after one step, and again from the start."""
    batch = batch_of(np.random.default_rng(0))
    results = {}

    def run(data, expert):
        if (data, expert) not in results:
            mesh = mesh_of(data, expert)
            train_step = step.make_train_step(moe_config, OPTIMIZER, mesh)
            placed = jax.device_put(batch, sharding.batch_sharding(mesh))
            state = step.init_state(moe_config, OPTIMIZER, 0, mesh)
            compiled = train_step.lower(state, placed).compile()
            start = jax.device_get(state)
            first = jax.device_get(compiled(state, placed))
            again = jax.device_get(compiled(step.init_state(moe_config, OPTIMIZER, 0, mesh), placed))
            results[data, expert] = compiled.as_text(), start, first, again
        return results[data, expert]

    return run


@pytest.mark.parametrize("shape", MESHES)
def test_a_step_repeats_bit_by_bit(one_step_on, shape):
    _, _, first, again = one_step_on(*shape)
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_initial_numbers_do_not_depend_on_the_mesh(one_step_on, shape):
    jax.tree.map(np.testing.assert_array_equal, one_step_on(*shape)[1], one_step_on(1, 1)[1])


@pytest.mark.parametrize("shape", MESHES[1:])
def test_a_sharded_step_equals_the_unsharded_one(one_step_on, shape):
    (state, metrics), (wanted_state, wanted_metrics) = one_step_on(*shape)[2], one_step_on(1, 1)[2]
    for name, wanted in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(metrics["batch_checksum"], wanted_metrics["batch_checksum"])
    for found, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted_state.params), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("shape", "exchanges"), [((2, 2), 8)])
def test_tokens_are_exchanged_twice_forward_and_twice_backward_a_layer(one_step_on, shape, exchanges):
    compiled = one_step_on(*shape)[0]
    assert len(re.findall(r"= .* all-to-all\(", compiled)) == exchanges
    assert "all-gather(" not in compiled


def test_gradients_of_microbatches_are_summed_each_with_its_own_normaliser(moe_config, mesh_of, moe_params):
    mesh, batch = mesh_of(1, 1), batch_of(np.random.default_rng(1), microbatches=2)
    batch["loss_weights"][0, :, 3:] = 0
    gradients = jax.jit(lambda params, batch: objective.gradients(moe_config, mesh, params, batch))
    both, metrics = gradients(moe_params, batch)
    alone = [gradients(moe_params, jax.tree.map(lambda x, m=m: x[m : m + 1], batch)) for m in range(2)]
    jax.tree.map(
        lambda found, a, b: np.testing.assert_allclose(found, a + b, atol=1e-5 * np.abs(a + b).max()),
        both,
        alone[0][0],
        alone[1][0],
    )
    assert metrics["loss_tokens"] == 8 * 3 + 8 * 28
    of_tokens = (24 * alone[0][1]["loss"] + 224 * alone[1][1]["loss"]) / 248
    assert metrics["loss"] == pytest.approx(float(of_tokens), rel=1e-6)
