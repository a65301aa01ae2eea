"""The PyTorch model of an export against the original's numbers, and against openmoe's own decoding and losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from openmoe.model import hf_checkpoint, interop, objective

BATCH = {"input_ids": "decoder_input_tokens", "attention_mask": "decoder_segment_ids"}
CASES = [
    ("moe_c_train_drop_packed", {}),
    ("moe_d_eval_packed", {}),
    ("moe_e_train_groups16_packed", {"group_size": 16}),
    ("moe_a_train_nodrop_unpacked", {"router_capacity_factor_train": 4.0}),
]


def inputs_of(case):
    found = {ours: case.get(f"batch/{theirs}") for ours, theirs in BATCH.items()}
    return {name: torch.from_numpy(array).long() for name, array in found.items() if array is not None}


def routed_layers(model):
    """Collects what each MoE layer's router decides from here on."""
    decisions = []
    for layer in model.model.layers:
        if layer.sparse:
            layer.mlp.register_forward_hook(lambda module, inputs, output: decisions.append(output[1]))
    return decisions


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])
def test_logits_and_routing_are_the_originals(load, golden, name, settings):
    case, model = golden(name), load(**settings)
    model.train(bool(case["train_mode"]))
    decisions = routed_layers(model)
    with torch.no_grad():
        logits = model(**inputs_of(case)).logits.numpy()
    np.testing.assert_allclose(logits[: len(case["logits"])], case["logits"], rtol=0, atol=1e-4)
    assert len(decisions) == 2
    for layer, routed in zip((1, 3), decisions, strict=True):
        np.testing.assert_array_equal(routed.expert_index, case[f"router/layer_{layer}/expert_index"])
        np.testing.assert_array_equal(routed.kept, case[f"router/layer_{layer}/kept"])
        np.testing.assert_allclose(routed.gate.numpy(), case[f"router/layer_{layer}/expert_gate"], rtol=0, atol=1e-5)


def with_targets(case):
    """The batch, and its targets as transformers has labels: -100 where there is no loss."""
    targets = np.where(case["batch/decoder_loss_weights"] > 0, case["batch/decoder_target_tokens"], -100)
    return inputs_of(case) | {"shift_labels": torch.from_numpy(targets).long()}


def in_t5x_shape(model, config, attribute=lambda parameter: parameter.data):
    """An array of each parameter by T5X's name."""
    by_name = dict(model.named_parameters())
    names = hf_checkpoint.torch_names(config)
    assert {torch_name.name for torch_name in names.values()} == by_name.keys()
    arrays = {name: attribute(by_name[torch_name.name]).numpy() for name, torch_name in names.items()}
    return {name: array.T if names[name].transposed else array for name, array in arrays.items()}


def test_loss_and_all_gradients_are_the_originals(load, golden, moe_config):
    case, model = golden("moe_c_train_drop_packed"), load().train()
    loss = model(**with_targets(case)).loss
    assert loss.item() == pytest.approx(float(case["loss/total"]), rel=1e-6)  # not ~1e10, as in the earlier port
    loss.backward()
    gradients = in_t5x_shape(model, moe_config, lambda parameter: parameter.grad)
    assert len(gradients) == 49
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient) == pytest.approx(float(case[f"grad_norm/{name}"]), rel=1e-4), name
        if f"grad/{name}" in case:
            wanted = case[f"grad/{name}"]
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_the_loss_is_that_of_our_own_training_step(load, golden, moe_config, mesh, jax_params):
    case = golden("moe_c_train_drop_packed")
    names = {"input_ids": "input_tokens", "target_ids": "target_tokens", "segment_ids": "segment_ids"}
    batch = {ours: jnp.asarray(case[f"batch/decoder_{theirs}"])[None] for ours, theirs in names.items()}
    batch["positions"] = jnp.asarray(case["batch/decoder_positions"])[None]
    batch["loss_weights"] = jnp.asarray(case["batch/decoder_loss_weights"], jnp.float32)[None]
    _, metrics = jax.jit(lambda params, batch: objective.gradients(moe_config, mesh, params, batch))(jax_params, batch)
    loss = load().train()(**with_targets(case)).loss.item()
    assert loss == pytest.approx(float(metrics["total_loss"]), rel=1e-6)


