"""The decoder: embedding, layers, head. Parameter names are exactly those of the T5X checkpoints.

Every model repeats a block of `config.block_layers` layers, the last of which is the MoE layer if there is one. Blocks
are written out one after another, `layers_0` to `layers_{n-1}`, or scanned: then one block is compiled, and
`blocks/layers_0` to `blocks/layers_{s-1}` hold the parameters of all of them, stacked (stacking.py).

Axes: b batch, t positions, d d_model, v vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from openmoe.model import attention, layers, moe, sharding
from openmoe.model.config import PLAIN, ExecutionConfig, ModelConfig
from openmoe.model.layers import Attention, GatedKernels, Kernel, RMSNorm, Rows, gated_mlp, project
from openmoe.model.parameters import Normal, TruncatedNormal, declare, fan_in_deviation

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Output(NamedTuple):
    """What the model computes."""

    logits: Array  # float32[b, t, v]; the compiler leaves them out where nobody reads them
    hidden: Array  # float32[b, t, d], of which the logits are the product with the head
    moe: tuple[moe.MoEOutput, ...]  # one for each MoE layer


def forward(
    config: ModelConfig,
    mesh: Mesh,
    params: Any,
    batch: dict[str, Array],
    *,
    train: bool,
    execution: ExecutionConfig = PLAIN,
) -> Output:
    """Applies the model to the rows [b, t] of a batch, of which it reads all ids but not the positions."""
    ids = (batch[key] for key in ("input_ids", "target_ids", "segment_ids"))
    output = Transformer(config, mesh, train, execution).apply({"params": params}, *ids)
    assert isinstance(output, Output)
    return output


def head_of(params: Any) -> Array:
    """Returns the head's kernel, float32[d, v]."""
    return params["decoder"]["logits_dense"]["kernel"]


