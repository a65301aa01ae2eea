"""How parameters are declared, once each: shape, roles of the axes, initial distribution.

A module declares a parameter where it uses it. Everything else follows from the declarations without a forward
pass: `declarations` lists them, `draw` fills them with numbers, sharding and optimizer read their roles.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from openmoe.model.config import ModelConfig


@dataclass(frozen=True)
class Normal:
    """Normal distribution around 0."""

    deviation: float

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Returns float32[shape]."""
        return self.deviation * jax.random.normal(key, shape)


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal distribution around 0, cut off at two deviations and widened to the given one."""

    deviation: float

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Returns float32[shape]."""
        return self.deviation / _DEVIATION_WITHIN_TWO * jax.random.truncated_normal(key, -2, 2, shape)


_DEVIATION_WITHIN_TWO = 0.87962566103423978  # of a standard normal distribution cut off at -2 and 2


@dataclass(frozen=True)
class Ones:
    """The constant 1."""

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Returns float32[shape]."""
        return jnp.ones(shape)


@dataclass(frozen=True)
class Zeros:
    """The constant 0."""

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Returns float32[shape]."""
        return jnp.zeros(shape)


Initializer = Normal | TruncatedNormal | Ones | Zeros


def fan_in_deviation(config: ModelConfig, fan_in: int) -> float:
    """Returns the deviation of kernels that read `fan_in` numbers."""
    return math.sqrt(config.init_scale / fan_in)


class Parameter(nn.LogicallyPartitioned):
    """A parameter's value boxed with the roles of its axes (`names`) and its initial distribution."""

    initializer: Initializer | None = struct.field(default=None, pytree_node=False)


def declare(shape: tuple[int, ...], roles: tuple[str, ...], initializer: Initializer) -> Callable[[Array], Any]:
    """Returns what `Module.param` wants: a function from a key to the boxed parameter, which it unboxes.

    Only its shape counts; its numbers are those of `draw`.
    """
    return lambda key: Parameter(jnp.zeros(shape), roles, initializer=initializer)


def roles_of(declared: Any) -> Any:
    """Maps a tree of Parameter to a tree of PartitionSpec, the roles of their axes."""
    return nn.get_partition_spec(declared)


def num_stacked(roles: PartitionSpec) -> int:
    """Returns the number of leading axes along which parameters are independent: blocks, experts."""
    return next((axis for axis, role in enumerate(roles) if role not in ("block", "expert")), len(roles))


def draw(declared: Any, layout: Any, seed: int) -> Any:
    """Fills declarations with numbers, leaf by leaf and where they will live; the same numbers on any mesh.

    Args:
      declared: tree of abstract Parameter.
      layout: the same tree with NamedSharding in place of Parameter.
      seed: of all parameters; each has its own key, from its name.
    """
    root = jax.random.key(seed)

    def leaf(path: Any, parameter: Parameter, place: NamedSharding) -> Array:
        key = jax.random.fold_in(root, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return _draw_one(key, parameter.initializer, parameter.value.shape, place)

    return jax.tree.map_with_path(leaf, declared, layout, is_leaf=lambda x: isinstance(x, Parameter))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_one(key: Array, initializer: Initializer, shape: tuple[int, ...], place: NamedSharding) -> Array:
    # Leaf by leaf: no more than one array is in the making, and equal kinds of parameters share a compilation.
    return jax.lax.with_sharding_constraint(initializer(key, shape), place)
