"""Which axis of which array lies on which axis of the device mesh: one mesh, one table.

Arrays name their axes by role ("embed", "expert"); RULES alone says where a role lives:

    data    rows of the batch; parameters are the same along it
    fsdp    rows of the batch, and a slice of every parameter, which is gathered where it is used (arXiv:1910.02054)
    expert  rows of the batch, and a share of the experts; all else is the same along it
    tensor  slices of heads, of inner widths and of the vocabulary (arXiv:1909.08053)

An axis of one device costs nothing, so every mesh has all four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "expert": "expert",
    "vocab": "tensor",
    "embed": "fsdp",
    "joined_kv": "tensor",
    "mlp": "tensor",
    "two_mlp": "tensor",
    "head_dim": None,
    "unmodeled": None,
    "block": None,
}


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh of data x fsdp x expert x tensor devices; all devices of the process group if none are given.

    The axis that exchanges most varies fastest, so its exchanges stay between neighbours. TPU slices, between which
    there is only the network, come one after the other: where their number divides `data`, that axis alone crosses it.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=slice_of)
    shape = (data, fsdp, expert, tensor)
    if len(devices) != np.prod(shape):
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"mesh: {sizes} needs {np.prod(shape)} devices, got {len(devices)}")
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def slice_of(device: jax.Device) -> int:
    """Returns the number of the TPU slice that a device belongs to; 0 for all that are none."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def num_batch_shares(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are divided."""
    return mesh.size // mesh.shape["tensor"]


def tensor_axis(mesh: Mesh) -> str | None:
    """Returns "tensor" if anything is divided along that axis, so that parts of sums must be added up."""
    return "tensor" if mesh.shape["tensor"] > 1 else None


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
    """Returns the layout of batch arrays, [microbatches, rows, seq]: rows over all batch axes."""
    return NamedSharding(mesh, mesh_axes(PartitionSpec(None, "batch", None)))


def put_batch(mesh: Mesh, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
    """Returns host arrays, [microbatches, rows, seq] each, as a batch; every process holds all of them."""
    layout = batch_sharding(mesh)
    return {key: jax.make_array_from_callback(all_.shape, layout, all_.__getitem__) for key, all_ in arrays.items()}


def by_rows(tree: Any, mesh: Mesh) -> Any:
    """Keeps arrays [b, ...] divided by rows, and by nothing else, inside a compiled function."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, mesh_axes(PartitionSpec("batch"))))


def whole(param: Array, roles: Sequence[str], mesh: Mesh) -> Array:
    """Gathers a parameter along fsdp where it is used, inside a compiled function."""
    if mesh.shape["fsdp"] == 1:
        return param
    spec = mesh_axes(PartitionSpec(*roles))
    use = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(param, NamedSharding(mesh, use))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """Returns arrays, inside a `shard_map`, that may each differ along all axes along which any of them does."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(axes - its), to="varying") for array, its in zip(arrays, varying, strict=True)
    )


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Returns zeros in the type of an array, which differ from device to device where it does."""
    return varying_alike(jnp.zeros(shape, like.dtype), like)[0]
