"""OpenMoE in PyTorch, for Hugging Face transformers: the arithmetic of openmoe's JAX model and of the original's.

Weights are cast to `config.activation_dtype` where they are used; router, weights of the experts' answers, head and
losses are float32, and so is the residual stream from the first MoE layer on.

A row is BOS (id 0, which is also padding) and its tokens. `attention_mask` is 0 for padding, on either side; other
numbers are those of packed segments, which do not see each other. Without it a row's padding is at its end.

Routing: `generate` lets every token find a free place in its experts, so that no token depends on its neighbours. A
pass without a cache routes groups of `group_size` tokens, row after row, as training does: with
`router_capacity_factor_train` in train mode, otherwise `router_capacity_factor_eval` if `router_drop_tks`. Where the
tokens are no multiple of a group, or with `router_dropless`, nothing is dropped.

Axes: b rows, t positions, s positions of the cache, d hidden.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_openmoe import OpenMoeConfig
from .layers_openmoe import (
    MASKED,
    OpenMoeAttention,
    OpenMoeExperts,
    OpenMoeLinear,
    OpenMoeMLP,
    OpenMoeRMSNorm,
    OpenMoeSparseMLP,
    Rows,
    load_balancing_loss,
    router_z_loss,
)


@dataclass
class OpenMoeOutput(ModelOutput):
    """What the model computes."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: DynamicCache | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class OpenMoeLayer(nn.Module):
    """Attention, experts or a dense block, and after or beside experts one more dense block."""

    def __init__(self, config, layer):
        super().__init__()
        self.sparse = config.is_moe_layer(layer)
        self.input_layernorm = OpenMoeRMSNorm(config)
        self.self_attn = OpenMoeAttention(config, layer)
        self.post_attention_layernorm = OpenMoeRMSNorm(config)
        self.mlp = OpenMoeSparseMLP(config) if self.sparse else OpenMoeMLP(config)
        self.extra = config.extra_mlp if self.sparse else "none"
        if self.extra == "after":
            self.pre_extra_mlp_layernorm = OpenMoeRMSNorm(config)
        if self.extra != "none":
            self.extra_mlp = OpenMoeMLP(config)

    def forward(self, x, rows, cache, generating):
        x = x + self.self_attn(rows.real * self.input_layernorm(x), rows, cache)
        h = rows.real * self.post_attention_layernorm(x)
        if not self.sparse:
            return x + self.mlp(h), None
        answers, routed = self.mlp(h, rows.real, generating)
        x = x + answers
        if self.extra == "after":
            h = rows.real * self.pre_extra_mlp_layernorm(x)
        return x if self.extra == "none" else x + self.extra_mlp(h), routed


class OpenMoePreTrainedModel(PreTrainedModel):
    """What transformers wants to know of both models: their settings, and how weights are drawn."""

    config_class = OpenMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["OpenMoeLayer"]

    def _init_weights(self, module):
        """The original's distributions: deviation sqrt(init_scale / fan_in), but for embedding and router."""
        if isinstance(module, OpenMoeLinear):
            deviation = math.sqrt(self.config.init_scale / module.in_features) / module.divisor
            # Of what is cut off at two deviations, 0.8796 of one is left.
            wide, cut = (deviation / 0.87962566, 2.0) if module.truncated else (deviation, 100.0)
            nn.init.trunc_normal_(module.weight, std=wide, a=-cut * wide, b=cut * wide)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, OpenMoeSparseMLP):
            nn.init.normal_(module.gate_weight, std=0.02)
            if module.gate_bias is not None:
                nn.init.zeros_(module.gate_bias)
        elif isinstance(module, OpenMoeExperts):
            for kernels in (module.wi_gate, module.wi_up, module.wo):
                nn.init.normal_(kernels, std=math.sqrt(self.config.init_scale / kernels.shape[1]))
        elif isinstance(module, OpenMoeRMSNorm):
            nn.init.ones_(module.weight)


