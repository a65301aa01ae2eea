"""Legacy T5X checkpoints: one that the original wrote, those that we write, and damaged ones.

`goldens/t5x_index.msgpack` is the index of the original's; its arrays lie in ../shared, where that exists.
"""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import jax
import msgpack
import numpy as np
import pytest
from flax import traverse_util

from openmoe.model import checkpoint, interop, sharding, step
from openmoe.model import t5x_checkpoint as t5x
from openmoe.model.config import PRESETS
from openmoe.model.optimizer import OptimizerState
from openmoe.model.optimizer_config import AdafactorConfig

ORIGINAL = "moe_t5x_checkpoint/checkpoint_3"
INDEX = Path(__file__).parent / "goldens" / "t5x_index.msgpack"
NORM = "target/decoder/decoder_norm/scale"


@pytest.fixture(scope="module")
def template(moe_config, mesh_of):
    """Returns template(data, expert): the shapes of a state on such a mesh."""
    return lambda data, expert: step.state_shapes(moe_config, AdafactorConfig(), mesh_of(data, expert))


@pytest.fixture(scope="module")
def state(moe_config, mesh_of):
    """A state of step 3, with moments that are no zeros."""
    fresh = step.init_state(moe_config, AdafactorConfig(), 0, mesh_of(1, 4))
    moments = jax.tree.map(lambda v: v + np.arange(v.size, dtype=np.float32).reshape(v.shape), fresh.opt_state.moments)
    return step.TrainState(fresh.step + 3, fresh.params, OptimizerState(fresh.opt_state.count + 3, moments))


