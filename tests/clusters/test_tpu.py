"""The table of TPU slices, compared with Ray's own for every topology of both."""

import pytest
from ray._private.accelerators import tpu as ray_tables
from ray.util import tpu as ray_tpu

from openmoe.clusters import tpu

# Ray's table holds every order of the dimensions, and 2x8; Google makes slices of ascending dimensions, and no 2x8.
SLICES = [(name, topology) for name, generation in tpu.GENERATIONS.items() for topology in generation.topologies]


@pytest.mark.parametrize(("accelerator", "topology"), SLICES, ids="-".join)
def test_a_slice_is_what_ray_takes_it_for(accelerator, topology):
    ray_type = tpu.ray_accelerator_type(accelerator)
    hosts, resources = ray_tpu.get_tpu_worker_resources(topology, ray_type)
    assert tpu.hosts_per_slice(accelerator, topology) == hosts
    assert tpu.chips_per_host(accelerator, topology) == resources["TPU"]
    assert tpu.pod_type(accelerator, topology) == ray_tpu.infer_tpu_pod_type_from_topology(topology, ray_type)


@pytest.mark.parametrize("accelerator", tpu.GENERATIONS)
def test_the_slices_are_rays_in_ascending_order_of_dimensions(accelerator):
    rays = ray_tables.VALID_TPU_TOPOLOGY[tpu.GENERATIONS[accelerator].ray_name] - {"2x8"}
    ascending = {t for t in rays if t in ("2x2x1",) or sorted(map(int, t.split("x"))) == [*map(int, t.split("x"))]}
    assert set(tpu.GENERATIONS[accelerator].topologies) == ascending


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts", "chips_per_host", "pod_type"),
    [
        ("v4", "2x2x2", 8, 2, 4, "v4-16"),
        ("v4", "4x4x4", 64, 16, 4, "v4-128"),
        ("v5p", "2x2x1", 4, 1, 4, "v5p-8"),
        ("v5p", "16x16x24", 6144, 1536, 4, "v5p-12288"),
        ("v5e", "1x1", 1, 1, 1, "v5litepod-1"),
        ("v5e", "2x4", 8, 1, 8, "v5litepod-8"),
        ("v6e", "4x4", 16, 4, 4, "v6e-16"),
        ("v7x", "2x2x2", 8, 2, 4, "v7x-16"),
    ],
)
def test_slices_by_hand(accelerator, topology, chips, hosts, chips_per_host, pod_type):
    assert tpu.num_chips(topology) == chips
    assert tpu.hosts_per_slice(accelerator, topology) == hosts
    assert tpu.chips_per_host(accelerator, topology) == chips_per_host
    assert tpu.pod_type(accelerator, topology) == pod_type


def test_slices_are_listed_smallest_first():
    for generation in tpu.GENERATIONS.values():
        sizes = [tpu.num_chips(topology) for topology in generation.topologies]
        assert sizes == sorted(sizes)


def test_the_names_of_ray():
    assert [tpu.ray_accelerator_type(name) for name in ("v4", "v5p", "v5e", "v6e", "v7x")] == [
        "TPU-V4",
        "TPU-V5P",
        "TPU-V5LITEPOD",
        "TPU-V6E",
        "TPU-V7X",
    ]
