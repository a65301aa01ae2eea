"""A run on other numbers of workers, by a mesh that is legal there. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from openmoe.platform.run_file import spec_checks
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError
from openmoe.platform.run_file.spec_sections import MeshConfig


def legal_counts(spec: RunSpec) -> list[int]:
    """Returns how many workers, up to the run file's own number, can train a run: on TPUs, those of whole slices."""
    most = spec.cluster.num_workers
    unit = most // spec.cluster.num_slices if spec.cluster.accelerator == "tpu" else 1
    return [number for number in range(unit, most + 1, unit) if _layouts(spec, number)]


def on_workers(spec: RunSpec, num_workers: int) -> RunSpec:
    """Returns a run on another number of workers: by its own mesh with another data axis if that is legal, else by one
    with as many experts apart as can be.

    Raises:
      SpecError: no mesh of so many devices holds whole routing groups.
    """
    if found := _layouts(spec, num_workers):
        return found[0]
    devices = num_workers * spec.cluster.devices_per_worker
    message = f"no mesh of {devices} devices is legal; these numbers are: {legal_counts(spec)}, got {num_workers}"
    raise SpecError([Problem("workers", message)])


def _layouts(spec: RunSpec, num_workers: int) -> list[RunSpec]:
    cluster = spec.cluster.model_copy(update={"num_workers": num_workers})
    moved = (spec.model_copy(update={"mesh": mesh, "cluster": cluster}) for mesh in _meshes(spec, num_workers))
    return [each for each in moved if not _problems(each)]


def _meshes(spec: RunSpec, num_workers: int) -> Iterator[MeshConfig]:
    devices, own = num_workers * spec.cluster.devices_per_worker, spec.mesh
    data, left = divmod(devices * own.data, own.num_devices)
    if data and not left:
        yield own.model_copy(update={"data": data})
    rows = spec.train.batch_rows // spec.train.microbatches
    legal = spec_checks.legal_meshes(spec.model, rows=rows, seq_len=spec.data.seq_len)
    for mesh in sorted(legal, key=lambda mesh: -mesh.expert):
        if mesh.data * mesh.expert == devices:
            yield MeshConfig(data=mesh.data, expert=mesh.expert)


def _problems(spec: RunSpec) -> list[Problem]:
    sections = ("model", "data", "train", "optimizer", "mesh", "execution", "cluster")
    return spec_checks.impossible_combinations(**{name: getattr(spec, name) for name in sections})