class Transformer(nn.Module):
    """An OpenMoE or OpenLLaMA model.

    Attributes:
      config: of the model.
      mesh: over whose devices rows, experts and parameters are divided.
      train: whether experts have their training capacity; nothing else depends on it, there being no dropout.
      execution: how it is carried out.
    """

    config: ModelConfig
    mesh: Mesh
    train: bool
    execution: ExecutionConfig = PLAIN

    def setup(self) -> None:
        """Declares the two parts, which both ways of reading rows share."""
        self.token_embedder = Embedding(self.config, self.mesh)
        self.decoder = Decoder(self.config, self.mesh, self.train, self.execution)

    def __call__(self, input_ids: Array, target_ids: Array, segment_ids: Array) -> Output:
        """Predicts the targets from the inputs, which are the targets one position later in each segment.

        Args:
          input_ids: int32[b, t]; 0 starts a segment and fills the row's end.
          target_ids: int32[b, t]; 0 is padding. Only used to see where that is.
          segment_ids: int32[b, t]; positions see only their own segment.
        """
        rows = Rows(
            position=layers.segment_positions(segment_ids) if self.config.reset_positions else None,
            real=layers.real_positions(input_ids)[..., None],
            segments=attention.segments_of(target_ids, segment_ids),
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
    mesh: Mesh

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Maps int32[b, t] to [b, t, d] in the activations' type."""
        shape, roles = (self.config.vocab_size, self.config.d_model), ("vocab", "embed")
        table = self.param("embedding", declare(shape, roles, Normal(1.0)))
        found = sharding.whole(table, roles, self.mesh)[ids].astype(self.config.dtype)
        return sharding.by_rows(found, self.mesh)


class Decoder(nn.Module):
    """The layers, the last norm and the head."""

    config: ModelConfig
    mesh: Mesh
    train: bool
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x: Array, rows: Rows, last: Array | None = None) -> Output:
        """Maps [b, t, d] to logits: of all positions, or of one in each row if `last`, int32[b], names it."""
        config = self.config
        if config.num_experts:
            x = x.astype(jnp.float32)  # the residual stream, see add_to_stream
        x, outputs = (self._scan if self.execution.scan_blocks else self._go_through)(x, rows)
        x = (rows.real * RMSNorm(config, name="decoder_norm")(x)).astype(jnp.float32)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        shape = (config.d_model, config.vocab_size)
        initializer = TruncatedNormal(fan_in_deviation(config, config.d_model))
        head = Kernel(shape, ("embed", "vocab"), initializer, self.mesh, name="logits_dense")()
        return Output(logits=project(x, head), hidden=x, moe=outputs)

    def _go_through(self, x: Array, rows: Rows) -> tuple[Array, tuple[moe.MoEOutput, ...]]:
        outputs = []
        for first in range(0, self.config.num_layers, self.config.block_layers):
            block = self._block_type()(self.config, self.mesh, self.train, self.execution, first)
            nn.share_scope(self, block)  # so that layers are the decoder's own, as in T5X
            x, output = block(x, rows, jnp.asarray(first == 0))
            outputs.append(output)
        return x, tuple(output for output in outputs if output is not None)

    def _scan(self, x: Array, rows: Rows) -> tuple[Array, tuple[moe.MoEOutput, ...]]:
        num_blocks = self.config.num_layers // self.config.block_layers
        scanned = nn.scan(
            self._block_type(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=num_blocks,
            metadata_params={nn.PARTITION_NAME: "block"},
        )
        is_first = jnp.arange(num_blocks) == 0
        x, outputs = scanned(self.config, self.mesh, self.train, self.execution, 0, name="blocks")(x, rows, is_first)
        of_block = [jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(num_blocks)]
        return x, tuple(of_block if self.config.num_experts else ())

    def _block_type(self) -> type[nn.Module]:
        if self.execution.remat == "none":
            return Block
        return nn.remat(Block, policy=REMAT_POLICIES[self.execution.remat], prevent_cse=not self.execution.scan_blocks)


class Block(nn.Module):
    """Some dense layers and, in a model with experts, an MoE layer after them.

    Attributes:
      first: number of its first layer, where blocks are written out.
    """

    config: ModelConfig
    mesh: Mesh
    train: bool
    execution: ExecutionConfig
    first: int

    @nn.compact
    def __call__(self, x: Array, rows: Rows, is_first: Array) -> tuple[Array, moe.MoEOutput | None]:
        """Maps [b, t, d] to [b, t, d]; `is_first`, bool[], tells whether no block comes before."""
        output = None
        for i in range(self.config.block_layers):
            name = f"layers_{self.first + i}"
            if self.config.is_moe_layer(i):
                x, output = MoELayer(self.config, self.mesh, self.train, self.execution, name=name)(x, rows, is_first)
            else:
                x = DenseLayer(self.config, self.mesh, self.execution, name=name)(x, rows, is_first)
            x = sharding.by_rows(x, self.mesh)
        return x, output


def add_to_stream(x: Array, change: Array, is_early: Array | bool) -> Array:
    """Adds to the residual stream, rounded as the original's is.

    Its experts answer in float32, and from there on its stream is float32; before, it has the activations' type. Ours
    is float32 throughout, so that all blocks are alike, and rounded to that type as long as it is early.
    """
    total = x + change
    if total.dtype == change.dtype:
        return total
    return jnp.where(is_early, total.astype(change.dtype).astype(total.dtype), total)


class DenseLayer(nn.Module):
    """Attention and a gated block, each on the normed residual stream, padding zeroed."""

    config: ModelConfig
    mesh: Mesh
    execution: ExecutionConfig = PLAIN

    @nn.compact
    def __call__(self, x: Array, rows: Rows, is_early: Array) -> Array:
        """Maps [b, t, d] to [b, t, d]; `is_early`, bool[]: no MoE layer comes before."""
        config, mesh = self.config, self.mesh
        h = rows.real * RMSNorm(config, name="pre_self_attention_layer_norm")(x)
        x = add_to_stream(x, Attention(config, mesh, self.execution, name="self_attention")(h, rows), is_early)
        h = rows.real * RMSNorm(config, name="pre_mlp_layer_norm")(x)
        kernels = GatedKernels(config, mesh, name="mlp")()
        return add_to_stream(x, gated_mlp(h, kernels, config.ffn, project), is_early)


class MoELayer(nn.Module):
    """Attention, experts, and one more gated block that every token passes.

    The paper draws that block parallel to the experts; the code that trained the models runs it after them, with a norm
    of its own. Unless `route_padding` is off, zeroed padding asks for experts 0 and 1 and takes places there.
    """

    config: ModelConfig
    mesh: Mesh
    train: bool
    execution: ExecutionConfig = PLAIN

    @nn.compact
    def __call__(self, x: Array, rows: Rows, is_early: Array) -> tuple[Array, moe.MoEOutput]:
        """Maps [b, t, d] to [b, t, d]; `is_early`, bool[]: no MoE layer comes before."""
        config, mesh = self.config, self.mesh
        h = rows.real * RMSNorm(config, name="pre_self_attention_layer_norm")(x)
        x = add_to_stream(x, Attention(config, mesh, self.execution, name="self_attention")(h, rows), is_early)
        h = rows.real * RMSNorm(config, name="pre_mlp_layer_norm")(x)
        output = moe.MoE(config, mesh, self.train, name="mlp")(h, rows.real)
        x = add_to_stream(x, output.y, False)
        if config.extra_mlp == "none":
            return x, output
        if config.extra_mlp == "after":
            h = rows.real * RMSNorm(config, name="pre_extra_mlp_layer_norm")(x)
        kernels = GatedKernels(config, mesh, name="extra_mlp")()
        return add_to_stream(x, gated_mlp(h, kernels, config.ffn, project), False), output
