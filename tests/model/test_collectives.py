"""What devices exchange in a training step, read from the optimized program of eight of them, and what comes out."""

import math
import re

import jax
import numpy as np
import pytest

from openmoe.model import counts, objective, sharding, step
from openmoe.model.optimizer_config import AdafactorConfig

KINDS = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf'= (.*?) ({KINDS}|ragged-all-to-all)(?:-start)?\((?:.*op_name="([^"]*)")?')


@pytest.fixture(scope="module")
def exchanged(config, mesh_of, packed_batch):
    """Returns exchanged(rows): (kind, numbers that a device gets, where in the model) of each collective."""
    mesh, found = mesh_of(2, 4), {}

    def of(rows):
        if rows not in found:
            state = step.state_shapes(config, AdafactorConfig(), mesh)
            batch = jax.device_put(packed_batch(rows=rows, seq=64), sharding.batch_sharding(mesh))
            program = step.make_train_step(config, AdafactorConfig(), mesh).lower(state, batch).compile().as_text()
            found[rows] = [(kind, size(shapes), where) for shapes, kind, where in COLLECTIVE.findall(program)]
        return found[rows]

    return of


def size(shapes):
    """Returns how many numbers "(f32[2,64]{1,0}, f32[])" holds."""
    return sum(math.prod(int(side) for side in axes.split(",") if side) for axes in re.findall(r"\[(.*?)\]", shapes))


def test_tokens_travel_twice_forward_and_twice_backward_in_each_moe_layer(exchanged):
    for rows in (8, 16):
        backward = ["transpose(" in where for kind, _, where in exchanged(rows) if kind == "all-to-all"]
        assert backward.count(False) == backward.count(True) == 2 * 2


@pytest.mark.parametrize(("rows", "numbers"), [(8, 8 * 10 * 64), (16, 2 * 8 * 10 * 64)])
def test_a_device_exchanges_the_places_of_its_groups(exchanged, rows, numbers):
    assert {n for kind, n, _ in exchanged(rows) if kind == "all-to-all"} == {numbers}


def test_nothing_else_that_is_exchanged_grows_with_the_batch(exchanged):
    other = [sorted((kind, n) for kind, n, _ in exchanged(rows) if kind != "all-to-all") for rows in (8, 16)]
    assert other[0] == other[1]
    assert {kind for kind, _ in other[0]} == {"all-reduce"}


def test_all_else_are_the_gradients_once_and_some_statistics(exchanged, config):
    parts = counts.parameter_counts(config)
    gradients = parts.total - parts.experts * 3 // 4  # a device holds a quarter of the experts
    summed = sum(n for kind, n, _ in exchanged(8) if kind == "all-reduce")
    assert gradients <= summed <= gradients + 64


@pytest.fixture(scope="module")
def gradients_on(config, mesh_of, packed_batch):
    """Returns gradients_on(data, expert): gradients and metrics of a batch with one group for each of 8 devices."""
    params = jax.device_get(step.init_state(config, AdafactorConfig(), 0, mesh_of(1, 1)).params)

    def run(data, expert):
        mesh = mesh_of(data, expert)
        layout = jax.tree.map(lambda leaf: leaf.sharding, step.state_shapes(config, AdafactorConfig(), mesh).params)
        batch = jax.device_put(packed_batch(rows=16, seq=32), sharding.batch_sharding(mesh))
        gradients = jax.jit(lambda params, batch: objective.gradients(config, mesh, params, batch))
        return jax.device_get(gradients(jax.device_put(params, layout), batch))

    return run


@pytest.fixture(scope="module")
def unsharded(gradients_on):
    return gradients_on(1, 1)


@pytest.mark.parametrize("shape", [(1, 8), (4, 2), (8, 1)])
def test_losses_and_gradients_on_eight_devices_are_those_on_one(gradients_on, unsharded, shape):
    (grads, metrics), (wanted_grads, wanted_metrics) = gradients_on(*shape), unsharded
    for name, wanted in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, err_msg=name)
    for (path, found), wanted in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=jax.tree_util.keystr(path))
