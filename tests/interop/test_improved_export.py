"""Exports of improved models: each departure from the original is computed in PyTorch as in JAX."""

import runpy
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import traverse_util

from openmoe.model import decode, hf_checkpoint, objective, step, transformer
from openmoe.model.config import DEPARTURES, PRESETS
from openmoe.model.interop import InMemory

ROWS, SEQ, BEGIN_2, PADDING = 4, 16, 6, 5  # a second segment begins at 6; the last 5 positions are padding
SIZES = {
    "num_layers": 2,
    "d_model": 32,
    "head_dim": 8,
    "d_ff": 24,
    "num_experts": 8,
    "vocab_size": 96,
    "text_vocab_size": 90,
    "group_size": 32,
}
SCARCE = {"capacity_factor_train": 0.8, "capacity_factor_eval": 1.0}
CONFIGS = {
    "next-nano": replace(
        PRESETS["openmoe-next-nano"], **SIZES, d_ff_expert=8, top_k=3, aux_loss_weight=1.0, router_z_loss_weight=0.1
    ),
    "coarse": replace(
        PRESETS["openmoe-nano"],
        **SIZES,
        **SCARCE,
        route_padding=False,
        capacity_counts_top_k=True,
        renormalize_gates=True,
        qk_norm=True,
        ffn="swiglu",
        extra_mlp="parallel",
    ),
    "sigmoid": replace(
        PRESETS["openmoe-nano"],
        **SIZES,
        **SCARCE,
        d_ff_expert=8,
        router="sigmoid",
        router_bias_rate=0.01,
        extra_mlp="none",
        reset_positions=True,
    ),
}


def batch_of(seed=0):
    """Rows of two packed segments and padding, and one of little else."""
    target_ids = np.random.default_rng(seed).integers(2, 90, (ROWS, SEQ), np.int32)
    segment_ids = np.where(np.arange(SEQ) < BEGIN_2, 1, 2).astype(np.int32) * np.ones((ROWS, SEQ), np.int32)
    for ids in (target_ids, segment_ids):
        ids[:, -PADDING:], ids[-1, 2:] = 0, 0
    input_ids = np.roll(target_ids, 1, axis=-1)
    input_ids[:, [0, BEGIN_2, SEQ - PADDING]], input_ids[-1, 2] = 0, 0
    return {"input_ids": input_ids, "target_ids": target_ids, "segment_ids": segment_ids}


def drawn(config, mesh):
    """Parameters of which none has the value that it begins with."""
    rng = np.random.default_rng(1)

    def draw(name, shape):
        numbers = rng.normal(size=shape).astype(np.float32)
        if name.endswith("scale"):
            return 1 + 0.2 * numbers
        return 0.2 * numbers if name.endswith("bias") else numbers / np.float32(shape[-2] ** 0.5)

    declared = traverse_util.flatten_dict(nn.unbox(step.declarations(config, mesh)), sep="/")
    return {name: draw(name, like.shape) for name, like in declared.items()}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def arrays(config, mesh):
    return drawn(config, mesh)


@pytest.fixture(scope="module")
def params(arrays):
    return traverse_util.unflatten_dict(arrays, sep="/")


@pytest.fixture(scope="module")
def improved(config, arrays, load, tmp_path_factory):
    """Returns improved(), the export as transformers loads it."""
    path = str(tmp_path_factory.mktemp("hf") / "improved")
    hf_checkpoint.write(path, config, {name: InMemory(array) for name, array in arrays.items()})
    return lambda: load(path)


def test_the_configs_have_every_departure():
    assert {name for config in CONFIGS.values() for name in config.departures()} == set(DEPARTURES)


def test_gates_of_sigmoids_too_small_to_be_summed_are_finite():
    settings = SimpleNamespace(
        num_experts=4, router_topk=2, router_scores="sigmoid", router_renormalize_gates=True
    )  # all that routing reads of an OpenMoeConfig
    layers = runpy.run_path(f"{hf_checkpoint.__file__.removesuffix('hf_checkpoint.py')}hf_export/layers_openmoe.py")
    logits = torch.tensor([[[0.0] * 4, [-40.0] * 4, [-110.0] * 4]], requires_grad=True)
    routed = layers["route"](logits, None, torch.ones(1, 3, dtype=torch.bool), None, settings)
    (routed.gate.sum() + routed.shares.sum()).backward()
    assert routed.gate[0].tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    assert logits.grad.isfinite().all()


