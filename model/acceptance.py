"""Whether two checkpoints are the same model: a forward pass of both, part by part, on fixed tokens.

Each layer gets the source's stream, so that a difference is its own; one layer's weights are in memory at a time. Every
number takes part, since each array is multiplied by fixed numbers as well: some experts may be asked by no token. All
is computed in float32. What was rounded when it was converted is held against the source rounded to the same type, so
the tolerance is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.sharding import Mesh

from openmoe.model import attention, layers, sharding
from openmoe.model.config import ModelConfig
from openmoe.model.interop import CheckpointError, Readable, Report
from openmoe.model.layers import Rows
from openmoe.model.transformer import DenseLayer, MoELayer

NUM_ROWS, ROW_LEN = 2, 64  # together one routing group
NUM_PADDED = 7  # positions at the end of the last row

_EMBEDDING = "token_embedder/embedding"
_NORM = "decoder/decoder_norm/scale"
_HEAD = "decoder/logits_dense/kernel"


class Checked(NamedTuple):
    """What a comparison without complaints looked at."""

    num_layers: int
    difference: float  # the largest
    largest: float  # of the numbers that were compared

    def __str__(self) -> str:
        """One line for people."""
        return f"checked: {self.num_layers} layers, largest difference {self.difference:.1f} of {self.largest:.1f}"


class _Part(NamedTuple):
    """A part of the model, of which all weights are in memory at once."""

    name: str
    kind: Literal["embedding", "dense", "moe", "head"]
    weights: tuple[str, ...]


def compare(
    source: Mapping[str, Readable],
    destination: Mapping[str, Readable],
    config: ModelConfig,
    report: Report = lambda *progress: None,
) -> Checked:
    """Compares the two on the same tokens.

    Args:
      source: its parameters, by T5X's names.
      destination: its parameters, which may be of a narrower type.
      config: of the model.
      report: told after each part of the model.

    Raises:
      CheckpointError: they differ; names the first part in which they do.
    """
    config = replace(config, dtype="float32", group_size=NUM_ROWS * ROW_LEN, t5x_expert_copies=0)
    mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
    ids, rows = _tokens(config)
    parts = list(_parts(config, source))
    hidden, difference, largest = jnp.zeros(0), 0.0, 0.0
    for done, part in enumerate(parts, 1):
        call = functools.partial(_apply, ids=ids, x=hidden, rows=rows, part=part._replace(name="", weights=()))
        theirs = {name: destination[name].read() for name in part.weights}
        types = {name: array.dtype for name, array in theirs.items()}
        found = call(
            {name: jnp.asarray(theirs.pop(name), jnp.float32) for name in part.weights}, config=config, mesh=mesh
        )
        ours = {name: source[name].read().astype(types[name], copy=False) for name in part.weights}
        wanted = call(
            {name: jnp.asarray(ours.pop(name), jnp.float32) for name in part.weights}, config=config, mesh=mesh
        )
        off, size = _largest([a - b for a, b in zip(found, wanted, strict=True)]), _largest(wanted)
        if off != 0:  # nor is NaN
            problem = f"{part.name}: source and destination differ by {off:.3g} of {size:.3g}"
            raise CheckpointError(f"{problem}; the destination is damaged: convert once more")
        hidden, difference, largest = wanted[0], max(difference, off), max(largest, size)
        report(done, len(parts))
    return Checked(config.num_layers, difference, largest)


def _parts(config: ModelConfig, names: Mapping[str, Any]) -> Iterator[_Part]:
    yield _Part(_EMBEDDING, "embedding", (_EMBEDDING,))
    for layer in range(config.num_layers):
        name = f"decoder/layers_{layer}"
        weights = tuple(sorted(n for n in names if n.startswith(f"{name}/")))
        kind = "moe" if config.is_moe_layer(layer) else "dense"
        yield _Part(name, kind, weights)
    yield _Part(_HEAD, "head", (_NORM, _HEAD))


@functools.partial(jax.jit, static_argnames=("part", "config", "mesh"))
def _apply(
    weights: dict[str, Array], *, ids: Array, x: Array, rows: Rows, part: _Part, config: ModelConfig, mesh: Mesh
) -> list[Any]:
    """Returns what a part makes of the stream x, and what its arrays make of fixed numbers."""
    match part.kind:
        case "embedding":
            y = weights[_EMBEDDING][ids]
        case "head":
            h = layers.rms_norm(x, weights[_NORM], epsilon=config.norm_epsilon, dtype=config.dtype)
            y = layers.project(rows.real * h, weights[_HEAD])
        case kind:
            # The last argument is about rounding to bfloat16, of which there is none here.
            tree = traverse_util.unflatten_dict({tuple(n.split("/")[2:]): array for n, array in weights.items()})
            if kind == "dense":
                y = DenseLayer(config, mesh).apply({"params": tree}, x, rows, False)
            else:
                y, _ = MoELayer(config, mesh, train=False).apply({"params": tree}, x, rows, False)
    return [y, *(array @ jnp.sin(jnp.arange(array.shape[-1]) + 1.0) for array in weights.values())]


def _tokens(config: ModelConfig) -> tuple[Array, Rows]:
    """Returns int32[NUM_ROWS, ROW_LEN] that start with BOS, the last row padded, and where they stand."""
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (NUM_ROWS, ROW_LEN + 1), np.int32)
    ids[:, 0] = 0
    ids[-1, -NUM_PADDED - 1 :] = 0
    inputs, targets = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    segments = attention.segments_of(targets, jnp.ones_like(targets))
    return inputs, Rows(jnp.arange(ROW_LEN), layers.real_positions(inputs)[..., None], segments)


def _largest(arrays: list[Any]) -> float:
    return float(np.max([jnp.max(jnp.abs(array)) for array in arrays]))
