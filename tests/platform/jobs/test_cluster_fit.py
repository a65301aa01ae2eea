"""A run that can never be trained on a cluster is refused before it is queued, with every reason."""

import pytest

from openmoe.clusters.spec import ClusterSpec
from openmoe.platform.jobs import cluster_fit
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError

TWIN = ClusterSpec(name="there", provider="twin", accelerator="v4", topology="2x2x2", slices=2)
PLAIN = ClusterSpec(name="there", provider="local")
FOUR_WORKERS = ("cluster.num_workers=4", "train.batch_rows=16", "mesh.data=2")


def test_a_run_occupies_its_slices_or_one_slot():
    assert cluster_fit.slots(spec.load("twin"), TWIN) == 1
    assert cluster_fit.slots(spec.load("twin", FOUR_WORKERS), TWIN) == 2
    assert cluster_fit.slots(spec.load("quickstart"), TWIN) == 1
    assert cluster_fit.slots(spec.load("quickstart"), PLAIN) == 1


@pytest.mark.parametrize(
    ("run", "overrides", "cluster", "lines"),
    [
        (
            "twin",
            (),
            PLAIN,
            ["accelerator: tpu, but a cluster of provider local has no slices; take a cluster that has"],
        ),
        (
            "quickstart",
            ("cluster.accelerator=gpu",),
            TWIN,
            ["accelerator: gpu, but the cluster has none; submit to one that has, by its address"],
        ),
        (
            "twin",
            ("cluster.accelerator_type=TPU-V5P",),
            TWIN,
            ["accelerator_type: 'TPU-V5P' is not what cluster there has; write TPU-V4"],
        ),
        (
            "twin",
            ("cluster.topology=2x2x1",),
            TWIN,
            ["topology: '2x2x1' is not what cluster there has; write 2x2x2"],
        ),
        (
            "twin",
            ("cluster.num_workers=4", "cluster.devices_per_worker=2", "cluster.cpus_per_worker=1.5"),
            TWIN.model_copy(update={"slices": 1}),
            [
                "devices_per_worker: 2 is not what cluster there has; write 4",
                "cpus_per_worker: a worker reserves 1.5, a host of cluster there offers 1; write host_cpus: 2 in the "
                "cluster file",
                "num_workers: one worker a host of whole slices: write a multiple of 2, at most 2, got 4",
            ],
        ),
        (
            "twin",
            ("cluster.num_workers=8", "train.batch_rows=32", "mesh.data=4"),
            TWIN,
            ["num_workers: one worker a host of whole slices: write a multiple of 2, at most 4, got 8"],
        ),
    ],
)
def test_what_does_not_fit_is_said(run, overrides, cluster, lines):
    with pytest.raises(SpecError) as refused:
        cluster_fit.slots(spec.load(run, overrides), cluster)
    assert str(refused.value).splitlines() == [f"run {run} on cluster there: cluster.{line}" for line in lines]


def test_a_chip_may_be_several_devices_to_jax_and_is_one_to_ray():
    cloud = {"provider": "kuberay", "image": "a/b:1", "storage": "gs://bucket/runs"}
    cluster = ClusterSpec(name="there", accelerator="v7x", topology="2x2x2", **cloud)
    types = ("cluster.accelerator_type=TPU-V7X", "cluster.devices_per_worker=8")
    run = spec.load("twin", (*types, "train.batch_rows=16", "mesh.data=2"))
    assert cluster_fit.slots(run, cluster) == 1
    assert (run.cluster.num_slices, run.cluster.chips_per_worker) == (1, 4)
