"""Initial parameters against statistics of the original initialisers, and their names against the original's."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from openmoe.model import counts, step
from openmoe.model.config import PRESETS
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.model.parameters import Normal, TruncatedNormal
from openmoe.model.transformer import Transformer


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_initial_parameters_have_the_original_statistics(model, full_golden_path, moe_config, dense_config, mesh_of):
    wanted = json.loads(full_golden_path("init_statistics.json").read_text())[model]
    config = moe_config if model == "moe" else dense_config
    sizes = {"num_layers": 4, "head_dim": 64, "d_model": 384, "d_ff": 640, "vocab_size": 2048}
    params = flat(step.init_state(replace(config, **sizes), AdafactorConfig(), 0, mesh_of(1, 1)).params)
    assert params.keys() == wanted.keys()
    for name, statistics in wanted.items():
        array = np.asarray(params[name], np.float64)
        noise = 5 / np.sqrt(array.size)
        deviation = statistics["std"] or 1.0
        assert list(array.shape) == statistics["shape"], name
        assert array.mean() == pytest.approx(statistics["mean"], abs=2 * noise * deviation), name
        assert array.std() == pytest.approx(statistics["std"], rel=2 * noise), name
        assert np.abs(array).max() == pytest.approx(statistics["absmax"], rel=0.3), name
        if statistics["std"]:
            kurtosis = ((array - array.mean()) ** 4).mean() / array.std() ** 4
            assert kurtosis == pytest.approx(statistics["kurtosis"], abs=10 * noise), name


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("token_embedder/embedding", Normal(1.0)),
        ("decoder/layers_0/self_attention/query/kernel", Normal(0.006987712 / 11.3125)),  # sqrt(128) in bfloat16
        ("decoder/layers_0/self_attention/key/kernel", Normal(0.006987712)),
        ("decoder/layers_0/self_attention/value/kernel", Normal(0.006987712)),
        ("decoder/layers_0/self_attention/out/kernel", Normal(0.005705443)),
        ("decoder/layers_0/mlp/wi_0/kernel", TruncatedNormal(0.006987712)),
        ("decoder/layers_0/mlp/wo/kernel", TruncatedNormal(0.003493856)),
        ("decoder/layers_5/mlp/expert/wi_0/kernel", Normal(0.006987712)),
        ("decoder/layers_5/mlp/expert/wo/kernel", Normal(0.003493856)),
        ("decoder/layers_5/mlp/router/router_weights/w/kernel", Normal(0.02)),
        ("decoder/layers_5/extra_mlp/wi_1/kernel", TruncatedNormal(0.006987712)),
        ("decoder/logits_dense/kernel", TruncatedNormal(0.006987712)),
    ],
)
def test_initial_distributions_of_openmoe_8b(name, distribution, mesh_of):
    found = flat(step.declarations(PRESETS["openmoe-8b"], mesh_of(1, 1)))[name].initializer
    assert type(found) is type(distribution)
    assert found.deviation == pytest.approx(distribution.deviation, rel=1e-6)


@pytest.mark.parametrize("preset", ["openmoe-nano", "openmoe-next-nano"])
def test_what_is_declared_from_one_block_is_what_all_of_them_declare(preset, mesh_of):
    config, mesh = PRESETS[preset], mesh_of(1, 1)
    assert config.num_layers > config.block_layers
    ids = jax.ShapeDtypeStruct((1, config.group_size), np.int32)
    whole = jax.eval_shape(Transformer(config, mesh, train=True).init, jax.random.key(0), ids, ids, ids)
    assert step.declarations(config, mesh) == whole["params"]


@pytest.mark.parametrize("preset", PRESETS)
def test_declared_parameters_are_those_that_are_counted(preset, mesh_of):
    shapes = jax.tree.leaves(step.state_shapes(PRESETS[preset], AdafactorConfig(), mesh_of(1, 1)).params)
    assert sum(leaf.size for leaf in shapes) == counts.parameter_counts(PRESETS[preset]).total


def test_experts_lie_on_the_expert_axis_and_all_else_everywhere(mesh_of):
    mesh = mesh_of(2, 4)
    for path, leaf in jax.tree.leaves_with_path(step.state_shapes(PRESETS["openmoe-nano"], AdafactorConfig(), mesh)):
        expected = {"expert"} if "'expert'" in jax.tree_util.keystr(path) else set()
        assert {axis for axis in leaf.sharding.spec if axis and mesh.shape[axis] > 1} == expected, path


def test_every_large_parameter_of_the_8b_is_divided_over_fsdp_and_tensor(mesh_of):
    mesh = mesh_of(1, 2, fsdp=2, tensor=2)
    for path, leaf in jax.tree.leaves_with_path(
        step.state_shapes(PRESETS["openmoe-8b"], AdafactorConfig(), mesh).params
    ):
        name, axes = jax.tree_util.keystr(path), {axis for axis in leaf.sharding.spec if axis}
        parts = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert parts == (8 if "'expert'" in name else 2 if "norm" in name or "router" in name else 4), (path, axes)
