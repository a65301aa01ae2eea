from dataclasses import replace

import pytest

from openmoe.model import counts
from openmoe.model.config import PRESETS, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("openmoe-base", 799_663_104, 141_616_128),
        ("openmoe-8b", 11_855_046_656, 2_751_834_112),
        ("openmoe-34b", 46_270_737_408, 8_456_727_552),
        ("openllama-base", 497_634_048, 103_828_224),
        ("openllama-large", 3_264_841_728, 2_214_692_864),
    ],
)
def test_presets_have_the_parameters_of_the_published_models(preset, total, active):
    assert counts.parameter_counts(PRESETS[preset]).total == total
    assert counts.active_parameters(PRESETS[preset]) == active


def test_components_of_openmoe_8b():
    assert counts.parameter_counts(PRESETS["openmoe-8b"]) == counts.ParameterCounts(
        embedding=525_074_432,
        head=525_074_432,
        attention=603_979_776,
        dense_ffn=20 * 67_108_864,
        extra_ffn=4 * 67_108_864,
        experts=8_589_934_592,
        routers=262_144,
        norms=108_544,
    )


def test_flops_of_openmoe_base():
    assert counts.flops_per_token(PRESETS["openmoe-base"], seq_len=2048) == (
        6 * (141_616_128 + 196_902_912) + 12 * 12 * 768 * 2048
    )


@pytest.mark.parametrize(
    ("preset", "layers"),
    [
        ("openmoe-base", [3, 7, 11]),
        ("openmoe-8b", [5, 11, 17, 23]),
        ("openmoe-34b", [3, 7, 11, 15, 19, 23, 27, 31]),
        ("openllama-base", []),
        ("openmoe-nano", [1, 3]),
    ],
)
def test_moe_layers_end_each_block(preset, layers):
    config = PRESETS[preset]
    assert [i for i in range(config.num_layers) if config.is_moe_layer(i)] == layers
    assert config.num_moe_layers == len(layers)


@pytest.mark.parametrize(
    ("num_experts", "group_size", "train", "eval_"),
    [(32, 4096, 160, 256), (32, 8192, 320, 512), (16, 4096, 320, 512), (8, 512, 80, 128), (8, 16, 4, 4)],
)
def test_capacity_ignores_top_k(num_experts, group_size, train, eval_):
    config = replace(PRESETS["openmoe-nano"], num_experts=num_experts, group_size=group_size)
    assert (config.capacity(train=True), config.capacity(train=False)) == (train, eval_)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: must be at least 1, got 0"),
        ({"head_dim": 31}, "head_dim: must be even, because RoPE rotates halves; got 31"),
        ({"text_vocab_size": 9000}, r"text_vocab_size: must be in \[2, vocab_size=8576\], got 9000"),
        ({"num_experts": 0}, "num_experts: and moe_every must both be"),
        ({"moe_every": 3}, "moe_every: must divide num_layers=4, got 3"),
        (
            {"num_experts": 0, "moe_every": 0, "router_bias_rate": 0.1},
            "router_bias_rate: a dense model has no router; leave it at 0, got 0.1",
        ),
        ({"top_k": 9}, "top_k: must be at most num_experts=8, got 9"),
        ({"dtype": "float16"}, "dtype: must be float32 or bfloat16, got 'float16'"),
        ({"init_scale": float("nan")}, "init_scale: must be finite and above 0, got nan"),
        ({"z_loss_weight": -1.0}, "z_loss_weight: must be finite and not negative, got -1.0"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["openmoe-nano"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "name: must be adafactor, got 'adam'"),
        ({"learning_rate": 0.0}, "learning_rate: must be finite and above 0, got 0.0"),
        ({"warmup_steps": 0}, "warmup_steps: must be at least 1, got 0"),
    ],
)
def test_impossible_optimizers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdafactorConfig(**change)


def test_settings_are_frozen_and_comparable():
    assert ModelConfig(**vars(PRESETS["openmoe-8b"])) == PRESETS["openmoe-8b"]
