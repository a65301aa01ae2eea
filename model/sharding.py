"""Which axis of which array lies on which axis of the device mesh: one mesh, one table.

Arrays name their axes by role ("embed", "expert"); RULES alone says where a role lives. Parameters are the same
on every device, except the experts, which are divided over the `expert` axis. Rows of the batch are divided over
all devices, so that for everything but the experts both axes are data parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "expert")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": AXES,
    "expert": "expert",
    "vocab": None,
    "embed": None,
    "joined_kv": None,
    "mlp": None,
    "unmodeled": None,
}


def make_mesh(*, data: int, expert: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of data x expert devices; all devices of the process group if none are given.

    The expert axis varies fastest, so its exchanges stay between neighbours.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != data * expert:
        raise ValueError(f"mesh: data={data} x expert={expert} needs {data * expert} devices, got {len(devices)}")
    return Mesh(np.asarray(devices).reshape(data, expert), AXES)


def mesh_axes(roles: PartitionSpec) -> PartitionSpec:
    """Returns the mesh axes on which axes of the given roles lie; None is an axis without a role."""
    return PartitionSpec(*(None if role is None else RULES[role] for role in roles))


def shardings(mesh: Mesh, roles: Any) -> Any:
    """Maps a tree of roles, a PartitionSpec for each array, to a tree of shardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, mesh_axes(spec)),
        roles,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of batch arrays, [microbatches, rows, seq]: rows over all devices."""
    return NamedSharding(mesh, mesh_axes(PartitionSpec(None, "batch", None)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
