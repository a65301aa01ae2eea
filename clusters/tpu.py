"""TPU generations: which slices exist, how many chips a host holds, what Ray, GCP and GKE call them.

A topology is the chips of one slice along each dimension, such as 4x4x4; a slice is whole or useless. Ray's launcher
lets 3x3x3 pass, so that a typing error would only be noticed when no machine comes.
"""

from dataclasses import dataclass
from itertools import product
from math import prod

_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def _cubes(x: int, y: int, z: int) -> tuple[str, ...]:
    """Slices of whole 4x4x4 cubes, dimensions ascending as Google wants them, smallest first."""
    shapes = product(range(4, x + 1, 4), range(4, y + 1, 4), range(4, z + 1, 4))
    ascending = sorted((shape for shape in shapes if list(shape) == sorted(shape)), key=lambda s: (prod(s), s))
    return tuple("x".join(map(str, shape)) for shape in ascending)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One TPU generation.

    Attributes:
      ray_name: how Ray spells it in pod types and resources: v5litepod-16, TPU-V5LITEPOD.
      cores_per_chip: TensorCores; pod types count these on some generations and chips on others.
      devices_per_chip: what JAX counts; v4 and v5p join a chip's two cores to one device.
      topologies: every slice that can be asked for, smallest first.
      gcp_type: `acceleratorConfig.type` of the TPU API; None where its nodes cannot be made through that API.
      gcp_runtime: image of a TPU VM, `runtimeVersion` of the TPU API.
      gke_accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
      gke_machines: series of the machine types of its node pools, of which "-4t" has 4 chips.
    """

    ray_name: str
    cores_per_chip: int
    devices_per_chip: int
    topologies: tuple[str, ...]
    gcp_type: str | None
    gcp_runtime: str | None
    gke_accelerator: str
    gke_machines: str


GENERATIONS = {
    "v4": Generation(
        ray_name="v4",
        cores_per_chip=2,
        devices_per_chip=1,
        topologies=_SMALL_3D + _cubes(12, 12, 16),
        gcp_type="V4",
        gcp_runtime="tpu-ubuntu2204-base",
        gke_accelerator="tpu-v4-podslice",
        gke_machines="ct4p-hightpu",
    ),
    "v5p": Generation(
        ray_name="v5p",
        cores_per_chip=2,
        devices_per_chip=1,
        topologies=_SMALL_3D + _cubes(16, 16, 24),
        gcp_type="V5P",
        gcp_runtime="v2-alpha-tpuv5",
        gke_accelerator="tpu-v5p-slice",
        gke_machines="ct5p-hightpu",
    ),
    "v5e": Generation(
        ray_name="v5litepod",
        cores_per_chip=1,
        devices_per_chip=1,
        topologies=_2D,
        gcp_type="V5LITE_POD",
        gcp_runtime="v2-alpha-tpuv5-lite",
        gke_accelerator="tpu-v5-lite-podslice",
        gke_machines="ct5lp-hightpu",
    ),
    "v6e": Generation(
        ray_name="v6e",
        cores_per_chip=1,
        devices_per_chip=1,
        topologies=_2D,
        gcp_type="V6E",
        gcp_runtime="v2-alpha-tpuv6e",
        gke_accelerator="tpu-v6e-slice",
        gke_machines="ct6e-standard",
    ),
    "v7x": Generation(
        ray_name="v7x",
        cores_per_chip=2,
        devices_per_chip=2,
        topologies=(*_SMALL_3D, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
        gcp_type=None,
        gcp_runtime=None,
        gke_accelerator="tpu7x",
        gke_machines="tpu7x-standard",
    ),
}


def num_chips(topology: str) -> int:
    """Chips of one slice: 64 of "4x4x4"."""
    return prod(int(size) for size in topology.split("x"))


def chips_per_host(accelerator: str, topology: str) -> int:
    """Chips of each host of a slice: 4, except that a 2D slice of up to 8 chips is one host.

    GKE would also make a 2x4 of two hosts of 4 chips; the TPU API and Ray know it as one of 8 alone.
    """
    chips = num_chips(topology)
    return chips if GENERATIONS[accelerator].topologies is _2D and chips <= 8 else 4


def hosts_per_slice(accelerator: str, topology: str) -> int:
    """Hosts of one slice: 16 of a v4 of 4x4x4."""
    return num_chips(topology) // chips_per_host(accelerator, topology)


def pod_type(accelerator: str, topology: str) -> str:
    """Ray's name of a slice's size, as in the resource TPU-v4-128-head: "v4-128" of a v4 of 4x4x4."""
    generation = GENERATIONS[accelerator]
    return f"{generation.ray_name}-{num_chips(topology) * generation.cores_per_chip}"


def ray_accelerator_type(accelerator: str) -> str:
    """Ray's name of a generation, as in `ScalingConfig(accelerator_type=...)`: "TPU-V4" of v4."""
    return f"TPU-{GENERATIONS[accelerator].ray_name.upper()}"
