"""AdamW and Muon against optax; schedules against tables; groups; the same step on a mesh, and with stacked blocks."""

import math
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from openmoe.model import muon, objective, optimizer, parameters, schedule, stacking, step
from openmoe.model.config import PRESETS, ExecutionConfig
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig, GroupConfig, MuonConfig, ScheduleConfig

ROLES = {"kernel": P("embed", "mlp"), "expert": P("expert", "mlp", "embed"), "scale": P("embed")}


def tree_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 10), "expert": (3, 10, 6), "scale": (6,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def updates_of(config, roles, params, *, steps=3):
    """The additions of some steps, each with gradients of its own."""
    transform = optimizer.make(config, roles, optimizer.treatments_of(config, roles))
    state, update, found = transform.init(params), jax.jit(transform.update), []
    for seed in range(1, steps + 1):
        additions, state = update(tree_of(seed), state, params)
        found.append(additions)
    return found, state


def reference_updates(transform, params, steps=3):
    state, found = transform.init(params), []
    for seed in range(1, steps + 1):
        additions, state = transform.update(tree_of(seed), state, params)
        found.append(additions)
    return found


def test_adamw_is_that_of_optax_and_spares_norms_from_decay():
    params = tree_of(0)
    config = AdamWConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.2)
    decayed = {"kernel": True, "expert": True, "scale": False}
    reference = optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.2, mask=decayed)
    found, state = updates_of(config, ROLES, params)
    for ours, wanted in zip(found, reference_updates(reference, params), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), ours, wanted)
    assert state.count == 3
    assert sorted(state.moments["scale"]) == ["mu", "nu"]


def test_muon_is_that_of_optax_for_each_expert_and_adamw_for_all_else():
    params = tree_of(0)
    config = MuonConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.2)
    matrix, experts = optax.contrib.MuonDimensionNumbers(), optax.contrib.MuonDimensionNumbers(1, 2)
    reference = optax.contrib.muon(
        0.01,
        weight_decay=0.2,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers={"kernel": matrix, "expert": experts, "scale": None},
    )
    found, state = updates_of(config, ROLES, params)
    for ours, wanted in zip(found, reference_updates(reference, params), strict=True):
        for name in ("kernel", "expert"):
            np.testing.assert_allclose(ours[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)
    adam = reference_updates(optax.adamw(0.01, b2=0.95, weight_decay=0), params)
    for ours, wanted in zip(found, adam, strict=True):
        np.testing.assert_allclose(ours["scale"], wanted["scale"], rtol=1e-5)
    assert {name: sorted(moments) for name, moments in state.moments.items()} == {
        "kernel": ["mu"],
        "expert": ["mu"],
        "scale": ["mu", "nu"],
    }


def test_muon_moves_a_matrix_alike_in_all_directions_and_as_far_as_adamw_would():
    config = MuonConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0)
    [additions], _ = updates_of(config, ROLES, tree_of(0), steps=1)
    for matrix in (additions["kernel"], *additions["expert"]):
        lengths = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(10))
        assert 0.6 < lengths.min() < lengths.max() < 1.3
        assert np.sqrt(np.mean(np.square(matrix))) == pytest.approx(0.2, rel=0.3)


def test_muon_takes_the_kernels_of_attention_feed_forward_blocks_and_experts(mesh_of):
    declared = step.declarations(PRESETS["openmoe-next-nano"], mesh_of(1, 1))
    roles = jax.tree.leaves_with_path(
        parameters.roles_of(declared)["decoder"]["layers_0"], is_leaf=lambda x: isinstance(x, P)
    )
    apart = {"/".join(key.key for key in path) for path, spec in roles if not muon.is_matrix(spec)}
    assert apart == {
        "mlp/router/bias",
        "mlp/router/router_weights/w/kernel",
        "pre_mlp_layer_norm/scale",
        "pre_self_attention_layer_norm/scale",
        "self_attention/key_norm/scale",
        "self_attention/query_norm/scale",
    }


