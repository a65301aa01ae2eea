"""Settings of the model and of how a step is carried out, and the published models as presets. Imports nothing heavy.

Numbers of the presets: the gin files of XueFuzhao/t5x and XueFuzhao/flaxformer behind the released models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

_AT_LEAST_ONE = (
    "num_layers",
    "num_heads",
    "head_dim",
    "d_model",
    "d_ff",
    "top_k",
    "group_size",
    "min_capacity",
)
_ABOVE_ZERO = ("capacity_factor_train", "capacity_factor_eval", "init_scale", "rope_theta", "norm_epsilon")
_NOT_NEGATIVE = (
    "aux_loss_weight",
    "router_z_loss_weight",
    "z_loss_weight",
    "d_ff_expert",
    "t5x_expert_copies",
    "router_bias_rate",
)
DEPARTURES = (
    "d_ff_expert",
    "ffn",
    "extra_mlp",
    "qk_norm",
    "reset_positions",
    "router",
    "route_padding",
    "renormalize_gates",
    "capacity_counts_top_k",
    "dropless",
    "router_bias_rate",
)
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "ffn": ("openmoe", "swiglu"),
    "extra_mlp": ("after", "parallel", "none"),
    "router": ("softmax", "sigmoid"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only OpenMoE transformer, or its dense counterpart OpenLLaMA.

    Without the settings from `d_ff_expert` on, this is the model of the original code. Each of them departs from it in
    one thing, for the reason given; `openmoe model ablate` measures what that changes.

    Attributes:
      num_layers: layers, MoE layers included.
      num_heads: attention heads; queries, keys and values have the same number.
      head_dim: width of a head; num_heads * head_dim may differ from d_model.
      d_model: width of the residual stream.
      d_ff: inner width of every feed-forward block, dense, extra and, unless d_ff_expert says otherwise, expert.
      vocab_size: rows of the embedding and columns of the head, padding included.
      text_vocab_size: ids below it are pieces of text; sentinels and padding rows lie above.
      num_experts: experts of each MoE layer; 0 for a dense model.
      moe_every: every moe_every-th layer is an MoE layer, the last one included; 0 for a dense model.
      top_k: experts each token asks for.
      group_size: tokens routed together, competing for the same capacity; consecutive, row after row.
      capacity_factor_train: places in an expert for a group, as a multiple of
        group_size / num_experts; top_k does not enter.
      capacity_factor_eval: the same outside training.
      min_capacity: least number of places in an expert for a group.
      init_scale: variance of the kernels at initialisation, times their fan-in.
      dtype: of the activations; parameters, router, head and losses are always float32.
      aux_loss_weight: of the load-balancing loss, averaged over MoE layers.
      router_z_loss_weight: of the router z-loss, averaged over MoE layers.
      z_loss_weight: of the z-loss on the output logits.
      normalize_loss: divide the cross-entropy by the sum of a microbatch's loss weights; False sums it.
      rope_theta: longest timescale of the rotary embedding.
      norm_epsilon: added to the mean square in RMSNorm.
      t5x_expert_copies: how often the devices of an original run held all experts; then groups have the size that
        its rule gave them, at most group_size. 0: they have group_size, whatever the devices.
      d_ff_expert: inner width of an expert; 0 for d_ff. Many narrow experts specialise more (arXiv:2401.06066).
      ffn: the gated block; openmoe has three factors (`layers.gated_mlp`), swiglu two (arXiv:2002.05202).
      extra_mlp: the dense block of an MoE layer: after the experts with its own norm, or in parallel with them, which
        makes it the shared expert of arXiv:2401.06066, or none.
      qk_norm: RMSNorm of each head's queries and keys, which keeps attention logits small (arXiv:2302.05442).
      reset_positions: RoPE counts from the start of each packed segment instead of the row.
      router: how logits become the choices' weights: softmax over all experts, or a sigmoid of each
        (arXiv:2412.19437, equation 15).
      route_padding: padding asks for experts too, always for 0 and 1, and takes places from tokens there.
      renormalize_gates: the weights of a token's choices sum to 1.
      capacity_counts_top_k: places are a multiple of group_size * top_k / num_experts.
      dropless: experts have a place for everyone who asks (arXiv:2211.15841); capacity means nothing.
      router_bias_rate: step of a bias, added to the router's scores when it chooses, that moves towards equal load
        without an auxiliary loss (arXiv:2408.15664); 0 for no bias.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    num_layers: int
    num_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    vocab_size: int
    text_vocab_size: int
    num_experts: int
    moe_every: int
    top_k: int = 2
    group_size: int = 4096
    capacity_factor_train: float = 1.25
    capacity_factor_eval: float = 2.0
    min_capacity: int = 4
    init_scale: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 1e-4
    z_loss_weight: float = 1e-4
    normalize_loss: bool = True
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    t5x_expert_copies: int = 0
    d_ff_expert: int = 0
    ffn: Literal["openmoe", "swiglu"] = "openmoe"
    extra_mlp: Literal["after", "parallel", "none"] = "after"
    qk_norm: bool = False
    reset_positions: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    route_padding: bool = True
    renormalize_gates: bool = False
    capacity_counts_top_k: bool = False
    dropless: bool = False
    router_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in _ABOVE_ZERO:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be finite and above 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: must be finite and not negative, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: must be even, because RoPE rotates halves; got {self.head_dim}")
        if not 2 <= self.text_vocab_size <= self.vocab_size:
            raise ValueError(
                f"text_vocab_size: must be in [2, vocab_size={self.vocab_size}], got {self.text_vocab_size}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.num_experts < 0 or self.moe_every < 0 or (self.num_experts == 0) != (self.moe_every == 0):
            raise ValueError(
                f"num_experts: and moe_every must both be at least 1, or both 0 for a dense model; "
                f"got {self.num_experts} and {self.moe_every}"
            )
        if self.router_bias_rate and not self.num_experts:
            raise ValueError(
                f"router_bias_rate: a dense model has no router; leave it at 0, got {self.router_bias_rate}"
            )
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(f"top_k: must be at most num_experts={self.num_experts}, got {self.top_k}")
        if self.moe_every and self.num_layers % self.moe_every:
            raise ValueError(f"moe_every: must divide num_layers={self.num_layers}, got {self.moe_every}")

    def is_moe_layer(self, layer: int) -> bool:
        """Returns whether layer `layer`, counted from 0, is an MoE layer."""
        return self.moe_every > 0 and layer % self.moe_every == self.moe_every - 1

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers."""
        return self.num_layers // self.moe_every if self.moe_every else 0

    @property
    def block_layers(self) -> int:
        """Number of layers of a block: the model repeats it, and its last layer is the MoE one if there is any."""
        return self.moe_every or 1

    @property
    def expert_width(self) -> int:
        """Inner width of an expert."""
        return self.d_ff_expert or self.d_ff

    def capacity(self, *, train: bool, group_size: int | None = None) -> int:
        """Returns the places each expert has for the tokens of one group, of `group_size` tokens if not the usual."""
        factor = self.capacity_factor_train if train else self.capacity_factor_eval
        asked = (group_size or self.group_size) * (self.top_k if self.capacity_counts_top_k else 1)
        return max(round(factor * asked / self.num_experts), self.min_capacity)

    def departures(self) -> list[str]:
        """Returns the names of the settings in which this is not a model of the original code."""
        settings = {field.name: field.default for field in fields(self)}
        return [name for name in DEPARTURES if getattr(self, name) != settings[name]]


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a step is carried out; it changes memory and time, and the numbers only in the order of summation.

    Attributes:
      scan_blocks: compile one block and run it for each, with the parameters of all blocks stacked; less to compile,
        and with remat less to keep.
      remat: what of a block's forward pass is computed again in the backward pass: nothing; all but products with
        kernels (dots); all but the block's input (full).
      attention: one fused kernel where the device has one (auto), or softmax over all logits (reference).
      accumulation_steps: parts of whole routing groups in which a device goes through each microbatch.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    scan_blocks: bool = False
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "reference"] = "auto"
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if self.remat not in ("none", "dots", "full"):
            raise ValueError(f"remat: must be none, dots or full, got {self.remat!r}")
        if self.attention not in ("auto", "reference"):
            raise ValueError(f"attention: must be auto or reference, got {self.attention!r}")
        if self.accumulation_steps < 1:
            raise ValueError(f"accumulation_steps: must be at least 1, got {self.accumulation_steps}")


