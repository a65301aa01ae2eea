import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from openmoe.model import checkpoint, step, t5x_checkpoint
from openmoe.model.checkpoint import Checkpointer
from openmoe.model.interop import CheckpointError, MissingArray, UnknownArray, WrongShape
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig


@pytest.fixture(scope="module")
def state(config, mesh_of):
    return step.init_state(config, AdafactorConfig(), 0, mesh_of(1, 4))


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
def test_restores_the_same_bits_on_another_mesh(saved, state, config, mesh_of, shape):
    template = step.state_shapes(config, AdafactorConfig(), mesh_of(*shape))
    restored, loader_state = Checkpointer(str(saved)).restore(7, template)
    assert loader_state == {"next_row": 28}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding or pytest.fail(str(leaf)), restored, template)
    assert checkpoint.checksum(restored) == checkpoint.checksum(state)


@pytest.mark.parametrize("step_number", [4, 9])
def test_a_step_that_was_never_committed_is_not_found(saved, config, mesh_of, step_number):
    template = step.state_shapes(config, AdafactorConfig(), mesh_of(1, 1))
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


def leaves(stored):
    return jax.tree.leaves(stored, is_leaf=lambda leaf: isinstance(leaf, checkpoint.StoredLeaf))


@pytest.fixture
def stored(saved, config, mesh_of):
    return checkpoint.stored(str(saved / "7"), step.state_shapes(config, AdafactorConfig(), mesh_of(1, 1)))


def test_every_array_can_be_read_by_itself(stored, state):
    for array, wanted in zip(leaves(stored), jax.tree.leaves(state), strict=True):
        assert array.shape == wanted.shape
        read = array.read()
        np.testing.assert_array_equal(read, wanted)
        assert read.dtype == wanted.dtype


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_layers": 1}, UnknownArray, "params/decoder/layers_1/extra_mlp/wi_0/kernel and 30 more: there is"),
        ({"num_layers": 4}, MissingArray, "params/decoder/layers_2/extra_mlp/wi_0/kernel and 61 more: missing"),
        ({"d_ff": 128}, WrongShape, "params/decoder/layers_0/extra_mlp/wi_0/kernel: has shape (64, 192), in"),
    ],
)
def test_a_checkpoint_of_another_model_is_named_before_anything_is_read(saved, config, mesh_of, changes, kind, message):
    template = step.state_shapes(replace(config, **changes), AdafactorConfig(), mesh_of(1, 1))
    with pytest.raises(kind) as raised:
        checkpoint.stored(str(saved / "7"), template)
    assert message in str(raised.value)


def test_parameters_are_read_whatever_optimizer_trained_them(tmp_path, config, mesh_of):
    mesh = mesh_of(1, 1)
    state = step.init_state(config, AdamWConfig(), 0, mesh)
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(2, state, {"next_row": 8})
    checkpointer.wait()
    template = step.state_shapes(config, AdafactorConfig(), mesh)
    with pytest.raises(UnknownArray, match=r"opt_state/\S+/mu and \d+ more: .* choose the optimizer it was trained"):
        checkpoint.stored(str(tmp_path / "2"), template)
    found = checkpoint.stored_parameters(str(tmp_path / "2"), template.params)
    norm = ("decoder", "decoder_norm", "scale")
    np.testing.assert_array_equal(found[norm[0]][norm[1]][norm[2]].read(), state.params[norm[0]][norm[1]][norm[2]])
    restored, _ = checkpointer.restore(2, step.state_shapes(config, AdamWConfig(), mesh_of(1, 4)))
    assert checkpoint.checksum(restored) == checkpoint.checksum(state)
    with pytest.raises(CheckpointError, match="T5X has a place for Adafactor's state only"):
        t5x_checkpoint.save(str(tmp_path / "t5x"), state._replace(step=state.opt_state.count))


def test_a_damaged_array_is_one_line(saved, config, mesh_of, tmp_path):
    shutil.copytree(saved / "7", tmp_path / "7")
    data = max((tmp_path / "7" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(b"\0" * data.stat().st_size)
    stored = checkpoint.stored(str(tmp_path / "7"), step.state_shapes(config, AdafactorConfig(), mesh_of(1, 1)))
    complaints = []
    for array in leaves(stored):
        try:
            array.read()
        except CheckpointError as error:
            complaints.append(str(error))
    assert complaints, "one of the arrays lies in the file that was overwritten"
    assert all("cannot be read" in line and "\n" not in line for line in complaints)


STREAM = """
import sys
from pathlib import Path
import jax, numpy as np, orbax.checkpoint as ocp
from openmoe.model import checkpoint

path, template = sys.argv[1], {str(i): jax.ShapeDtypeStruct((40, 2**18), np.float32) for i in range(3)}
arrays = {name: np.random.default_rng(0).standard_normal(like.shape, np.float32) for name, like in template.items()}
manager = ocp.CheckpointManager(path)
manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays)))
manager.wait_until_finished()
del arrays
stored = checkpoint.stored(path + "/0", template)

def peak_bytes():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")
start = peak_bytes()
for array in stored.values():
    array.read().sum()
print(peak_bytes() - start)
Path("/proc/self/clear_refs").write_text("5")
start = peak_bytes()
checkpoint.write(path + "/again", 0, stored, template, {}, lambda *progress: None)
print(peak_bytes() - start)
again = checkpoint.stored(path + "/again/0", template)
assert all((again[name].read() == stored[name].read()).all() for name in template)
"""


def test_reading_and_writing_array_by_array_take_at_most_twice_the_largest(needs, tmp_path):
    needs(os.access("/proc/self/clear_refs", os.W_OK), "Linux: /proc, to measure peak memory")
    command, environment = [sys.executable, "-c", STREAM, str(tmp_path)], os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    largest = 40 * 2**18 * 4
    for peak in result.stdout.split():
        assert 0.9 * largest < int(peak) < 2 * largest + 2**23
    assert len(result.stdout.split()) == 2
