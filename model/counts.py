"""Parameters and arithmetic of a model, from its settings alone. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from openmoe.model.config import ModelConfig

BLOCK_LOGITS = 2**27  # that a device forms at a time: 512 MiB, for 512 positions of umT5's vocabulary
CPU_BLOCK_POSITIONS = 256  # a CPU forms no more than it must: logits of 256 positions and 8,192 tokens fit its cache


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters by component.

    Attributes:
      embedding: of the input tokens.
      head: output projection, not tied to the embedding.
      attention: query, key, value and output kernels of all layers.
      dense_ffn: feed-forward blocks of the layers without experts.
      extra_ffn: dense blocks that follow the experts of each MoE layer.
      experts: all experts of all MoE layers.
      routers: of all MoE layers.
      norms: scales of all norms.
    """

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    extra_ffn: int
    experts: int
    routers: int
    norms: int

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(getattr(self, field.name) for field in fields(self))


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Returns the parameters a model stores."""
    layers, moe_layers = config.num_layers, config.num_moe_layers
    biases = config.num_experts if config.router_bias_rate else 0
    return ParameterCounts(
        embedding=config.vocab_size * config.d_model,
        head=config.vocab_size * config.d_model,
        attention=layers * 4 * config.d_model * config.num_heads * config.head_dim,
        dense_ffn=(layers - moe_layers) * _ffn(config, config.d_ff),
        extra_ffn=moe_layers * _ffn(config, config.d_ff) if config.extra_mlp != "none" else 0,
        experts=moe_layers * config.num_experts * _ffn(config, config.expert_width),
        routers=moe_layers * (config.d_model * config.num_experts + biases),
        norms=_norms(config),
    )


def active_parameters(config: ModelConfig) -> int:
    """Returns the parameters that act on one token, the embedding and the head left out."""
    counts = parameter_counts(config)
    chosen_experts = config.num_moe_layers * config.top_k * _ffn(config, config.expert_width)
    return counts.total - counts.embedding - counts.head - counts.experts + chosen_experts


class Groups(NamedTuple):
    """How a batch [b, t] is cut into groups: consecutive tokens, row after row."""

    size: int  # tokens of a group
    pad_rows: int = 0  # rows of zeros that are appended before
    pad_cols: int = 0  # columns of zeros that are appended before


def groups_of(config: ModelConfig, num_rows: int, row_len: int) -> Groups:
    """Returns the groups of a microbatch: of `group_size` tokens, or those of the original's rule.

    That rule takes the fewest groups that are a multiple of all experts on all devices and no larger than group_size.
    Where the tokens are no such multiple it appends zeros, as rows or columns, whichever are fewer, which are routed
    like padding (moe_layers.py of flaxformer).
    """
    if not config.t5x_expert_copies:
        return Groups(config.group_size)
    multiple = config.num_experts * config.t5x_expert_copies
    pad_rows, pad_cols = 0, 0
    if num_rows * row_len % multiple:
        pad_rows = -num_rows % (multiple // math.gcd(multiple, row_len))
        pad_cols = -row_len % (multiple // math.gcd(multiple, num_rows))
        if pad_cols * num_rows > pad_rows * row_len:
            pad_cols = 0
        else:
            pad_rows = 0
    num_tokens = (num_rows + pad_rows) * (row_len + pad_cols)
    num_groups = max(num_tokens // config.group_size, multiple)
    while num_tokens % num_groups or num_groups % multiple:
        num_groups += 1
    return Groups(num_tokens // num_groups, pad_rows, pad_cols)


def flops_per_token(config: ModelConfig, *, seq_len: int) -> int:
    """Returns the floating-point operations of one token's training step, forward and backward.

    Six per active parameter (arXiv:2001.08361, section 2.1), the head included because it multiplies every
    token, and 12 * layers * heads * head_dim * seq_len for the attention itself, the causal mask not used to
    save work. Tokens that find their experts full are counted as if they had not.
    """
    head = parameter_counts(config).head
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6 * (active_parameters(config) + head) + attention


def _ffn(config: ModelConfig, width: int) -> int:
    """Parameters of one gated block; OpenMoE's wi_0 is twice as wide as wi_1."""
    return (4 if config.ffn == "openmoe" else 3) * config.d_model * width


def _norms(config: ModelConfig) -> int:
    """Scales of all norms: two of each layer, one before an extra block that comes after, the last, and of heads."""
    of_stream = 2 * config.num_layers + 1 + (config.num_moe_layers if config.extra_mlp == "after" else 0)
    return of_stream * config.d_model + (2 * config.num_layers * config.head_dim if config.qk_norm else 0)