@pytest.fixture(scope="module")
def written(state, tmp_path_factory):
    return Path(t5x.save(str(tmp_path_factory.mktemp("t5x")), state))


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the written checkpoint, to damage."""
    return Path(shutil.copytree(written, tmp_path / written.name))


def assert_same_bits(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
    assert checkpoint.checksum(found) == checkpoint.checksum(wanted)


def batch_of(case):
    names = {
        "input_ids": "decoder_input_tokens",
        "target_ids": "decoder_target_tokens",
        "loss_weights": "decoder_loss_weights",
        "segment_ids": "decoder_segment_ids",
        "positions": "decoder_positions",
    }
    batch = {ours: case[f"step_0/batch/{theirs}"][None] for ours, theirs in names.items()}
    return batch | {"loss_weights": batch["loss_weights"].astype(np.float32)}


def one_more_step(config, mesh, state, batch):
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    return step.make_train_step(config, AdafactorConfig(), mesh)(state, placed)


def test_every_array_of_the_original_is_read(full_golden, full_golden_path, template):
    case = full_golden("moe_train_steps.npz")
    restored = t5x.restore(str(full_golden_path(ORIGINAL)), template(1, 1))
    found = {f"after/{name.replace('target/', 'params/')}": a for name, a in t5x.arrays_by_name(restored).items()}
    assert len(found) == 105
    assert found.keys() == {name for name in case if name.startswith("after/")}
    for name, array in found.items():
        np.testing.assert_array_equal(array, case[name], err_msg=name)
        assert array.dtype == case[name].dtype
    assert restored.step == restored.opt_state.count == 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 4)])
def test_a_state_of_the_original_trains_on(shape, golden, full_golden_path, template, moe_config, mesh_of):
    restored = t5x.restore(str(full_golden_path(ORIGINAL)), template(*shape))
    jax.tree.map(
        lambda leaf, like: leaf.sharding == like.sharding or pytest.fail(str(leaf)), restored, template(*shape)
    )
    state, metrics = one_more_step(moe_config, mesh_of(*shape), restored, batch_of(golden("moe_train_steps")))
    assert state.step == state.opt_state.count == 4
    assert metrics["total_loss"] == pytest.approx(5.590362, rel=1e-5)  # 7.053712 three steps before


def test_the_index_is_that_of_the_original_byte_by_byte(written):
    assert (written / "checkpoint").read_bytes() == INDEX.read_bytes()


def test_what_the_original_wrote_is_written_again_with_the_same_bits_names_and_metadata(
    full_golden_path, template, tmp_path
):
    original = full_golden_path(ORIGINAL)
    state = t5x.restore(str(original), template(1, 4))
    again = Path(t5x.save(str(tmp_path), state))
    assert_same_bits(t5x.restore(str(again), template(1, 1)), t5x.restore(str(original), template(1, 1)))
    files = sorted(str(path.relative_to(original)) for path in original.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file()) == files
    for name in files:
        if name == "checkpoint" or name.endswith(".zarray"):
            assert (again / name).read_bytes() == (original / name).read_bytes(), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 2)])
def test_restores_the_same_bits_on_another_mesh(written, state, template, shape):
    told = []
    restored = t5x.restore(f"{written}/", template(*shape), lambda *progress: told.append(progress))
    assert_same_bits(restored, state)
    jax.tree.map(
        lambda leaf, like: leaf.sharding == like.sharding or pytest.fail(str(leaf)), restored, template(*shape)
    )
    assert told == [(done, 106) for done in range(1, 107)]


def test_training_goes_on_with_the_same_bits(golden, moe_config, mesh_of, template, tmp_path):
    mesh, batch = mesh_of(1, 4), batch_of(golden("moe_train_steps"))
    state, _ = one_more_step(moe_config, mesh, step.init_state(moe_config, AdafactorConfig(), 0, mesh), batch)
    restored = t5x.restore(t5x.save(str(tmp_path), state), template(1, 4))
    assert_same_bits(
        one_more_step(moe_config, mesh, restored, batch)[0], one_more_step(moe_config, mesh, state, batch)[0]
    )


def test_factors_of_matrices_stand_in_the_index_and_those_of_experts_in_folders(mesh_of, tmp_path):
    config = replace(PRESETS["openmoe-nano"], num_layers=2)  # 128 wide: matrices are factored, too
    path = t5x.save(str(tmp_path), step.init_state(config, AdafactorConfig(), 0, mesh_of(1, 1)))
    found = t5x.read_index(path)
    states = "state/param_states/decoder"
    for name, shape, inline in [
        ("state/step", (), True),
        (f"{states}/logits_dense/kernel/v_row", (128,), True),
        (f"{states}/logits_dense/kernel/v_col", (8576,), True),
        (f"{states}/logits_dense/kernel/v", (1,), True),
        (f"{states}/decoder_norm/scale/v", (128,), False),
        (f"{states}/decoder_norm/scale/m", (1,), True),
        (f"{states}/layers_1/mlp/expert/wi_0/kernel/v_row", (8, 128), False),
        (f"{states}/layers_1/mlp/expert/wi_0/kernel/v_col", (8, 512), False),
        (f"{states}/layers_1/mlp/expert/wo/kernel/v_row", (8, 128), False),
        (f"{states}/layers_1/mlp/expert/wo/kernel/v_col", (8, 256), False),
    ]:
        assert (found[name].shape, isinstance(found[name].source, np.ndarray)) == (shape, inline), name
        assert Path(path, name.replace("/", ".")).exists() != inline, name


def test_bfloat16_is_of_parameters_alone(state, template, tmp_path):
    path = Path(t5x.save(str(tmp_path), state, dtype="bfloat16"))
    assert '"dtype":"bfloat16"' in (path / "target.decoder.decoder_norm.scale" / ".zarray").read_text()
    assert '"dtype":"<f4"' in (path / "state.param_states.decoder.decoder_norm.scale.v" / ".zarray").read_text()
    restored = t5x.restore(str(path), template(1, 4))
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), state.params)
    assert_same_bits(restored, state._replace(params=rounded))


def edit_index(path, change):
    """Rewrites an index; `change` gets it as {name: leaf} and returns pairs of them, a name twice if it likes."""
    data = msgpack.unpackb((path / "checkpoint").read_bytes())
    leaves = traverse_util.flatten_dict(data["optimizer"], sep="/", is_leaf=lambda _, leaf: "driver" in leaf)
    tree = {}
    for name, leaf in change(leaves):
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last if last not in node else f"{last}~"] = leaf  # renamed below: a dict cannot have it twice
    packed = msgpack.packb({"version": 3, "optimizer": tree})
    (path / "checkpoint").write_bytes(packed.replace(b"\xa6scale~", b"\xa5scale"))


def without(name, leaves):
    return [(key, leaf) for key, leaf in leaves.items() if key != name]


def with_another(name, leaves):
    spec = leaves[NORM] | {"kvstore": {"driver": "file", "path": f"{name.replace('/', '.')}/"}}
    return [*leaves.items(), (name, spec)]


def with_folder_of(other, leaves):
    return [(key, leaves[other] if key == NORM else leaf) for key, leaf in leaves.items()]


REMEDY = "choose the model and optimizer settings it was written with"
LAYER_NORM = "target/decoder/layers_0/pre_mlp_layer_norm/scale"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            partial(with_another, "target/decoder/layers_4/bias"),
            interop.UnknownArray,
            f": target/decoder/layers_4/bias: there is no such array in this model; {REMEDY}",
        ),
        (partial(without, NORM), interop.MissingArray, f": {NORM}: missing, this model has it; {REMEDY}"),
        (
            lambda leaves: [*leaves.items(), (NORM, leaves[NORM])],
            interop.DuplicateArray,
            f"/checkpoint: {NORM}: there twice; write the checkpoint once more",
        ),
        (
            partial(with_folder_of, LAYER_NORM),
            interop.DuplicateArray,
            f"/checkpoint: {LAYER_NORM.replace('/', '.')}/: two arrays in one folder; write it once more",
        ),
    ],
    ids=["unknown", "missing", "name twice", "folder twice"],
)
def test_every_array_is_used_exactly_once(copied, template, change, kind, message):
    edit_index(copied, change)
    with pytest.raises(interop.CheckpointError) as raised:
        t5x.restore(str(copied), template(1, 1))
    assert (type(raised.value), str(raised.value)) == (kind, f"{copied}{message}")


def test_another_shape_is_an_error_before_anything_is_read(written, mesh_of, moe_config):
    wider = step.state_shapes(replace(moe_config, vocab_size=640), AdafactorConfig(), mesh_of(1, 1))
    message = rf"decoder/logits_dense/kernel: has shape \(64, 512\), in this model \(64, 640\); {REMEDY}$"
    with pytest.raises(interop.WrongShape, match=message):
        t5x.restore(str(written), wider, lambda *progress: pytest.fail("an array has been read"))


def test_moments_of_other_optimizer_settings_are_unknown(written, mesh_of, moe_config):
    factored = step.state_shapes(moe_config, AdafactorConfig(min_dim_size_to_factor=64), mesh_of(1, 1))
    with pytest.raises(interop.UnknownArray, match=r"kernel/v and 29 more: there is no such array in this model"):
        t5x.restore(str(written), factored)


def remove_chunk(path):
    (path / "target.decoder.decoder_norm.scale" / "0").unlink()


def remove_folder(path):
    shutil.rmtree(path / "target.decoder.decoder_norm.scale")


def tear_chunk(path):
    chunk = path / "target.decoder.decoder_norm.scale" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-12])


def reshape_array(path):
    metadata = path / "target.decoder.decoder_norm.scale" / ".zarray"
    metadata.write_text(metadata.read_text().replace('"shape":[64]', '"shape":[32]'))


def tear_index(path):
    (path / "checkpoint").write_bytes((path / "checkpoint").read_bytes()[:1000])


def lead_outside(path):
    elsewhere = {"kvstore": {"driver": "file", "path": "../elsewhere/"}}
    edit_index(
        path, lambda leaves: [(name, leaf | elsewhere if name == NORM else leaf) for name, leaf in leaves.items()]
    )


def make_older(path):
    index = (path / "checkpoint").read_bytes()
    (path / "checkpoint").write_bytes(index.replace(b"\xa7version\x03", b"\xa7version\x02"))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (remove_chunk, interop.MissingArray, f"{NORM}: cannot be read: NOT_FOUND: chunk"),
        (remove_folder, interop.MissingArray, f"{NORM}: cannot be read: NOT_FOUND: "),
        (tear_chunk, interop.CheckpointError, f"{NORM}: cannot be read: "),
        (reshape_array, interop.CheckpointError, f"{NORM}: cannot be read: "),
        (tear_index, interop.CheckpointError, "/checkpoint: no index of T5X"),
        (lead_outside, interop.CheckpointError, f"{NORM}: lies outside of the checkpoint, in ../elsewhere/"),
        (make_older, interop.CheckpointError, ": version 2 of T5X's format; only 3 can be read"),
        (lambda path: (path / "checkpoint").unlink(), interop.CheckpointError, "no T5X checkpoint: it has no file"),
    ],
    ids=["chunk", "array", "torn chunk", "other array", "torn index", "outside", "version", "no index"],
)
def test_damage_is_named_in_one_line(copied, template, damage, kind, message):
    damage(copied)
    with pytest.raises(interop.CheckpointError) as raised:
        t5x.restore(str(copied), template(1, 1))
    assert type(raised.value) is kind
    assert str(raised.value).startswith(str(copied))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_is_not_written_over(written, state):
    with pytest.raises(
        interop.CheckpointError, match="checkpoint_3: is there already; remove it, or choose another folder"
    ):
        t5x.save(str(written.parent), state)


def test_a_step_that_is_not_the_count_of_updates_cannot_be_written(state, tmp_path):
    with pytest.raises(
        interop.CheckpointError, match="step 4 with 3 updates of the optimizer: T5X has one number for both"
    ):
        t5x.save(str(tmp_path), state._replace(step=state.step + 1))


def test_a_folder_that_cannot_be_made_is_one_line(state, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(interop.CheckpointError, match=r"file/checkpoint_3: cannot be written: .*Not a directory"):
        t5x.save(str(tmp_path / "file"), state)


KILLED_IN_THE_THIRD_ARRAY = """
import os, signal, sys
import numpy as np
from openmoe.model import t5x_checkpoint as t5x

