"""Each departure from the original model does what its setting says, and nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.model import counts, layers, moe, objective, routing, sharding, step, transformer
from openmoe.model.config import PRESETS, ExecutionConfig
from openmoe.model.layers import GatedWeights, Rows
from openmoe.model.optimizer_config import AdafactorConfig

ROWS, SEQ = 4, 16
TINY = replace(
    PRESETS["openmoe-nano"],
    num_layers=1,
    moe_every=1,
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=24,
    num_experts=4,
    vocab_size=64,
    text_vocab_size=60,
    group_size=16,
)


def batch_of(config, *, seed=0, padding=4):
    target_ids = np.random.default_rng(seed).integers(2, config.text_vocab_size, (1, ROWS, SEQ), dtype=np.int32)
    segment_ids = np.broadcast_to(np.where(np.arange(SEQ) < 6, 1, 2).astype(np.int32), target_ids.shape).copy()
    target_ids[..., SEQ - padding :], segment_ids[..., SEQ - padding :] = 0, 0
    input_ids = np.roll(target_ids, 1, axis=-1)
    input_ids[..., [0, 6]] = 0
    input_ids[..., SEQ - padding + 1 :] = 0
    ids = {"input_ids": input_ids, "target_ids": target_ids, "segment_ids": segment_ids, "positions": segment_ids}
    return ids | {"loss_weights": (target_ids > 0).astype(np.float32)}


@pytest.fixture(scope="module")
def run(mesh_of):
    """Returns run(config, batch): the output for the rows of a batch and the parameters that gave it."""

    def of(config, batch=None, params=None):
        mesh, batch = mesh_of(1, 1), batch or batch_of(config)
        params = params or step.init_state(config, AdafactorConfig(), 0, mesh).params
        rows = jax.tree.map(lambda x: x[0], batch)
        forward = jax.jit(lambda params, rows: transformer.forward(config, mesh, params, rows, train=True))
        return jax.device_get(forward(params, rows)), params

    return of


def test_padding_kept_out_of_routing_asks_for_no_expert_and_takes_no_place(run):
    config = replace(TINY, route_padding=False, capacity_factor_train=1.0)
    output, _ = run(config)
    routed, statistics = output.moe[0].routing, output.moe[0].statistics
    is_padding = np.arange(SEQ) > SEQ - 4  # the first padding position has the last token as its input
    assert (routed.expert_index[:, is_padding] == 4).all()
    assert not routed.kept[:, is_padding].any()
    assert (routed.expert_index[:, ~is_padding] < 4).all()
    np.testing.assert_allclose(statistics.load.sum(axis=-1), np.ones(ROWS), rtol=1e-6)
    asked = np.stack([np.bincount(group[group < 4], minlength=4) for group in routed.expert_index])
    np.testing.assert_allclose(statistics.load, asked / (13 * 2), rtol=1e-6)


def test_a_row_of_nothing_but_padding_has_no_statistics_but_finite_ones(run):
    batch = batch_of(TINY)
    for key in ("input_ids", "target_ids", "segment_ids"):
        batch[key][0, 2] = 0
    batch["loss_weights"][0, 2] = 0
    statistics = run(replace(TINY, route_padding=False), batch)[0].moe[0].statistics
    assert all(np.isfinite(leaf).all() for leaf in statistics)


@pytest.fixture(scope="module")
def gradients(mesh_of):
    """Returns gradients(config, batch, parts=1), with the metrics, of the parameters of seed 0."""

    def of(config, batch, parts=1):
        mesh, execution = mesh_of(1, 1), ExecutionConfig(accumulation_steps=parts)
        params = step.init_state(config, AdafactorConfig(), 0, mesh).params
        compute = jax.jit(lambda params, batch: objective.gradients(config, mesh, params, batch, execution))
        return jax.device_get(compute(params, batch))

    return of


def assert_same(found, wanted):
    jax.tree.map(lambda x, like: np.testing.assert_allclose(x, like, rtol=1e-4, atol=1e-6), found, wanted)


KEPT_OUT = replace(TINY, route_padding=False, router="sigmoid", dropless=True, aux_loss_weight=1.0, group_size=8)


def test_groups_of_nothing_but_padding_count_neither_in_losses_nor_in_metrics(gradients):
    batch = batch_of(KEPT_OUT, padding=9)  # the second half of each row, and one position more
    batch["input_ids"][..., 7] = 0  # else it is none, and attends to the whole row
    grads, metrics = gradients(KEPT_OUT, batch)
    assert_same((grads, metrics), gradients(KEPT_OUT, {key: rows[..., :8] for key, rows in batch.items()}))
    assert metrics["drop_fraction"] == pytest.approx(0, abs=1e-6)
    assert metrics["tokens_left_behind"] == pytest.approx(0, abs=1e-6)
    assert metrics["expert_load"].sum() == pytest.approx(1)


def test_parts_with_unequal_padding_have_the_gradients_and_metrics_of_the_whole(gradients):
    full, half = batch_of(KEPT_OUT, padding=0), batch_of(KEPT_OUT, padding=9)
    batch = {key: np.concatenate([full[key][:, :1], half[key][:, 1:]], axis=1) for key in full}
    assert_same(gradients(KEPT_OUT, batch, parts=4), gradients(KEPT_OUT, batch))


@pytest.mark.parametrize(("counts_top_k", "train", "eval_"), [(False, 80, 128), (True, 160, 256)])
def test_capacity_can_count_top_k(counts_top_k, train, eval_):
    config = replace(PRESETS["openmoe-nano"], capacity_counts_top_k=counts_top_k)
    assert (config.capacity(train=True), config.capacity(train=False)) == (train, eval_)


def test_renormalised_gates_sum_to_1_and_keep_their_ratio(run):
    gates, params = run(TINY)
    renormalised, _ = run(replace(TINY, renormalize_gates=True), params=params)
    gates, renormalised = (output.moe[0].routing.gate for output in (gates, renormalised))
    assert gates.sum(axis=-1).max() < 0.9
    np.testing.assert_allclose(renormalised, gates / gates.sum(axis=-1, keepdims=True), rtol=1e-5)


def test_a_sigmoid_router_weighs_each_expert_by_itself():
    logits = jnp.asarray([[0.0, np.log(3.0), -np.log(3.0)]])
    np.testing.assert_allclose(routing.scores(logits, replace(TINY, router="sigmoid")), [[0.5, 0.75, 0.25]], rtol=1e-6)


@pytest.mark.parametrize(
    ("logit", "wanted"),
    [(0.0, 0.5), (-40.0, 0.5), (-50.0, 1.9287498e-4), (-110.0, 0.0)],  # exp(-50) / 1e-18, and exp(-110) is 0
)
def test_renormalised_sigmoids_too_small_to_be_summed_are_finite_and_so_is_their_gradient(logit, wanted):
    config = replace(TINY, router="sigmoid", renormalize_gates=True)

    @jax.jit
    @jax.value_and_grad
    def first_gate(logits):
        scores = routing.scores(logits, config)
        gate = routing.choose(scores, None, jnp.ones(1, bool), config).gate
        return gate[0, 0] + 0 * jnp.sum(routing.shares(scores))

    gate, gradient = first_gate(jnp.full((1, 4), logit))
    np.testing.assert_allclose(gate, wanted, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_bias_changes_who_is_chosen_and_not_the_gates():
    scores = jnp.asarray([[0.5, 0.3, 0.2, 0.1]])
    bias, real = jnp.asarray([0.0, 0.0, 0.0, 1.0]), jnp.ones(1, bool)
    choices = routing.choose(scores, bias, real, TINY)
    assert choices.expert_index.tolist() == [[3, 0]]
    np.testing.assert_allclose(choices.gate, [[0.1, 0.5]])
    assert jax.grad(lambda bias: routing.choose(scores, bias, real, TINY).gate.sum())(bias).tolist() == [0.0] * 4


def test_biases_move_by_the_sign_of_what_is_missing_to_equal_load():
    config = replace(TINY, num_layers=2, moe_every=2, router_bias_rate=0.5)
    layer = {"mlp": {"router": {"bias": jnp.zeros(4)}}}
    load = jnp.asarray([[0.5, 0.25, 0.25, 0.0]])
    moved = step.balanced(config, {"decoder": {"layers_0": {}, "layers_1": layer}}, load)
    assert moved["decoder"]["layers_1"]["mlp"]["router"]["bias"].tolist() == [-0.5, 0.0, 0.0, 0.5]
    stacked = {"decoder": {"blocks": {"layers_0": {}, "layers_1": jax.tree.map(lambda x: x[None], layer)}}}
    moved = step.balanced(config, stacked, load)
    assert moved["decoder"]["blocks"]["layers_1"]["mlp"]["router"]["bias"].tolist() == [[-0.5, 0.0, 0.0, 0.5]]


def test_biases_balance_a_router_that_prefers_one_expert(mesh_of):
    config = replace(TINY, router_bias_rate=0.001, aux_loss_weight=0.0, router="sigmoid", route_padding=False)
    mesh, optimizer = mesh_of(1, 1), AdafactorConfig(learning_rate=1e-6)
    state, train_step = step.init_state(config, optimizer, 0, mesh), step.make_train_step(config, optimizer, mesh)
    loads, batch = [], jax.device_put(batch_of(config), sharding.batch_sharding(mesh))
    bias = state.params["decoder"]["layers_0"]["mlp"]["router"]["bias"]
    state.params["decoder"]["layers_0"]["mlp"]["router"]["bias"] = bias.at[2].set(0.05)  # all prefer expert 2
    for _ in range(80):
        state, metrics = train_step(state, batch)
        loads.append(np.asarray(metrics["expert_load"])[0])
    assert np.abs(loads[0] - 1 / 4).max() > 0.2
    assert np.abs(np.mean(loads[-20:], axis=0) - 1 / 4).max() < 0.03


def test_swiglu_by_hand():
    weights = GatedWeights(jnp.asarray([[2.0], [0.0]]), jnp.asarray([[0.0], [3.0]]), jnp.asarray([[1.0, -1.0]]))
    y = layers.gated_mlp(jnp.asarray([[1.0, 2.0]]), weights, "swiglu")
    swish = 2 / (1 + np.exp(-2))
    np.testing.assert_allclose(y, [[6 * swish, -6 * swish]], rtol=1e-6)


def test_openmoe_s_gate_has_a_third_factor_and_may_have_its_halves_apart():
    rng = np.random.default_rng(0)
    wi_0, wi_1, wo = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 8), (3, 4), (4, 3)))
    x = rng.normal(size=(5, 3)).astype(np.float32)
    linear, gate = x @ wi_0[:, :4], x @ wi_0[:, 4:]
    by_hand = (linear * gate / (1 + np.exp(-gate)) * (x @ wi_1)) @ wo
    for form in (wi_0, wi_0.reshape(3, 2, 4)):
        np.testing.assert_allclose(layers.gated_mlp(x, GatedWeights(form, wi_1, wo), "openmoe"), by_hand, rtol=1e-4)


def test_normed_queries_and_keys_do_not_grow_with_their_kernels(run):
    config = replace(TINY, qk_norm=True)
    output, params = run(config)
    attention = params["decoder"]["layers_0"]["self_attention"]
    assert {name: attention[name]["scale"].shape for name in ("query_norm", "key_norm")} == {
        "query_norm": (8,),
        "key_norm": (8,),
    }
    grown = jax.tree.map_with_path(lambda path, x: 100 * x if "'query'" in jax.tree_util.keystr(path) else x, params)
    np.testing.assert_allclose(run(config, params=grown)[0].logits, output.logits, atol=1e-3)
    assert np.abs(run(TINY, params=grown)[0].logits - run(TINY, params=params)[0].logits).max() > 0.1


def test_positions_start_anew_in_each_segment():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [7, 8, 8, 8, 8, 8, 8]])
    assert layers.segment_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]


def test_a_parallel_extra_block_reads_what_the_experts_read(run, mesh_of):
    config = replace(TINY, extra_mlp="parallel")
    layer = transformer.MoELayer(config, mesh_of(1, 1), train=True)
    params = step.init_state(config, AdafactorConfig(), 0, mesh_of(1, 1)).params["decoder"]["layers_0"]
    assert "pre_extra_mlp_layer_norm" not in params
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, SEQ, 16)), jnp.float32)
    rows = Rows(jnp.arange(SEQ), jnp.ones((ROWS, SEQ, 1), bool), jnp.ones((ROWS, SEQ), jnp.int32))

    def both(params, x):
        (y, output), found = layer.apply({"params": params}, x, rows, True, capture_intermediates=True)
        normed = found["intermediates"]["pre_mlp_layer_norm"]["__call__"][0]
        attended = found["intermediates"]["self_attention"]["__call__"][0]
        kernels = GatedWeights(*(params["extra_mlp"][name]["kernel"] for name in ("wi_0", "wi_1", "wo")))
        return y, x + attended + output.y + layers.gated_mlp(normed, kernels, config.ffn)

    y, by_hand = jax.jit(both)(params, x)
    np.testing.assert_allclose(y, by_hand, atol=1e-5)


def test_without_an_extra_block_there_are_only_experts(run):
    output, params = run(replace(TINY, extra_mlp="none"))
    assert sorted(params["decoder"]["layers_0"]) == [
        "mlp",
        "pre_mlp_layer_norm",
        "pre_self_attention_layer_norm",
        "self_attention",
    ]
    assert np.isfinite(output.logits).all()


def test_dropless_experts_answer_as_those_with_a_place_for_everyone(run):
    roomy = replace(TINY, capacity_factor_train=4.0)
    output, params = run(roomy)
    dropless, _ = run(replace(TINY, dropless=True), params=params)
    np.testing.assert_allclose(dropless.logits, output.logits, atol=1e-5)
    assert (dropless.moe[0].statistics.kept == 1).all()
    assert run(TINY, params=params)[0].moe[0].statistics.kept.min() < 1


@pytest.mark.parametrize(
    ("rows", "row_len", "copies", "groups"),
    [
        (8, 32, 1, (64, 0, 0)),  # the golden files: at least one group for each of 4 experts
        (128, 2048, 1, (4096, 0, 0)),
        (128, 2048, 32, (2048, 0, 0)),  # more devices, smaller groups
        (3, 10, 1, (9, 0, 2)),  # 30 tokens: two columns are 6 zeros, one row is 10
        (5, 2, 1, (3, 1, 0)),  # 10 tokens: one row is 2 zeros, two columns are 10
        (6, 3, 2, (3, 0, 1)),  # 18 tokens: two rows are 6 zeros, and so is one column
        (1, 30, 1, (8, 0, 2)),
    ],
)
def test_groups_by_the_original_s_rule(rows, row_len, copies, groups):
    config = replace(TINY, group_size=4096, t5x_expert_copies=copies)
    assert counts.groups_of(config, rows, row_len) == groups
    assert counts.groups_of(replace(config, t5x_expert_copies=0), rows, row_len) == (4096, 0, 0)


def test_appended_padding_takes_places_and_answers_nothing(mesh_of):
    config = replace(TINY, t5x_expert_copies=1, group_size=4096)
    layer = moe.MoE(config, mesh_of(1, 1), train=True)
    params = step.init_state(config, AdafactorConfig(), 0, mesh_of(1, 1)).params["decoder"]["layers_0"]["mlp"]
    x = np.random.default_rng(0).normal(size=(3, 10, 16)).astype(np.float32)
    real = np.ones((3, 10, 1), bool)
    apply = jax.jit(lambda x, real: layer.apply({"params": params}, x, real))
    short, full = apply(x, real), apply(np.pad(x, ((0, 0), (0, 2), (0, 0))), np.pad(real, ((0, 0), (0, 2), (0, 0))))
    assert short.routing.kept.shape == full.routing.kept.shape == (4, 9, 2)
    np.testing.assert_array_equal(short.y, full.y[:, :10])
    assert (np.asarray(short.routing.expert_index).reshape(3, 12, 2)[:, 10:] == [0, 1]).all()


def test_the_improved_model_trains_the_same_on_any_mesh(mesh_of):
    config = replace(
        PRESETS["openmoe-next-nano"],
        num_layers=1,
        d_model=16,
        head_dim=8,
        d_ff=24,
        d_ff_expert=8,
        num_experts=8,
        top_k=2,
        vocab_size=64,
        text_vocab_size=60,
        group_size=16,
    )
    results = {}
    for shape in ((1, 1), (1, 2, 1, 2)):
        mesh = mesh_of(*shape)
        train_step = step.make_train_step(config, AdafactorConfig(), mesh)
        batch = jax.device_put(batch_of(config), sharding.batch_sharding(mesh))
        results[shape] = jax.device_get(train_step(step.init_state(config, AdafactorConfig(), 0, mesh), batch))
    (state, metrics), (wanted_state, wanted) = results[1, 2, 1, 2], results[1, 1]
    assert wanted["drop_fraction"] == 0
    for name in ("loss", "grad_norm", "expert_load"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda found, like: np.testing.assert_allclose(found, like, atol=1e-5 * max(np.abs(like).max(), 1e-6)),
        state.params,
        wanted_state.params,
    )
