"""Settings of the model and its optimizer, and the published models as presets. Imports nothing heavy.

Numbers of the presets: the gin files of XueFuzhao/t5x and XueFuzhao/flaxformer behind the released models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
_NOT_NEGATIVE = ("aux_loss_weight", "router_z_loss_weight", "z_loss_weight")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only OpenMoE transformer, or its dense counterpart OpenLLaMA.

    Attributes:
      num_layers: layers, MoE layers included.
      num_heads: attention heads; queries, keys and values have the same number.
      head_dim: width of a head; num_heads * head_dim may differ from d_model.
      d_model: width of the residual stream.
      d_ff: inner width of every feed-forward block, dense, extra and expert.
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
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: must be float32 or bfloat16, got {self.dtype!r}")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.num_experts < 0 or self.moe_every < 0 or (self.num_experts == 0) != (self.moe_every == 0):
            raise ValueError(
                f"num_experts: and moe_every must both be at least 1, or both 0 for a dense model; "
                f"got {self.num_experts} and {self.moe_every}"
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

    def capacity(self, *, train: bool) -> int:
        """Returns the places each expert has for the tokens of one group."""
        factor = self.capacity_factor_train if train else self.capacity_factor_eval
        return max(round(factor * self.group_size / self.num_experts), self.min_capacity)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adafactor as T5X runs it: no momentum, no weight decay, updates relative to each parameter's size.

    Attributes:
      name: the optimizer; there is one.
      learning_rate: multiplies the schedule 1 / sqrt(max(step, warmup_steps)), steps counted from 0.
      warmup_steps: the rate is constant until this step and falls with the inverse square root after it.
      decay_rate: exponent of the second moments' decay, 1 - (step + 1) ** -decay_rate.
      clipping_threshold: largest root mean square of an update before the learning rate.
      min_dim_size_to_factor: a matrix is factored when both its sides are at least this; experts always are.
      epsilon_grad: added to squared gradients.
      epsilon_param: least root mean square of a parameter that scales its updates.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    name: Literal["adafactor"] = "adafactor"
    learning_rate: float = 1.0
    warmup_steps: int = 10_000
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_dim_size_to_factor: int = 128
    epsilon_grad: float = 1e-30
    epsilon_param: float = 1e-3

    def __post_init__(self) -> None:
        if self.name != "adafactor":
            raise ValueError(f"name: must be adafactor, got {self.name!r}")
        for name in ("learning_rate", "decay_rate", "clipping_threshold", "epsilon_grad", "epsilon_param"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: must be finite and above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "min_dim_size_to_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


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
}
