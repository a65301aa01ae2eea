"""Which numbers of workers can train a run, and by which mesh."""

import pytest

from openmoe.platform.planner import layouts
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError


@pytest.mark.parametrize(
    ("workers", "mesh"),
    [
        (1, {"data": 1, "fsdp": 1, "expert": 2, "tensor": 1}),
        (2, {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1}),
    ],
)
def test_a_run_on_fewer_workers_gets_the_mesh_nearest_to_its_own(workers, mesh):
    loaded = spec.load("quickstart")
    moved = layouts.on_workers(loaded, workers)
    assert (moved.cluster.num_workers, moved.mesh.model_dump()) == (workers, mesh)
    assert spec.spec_hash(moved) == spec.spec_hash(loaded)


def test_only_whole_slices_and_whole_routing_groups_are_legal():
    assert layouts.legal_counts(spec.load("quickstart")) == [1, 2]
    slices = ["train.batch_rows=256", "train.microbatches=1", "cluster.num_workers=32"]
    two = spec.load("openmoe_8b", [*slices, "mesh={data: 2, fsdp: 2, expert: 32, tensor: 1}"])
    assert layouts.legal_counts(two) == [16, 32]
    assert layouts.on_workers(two, 16).mesh.model_dump() == {"data": 1, "fsdp": 2, "expert": 32, "tensor": 1}
    with pytest.raises(SpecError, match="workers: no mesh of 6 devices is legal; these numbers are"):
        layouts.on_workers(spec.load("quickstart"), 3)