def test_logits_and_routing_of_packed_rows_are_jax_s(config, params, improved, mesh):
    batch, model, decisions = batch_of(), improved().eval(), []
    wanted = jax.jit(lambda params, batch: transformer.forward(config, mesh, params, batch, train=False))(params, batch)
    for layer in model.model.layers:
        if layer.sparse:
            layer.mlp.register_forward_hook(lambda module, inputs, output: decisions.append(output[1]))
    ids, segments = (torch.from_numpy(batch[key]).long() for key in ("input_ids", "segment_ids"))
    with torch.no_grad():
        logits = model(ids, attention_mask=segments).logits.numpy()
    np.testing.assert_allclose(logits, wanted.logits, rtol=0, atol=1e-4)
    assert len(decisions) == len(wanted.moe) == config.num_moe_layers
    for routed, layer in zip(decisions, wanted.moe, strict=True):
        shape = (-1, config.top_k)
        for name in ("expert_index", "kept"):
            found, like = (getattr(routing, name) for routing in (routed, layer.routing))
            np.testing.assert_array_equal(found.reshape(shape), like.reshape(shape), err_msg=name)
        np.testing.assert_allclose(routed.gate.reshape(shape), layer.routing.gate.reshape(shape), rtol=0, atol=1e-5)
    assert config.dropless == bool(all(layer.routing.kept[:, :BEGIN_2].all() for layer in wanted.moe))


def test_generated_tokens_and_their_logits_are_those_of_jax(config, params, improved, mesh):
    """JAX's own cache gives what a full pass does in which nothing is dropped: tests/model/test_decode.py."""
    alone, model = decode.ungrouped(config), improved().eval()
    prompts = torch.tensor([[0, 5, 6, 7], [0, 80, 81, 82]])
    padded = torch.nn.functional.pad(prompts, (3, 0))
    ids = model.generate(prompts, max_new_tokens=4, do_sample=False, eos_token_id=None)
    mask = (torch.arange(11) > 2).long().expand(2, -1)
    with torch.no_grad():
        read = model(padded, attention_mask=mask[:, :7], use_cache=True, generating=True)
        steps = [
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 4], cache=read.cache, generating=True).logits
            for t in range(4, 8)
        ]
    batch = {"input_ids": ids.int().numpy(), "target_ids": np.full((2, 8), 2), "segment_ids": np.ones((2, 8), int)}
    wanted = jax.jit(lambda params: transformer.forward(alone, mesh, params, batch, train=False).logits)(params)
    np.testing.assert_allclose(torch.cat([read.logits[:, 3:], *steps], 1), wanted, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ids[:, 4:], wanted[:, 3:-1, 1:].argmax(-1) + 1)  # never id 0
    assert len({*ids[:, 4:].flatten().tolist()}) > 2


def test_a_bfloat16_export_is_rounded_where_jax_rounds(config, arrays, load, mesh, tmp_path):
    """In its weights and in what it computes; XLA keeps more digits here and there, so a mean is what can be held."""
    half, rounded = (
        replace(config, dtype="bfloat16"),
        {name: array.astype("bfloat16") for name, array in arrays.items()},
    )
    weights = {name: InMemory(array) for name, array in rounded.items()}
    model, batch, streams = (
        load(hf_checkpoint.write(str(tmp_path / "half"), half, weights, dtype="bfloat16")),
        batch_of(),
        [],
    )
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.bfloat16}
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output[0].dtype))
    with torch.no_grad():
        ids, segments = (torch.from_numpy(batch[key]).long() for key in ("input_ids", "segment_ids"))
        logits = model.eval()(ids, attention_mask=segments).logits
    assert logits.dtype == torch.float32
    assert streams == [torch.bfloat16] * (config.moe_every - 1) + [torch.float32] * (3 - config.moe_every)
    params = traverse_util.unflatten_dict({name: jnp.float32(array) for name, array in rounded.items()}, sep="/")
    wanted, in_float32 = (
        jax.jit(lambda params, c=c: transformer.forward(c, mesh, params, batch, train=False).logits)(params)
        for c in (half, config)
    )
    off, usual = (np.median(abs(found - wanted)[batch["segment_ids"] > 0]) for found in (logits.numpy(), in_float32))
    assert off < 1.5 * usual
    drawn = model.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert drawn.shape == (1, 6)


@pytest.mark.parametrize("config", ["next-nano", "sigmoid"], indirect=True)
def test_loss_and_gradients_are_jax_s(config, params, improved, mesh):
    batch = batch_of()
    weights = (batch["target_ids"] > 0).astype(np.float32)
    whole = batch | {"positions": batch["segment_ids"], "loss_weights": weights}
    gradients, metrics = jax.jit(lambda params, batch: objective.gradients(config, mesh, params, batch))(
        params, {name: jnp.asarray(array)[None] for name, array in whole.items()}
    )
    model = improved().train()
    targets = torch.from_numpy(np.where(batch["target_ids"] > 0, batch["target_ids"], -100)).long()
    ids, segments = (torch.from_numpy(batch[key]).long() for key in ("input_ids", "segment_ids"))
    loss = model(ids, attention_mask=segments, shift_labels=targets).loss
    assert loss.item() == pytest.approx(float(metrics["total_loss"]), rel=1e-5)
    loss.backward()
    by_name, names = dict(model.named_parameters()), hf_checkpoint.torch_names(config)
    for name, wanted in traverse_util.flatten_dict(gradients, sep="/").items():
        if name.endswith("mlp/router/bias"):
            assert names[name].name in dict(model.named_buffers())  # no optimizer of PyTorch moves it
            continue
        found = by_name.pop(names[name].name).grad.numpy()
        found = found.T if names[name].transposed else found
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
    assert by_name == {}
