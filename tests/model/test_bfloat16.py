"""The types at each point of a bfloat16 model, as the original has them; traced, not compiled.

How close its numbers are to the original's is in test_golden.py.
"""

import functools
import operator
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from openmoe.model.transformer import Transformer

IDS = np.ones((8, 32), np.int32)


@pytest.fixture(scope="module")
def model(moe_config, mesh_of):
    return Transformer(replace(moe_config, dtype="bfloat16"), mesh_of(1, 1), train=True)


@pytest.fixture(scope="module")
def output_of(model, moe_params):
    """Returns output_of("decoder/layers_0"), the shapes and types that a module returns."""

    def apply(params):
        return model.apply({"params": params}, IDS, IDS, IDS, capture_intermediates=True)[1]["intermediates"]

    captured = jax.eval_shape(apply, moe_params)

    def of(name):
        return functools.reduce(operator.getitem, name.split("/"), captured)["__call__"][0]

    return of


def equations(jaxpr):
    """All operations of a traced function, those of the functions it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for called in (getattr(value, "jaxpr", value) for value in inner):
            if hasattr(called, "eqns"):
                yield from equations(called)


@pytest.fixture(scope="module")
def types_of(model, moe_params):
    """Returns types_of("exp"), how many operations of that name give which type."""
    traced = jax.make_jaxpr(lambda params: model.apply({"params": params}, IDS, IDS, IDS))(moe_params)
    operations = list(equations(traced.jaxpr))

    def of(name):
        return Counter(str(e.outvars[0].aval.dtype) for e in operations if e.primitive.name == name)

    return of


def test_the_embedding_and_every_norm_give_bfloat16(output_of):
    norms = [f"layers_{i}/pre_{name}_layer_norm" for i in range(4) for name in ("self_attention", "mlp")]
    norms += ["layers_1/pre_extra_mlp_layer_norm", "layers_3/pre_extra_mlp_layer_norm", "decoder_norm"]
    assert output_of("token_embedder").dtype == "bfloat16"
    assert {output_of(f"decoder/{name}").dtype for name in norms} == {np.dtype("bfloat16")}


def test_the_residual_stream_has_the_precision_of_bfloat16_up_to_the_first_moe_layer(model, moe_params):
    def streams(params, ids):
        _, captured = model.apply({"params": params}, ids, ids, ids, capture_intermediates=True)
        found = captured["intermediates"]["decoder"]
        return [found["layers_0"]["__call__"][0], found["layers_1"]["__call__"][0][0]]

    ids = np.random.default_rng(0).integers(1, 500, IDS.shape, dtype=np.int32)
    before, after = jax.jit(streams)(moe_params, ids)
    assert (before == before.astype("bfloat16")).all()
    assert (after != after.astype("bfloat16")).mean() > 0.9


def test_router_gates_and_sums_of_experts_are_float32(output_of):
    for layer in (1, 3):
        moe = output_of(f"decoder/layers_{layer}/mlp")
        assert moe.y.dtype == moe.routing.gate.dtype == "float32"
        assert {leaf.dtype for leaf in moe.statistics} == {np.dtype("float32")}


def test_products_are_bfloat16_but_for_router_combine_and_head(types_of):
    attention = 4 * (4 + 2)  # layers times q, k, v, out, and the two of the softmax
    feed_forward = 2 * 3 + 2 * (3 + 3)  # dense layers; MoE layers with experts and the extra block
    assert types_of("dot_general") == {"bfloat16": attention + feed_forward, "float32": 2 + 2 + 1}


def test_the_softmax_of_attention_is_bfloat16_and_the_routers_float32(types_of):
    assert types_of("exp") == {"bfloat16": 4, "float32": 2 + 2}  # the router's z-loss has one as well
    assert types_of("logistic") == {"bfloat16": 2 + 2 * 2}


def test_logits_are_float32(model, moe_params):
    output = jax.eval_shape(lambda params: model.apply({"params": params}, IDS, IDS, IDS), moe_params)
    assert output.logits.dtype == "float32"
