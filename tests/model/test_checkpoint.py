import jax
import numpy as np
import pytest

from openmoe.model import checkpoint, step
from openmoe.model.checkpoint import Checkpointer
from openmoe.model.config import OptimizerConfig


@pytest.fixture(scope="module")
def state(moe_config, mesh_of):
    return step.init_state(moe_config, OptimizerConfig(), 0, mesh_of(1, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A folder with steps 3 and 7, and what a kill in the middle of a save leaves behind: step 9, not committed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpointer = Checkpointer(str(folder))
    checkpointer.save(3, state, {"next_row": 12})
    checkpointer.save(7, state, {"next_row": 28})
    checkpointer.wait()
    assert not checkpointer.is_saving()
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    return folder


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (1, 1), (4, 2)])
def test_restores_the_same_bits_on_another_mesh(saved, state, moe_config, mesh_of, shape):
    template = step.state_shapes(moe_config, OptimizerConfig(), mesh_of(*shape))
    restored, loader_state = Checkpointer(str(saved)).restore(7, template)
    assert loader_state == {"next_row": 28}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding or pytest.fail(str(leaf)), restored, template)
    assert checkpoint.checksum(restored) == checkpoint.checksum(state)


@pytest.mark.parametrize("step_number", [4, 9])
def test_a_step_that_was_never_committed_is_not_found(saved, moe_config, mesh_of, step_number):
    template = step.state_shapes(moe_config, OptimizerConfig(), mesh_of(1, 1))
    with pytest.raises(FileNotFoundError):
        Checkpointer(str(saved)).restore(step_number, template)


def test_a_leftover_of_a_killed_save_does_not_hinder_the_next_one(saved, state):
    checkpointer = Checkpointer(str(saved))
    checkpointer.save(9, state, {"next_row": 36})
    checkpointer.wait()
    assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["3", "7", "9"]


def test_a_step_is_saved_once(saved, state):
    with pytest.raises(FileExistsError, match="3: saved before"):
        Checkpointer(str(saved)).save(3, state, {})


def test_checksum_sees_every_single_bit(state):
    leaf = np.arange(6, dtype=np.float32).reshape(2, 3)
    digest = checkpoint.checksum({"a": leaf})
    assert checkpoint.checksum({"a": leaf.copy()}) == digest
    for index in np.ndindex(leaf.shape):
        for bit in (0, 13, 31):
            changed = leaf.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1) << np.uint32(bit)
            assert checkpoint.checksum({"a": changed}) != digest
    assert checkpoint.checksum({"a": leaf[::-1].copy()}) != digest
    assert checkpoint.checksum({"b": leaf}) != digest
    assert checkpoint.checksum({"a": leaf.reshape(3, 2)}) != digest
