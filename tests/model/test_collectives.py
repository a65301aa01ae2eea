"""What devices exchange in a training step, read from the optimized program of eight of them."""

import math
import re

import jax
import pytest

from openmoe.model import counts, sharding, step
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