PLAIN = ExecutionConfig()


# The published models speak umT5: 256,000 pieces and 300 sentinels, padded to a multiple of 128.
_BASE = ModelConfig(
    num_layers=12,
    num_heads=12,
    head_dim=64,
    d_model=768,
    d_ff=2048,
    num_experts=16,
    moe_every=4,
    vocab_size=256_384,
    text_vocab_size=256_000,
)
_LARGE = ModelConfig(
    num_layers=24,
    num_heads=24,
    head_dim=128,
    d_model=2048,
    d_ff=8192,
    num_experts=32,
    moe_every=6,
    vocab_size=256_384,
    text_vocab_size=256_000,
)
_DENSE = {"num_experts": 0, "moe_every": 0, "init_scale": 1.0, "normalize_loss": False}

_NEXT = replace(
    _BASE,
    num_experts=64,
    top_k=8,
    moe_every=1,
    aux_loss_weight=0.0,
    ffn="swiglu",
    extra_mlp="parallel",
    qk_norm=True,
    reset_positions=True,
    router="sigmoid",
    route_padding=False,
    renormalize_gates=True,
    dropless=True,
    router_bias_rate=1e-3,
)

PRESETS: dict[str, ModelConfig] = {
    "openmoe-base": _BASE,
    "openmoe-8b": _LARGE,
    "openmoe-34b": ModelConfig(
        num_layers=32,
        num_heads=24,
        head_dim=128,
        d_model=3072,
        d_ff=12288,
        num_experts=32,
        moe_every=4,
        group_size=8192,
        router_z_loss_weight=1e-3,
        vocab_size=256_384,
        text_vocab_size=256_000,
    ),
    "openllama-base": replace(_BASE, **_DENSE),
    "openllama-large": replace(_LARGE, **_DENSE),
    "openmoe-nano": ModelConfig(
        num_layers=4,
        num_heads=2,
        head_dim=64,
        d_model=128,
        d_ff=256,
        vocab_size=8576,
        text_vocab_size=8192,
        num_experts=8,
        moe_every=2,
        group_size=512,
        dtype="float32",
    ),
    # The improved model in three sizes: fine-grained experts in every layer and a shared one, nothing dropped, load
    # balanced by a bias. Widths keep the active parameters near those of the original of the same name.
    "openmoe-next-nano": replace(
        _NEXT,
        num_layers=4,
        num_heads=2,
        d_model=128,
        d_ff=128,
        d_ff_expert=64,
        num_experts=16,
        top_k=4,
        vocab_size=8576,
        text_vocab_size=8192,
        group_size=512,
        dtype="float32",
    ),
    "openmoe-next-base": replace(_NEXT, num_layers=12, num_heads=12, d_model=768, d_ff=768, d_ff_expert=256),
    "openmoe-next-8b": replace(
        _NEXT, num_layers=24, num_heads=16, head_dim=128, d_model=2048, d_ff=2048, d_ff_expert=1024
    ),
}
