"""Attention of packed rows behind one function: plain softmax anywhere, a fused kernel on TPU and GPU.

    reference   all logits in memory, in the activations' type, as the original computed them; any platform
    splash      Pallas kernel for TPU, which skips blocks that the causal mask leaves empty (arXiv:2205.14135 in tiles)
    cudnn       cuDNN's flash attention for GPU, in bfloat16; no logits, but a mask of [b, t, t] in their type

A row is cut into segments: segments[i, j] is 0 at padding, and positions see those not later of the same segment.
The fused kernels sum in float32 what the reference rounds to the activations' type.

Padding differs. In the reference it sees nothing, so all masked logits are equal and it attends to all positions of
the row; in the fused kernels it attends to padding not later than itself. No loss depends on it: padding is zeroed
before each sublayer. But for one position: the first padding behind an unpacked row's end has the end-of-example token
as its input, is not zeroed, and takes its place in a routing group.

Axes: b batch, t and s positions, h heads, k head_dim.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from openmoe.model.config import ExecutionConfig, ModelConfig
from openmoe.model.sharding import BATCH_AXES

Implementation = Literal["reference", "splash", "cudnn"]

MASKED = -1e10
SPLASH_TILES = (512, 256, 128)  # positions of a tile: the largest that divides the row; a TPU's lanes are 128


def implementation_for(
    platform: str, config: ModelConfig, execution: ExecutionConfig, *, row_len: int, tensor: int
) -> Implementation:
    """Returns the fused kernel that a platform has for a model's rows; reference if it has none or none is wanted.

    Splash takes rows of whole tiles. cuDNN takes bfloat16, heads of multiples of 8 up to 128 and, backward, even rows.
    Each device computes whole heads.

    Args:
      platform: of the mesh's devices, as JAX names it.
      config: of the model.
      execution: says whether a fused kernel is wanted.
      row_len: t.
      tensor: size of the mesh's axis over which heads are divided.
    """
    if execution.attention == "reference" or config.num_heads % tensor:
        return "reference"
    if platform == "tpu" and row_len % min(SPLASH_TILES) == 0:
        return "splash"
    head_fits_cudnn = config.head_dim % 8 == 0 and config.head_dim <= 128
    if platform in ("gpu", "cuda") and config.dtype == "bfloat16" and head_fits_cudnn and row_len % 2 == 0:
        return "cudnn"
    return "reference"


def segments_of(target_ids: Array, segment_ids: Array) -> Array:
    """Returns int32[b, t], the packed segment of each position, 0 at padding.

    Args:
      target_ids: int32[b, t]; 0 is padding.
      segment_ids: int32[b, t]; at least 1 where there is a target.
    """
    return jnp.where(target_ids > 0, segment_ids, 0)


def visible(segments: Array) -> Array:
    """Returns bool[b, 1, t, s]: whether position t sees s: not later, same segment, no padding."""
    positions = jnp.arange(segments.shape[1])
    causal = positions[:, None] >= positions[None, :]
    same_segment = segments[:, :, None] == segments[:, None, :]
    return (causal & same_segment & (segments > 0)[:, :, None])[:, None]


def attend(
    query: Array, key: Array, value: Array, segments: Array, *, implementation: Implementation, mesh: Mesh
) -> Array:
    """Causal softmax attention inside segments, without the factor 1/sqrt(k), which the query's initialiser has.

    XLA cannot divide a kernel of others' making over devices, so each is run by `shard_map` on its own rows and heads.

    Args:
      query, key, value: [b, t, h, k], rotated.
      segments: int32[b, t], see `segments_of`.
      implementation: for which the shapes must fit, see `implementation_for`. Where the devices are no TPU, splash
        is interpreted, for tests.
      mesh: for the fused ones; the sizes of its axes must divide b and h.

    Returns:
      [b, t, h, k], in the type of `value`.
    """
    if implementation == "reference":
        return masked_attention(query, key, value, visible(segments))
    if implementation == "splash":
        on_each_device = functools.partial(splash_attention, interpret=mesh.devices.flat[0].platform != "tpu")
    else:
        on_each_device = cudnn_attention
    by_heads = P(BATCH_AXES, None, "tensor", None)
    in_specs = (by_heads, by_heads, by_heads, P(BATCH_AXES, None))
    # The kernels do not say over which axes their results vary; all that is summed over devices is summed outside.
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=in_specs, out_specs=by_heads, check_vma=False)(
        query, key, value, segments
    )


def masked_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """The reference: softmax over all logits.

    The mask is added, not selected: a position that sees nothing attends to all positions equally, and its
    gradient passes through. That is what the original does with padding.

    Args:
      query: [b, t, h, k].
      key, value: [b, s, h, k].
      mask: bool[b, 1, t, s], which positions s are seen.

    Returns:
      [b, t, h, k], in the type of `value`.
    """
    logits = jnp.einsum("bthk,bshk->bhts", query, key)
    weights = jax.nn.softmax(logits + jnp.where(mask, 0, MASKED).astype(logits.dtype), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


def splash_attention(query: Array, key: Array, value: Array, segments: Array, *, interpret: bool = False) -> Array:
    """Attention by JAX's splash kernel, of one device's rows and heads. Its import, only here, takes half a second.

    Args:
      query, key, value: [b, t, h, k], t a multiple of 128.
      segments: int32[b, t].
      interpret: compute on any platform what the kernel would, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, row_len, num_heads, _ = query.shape
    tile = next(size for size in SPLASH_TILES if row_len % size == 0)
    causal = splash_attention_mask.CausalMask((row_len, row_len))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * num_heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        return kernel(query, key, value, splash_attention_kernel.SegmentIds(segments, segments))

    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.vmap(of_row)(query, key, value, segments).swapaxes(1, 2)


def cudnn_attention(
    query: Array, key: Array, value: Array, segments: Array, *, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """Attention by cuDNN's flash attention, of one device's rows and heads.

    JAX's function knows no segments, and cuDNN's own packed layout wants their greatest number fixed and a Hopper. So
    segments are a mask, which becomes a bias of 2 b t t bytes, and as much again for its gradient, which nobody reads:
    an h-th of the logits.

    Args:
      query, key, value: bfloat16[b, t, h, k].
      segments: int32[b, t].
      implementation: xla computes the same by plain operations, on any platform.
    """
    same_segment = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=same_segment, is_causal=True, scale=1.0, implementation=implementation
    )
