"""Parameters and arithmetic of a model, from its settings alone. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields

from openmoe.model.config import ModelConfig


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
    return ParameterCounts(
        embedding=config.vocab_size * config.d_model,
        head=config.vocab_size * config.d_model,
        attention=layers * 4 * config.d_model * config.num_heads * config.head_dim,
        dense_ffn=(layers - moe_layers) * _ffn(config),
        extra_ffn=moe_layers * _ffn(config),
        experts=moe_layers * config.num_experts * _ffn(config),
        routers=moe_layers * config.d_model * config.num_experts,
        norms=(2 * layers + moe_layers + 1) * config.d_model,
    )


def active_parameters(config: ModelConfig) -> int:
    """Returns the parameters that act on one token, the embedding and the head left out."""
    counts = parameter_counts(config)
    chosen_experts = config.num_moe_layers * config.top_k * _ffn(config)
    return counts.total - counts.embedding - counts.head - counts.experts + chosen_experts


def flops_per_token(config: ModelConfig, *, seq_len: int) -> int:
    """Returns the floating-point operations of one token's training step, forward and backward.

    Six per active parameter (arXiv:2001.08361, section 2.1), the head included because it multiplies every
    token, and 12 * layers * heads * head_dim * seq_len for the attention itself, the causal mask not used to
    save work. Tokens that find their experts full are counted as if they had not.
    """
    head = parameter_counts(config).head
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6 * (active_parameters(config) + head) + attention


def _ffn(config: ModelConfig) -> int:
    """Parameters of one gated block: wi_0 is twice as wide as wi_1."""
    return 4 * config.d_model * config.d_ff
