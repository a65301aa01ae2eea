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
            ("cluster.topology=4x4", "cluster.accelerator_type=TPU-V6E"),
            TWIN,
            [
                "accelerator_type: TPU-V6E does not fit the cluster: its slices are TPU-V4; change the run or take "
                "another one",
                "topology: 4x4 does not fit the cluster: its slices are 2x2x2; change the run or take another one",
            ],
        ),
        (
            "twin",
            ("cluster.num_workers=1", "cluster.devices_per_worker=8"),
            TWIN,
            [
                "devices_per_worker: 8 does not fit the cluster: each of its hosts has 4 chips, all for one worker; "
                "change the run or take another one",
                "num_workers: 1 does not fit the cluster: it has 2 slices of 2 hosts, and a run takes whole slices; "
                "change the run or take another one",
            ],
        ),
        (
            "twin",
            ("cluster.num_workers=8", "train.batch_rows=32", "mesh.data=4"),
            TWIN,
            [
                "num_workers: 8 does not fit the cluster: it has 2 slices of 2 hosts, and a run takes whole slices; "
                "change the run or take another one",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_said(run, overrides, cluster, lines):
    with pytest.raises(SpecError) as refused:
        cluster_fit.slots(spec.load(run, overrides), cluster)
    assert str(refused.value).splitlines() == [f"run {run} on cluster there: cluster.{line}" for line in lines]
