"""A cluster of this machine as its files have it, without a Ray."""

import os

import pytest

from openmoe.clusters import processes, provider, ray_start, twin
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.twin_state import Cluster, Node


@pytest.fixture
def cluster(tmp_path):
    """A cluster as it is when all of its processes are gone, say after a reboot."""
    state_dir = tmp_path / "clusters" / "small"
    state_dir.mkdir(parents=True)
    temp_dir = tmp_path / "openmoe-abc"
    temp_dir.mkdir()
    made = Cluster(
        state_dir=state_dir,
        spec=ClusterSpec(name="small", provider="twin", accelerator="v4", topology="2x2x2", slices=2),
        temp_dir=temp_dir,
        ip="127.71.3.1",
        gcs_address="127.71.3.1:20001",
        dashboard_url="http://127.0.0.1:20002",
    )
    made.save()
    provider.write(state_dir, ray_start.planned(made.spec, "127.71.3"))
    return made


@pytest.fixture
def running(cluster):
    """The same while all of its processes live: this one stands for each."""
    hosts = twin.instances(cluster.state_dir)
    for name in ("head", *(host.name for host in hosts)):
        this = processes.identify(os.getpid())
        cluster.save_node(Node(name=name, mark=cluster.new_mark(name), node_id="ab", processes=(this,)))
    provider.set_state(cluster.state_dir, hosts, "RUNNING", 5.0)
    return cluster
