"""Settings of OpenMoE for Hugging Face transformers. Names and meanings: config.json of the released checkpoints."""

from transformers import PretrainedConfig

DEFAULTS = {  # openmoe-base
    "vocab_size": 256_384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "head_dim": 64,
    "num_experts": 16,
    "moe_layer_interval": 4,  # the last of so many layers is an MoE layer; 0: none
    "router_topk": 2,
    "router_capacity_factor_train": 1.25,
    "router_capacity_factor_eval": 2.0,
    "router_min_capacity": 4,
    "router_drop_tks": True,  # in eval mode, too
    "router_aux_loss_factor": 0.01,
    "router_z_loss_factor": 1e-4,
    "z_loss_factor": 1e-4,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    # The released checkpoints have no words for these.
    "text_vocab_size": 256_000,  # ids below it are pieces of text
    "group_size": 4096,  # tokens that are routed together in a full pass
    "t5x_expert_copies": 0,  # groups by the original's rule for so many copies of the experts; 0: of group_size
    "normalize_loss": True,  # the mean over labels, not their sum
    "init_scale": 0.1,
    "activation_dtype": "bfloat16",  # of all but router, head, losses and the stream after the first experts
    # Departures from the models released so far; their config.json has none of these.
    "moe_intermediate_size": 0,  # of an expert; 0: intermediate_size
    "ffn": "openmoe",  # its gated block with three factors; swiglu: with two
    "extra_mlp": "after",  # the dense block of an MoE layer: after the experts with its own norm; parallel; none
    "qk_norm": False,  # RMSNorm of each head's queries and keys
    "reset_positions": False,  # counted from the start of each packed segment
    "router_scores": "softmax",  # over all experts; sigmoid: of each
    "router_takes_padding": True,  # which asks for experts 0 and 1
    "router_renormalize_gates": False,  # the weights of a token's choices sum to 1
    "router_capacity_counts_topk": False,
    "router_dropless": False,  # a place for everyone who asks
    "router_bias_rate": 0.0,  # above 0: a bias on the scores decides with them who is chosen
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}


class OpenMoeConfig(PretrainedConfig):
    """A decoder-only OpenMoE model, or its dense counterpart OpenLLaMA: DEFAULTS, and what transformers has."""

    model_type = "openmoe"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(self, **settings):
        for name, default in DEFAULTS.items():
            setattr(self, name, settings.pop(name, default))
        settings.pop("num_key_value_heads", None)
        self.num_key_value_heads = self.num_attention_heads
        super().__init__(**(SPECIAL | settings))

    @property
    def expert_width(self):
        """Inner width of an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    def is_moe_layer(self, layer):
        """Whether layer `layer`, counted from 0, is an MoE layer."""
        return self.moe_layer_interval > 0 and (layer + 1) % self.moe_layer_interval == 0
