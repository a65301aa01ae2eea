"""The decoder: embedding, layers, head. Parameter names are exactly those of the T5X checkpoints.

Axes: b batch, t positions, d d_model, v vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from openmoe.model import layers, moe
from openmoe.model.config import ModelConfig
from openmoe.model.layers import Attention, GatedKernels, Kernel, RMSNorm, Rows, gated_mlp, project
from openmoe.model.parameters import Normal, TruncatedNormal, declare, fan_in_deviation


class Output(NamedTuple):
    """What the model computes."""

    logits: Array  # float32[b, t, v]; the compiler leaves them out where nobody reads them
    hidden: Array  # float32[b, t, d], of which the logits are the product with the head
    moe: tuple[moe.MoEOutput, ...]  # one for each MoE layer


def forward(config: ModelConfig, mesh: Mesh, params: Any, batch: dict[str, Array], *, train: bool) -> Output:
    """Applies the model to the rows [b, t] of a batch, of which it reads all ids but not the positions."""
    ids = (batch[key] for key in ("input_ids", "target_ids", "segment_ids"))
    output = Transformer(config, mesh, train).apply({"params": params}, *ids)
    assert isinstance(output, Output)
    return output


def head_of(params: Any) -> Array:
    """Returns the head's kernel, float32[d, v]."""
    return params["decoder"]["logits_dense"]["kernel"]


class Transformer(nn.Module):
    """An OpenMoE or OpenLLaMA model.

    Attributes:
      config: of the model.
      mesh: over whose devices rows and experts are divided.
      train: whether experts have their training capacity; nothing else depends on it, there being no dropout.
    """

    config: ModelConfig
    mesh: Mesh
    train: bool

    def setup(self) -> None:
        """Declares the two parts, which both ways of reading rows share."""
        self.token_embedder = Embedding(self.config)
        self.decoder = Decoder(self.config, self.mesh, self.train)

    def __call__(self, input_ids: Array, target_ids: Array, segment_ids: Array) -> Output:
        """Predicts the targets from the inputs, which are the targets one position later in each segment.

        Args:
          input_ids: int32[b, t]; 0 starts a segment and fills the row's end.
          target_ids: int32[b, t]; 0 is padding. Only used to see where that is.
          segment_ids: int32[b, t]; positions see only their own segment.
        """
        rows = Rows(
            position=jnp.arange(input_ids.shape[1]),
            real=layers.real_positions(input_ids)[..., None],
            mask=layers.attention_mask(target_ids, segment_ids),
        )
        return self.decoder(self.token_embedder(input_ids), rows)

    def extend(self, input_ids: Array, rows: Rows, last: Array) -> Array:
        """Reads further positions of rows whose earlier ones are in the collection `cache`, and adds them to it.

        Args:
          input_ids: int32[b, t], at consecutive positions of each row.
          rows: where they stand; the mask is over the positions of the cache.
          last: int32[b], which of the t positions to predict from.

        Returns:
          float32[b, v], the logits at those positions.
        """
        return self.decoder(self.token_embedder(input_ids), rows, last).logits[:, 0]


class Embedding(nn.Module):
    """The table of token vectors; not scaled, not tied to the head."""

    config: ModelConfig

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Maps int32[b, t] to [b, t, d] in the activations' type."""
        shape = (self.config.vocab_size, self.config.d_model)
        table = self.param("embedding", declare(shape, ("vocab", "embed"), Normal(1.0)))
        return table[ids].astype(self.config.dtype)


class Decoder(nn.Module):
    """The layers, the last norm and the head."""

    config: ModelConfig
    mesh: Mesh
    train: bool

    @nn.compact
    def __call__(self, x: Array, rows: Rows, last: Array | None = None) -> Output:
        """Maps [b, t, d] to logits: of all positions, or of one in each row if `last`, int32[b], names it."""
        config, outputs = self.config, []
        for i in range(config.num_layers):
            if config.is_moe_layer(i):
                x, output = MoELayer(config, self.mesh, self.train, name=f"layers_{i}")(x, rows)
                outputs.append(output)
            else:
                x = DenseLayer(config, name=f"layers_{i}")(x, rows)
        x = (rows.real * RMSNorm(config, name="decoder_norm")(x)).astype(jnp.float32)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        shape = (config.d_model, config.vocab_size)
        initializer = TruncatedNormal(fan_in_deviation(config, config.d_model))
        head = Kernel(shape, ("embed", "vocab"), initializer, name="logits_dense")()
        return Output(logits=project(x, head), hidden=x, moe=tuple(outputs))


class DenseLayer(nn.Module):
    """Attention and a gated block, each on the normed residual stream, padding zeroed."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps [b, t, d] to [b, t, d]."""
        h = rows.real * RMSNorm(self.config, name="pre_self_attention_layer_norm")(x)
        x = x + Attention(self.config, name="self_attention")(h, rows)
        h = rows.real * RMSNorm(self.config, name="pre_mlp_layer_norm")(x)
        return x + gated_mlp(h, GatedKernels(self.config, name="mlp")())


class MoELayer(nn.Module):
    """Attention, experts, and after them one more gated block that every token passes, with its own norm.

    The paper draws that block parallel to the experts; the code that trained the models runs it after them.
    Zeroed padding reaches the router: it asks for experts 0 and 1 and takes places there.
    """

    config: ModelConfig
    mesh: Mesh
    train: bool

    @nn.compact
    def __call__(self, x: Array, rows: Rows) -> tuple[Array, moe.MoEOutput]:
        """Maps [b, t, d] to [b, t, d]; from the first such layer on the residual stream is float32."""
        h = rows.real * RMSNorm(self.config, name="pre_self_attention_layer_norm")(x)
        x = x + Attention(self.config, name="self_attention")(h, rows)
        h = rows.real * RMSNorm(self.config, name="pre_mlp_layer_norm")(x)
        output = moe.MoE(self.config, self.mesh, self.train, name="mlp")(h)
        x = x + output.y
        h = rows.real * RMSNorm(self.config, name="pre_extra_mlp_layer_norm")(x)
        return x + gated_mlp(h, GatedKernels(self.config, name="extra_mlp")()), output