def test_labels_are_shifted_once(load):
    model = load().eval()
    input_ids = torch.tensor([[0, 5, 6, 7, 8]])
    output = model(input_ids, labels=input_ids.masked_fill(torch.tensor([[True, True, False, False, False]]), -100))
    log_z = output.logits.logsumexp(-1)[0]
    wanted = sum(log_z[t] - output.logits[0, t, 5 + t] + 1e-4 * log_z[t] ** 2 for t in (1, 2, 3)) / 3
    statistics = [(logits.softmax(-1), logits.logsumexp(-1)) for logits in output.router_logits]
    for probs, router_log_z in statistics:
        asked = torch.zeros(4).index_add(0, probs.topk(2).indices.flatten(), torch.ones(10)) / 5
        wanted += (0.01 * 4 * (asked * probs.mean((0, 1))).sum() + 1e-4 * router_log_z.square().mean()) / 2
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("train", "size", "capacity"), [(True, 64, 20), (False, 64, 32), (True, 16, 5), (False, 16, 8)]
)
def test_capacity_is_that_of_a_group_and_not_doubled(load, train, size, capacity):
    model = load(group_size=size).train(train)
    assert model.model.layers[1].mlp.groups_of(256, generating=False) == (size, capacity)
    assert model.model.layers[1].mlp.groups_of(256, generating=True) == (256, None)
    assert model.model.layers[1].mlp.groups_of(250, generating=False) == (250, None)


def test_groups_are_those_of_the_original_rule_if_the_model_has_it(load):
    moe = load(group_size=4096, t5x_expert_copies=1).train().model.layers[1].mlp
    assert moe.groups_of(256, generating=False) == (64, 20)  # at least as many groups as experts
    assert moe.groups_of(250, generating=False) == (250, None)


def test_the_row_of_bos_is_a_row_like_others(load, golden):
    model = load().train()
    table = model.model.embed_tokens
    assert table.padding_idx is None
    wanted = golden("moe_params")["token_embedder/embedding"]
    assert np.abs(wanted[0]).max() > 0.1
    np.testing.assert_array_equal(table.weight.detach().numpy(), wanted)
    model(torch.tensor([[0, 5, 6, 7]]), labels=torch.tensor([[0, 5, 6, 7]])).loss.backward()
    assert table.weight.grad[0].abs().max() > 0


def test_fresh_weights_have_the_originals_deviations(load):
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(load().config, trust_remote_code=True)
    layer = model.model.layers[1]
    for weight, deviation in [  # the smallest has 256 numbers
        (model.model.embed_tokens.weight, 1.0),
        (layer.self_attn.q_proj.weight, (0.1 / 64) ** 0.5 / 4),
        (layer.self_attn.k_proj.weight, (0.1 / 64) ** 0.5),
        (layer.mlp.gate_weight, 0.02),
        (layer.mlp.experts.wi_gate, (0.1 / 64) ** 0.5),
        (layer.mlp.experts.wo, (0.1 / 96) ** 0.5),
        (layer.extra_mlp.down_proj.weight, (0.1 / 96) ** 0.5),
        (model.lm_head.weight, (0.1 / 64) ** 0.5),
    ]:
        assert float(weight.detach().std()) == pytest.approx(deviation, rel=0.15)
    assert (model.model.norm.weight == 1).all()


def test_the_dense_model_is_the_originals(load, golden, dense_config, tmp_path):
    case = golden("dense_a_train_packed")
    parameters = {name: interop.InMemory(array) for name, array in golden("dense_params").items()}
    model = load(hf_checkpoint.write(str(tmp_path / "dense"), dense_config, parameters)).train()
    output = model(**with_targets(case))
    np.testing.assert_allclose(output.logits.detach().numpy(), case["logits"], rtol=0, atol=1e-4)
    assert output.loss.item() == pytest.approx(float(case["loss/total"]), rel=1e-5)


def test_bfloat16_is_rounded_where_the_original_rounds(load, golden):
    """Single logits move by up to 1 there, and some choices change; the mean is what can be held."""
    case, model = golden("moe_f_train_bfloat16_packed"), load(activation_dtype="bfloat16").train()
    streams = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output[0].dtype))
    with torch.no_grad():
        logits = model(**inputs_of(case)).logits
    assert streams == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert logits.dtype == torch.float32
    in_float32 = np.abs(golden("moe_c_train_drop_packed")["logits"] - case["logits"])
    off = np.abs(logits.numpy() - case["logits"])
    assert np.median(off) < np.median(in_float32)