def end():
    os.kill(os.getpid(), signal.SIGKILL)

arrays = {"state/step": lambda: np.int32(3), "target/old/scale": lambda: np.ones(64, np.float32), "target/b": end}
t5x.write(sys.argv[1], arrays)
"""


@pytest.mark.parametrize("place", ["local", "gs"])
def test_a_killed_save_leaves_no_checkpoint_and_does_not_hinder_the_next_one(place, request, tmp_path, state, template):
    folder = str(tmp_path) if place == "local" else f"{request.getfixturevalue('gcs')}/t5x-killed"
    command = [sys.executable, "-c", KILLED_IN_THE_THIRD_ARRAY, folder]
    assert subprocess.run(command, timeout=100).returncode == -signal.SIGKILL
    files = fsspec.filesystem("gs" if place == "gs" else "file", use_listings_cache=False)
    left = [name.partition("/checkpoint_3")[2] for name in files.find(folder)]
    assert len(left) == 2  # the first array has been written
    assert not files.exists(f"{folder}/checkpoint_3/checkpoint")
    with pytest.raises(interop.CheckpointError, match="checkpoint_3: no T5X checkpoint"):
        t5x.restore(f"{folder}/checkpoint_3", template(1, 1))

    assert t5x.save(folder, state) == f"{folder}/checkpoint_3"
    assert_same_bits(t5x.restore(f"{folder}/checkpoint_3", template(1, 4)), state)
    assert not files.exists(f"{folder}/checkpoint_3/target.old.scale")


def test_a_failed_save_leaves_nothing(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(interop.CheckpointError, match=r"checkpoint_3: cannot be written: .*No space left on device"):
        t5x.write(str(tmp_path / "t5x"), {"state/step": lambda: np.int32(3), "target/a": fail})
    assert list((tmp_path / "t5x").iterdir()) == []


def test_on_gs_the_index_names_no_bucket_and_a_checkpoint_can_be_copied_either_way(
    gcs, state, template, written, tmp_path
):
    path, files = t5x.save(f"{gcs}/t5x", state), fsspec.filesystem("gs", use_listings_cache=False)
    assert_same_bits(t5x.restore(path, template(1, 4)), state)
    index = msgpack.unpackb(files.cat_file(f"{path}/checkpoint"))
    assert index["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"] == {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"bucket": "t5x-dummy-bucket", "driver": "gcs", "path": "target.decoder.decoder_norm.scale/"},
        "metadata": {"chunks": [64], "compressor": {"id": "gzip", "level": 1}, "shape": [64]},
    }
    with pytest.raises(interop.CheckpointError, match="checkpoint_3: is there already"):
        t5x.save(f"{gcs}/t5x", state)

    files.get(path, str(tmp_path / "downloaded"), recursive=True)
    assert_same_bits(t5x.restore(str(tmp_path / "downloaded"), template(1, 1)), state)
    files.put(str(written), f"{gcs}/uploaded", recursive=True)
    assert_same_bits(t5x.restore(f"{gcs}/uploaded", template(1, 1)), state)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((64,), [64]),
        ((768, 4096), [768, 4096]),
        ((256_384, 768), [16_024, 768]),
        ((2048, 16_384), [2048, 8192]),
        ((32, 2048, 16_384), [32, 512, 1024]),
    ],
)
def test_chunks_are_at_most_64_mib(shape, chunk):
    assert t5x.chunk_shape(shape, 64 * 2**20 // 4) == chunk
    assert np.prod(chunk) <= 2**24


def test_the_names_and_shapes_of_the_8b_model(mesh_of):
    shapes = t5x.arrays_by_name(step.state_shapes(PRESETS["openmoe-8b"], AdafactorConfig(), mesh_of(1, 8)))
    target = {name: like.shape for name, like in shapes.items() if name.startswith("target/")}
    assert sum(int(np.prod(shape)) for shape in target.values()) == 11_855_046_656
    for name, shape in {
        "target/token_embedder/embedding": (256_384, 2048),
        "target/decoder/layers_0/self_attention/query/kernel": (2048, 3072),
        "target/decoder/layers_5/mlp/router/router_weights/w/kernel": (2048, 32),
        "target/decoder/layers_23/mlp/expert/wi_0/kernel": (32, 2048, 16_384),
        "target/decoder/layers_23/extra_mlp/wo/kernel": (8192, 2048),
        "state/param_states/decoder/layers_23/mlp/expert/wi_0/kernel/v_row": (32, 2048),
        "state/param_states/decoder/layers_23/mlp/expert/wi_0/kernel/v_col": (32, 16_384),
        "state/param_states/decoder/layers_23/mlp/expert/wo/kernel/v_row": (32, 2048),
        "state/param_states/decoder/layers_23/mlp/expert/wo/kernel/v_col": (32, 8192),
        "state/param_states/decoder/layers_5/mlp/router/router_weights/w/kernel/v": (2048, 32),
    }.items():
        assert shapes[name].shape == shape, name


STREAM = """
import sys
from pathlib import Path
import numpy as np
from openmoe.model import t5x_checkpoint as t5x

def peak_bytes():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) * 1024

def from_here():
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()

def numbers(seed):
    return np.random.default_rng(seed).standard_normal((40, 2**18), dtype=np.float32)

arrays = {"state/step": lambda: np.int32(7)} | {f"target/{i}/kernel": lambda i=i: numbers(i) for i in range(3)}
start = from_here()
path = t5x.write(sys.argv[1], arrays)
print(peak_bytes() - start)
stored = t5x.read_index(path)
start = from_here()
for name in arrays:
    stored[name].read().sum()
print(peak_bytes() - start)
"""


def test_streaming_takes_at_most_twice_the_largest_array(needs, tmp_path):
    needs(os.access("/proc/self/clear_refs", os.W_OK), "Linux: /proc, to measure peak memory")
    # One arena: what the allocator keeps for each thread after it has been freed is not what is measured here.
    command, environment = [sys.executable, "-c", STREAM, str(tmp_path)], os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    largest = 40 * 2**18 * 4
    for peak in map(int, result.stdout.split()):  # of writing and reading 3 such arrays
        assert 0.9 * largest < peak < 2 * largest + 2**23  # and 8 MiB for the interpreter and its threads
