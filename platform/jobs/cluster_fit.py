"""Whether a run can be trained on a cluster, and how much of it it takes; asked before anything is queued."""

from __future__ import annotations

import math
from collections.abc import Iterator

from openmoe.clusters.spec import ClusterSpec
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError, show
from openmoe.platform.run_file.spec_sections import ClusterConfig


def slots(run: RunSpec, cluster: ClusterSpec) -> int:
    """Returns how many slices of a cluster a run occupies; 1 if it uses none.

    Raises:
      SpecError: it can never run there; with every reason.
    """
    problems = list(misfits(run.cluster, cluster))
    if problems:
        raise SpecError(problems, f"run {run.name} on cluster {cluster.name}")
    return run.cluster.num_workers // cluster.hosts_per_slice if run.cluster.accelerator == "tpu" else 1


def misfits(run: ClusterConfig, cluster: ClusterSpec) -> Iterator[Problem]:
    """Yields what a run asks for that a cluster does not have; paths are those of the run file."""
    if run.accelerator == "gpu":
        yield Problem("cluster.accelerator", "gpu, but the cluster has none; submit to one that has, by its address")
    if run.accelerator != "tpu":
        return
    if not cluster.has_slices:
        message = f"tpu, but a cluster of provider {cluster.provider} has no slices; take a cluster that has"
        yield Problem("cluster.accelerator", message)
        return
    wanted = {
        "accelerator_type": (run.accelerator_type, cluster.ray_accelerator_type),
        "topology": (run.topology, cluster.topology),
        "devices_per_worker": (run.devices_per_worker, cluster.devices_per_host),
    }
    for key, (value, there) in wanted.items():
        if value != there:
            yield Problem(f"cluster.{key}", f"{show(value)} is not what cluster {cluster.name} has; write {there}")
    if run.cpus_per_worker > cluster.host_cpus:
        remedy = f"write host_cpus: {math.ceil(run.cpus_per_worker)} in the cluster file"
        message = f"a worker reserves {run.cpus_per_worker:g}, a host of cluster {cluster.name} offers"
        yield Problem("cluster.cpus_per_worker", f"{message} {cluster.host_cpus}; {remedy}")
    hosts = cluster.hosts_per_slice
    if run.num_workers % hosts or run.num_workers > cluster.num_hosts:
        message = f"one worker a host of whole slices: write a multiple of {hosts}, at most {cluster.num_hosts}"
        yield Problem("cluster.num_workers", f"{message}, got {run.num_workers}")
