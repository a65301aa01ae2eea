"""ClusterSpec as code builds it: derived numbers, and what cannot be."""

import pytest
from pydantic import ValidationError

from openmoe.clusters import spec
from openmoe.clusters.spec import ClusterSpec, HeadSpec

TWIN = {"name": "twin", "provider": "twin", "accelerator": "v4", "topology": "2x2x2", "slices": 2}


def test_numbers_follow_from_accelerator_topology_and_slices():
    cluster = ClusterSpec.model_validate(TWIN)
    assert (cluster.chips_per_slice, cluster.hosts_per_slice, cluster.chips_per_host) == (8, 2, 4)
    assert (cluster.num_hosts, cluster.pod_type, cluster.ray_accelerator_type) == (4, "v4-16", "TPU-V4")
    assert cluster.summary == "2 x v4-16 (2x2x2, 2 hosts of 4 chips each); head on demand"


def test_jax_sees_two_devices_on_a_v7x_chip_and_a_twin_has_one_for_each():
    twin = ClusterSpec.model_validate(TWIN | {"accelerator": "v7x"})
    assert (twin.chips_per_host, twin.devices_per_host) == (4, 4)
    cloud = ClusterSpec.model_validate(
        TWIN | {"provider": "kuberay", "accelerator": "v7x", "image": "a/b:1", "storage": "gs://bucket"}
    )
    assert (cloud.chips_per_host, cloud.devices_per_host) == (4, 8)


def test_a_plain_local_ray_has_no_slices():
    cluster = ClusterSpec(name="plain", provider="local", head=HeadSpec(cpus=4))
    assert (cluster.has_slices, cluster.num_hosts) == (False, 0)
    with pytest.raises(spec.ClusterError, match="a local cluster has no TPU slices"):
        _ = cluster.pod_type


def test_a_spec_survives_json_with_all_of_its_fields():
    cluster = ClusterSpec.model_validate(TWIN)
    assert ClusterSpec.model_validate_json(cluster.model_dump_json()) == cluster


def test_settings_do_not_grow_unnoticed():
    assert len(ClusterSpec.model_fields) == 15
    assert len(HeadSpec.model_fields) == 2


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        ClusterSpec.model_validate(TWIN).slices = 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"topology": "3x3x3"}, "topology: no v4 slice is '3x3x3'; write one of 2x2x1, 2x2x2, 2x2x4"),
        ({"topology": "4x2x2"}, "topology: no v4 slice is '4x2x2'"),
        ({"topology": None}, "topology: missing; provider twin needs it, such as `topology: 4x4x4`"),
        ({"zone": "us-central2-b"}, "zone: means nothing under provider twin; remove it (it is for gcp)"),
        ({"provider": "local"}, "accelerator: means nothing under provider local"),
    ],
)
def test_an_impossible_cluster_cannot_be_built(changes, problem):
    with pytest.raises(ValidationError) as caught:
        ClusterSpec.model_validate(TWIN | changes)
    assert problem in str(caught.value)


def test_each_field_is_used_by_a_provider_and_each_needed_one_is_used():
    used = set.union(*spec._USED.values())
    assert used == set(ClusterSpec.model_fields)
    assert all(set(needed) <= spec._USED[provider] for provider, needed in spec._NEEDED.items())
    assert all(ClusterSpec.model_fields[field].examples for needed in spec._NEEDED.values() for field in needed)
