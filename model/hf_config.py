"""`config.json` of Hugging Face and our ModelConfig, one from the other.

Keys are those of the released OpenMoE checkpoints. What those cannot say has keys of its own (`_OWN`); where a file
lacks them, as the released ones do, they are those of the preset with the same sizes, or ModelConfig's defaults. From
such a file the weight of the z-loss is not taken either: the released ones say 0.01, the models had 0.0001. A setting
that departs from the original (`DEPARTURES`) is written where it does, and is the original's where a file lacks it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from openmoe.model.config import PRESETS, ModelConfig
from openmoe.model.interop import CheckpointError

_SIZES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "num_experts": "num_experts",
    "moe_every": "moe_layer_interval",
}
_SETTINGS = {
    "top_k": "router_topk",
    "capacity_factor_train": "router_capacity_factor_train",
    "capacity_factor_eval": "router_capacity_factor_eval",
    "min_capacity": "router_min_capacity",
    "aux_loss_weight": "router_aux_loss_factor",
    "router_z_loss_weight": "router_z_loss_factor",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}
_OWN = {
    "text_vocab_size": "text_vocab_size",
    "group_size": "group_size",
    "t5x_expert_copies": "t5x_expert_copies",
    "init_scale": "init_scale",
    "normalize_loss": "normalize_loss",
    "z_loss_weight": "z_loss_factor",
    "dtype": "activation_dtype",
}
DEPARTURES = {
    "d_ff_expert": "moe_intermediate_size",
    "ffn": "ffn",
    "extra_mlp": "extra_mlp",
    "qk_norm": "qk_norm",
    "reset_positions": "reset_positions",
    "router": "router_scores",
    "route_padding": "router_takes_padding",
    "renormalize_gates": "router_renormalize_gates",
    "capacity_counts_top_k": "router_capacity_counts_topk",
    "dropless": "router_dropless",
    "router_bias_rate": "router_bias_rate",
}
# The first release of the checkpoints had other names for some keys.
_OLDER = {
    "router_topk": "topk",
    "router_capacity_factor_train": "capacity_factor_train",
    "router_capacity_factor_eval": "capacity_factor_eval",
    "router_min_capacity": "min_capacity",
    "rms_norm_eps": "layer_norm_epsilon",
}
_FIXED = {
    "architectures": ["OpenMoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openmoe.OpenMoeConfig",
        "AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM",
    },
    "model_type": "openmoe",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dropout_rate": 0.0,
    "hidden_act": "swiglu",
    "label_smoothing": 0.0,
    "max_position_embeddings": 2048,
    "mlp_gated": True,
    "router_drop_tks": True,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the content of a `config.json`.

    Args:
      config: of the model.
      dtype: of the parameters in the files.
    """
    departures = {ours: DEPARTURES[ours] for ours in config.departures()}
    settings = {theirs: getattr(config, ours) for ours, theirs in (_SIZES | _SETTINGS | _OWN | departures).items()}
    return _FIXED | {"num_key_value_heads": config.num_heads, "torch_dtype": dtype} | settings


def model_config(path: str, content: dict[str, Any]) -> ModelConfig:
    """Returns the settings that a `config.json` describes.

    Args:
      path: of the file, for errors.
      content: of the file.

    Raises:
      CheckpointError: it lacks a size, or describes another kind of model.
    """
    if missing := [key for key in _SIZES.values() if key not in content]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; is it of an OpenMoE model?")
    for key in ("attention_bias", "hidden_act", "mlp_gated", "tie_word_embeddings"):
        if content.get(key, _FIXED[key]) != _FIXED[key]:
            raise CheckpointError(f"{path}: {key}: OpenMoE has {_FIXED[key]}, got {content[key]!r}")
    if content.get("num_key_value_heads", heads := content["num_attention_heads"]) != heads:
        raise CheckpointError(f"{path}: num_key_value_heads: OpenMoE has as many as heads, {heads}")
    sizes = {ours: content[theirs] for ours, theirs in _SIZES.items()}
    own = set(_OWN.values()) <= content.keys()
    settings = {}
    for ours, theirs in (_SETTINGS | DEPARTURES | (_OWN if own else {})).items():
        key = theirs if theirs in content else _OLDER.get(theirs, theirs)
        if key in content:
            settings[ours] = content[key]
    try:
        return ModelConfig(**(_unsaid(sizes) | settings | sizes))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: describes no model: {error}") from error


def _unsaid(sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns what a model of these sizes has where its config.json says nothing."""
    for preset in PRESETS.values():
        if not preset.departures() and sizes.items() <= asdict(preset).items():
            return asdict(preset)
    dense = {} if sizes["num_experts"] else {"init_scale": 1.0, "normalize_loss": False}
    return {"text_vocab_size": min(sizes["vocab_size"], PRESETS["openmoe-base"].text_vocab_size)} | dense