class OpenMoeModel(OpenMoePreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__(config)
        # Without padding_idx: row 0 is the BOS, which has a vector and learns.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OpenMoeLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = OpenMoeRMSNorm(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, cache=None, generating=False):
        """Returns float32 [b, t, d], of which the logits are the product with the head, and each MoE layer's Routed."""
        x = self.embed_tokens(input_ids).to(getattr(torch, self.config.activation_dtype))
        rows = self.rows_of(input_ids, attention_mask, cache, generating, x.dtype)
        routing = []
        for layer in self.layers:
            x, routed = layer(x, rows, cache, generating)
            routing += [routed] if routed is not None else []
        return (rows.real * self.norm(x)).float(), routing

    def rows_of(self, input_ids, attention_mask, cache, generating, dtype):
        """Returns the Rows of [b, t] ids, of which those behind the s - t positions of a cache are at hand."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask: must be [b, t], got {list(attention_mask.shape)}; use a dynamic cache")
        seen = cache.get_seq_length() if cache is not None else 0
        length = input_ids.shape[1]
        if attention_mask is not None:
            segment = attention_mask
        elif seen or generating:
            segment = torch.ones_like(input_ids[:, :1]).expand(-1, seen + length)
        else:
            segment = real_positions(input_ids).long()
        at = torch.arange(seen + length, device=segment.device)
        index = (segment > 0).cumsum(-1) - 1  # counted from each row's first real position
        if self.config.reset_positions:
            starts = segment != F.pad(segment[:, :-1], (1, 0), value=-1)
            index = at - torch.where(starts, at, 0).cummax(-1).values
        half = self.config.head_dim // 2
        timescale = self.config.rope_theta ** (torch.arange(half, device=index.device, dtype=torch.float32) / half)
        angle = index[:, seen:, None, None].clamp(min=0).float() / timescale
        mine = segment[:, seen:, None]
        sees = (at[seen:, None] >= at) & (mine == segment[:, None]) & (segment > 0)[:, None]
        return Rows(
            angle.sin().to(dtype),
            angle.cos().to(dtype),
            mine > 0,
            torch.where(sees, 0.0, MASKED).to(dtype)[:, None],
        )


def real_positions(input_ids):
    """Returns bool [b, t]: all but trailing padding; id 0 before a token starts a row or a packed segment."""
    following = F.pad(input_ids[:, 1:], (0, 1))
    first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
    return (input_ids > 0) | (following > 0) | first


class OpenMoeForCausalLM(OpenMoePreTrainedModel, GenerationMixin):
    """The decoder and its head: [b, t] ids to float32 [b, t, v] logits."""

    accepts_loss_kwargs = False  # the Trainer's microbatches are averaged by the Trainer

    def __init__(self, config):
        super().__init__(config)
        self.model = OpenMoeModel(config)
        self.lm_head = OpenMoeLinear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        labels=None,
        shift_labels=None,
        use_cache=None,
        logits_to_keep=0,
        generating=False,
        return_dict=None,
        **unused,
    ):
        """Predicts each position's next token.

        Args: input_ids, [b, t]; attention_mask, [b, t] or with a cache [b, s]; labels, [b, t], the input_ids, or -100
        where there is no loss; shift_labels, the same one position earlier, instead.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        hidden, routing = self.model(input_ids, attention_mask, cache, generating)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            loss = self.loss_of(logits, shift_labels, routing)
        output = OpenMoeOutput(loss, logits, cache, tuple(routed.logits for routed in routing))
        return output.to_tuple() if return_dict is False else output

    def loss_of(self, logits, targets, routing):
        """Cross-entropy and z-loss of the positions whose target is not -100, and the mean router losses."""
        config, weights = self.config, (targets != -100).float()
        log_z = logits.logsumexp(-1)
        target_logits = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        loss = (weights * (log_z - target_logits + config.z_loss_factor * log_z.square())).sum()
        if config.normalize_loss:
            loss = loss / weights.sum()
        for routed in routing:
            aux = config.router_aux_loss_factor * load_balancing_loss(routed)
            z_loss = config.router_z_loss_factor * router_z_loss(routed)
            loss = loss + (aux + z_loss) / len(routing)
        return loss

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"generating": True}

    def generate(self, inputs=None, **kwargs):
        """As in transformers. Without an attention_mask zeros are padding, but for the one before a row's first token.

        Transformers itself would take the BOS for padding, too.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is not None and kwargs.get("attention_mask") is None:
            following = F.pad(input_ids[:, 1:], (0, 1), value=1)
            kwargs["attention_mask"] = ((input_ids > 0) | (following > 0)).long()
        return super().generate(inputs, **kwargs)
