"""Devices, scan, recomputation, parts and sharded parameters change no number of a step beyond the order of sums."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from openmoe.model import objective, sharding, stacking, step
from openmoe.model.config import PLAIN, PRESETS, ExecutionConfig
from openmoe.model.optimizer_config import AdafactorConfig

ADAFACTOR = AdafactorConfig()
SCANNED = ExecutionConfig(scan_blocks=True, remat="dots")


@pytest.fixture(scope="module")
def uneven_batch(packed_batch):
    """Returns what `packed_batch` does, with rows that carry different numbers of losses."""

    def make(rows, seq, microbatches=1):
        batch = packed_batch(rows, seq, microbatches)
        begins = np.random.default_rng(1).integers(0, seq // 2, (microbatches, rows, 1))
        return batch | {"loss_weights": batch["loss_weights"] * (np.arange(seq) >= begins)}

    return make


@pytest.fixture(scope="module")
def gradients(config, mesh_of, uneven_batch):
    """Returns gradients(data, expert, fsdp, tensor, execution): of two microbatches of 16 rows, with their metrics."""
    batch = uneven_batch(rows=16, seq=32, microbatches=2)
    initial = jax.device_get(step.init_state(config, ADAFACTOR, 0, mesh_of(1, 1)).params)

    @functools.cache
    def of(data=1, expert=1, fsdp=1, tensor=1, execution=PLAIN):
        mesh = mesh_of(data, expert, fsdp, tensor)
        layout = jax.tree.map(lambda leaf: leaf.sharding, step.state_shapes(config, ADAFACTOR, mesh, execution).params)
        params = stacking.stack(config, initial, np.stack) if execution.scan_blocks else initial
        compute = jax.jit(lambda params, batch: objective.gradients(config, mesh, params, batch, execution))
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        grads, metrics = jax.device_get(compute(jax.device_put(params, layout), placed))
        return stacking.unstack(config, grads) if execution.scan_blocks else grads, metrics

    return of


def assert_same(found, wanted, *, within=1e-5):
    for name, value in wanted[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=within, err_msg=name)
    grads = traverse_util.flatten_dict(found[0], sep="/")
    for name, grad in traverse_util.flatten_dict(wanted[0], sep="/").items():
        np.testing.assert_allclose(grads[name], grad, atol=within * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(1, 8), (4, 2), (8, 1)])
def test_losses_and_gradients_on_eight_devices_are_those_on_one(gradients, shape):
    assert_same(gradients(*shape), gradients())


@pytest.mark.parametrize("execution", [SCANNED, ExecutionConfig(remat="full")], ids=["scan, dots", "full"])
def test_scanned_and_recomputed_blocks_have_the_same_gradients(gradients, execution):
    assert_same(gradients(execution=execution), gradients())


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (1, 1, 1, 2), (1, 2, 2, 2)])
def test_fully_sharded_and_tensor_parallel_parameters_have_the_same_gradients(gradients, shape):
    assert_same(gradients(*shape), gradients())


def test_all_axes_with_scanned_blocks_and_parts(gradients):
    assert_same(gradients(1, 2, 2, 2, replace(SCANNED, accumulation_steps=2)), gradients())


def test_microbatches_cut_into_parts_keep_groups_and_normalisers(gradients):
    found = gradients(2, 1, execution=ExecutionConfig(accumulation_steps=4))
    assert_same(found, gradients())
    np.testing.assert_allclose(found[1]["expert_load"], gradients()[1]["expert_load"], rtol=1e-6)


def test_each_device_cuts_its_own_rows_into_parts(mesh_of):
    rows = np.arange(8).reshape(1, 8, 1)
    parts = jax.jit(lambda batch: objective.in_parts(batch, 2, mesh_of(2, 1)))({"rows": rows})
    assert np.asarray(parts["rows"])[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_one_compilation_serves_all_steps_and_states_are_freely_rearranged(config, mesh_of, uneven_batch):
    mesh = mesh_of(1, 2, 2, 1)
    train_step = step.make_train_step(config, ADAFACTOR, mesh, SCANNED)
    state = step.init_state(config, ADAFACTOR, 0, mesh, SCANNED)
    plain = jax.device_get(step.plain(config, ADAFACTOR, mesh, SCANNED, state))
    jax.tree.map(np.testing.assert_array_equal, plain, jax.device_get(step.init_state(config, ADAFACTOR, 0, mesh)))
    batch = jax.device_put(uneven_batch(rows=16, seq=32), sharding.batch_sharding(mesh))
    for _ in range(2):
        state, _ = train_step(state, batch)
        state = step.plain(config, ADAFACTOR, mesh, SCANNED, state)
        state = step.arranged(config, ADAFACTOR, mesh, SCANNED, state)
    assert train_step._cache_size() == 1


@pytest.mark.parametrize("preset", ["openmoe-8b", "openmoe-34b", "openllama-large", "openmoe-next-8b"])
def test_every_preset_is_one_scan_over_equal_blocks(preset, mesh_of):
    config, mesh = PRESETS[preset], mesh_of(1, 1)
    apart = step.state_shapes(config, ADAFACTOR, mesh).params
    stacked = step.state_shapes(config, ADAFACTOR, mesh, SCANNED).params
    assert sorted(stacked["decoder"]) == ["blocks", "decoder_norm", "logits_dense"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked["decoder"]["blocks"])} == {
        config.num_layers // config.block_layers
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(stacked)) == sum(leaf.size for leaf in jax.tree.leaves(apart))
