"""Whether a run can be trained on a cluster, and how much of it it takes; asked before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator

from openmoe.clusters.spec import ClusterSpec
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError
from openmoe.platform.run_file.spec_sections import ClusterConfig


def slots(run: RunSpec, cluster: ClusterSpec) -> int:
    """Returns how many slices of a cluster a run occupies; 1 if it uses none.

    Raises:
      SpecError: it can never run there; with every reason.
    """
    problems = list(_misfits(run.cluster, cluster))
    if problems:
        raise SpecError(problems, f"run {run.name} on cluster {cluster.name}")
    return run.cluster.num_workers // cluster.hosts_per_slice if run.cluster.accelerator == "tpu" else 1


def _misfits(run: ClusterConfig, cluster: ClusterSpec) -> Iterator[Problem]:
    if run.accelerator == "gpu":
        yield Problem("cluster.accelerator", "gpu, but the cluster has none; submit to one that has, by its address")
    if run.accelerator != "tpu":
        return
    if not cluster.has_slices:
        message = f"tpu, but a cluster of provider {cluster.provider} has no slices; take a cluster that has"
        yield Problem("cluster.accelerator", message)
        return
    if run.accelerator_type != cluster.ray_accelerator_type:
        yield _other("accelerator_type", run.accelerator_type, f"its slices are {cluster.ray_accelerator_type}")
    if run.topology != cluster.topology:
        yield _other("topology", run.topology, f"its slices are {cluster.topology}")
    if run.devices_per_worker != cluster.chips_per_host:
        there = f"each of its hosts has {cluster.chips_per_host} chips, all for one worker"
        yield _other("devices_per_worker", run.devices_per_worker, there)
    wanted, rest = divmod(run.num_workers, cluster.hosts_per_slice)
    if rest or wanted > cluster.slices:
        there = f"it has {cluster.slices} slices of {cluster.hosts_per_slice} hosts, and a run takes whole slices"
        yield _other("num_workers", run.num_workers, there)


def _other(field: str, value: object, there: str) -> Problem:
    return Problem(f"cluster.{field}", f"{value} does not fit the cluster: {there}; change the run or take another one")