def test_gradients_are_shortened_together_to_the_norm_given():
    config = AdamWConfig(warmup_steps=0, beta1=0.0, beta2=0.0, epsilon=1e6, learning_rate=1e6, weight_decay=0)
    grads, params = {"kernel": np.full((2, 2), 3.0, np.float32), "scale": np.full(4, 4.0, np.float32)}, None
    params = jax.tree.map(np.zeros_like, grads)
    roles = {name: ROLES[name] for name in grads}
    for norm, factor in [(None, 1.0), (5.0, 0.5), (20.0, 1.0)]:  # theirs is 10
        limited = replace(config, max_grad_norm=norm)
        transform = optimizer.make(limited, roles, optimizer.treatments_of(limited, roles))
        additions, _ = transform.update(grads, transform.init(params), params)
        np.testing.assert_allclose(additions["kernel"], np.full((2, 2), -3.0 * factor), rtol=1e-4)
        np.testing.assert_allclose(additions["scale"], np.full(4, -4.0 * factor), rtol=1e-4)


SHAPES = {
    "inverse_sqrt": (
        {"name": "inverse_sqrt"},
        {0: 4, 10: 4, 25: 4, 100: 2, 400: 1},
        {"learning_rate": 20.0, "warmup_steps": 25},
    ),
    "constant": ({"name": "constant"}, {0: 0, 5: 4, 10: 8, 1000: 8}, {}),
    "no warm-up": ({"name": "constant"}, {0: 8, 1: 8}, {"warmup_steps": 0}),
    "cosine": (
        {"name": "cosine", "end_steps": 110, "final_factor": 0.25},
        {0: 0, 5: 4, 10: 8, 60: 5, 110: 2, 200: 2},
        {},
    ),
    "linear": (
        {"name": "wsd", "end_steps": 200, "cooldown_steps": 100},
        {5: 4, 10: 8, 100: 8, 150: 4, 175: 2, 200: 0, 300: 0},
        {},
    ),
    "one minus sqrt": (
        {"name": "wsd", "end_steps": 200, "cooldown_steps": 100, "cooldown": "one_minus_sqrt", "final_factor": 0.5},
        {100: 8, 125: 6, 164: 4.8, 200: 4},
        {},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_learning_rates(shape):
    settings, wanted, others = SHAPES[shape]
    config = AdamWConfig(**{"learning_rate": 8.0, "warmup_steps": 10, **others}, schedule=ScheduleConfig(**settings))
    rate = schedule.learning_rate(config)
    assert {at: float(rate(np.int32(at))) for at in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("warmup", "length", "final"), [(1, 1, 0.0), (20, 90, 0.1), (7, 13, 1.0)])
def test_cosine_and_linear_cooldown_are_those_of_optax(warmup, length, final):
    cosine = ScheduleConfig(name="cosine", end_steps=warmup + length, final_factor=final)
    wsd = ScheduleConfig(name="wsd", end_steps=warmup + 7 + length, cooldown_steps=length, final_factor=final)
    parts = [
        optax.linear_schedule(0, 2.0, warmup),
        optax.constant_schedule(2.0),
        optax.linear_schedule(2.0, 2.0 * final, length),
    ]
    references = [
        (cosine, optax.warmup_cosine_decay_schedule(0, 2.0, warmup, warmup + length, 2.0 * final)),
        (wsd, optax.join_schedules(parts, [warmup, warmup + 7])),
    ]
    for settings, wanted in references:
        rate = schedule.learning_rate(AdamWConfig(learning_rate=2.0, warmup_steps=warmup, schedule=settings))
        found = jax.vmap(rate)(np.arange(150))
        np.testing.assert_allclose(found, jax.vmap(wanted)(np.arange(150)), rtol=1e-4, atol=1e-5)


GROUPS = (GroupConfig(match=("decoder/layers_0/*", "*/router/*"), learning_rate_factor=0.5, weight_decay=0.5),)
TRAINED = [
    AdamWConfig(warmup_steps=0, learning_rate=0.01, epsilon=1e-4, groups=GROUPS, max_grad_norm=0.5),
    MuonConfig(warmup_steps=0, learning_rate=0.01, epsilon=1e-4),
]


@pytest.fixture(scope="module")
def gradients(config, mesh_of, packed_batch):
    """Returns the initial parameters, and gradients(parameters) on one device, all on the host."""
    mesh, batch = mesh_of(1, 1), packed_batch(8, 32)
    compute = jax.jit(lambda params: objective.gradients(config, mesh, params, batch))
    params = jax.device_get(step.init_state(config, AdafactorConfig(), 0, mesh).params)
    return params, lambda params: jax.device_get(compute(params))


@pytest.mark.parametrize("optimizer_config", TRAINED, ids=lambda config: config.name)
def test_losses_fall(config, mesh_of, gradients, optimizer_config):
    params, compute = gradients
    transform = step.transformation(config, optimizer_config, mesh_of(1, 1))
    state, update, losses = jax.device_get(transform.init(params)), jax.jit(transform.update), []
    for _ in range(4):
        grads, metrics = compute(params)
        losses.append(float(metrics["loss"]))
        additions, state = jax.device_get(update(grads, state, params))
        params = jax.tree.map(np.add, params, additions)
    assert losses[3] < losses[1] < losses[0]


@pytest.mark.parametrize("optimizer_config", TRAINED, ids=lambda config: config.name)
def test_an_update_on_eight_devices_with_stacked_blocks_equals_that_on_one(
    config, mesh_of, gradients, optimizer_config
):
    params, grads = gradients[0], gradients[1](gradients[0])[0]
    one = step.transformation(config, optimizer_config, mesh_of(1, 1))
    wanted = jax.device_get(jax.jit(one.update)(grads, jax.device_get(one.init(params)), params))

    mesh, scanned = mesh_of(1, 2, 2, 2), ExecutionConfig(scan_blocks=True)
    layout = jax.tree.map(lambda x: x.sharding, step.state_shapes(config, optimizer_config, mesh, scanned))
    many = step.transformation(config, optimizer_config, mesh, scanned)
    params, grads = (jax.device_put(stacking.stack(config, x, np.stack), layout.params) for x in (params, grads))
    state = jax.jit(many.init, out_shardings=layout.opt_state)(params)
    additions, state = jax.device_get(jax.jit(many.update)(grads, state, params))
    params, additions, moments = (
        stacking.unstack(config, tree) for tree in (jax.device_get(params), additions, state.moments)
    )
    found = (jax.tree.map(np.add, params, additions), moments)
    wanted = (jax.tree.map(np.add, params, wanted[0]), wanted[1].moments)
    for (path, theirs), ours in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), err_msg=jax.tree_util.keystr(path))


def test_groups_have_their_own_rates_and_decay():
    params, grads = ({"a": {**tree, "norm": tree["scale"]}} for tree in (tree_of(0), tree_of(1)))
    roles = {"a": {**ROLES, "norm": ROLES["scale"]}}
    groups = (
        GroupConfig(match=("a/kernel",), learning_rate_factor=0.0),
        GroupConfig(match=("*/expert", "*l*"), learning_rate_factor=0.5, weight_decay=0.5),
    )

    def additions(groups):
        config = AdamWConfig(warmup_steps=0, learning_rate=0.01, weight_decay=0, groups=groups)
        transform = optimizer.make(config, roles, optimizer.treatments_of(config, roles))
        return jax.jit(transform.update)(grads, transform.init(params), params)[0]["a"]

    usual, grouped = additions(()), additions(groups)
    assert not np.any(grouped["kernel"])
    np.testing.assert_array_equal(grouped["norm"], usual["norm"])
    for name in ("expert", "scale"):
        np.testing.assert_allclose(grouped[name], usual[name] / 2 - 0.0025 * params["a"][name], atol=1e-7)
