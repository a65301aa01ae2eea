"""The ways in which a run can be carried out on given machines: every legal mesh, remat and accumulation. Pure.

None of them changes the mathematics; what is legal is decided by spec_checks, as for a run file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from openmoe.clusters import tpu
from openmoe.model.config import ExecutionConfig
from openmoe.platform.planner import plan_work
from openmoe.platform.planner.plan_hardware import Machines
from openmoe.platform.planner.plan_work import Bound, Work
from openmoe.platform.run_file import spec_checks, validate_memory
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_sections import ClusterConfig, MeshConfig

REMATS = ("none", "dots", "full")
SAFE_SHARE = 0.9  # of what a program may take: estimates were within a tenth of the TPU compiler's own figures


class Way(NamedTuple):
    """One way of carrying out a run.

    Attributes:
      spec: the run with this mesh, execution and cluster.
      memory_bytes: estimate, of a device.
      fits: whether that is less than SAFE_SHARE of what a device has for a program.
      work: of a device in a step.
      bound: on the time of a step.
    """

    spec: RunSpec
    memory_bytes: int
    fits: bool
    work: Work
    bound: Bound

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Ways that fit come first, quick ones before others, nothing taken to overlap; then the rest by memory."""
        seconds = round(sum(self.bound), 4)
        return (False, seconds, self.memory_bytes) if self.fits else (True, self.memory_bytes, seconds)


def as_written(spec: RunSpec, machines: Machines) -> Way | None:
    """Returns the run file's own way, or None if its mesh is for another number of devices."""
    if spec.mesh.num_devices != machines.chips:
        return None
    moved = spec.model_copy(update={"cluster": cluster_of(spec.cluster, machines)})
    return None if _is_impossible(moved, machines) else _way(moved, machines)


def ways(spec: RunSpec, machines: Machines) -> list[Way]:
    """Returns every legal way, the best first; empty if the machines cannot hold whole routing groups."""
    cluster = cluster_of(spec.cluster, machines)
    found = []
    for mesh in legal_meshes(spec, machines):
        for execution in _executions(spec, mesh):
            moved = spec.model_copy(update={"mesh": mesh, "execution": execution, "cluster": cluster})
            if not _is_impossible(moved, machines):
                found.append(_way(moved, machines))
    return sorted(found, key=lambda way: way.rank)


def legal_meshes(spec: RunSpec, machines: Machines) -> list[MeshConfig]:
    """Returns the meshes of all chips on which a run's microbatches are whole routing groups everywhere.

    Between slices only the data axis exchanges: its size is a multiple of theirs.
    """
    rows = spec.train.batch_rows // spec.train.microbatches
    flat = spec_checks.legal_meshes(spec.model, rows=rows, seq_len=spec.data.seq_len)
    cluster, found = cluster_of(spec.cluster, machines), []
    for tensor in _divisors(machines.chips):
        for data_and_fsdp, expert in (mesh for mesh in flat if mesh.data * mesh.expert * tensor == machines.chips):
            for fsdp in _divisors(data_and_fsdp):
                mesh = MeshConfig(data=data_and_fsdp // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)
                moved = spec.model_copy(update={"mesh": mesh, "execution": ExecutionConfig(), "cluster": cluster})
                if not _is_impossible(moved, machines):
                    found.append(mesh)
    return found


def cluster_of(cluster: ClusterConfig, machines: Machines) -> ClusterConfig:
    """Returns a run's cluster settings for other machines."""
    is_tpu = machines.kind in tpu.GENERATIONS
    return cluster.model_copy(
        update={
            "accelerator": "tpu" if is_tpu else "gpu",
            "accelerator_type": tpu.ray_accelerator_type(machines.kind) if is_tpu else None,
            "topology": machines.shape if is_tpu else None,
            "num_workers": machines.hosts,
            "devices_per_worker": machines.chips_per_host,
        }
    )


def _way(spec: RunSpec, machines: Machines) -> Way:
    memory_bytes = validate_memory.estimate(spec).total
    work = plan_work.work(spec)
    bound = plan_work.bound(spec, work, machines)
    return Way(spec, memory_bytes, memory_bytes <= SAFE_SHARE * machines.chip.usable_bytes, work, bound)


def _executions(spec: RunSpec, mesh: MeshConfig) -> Iterator[ExecutionConfig]:
    rows = spec.train.batch_rows // spec.train.microbatches // mesh.num_batch_shares
    for parts in _divisors(rows):
        for remat in REMATS:
            yield replace(spec.execution, scan_blocks=True, remat=remat, accumulation_steps=parts)


def _is_impossible(spec: RunSpec, machines: Machines) -> bool:
    crosses = machines.slices > 1 and spec.mesh.data % machines.slices
    sections = ("model", "data", "train", "optimizer", "mesh", "execution", "cluster")
    return bool(crosses or spec_checks.impossible_combinations(**{name: getattr(spec, name) for name in sections}))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
