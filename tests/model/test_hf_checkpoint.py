"""Checkpoints of Hugging Face: names, settings, safetensors both ways, PyTorch's files built by hand, and damaged ones.

What PyTorch itself makes of them is in tests/interop.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from openmoe.model import hf_checkpoint as hf
from openmoe.model import hf_config, hf_files, interop, step, t5x_checkpoint
from openmoe.model.config import DEPARTURES, PRESETS
from openmoe.model.interop import InMemory
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.model.parameter_names import parameter_names

NORM = "model.norm.weight"
EXPERTS = "model.layers.1.mlp.experts.wi_gate"


@pytest.fixture(scope="module")
def parameters(golden):
    return {name: InMemory(array) for name, array in golden("moe_params").items()}


@pytest.fixture(scope="module")
def written(parameters, moe_config, tmp_path_factory):
    """The golden weights in three parts."""
    return Path(hf.write(str(tmp_path_factory.mktemp("hf") / "golden"), moe_config, parameters, shard_bytes=800_000))


@pytest.fixture
def copied(written, tmp_path):
    """A copy of the written checkpoint, to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def assert_same(stored, parameters, as_type=np.float32):
    assert stored.keys() == parameters.keys()
    for name, parameter in parameters.items():
        array = stored[name].read()
        assert array.dtype == as_type
        np.testing.assert_array_equal(array, parameter.array.astype(as_type), err_msg=name)


def test_every_parameter_comes_back_with_the_same_bits(written, parameters, moe_config):
    assert_same(hf.stored_parameters(str(written), parameters, moe_config), parameters)
    assert hf.read_config(str(written)) == moe_config
    assert sorted(path.name for path in written.iterdir()) == [
        "config.json",
        "configuration_openmoe.py",
        "generation_config.json",
        "layers_openmoe.py",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "modeling_openmoe.py",
        "tokenization_openmoe.py",
    ]
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 1_708_800}
    assert len(index["weight_map"]) == 49
    assert index["weight_map"]["lm_head.weight"] == "model-00001-of-00003.safetensors"


def test_bfloat16_is_rounded_to_the_nearest(parameters, moe_config, tmp_path):
    path = hf.write(str(tmp_path / "small"), moe_config, parameters, dtype="bfloat16")
    assert_same(hf.stored_parameters(path, parameters, moe_config), parameters, ml_dtypes.bfloat16)
    assert json.loads(Path(path, "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_safetensors_file_byte_by_byte(tmp_path):
    path, kernel = str(tmp_path / "x.safetensors"), np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    tensors = {"a.weight": ((3, 2), lambda: kernel.T), "b": ((1,), lambda: np.float32([0.5]))}
    hf_files.write_safetensors(path, tensors, "float32")
    data = Path(path).read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    assert data[8 : 8 + length].rstrip() == (
        b'{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[24,28]}}'
    )
    assert length % 8 == 0
    assert data[8 + length :] == struct.pack("<7f", 1, 4, 2, 5, 3, 6, 0.5)


def test_what_was_written_in_blocks_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "BLOCK_BYTES", 40)
    array = np.arange(2 * 5 * 7, dtype=np.float32).reshape(2, 5, 7)
    tensors = {"cube": (array.shape, lambda: array), "side": ((5, 7), lambda: array[0].T.copy().T)}
    hf_files.write_safetensors(str(tmp_path / "x"), tensors, "float32")
    found = hf_files.read_safetensors(str(tmp_path / "x"))
    np.testing.assert_array_equal(found["cube"].read(), array)
    np.testing.assert_array_equal(found["side"].read(), array[0])


def test_the_settings_of_nano_in_the_words_of_the_released_models():
    assert hf_config.config_json(PRESETS["openmoe-nano"], "float32") == {
        "activation_dtype": "float32",
        "architectures": ["OpenMoeForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_openmoe.OpenMoeConfig",
            "AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM",
        },
        "bos_token_id": 0,
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "group_size": 512,
        "head_dim": 64,
        "hidden_act": "swiglu",
        "hidden_size": 128,
        "init_scale": 0.1,
        "intermediate_size": 256,
        "label_smoothing": 0.0,
        "max_position_embeddings": 2048,
        "mlp_gated": True,
        "model_type": "openmoe",
        "moe_layer_interval": 2,
        "normalize_loss": True,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "router_aux_loss_factor": 0.01,
        "router_capacity_factor_eval": 2.0,
        "router_capacity_factor_train": 1.25,
        "router_drop_tks": True,
        "router_min_capacity": 4,
        "router_topk": 2,
        "router_z_loss_factor": 1e-4,
        "t5x_expert_copies": 0,
        "text_vocab_size": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 8576,
        "z_loss_factor": 1e-4,
    }


def test_departures_are_written_where_there_are_some():
    content = hf_config.config_json(PRESETS["openmoe-next-nano"], "float32")
    assert {key: value for key, value in content.items() if key in hf_config.DEPARTURES.values()} == {
        "moe_intermediate_size": 64,
        "ffn": "swiglu",
        "extra_mlp": "parallel",
        "qk_norm": True,
        "reset_positions": True,
        "router_scores": "sigmoid",
        "router_takes_padding": False,
        "router_renormalize_gates": True,
        "router_dropless": True,
        "router_bias_rate": 0.001,
    }
    assert hf_config.DEPARTURES.keys() == set(DEPARTURES)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_come_back(name):
    config = replace(PRESETS[name], group_size=192, init_scale=0.3, z_loss_weight=0.0, text_vocab_size=300)
    assert hf_config.model_config("config.json", hf_config.config_json(config, "float32")) == config


RELEASED_8B = {  # as the Hugging Face repositories have it, up to what only its own code read
    "architectures": ["OpenMoeForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM"},
    "bos_token_id": 0,
    "dropout_rate": 0.0,
    "enable_comm_overlap": False,
    "eos_token_id": 1,
    "expert_parallel": None,
    "head_dim": 128,
    "hidden_act": "swiglu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "label_smoothing": 0.001,
    "layer_norm_epsilon": 1e-06,
    "mlp_gated": True,
    "model_type": "llama",
    "moe_layer_interval": 6,
    "num_attention_heads": 24,
    "num_experts": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 24,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_factor": 0.01,
    "router_capacity_factor_eval": 2.0,
    "router_capacity_factor_train": 1.25,
    "router_drop_tks": True,
    "router_min_capacity": 4,
    "router_topk": 2,
    "router_z_loss_factor": 0.0001,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 256384,
    "z_loss_factor": 0.01,
}
FIRST_RELEASE = {
    "intermediate_size": 2048,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "head_dim": 64,
    "num_attention_heads": 12,
    "layer_norm_epsilon": 1e-6,
    "vocab_size": 256384,
    "hidden_act": "swiglu",
    "num_experts": 16,
    "topk": 2,
    "capacity_factor_train": 1.25,
    "capacity_factor_eval": 3.0,
    "min_capacity": 4,
    "moe_layer_interval": 4,
}


def test_released_settings_are_those_of_the_presets():
    assert hf_config.model_config("config.json", RELEASED_8B) == PRESETS["openmoe-8b"]
    expected = replace(PRESETS["openmoe-base"], capacity_factor_eval=3.0)
    assert hf_config.model_config("config.json", FIRST_RELEASE) == expected
    other = hf_config.model_config("config.json", FIRST_RELEASE | {"hidden_size": 1024})
    assert (other.d_model, other.group_size, other.text_vocab_size) == (1024, 4096, 256_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 8}, "num_key_value_heads: OpenMoE has as many as heads, 24"),
        ({"hidden_act": "silu"}, "hidden_act: OpenMoE has swiglu, got 'silu'"),
        ({"hidden_size": 0}, "describes no model: d_model: must be at least 1, got 0"),
        ({"vocab_size": "many"}, "describes no model: "),
    ],
)
def test_another_kind_of_model_is_one_line(change, message):
    with pytest.raises(interop.CheckpointError, match=rf"^dir/config\.json: {message}"):
        hf_config.model_config("dir/config.json", RELEASED_8B | change)


def test_settings_without_sizes_are_one_line():
    with pytest.raises(interop.CheckpointError, match=r"lacks num_experts, moe_layer_interval; is it of an OpenMoE"):
        hf_config.model_config(
            "c", {k: v for k, v in RELEASED_8B.items() if k not in ("num_experts", "moe_layer_interval")}
        )


def test_a_departure_that_is_none_is_one_line():
    content = hf_config.config_json(PRESETS["openmoe-next-nano"], "float32") | {"ffn": "geglu"}
    with pytest.raises(interop.CheckpointError, match="describes no model: ffn: must be openmoe or swiglu, got"):
        hf_config.model_config("c", content)


def edit_header(path, change):
    """Rewrites the header of a safetensors file, whose numbers stay; `change` gets and returns its pairs."""
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    pairs = change(json.loads(data[8 : 8 + length], object_pairs_hook=list))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(dict(entry))}" for name, entry in pairs) + "}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def part_of(path, name):
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_index(path, change):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def add_unknown(path):
    part = part_of(path, NORM)
    edit_header(part, lambda pairs: [*pairs, ("model.layers.0.bias", dict(pairs)[NORM])])
    edit_index(path, lambda where: where.update({"model.layers.0.bias": part.name}))


def add_unlisted(path):
    edit_header(part_of(path, NORM), lambda pairs: [*pairs, ("extra", dict(pairs)[NORM])])


def lose_one(path):
    edit_header(part_of(path, NORM), lambda pairs: [pair for pair in pairs if pair[0] != NORM])


def lose_one_everywhere(path):
    lose_one(path)
    edit_index(path, lambda where: where.pop(NORM))


def double_in_file(path):
    edit_header(part_of(path, NORM), lambda pairs: [*pairs, (NORM, dict(pairs)[NORM])])


def double_in_parts(path):
    shutil.copy(part_of(path, NORM), path / "other.safetensors")
    edit_index(path, lambda where: where.update({"x": "other.safetensors"}))


def reshape(path):
    def change(pairs):
        for name, entry in pairs:
            if name == EXPERTS:
                entry[:] = [(k, v[::-1] if k == "shape" else v) for k, v in entry]
        return pairs

    edit_header(part_of(path, EXPERTS), change)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (add_unknown, interop.UnknownArray, "model.layers.0.bias: there is no such array in this model; choose the"),
        (add_unlisted, interop.UnknownArray, "extra: not in model.safetensors.index.json; write the checkpoint once"),
        (
            lose_one,
            interop.MissingArray,
            f"{NORM}: in model.safetensors.index.json, but in no part; copy the checkpoint",
        ),
        (lose_one_everywhere, interop.MissingArray, f"{NORM}: missing, this model has it; choose the model it was"),
        (double_in_file, interop.DuplicateArray, f"{NORM}: there twice; write the file once more"),
        (double_in_parts, interop.DuplicateArray, "in another part, too; write the checkpoint once more"),
        (
            reshape,
            interop.WrongShape,
            f"{EXPERTS}: has shape (192, 64, 4), in this model (4, 64, 192); choose the model",
        ),
    ],
    ids=["unknown", "unlisted", "missing in part", "missing", "twice in file", "twice in parts", "shape"],
)
def test_every_tensor_is_used_exactly_once(copied, parameters, moe_config, damage, kind, message):
    damage(copied)
    with pytest.raises(interop.CheckpointError) as raised:
        hf.stored_parameters(str(copied), parameters, moe_config)
    assert type(raised.value) is kind
    assert str(raised.value).startswith(str(copied))
    assert message in str(raised.value)


def tear(path):
    part = part_of(path, NORM)
    part.write_bytes(part.read_bytes()[:-100])


def tear_header(path):
    part = part_of(path, NORM)
    part.write_bytes(part.read_bytes()[:100])


def lead_outside(path):
    edit_index(path, lambda where: where.update({NORM: "../other.safetensors"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tear, "no safetensors file: ValueError: "),
        (tear_header, "no safetensors file: ValueError: its header is said to have"),
        (lambda path: part_of(path, NORM).unlink(), "no safetensors file: FileNotFoundError"),
        (lead_outside, "no index of parts; copy the checkpoint once more"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), "cannot be read: "),
        (lambda path: (path / "model.safetensors.index.json").unlink(), "it has neither model.safetensors nor"),
    ],
    ids=["torn", "torn header", "no part", "outside", "torn index", "no index"],
)
def test_damage_is_named_in_one_line(copied, parameters, moe_config, damage, message):
    damage(copied)
    with pytest.raises(interop.CheckpointError) as raised:
        hf.stored_parameters(str(copied), parameters, moe_config)
    assert str(raised.value).startswith(str(copied))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_settings_is_one_line(tmp_path):
    with pytest.raises(interop.CheckpointError, match=r"no checkpoint of Hugging Face: it has no config\.json; give"):
        hf.read_config(str(tmp_path))


def test_a_checkpoint_is_not_written_over(written, parameters, moe_config):
    with pytest.raises(interop.CheckpointError, match="golden: is there already; remove it, or choose another folder"):
        hf.write(str(written), moe_config, parameters)


def test_parameters_of_another_model_are_not_written(parameters, moe_config, tmp_path):
    more = parameters | {"decoder/bias": parameters["decoder/decoder_norm/scale"]}
    with pytest.raises(interop.UnknownArray, match="decoder/bias: there is no such array"):
        hf.write(str(tmp_path / "new"), moe_config, more)
    with pytest.raises(interop.MissingArray, match="decoder/decoder_norm/scale and 48 more: missing"):
        hf.write(str(tmp_path / "new"), moe_config, {})


def test_a_failed_write_leaves_nothing(parameters, moe_config, tmp_path):
    class Unreadable(InMemory):
        def read(self):
            raise OSError(28, "No space left on device")

    broken = parameters | {"decoder/decoder_norm/scale": Unreadable(np.ones(64, np.float32))}
    with pytest.raises(interop.CheckpointError, match=r"new: cannot be written: .*No space left on device"):
        hf.write(str(tmp_path / "new"), moe_config, broken)
    assert list(tmp_path.iterdir()) == []


def test_on_gs_as_on_a_disk(gcs, parameters, moe_config):
    path = hf.write(f"{gcs}/hf", moe_config, parameters, shard_bytes=800_000)
    assert_same(hf.stored_parameters(path, parameters, moe_config), parameters)
    assert hf.read_config(path) == moe_config
    with pytest.raises(interop.CheckpointError, match="hf: is there already"):
        hf.write(path, moe_config, parameters)


def opcodes(value):
    return pickle.dumps(value, 2)[2:-1]


def tensor_opcodes(key, storage, numel, first, shape, strides):
    """What torch.save writes of a tensor, in the opcodes of pickle."""
    place = b"(" + opcodes("storage") + b"ctorch\n" + storage.encode() + b"\n" + opcodes(key) + opcodes("cpu")
    place += opcodes(numel) + b"tQ"
    arguments = (
        place + opcodes(first) + opcodes(shape) + opcodes(strides) + opcodes(False) + b"ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def write_bin(path, tensors, storages, *, compression=zipfile.ZIP_STORED, byteorder="little"):
    """Writes what torch.save does: {name: opcodes of a tensor} and {key: bytes of a storage}."""
    content = b"\x80\x02}(" + b"".join(opcodes(name) + tensor for name, tensor in tensors.items()) + b"u."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("pytorch_model/data.pkl", content)
        archive.writestr("pytorch_model/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"pytorch_model/data/{key}", data)
        archive.writestr("pytorch_model/version", "3\n")


NUMBERS = np.arange(12, dtype=np.float32)


def test_files_of_pytorch_are_read(tmp_path):
    tensors = {
        "whole": tensor_opcodes("0", "FloatStorage", 12, 0, (3, 4), (4, 1)),
        "transposed": tensor_opcodes("0", "FloatStorage", 12, 0, (4, 3), (1, 4)),
        "part": tensor_opcodes("0", "FloatStorage", 12, 5, (2, 2), (4, 1)),
        "small": tensor_opcodes("1", "BFloat16Storage", 2, 0, (2,), (1,)),
        "scalar": tensor_opcodes("1", "BFloat16Storage", 2, 1, (), ()),
    }
    storages = {"0": NUMBERS.tobytes(), "1": np.array([1.5, -2], ml_dtypes.bfloat16).tobytes()}
    write_bin(tmp_path / "x.bin", tensors, storages)
    found = hf_files.read_bin(str(tmp_path / "x.bin"))
    table = NUMBERS.reshape(3, 4)
    np.testing.assert_array_equal(found["whole"].read(), table)
    np.testing.assert_array_equal(found["transposed"].read(), table.T)
    np.testing.assert_array_equal(found["part"].read(), [[5, 6], [9, 10]])
    np.testing.assert_array_equal(found["small"].read(), np.array([1.5, -2], ml_dtypes.bfloat16))
    assert found["scalar"].read() == -2


def test_a_released_checkpoint_in_parts_of_pytorch_is_read(tmp_path, parameters, moe_config):
    names, where = hf.torch_names(moe_config), {}
    for part in (1, 2, 3):
        tensors, storages = {}, {}
        for name in list(parameters)[part - 1 :: 3]:
            array = parameters[name].array.T if names[name].transposed else parameters[name].array
            strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
            key = str(len(storages))
            tensors[names[name].name] = tensor_opcodes(key, "FloatStorage", array.size, 0, array.shape, strides)
            storages[key] = array.tobytes()
        write_bin(tmp_path / f"pytorch_model-0000{part}-of-00003.bin", tensors, storages)
        where |= dict.fromkeys(tensors, f"pytorch_model-0000{part}-of-00003.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(hf.stored_parameters(str(tmp_path), parameters, moe_config), parameters)


class Command:
    def __reduce__(self):
        return os.system, ("touch hacked",)


PLAIN = tensor_opcodes("0", "FloatStorage", 12, 0, (3, 4), (4, 1))


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"a": opcodes(Command())}, {}, "its pickle asks for (posix|nt).system, which is no tensor; do not trust it"),
        ({"a": b"cbuiltins\neval\n(" + opcodes("1") + b"tR"}, {}, "its pickle asks for builtins.eval, which is no"),
        ({"a": b"ctorch.nn\nLinear\n"}, {}, "its pickle asks for torch.nn.Linear, which is no tensor"),
        ({"a": opcodes(3)}, {}, "it holds more than tensors"),
        ({"a": PLAIN, "b": opcodes({"c": 1})}, {}, "it holds more than tensors"),
        ({"a": tensor_opcodes("7", "FloatStorage", 12, 0, (3, 4), (4, 1))}, {}, "KeyError"),
        ({"a": tensor_opcodes("0", "FloatStorage", 12, 1, (3, 4), (4, 1))}, {}, "in a storage of 48 bytes"),
        ({"a": tensor_opcodes("0", "FloatStorage", 12, -4, (3, 4), (4, 1))}, {}, "in a storage of 48 bytes"),
        ({"a": tensor_opcodes("0", "LongStorage", 6, 0, (6,), (1,))}, {}, "its pickle asks for torch.LongStorage"),
        ({"a": PLAIN}, {"compression": zipfile.ZIP_DEFLATED}, "data/0 is compressed"),
        ({"a": PLAIN}, {"byteorder": "big"}, "its numbers are not little-endian"),
    ],
)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(tmp_path, monkeypatch, tensors, settings, message):
    monkeypatch.chdir(tmp_path)
    write_bin("x.bin", tensors, {"0": NUMBERS.tobytes()}, **settings)
    with pytest.raises(interop.CheckpointError, match=rf"^x\.bin: .*{message}") as raised:
        hf_files.read_bin("x.bin")
    assert "\n" not in str(raised.value)
    assert not Path("hacked").exists()


def test_a_file_that_is_no_zip_is_one_line(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(
        interop.CheckpointError, match=r"no file of torch.save since PyTorch 1\.6 .*; save it once more"
    ):
        hf_files.read_bin(str(tmp_path / "x.bin"))


def test_the_names_shapes_and_parts_of_the_8b_model(mesh_of):
    config = PRESETS["openmoe-8b"]
    shapes = t5x_checkpoint.arrays_by_name(step.state_shapes(config, AdafactorConfig(), mesh_of(1, 8)))
    names = hf.torch_names(config)
    found = {torch.name: torch.shape(shapes[f"target/{name}"].shape) for name, torch in names.items()}
    assert len(found) == len(names) == 239
    assert sum(int(np.prod(shape)) for shape in found.values()) == 11_855_046_656
    for name, shape in {
        "model.embed_tokens.weight": (256_384, 2048),
        "lm_head.weight": (256_384, 2048),
        "model.layers.0.self_attn.q_proj.weight": (3072, 2048),
        "model.layers.0.self_attn.o_proj.weight": (2048, 3072),
        "model.layers.0.mlp.gate_proj.weight": (16_384, 2048),
        "model.layers.0.mlp.down_proj.weight": (2048, 8192),
        "model.layers.5.mlp.gate_weight": (32, 2048),
        "model.layers.23.mlp.experts.wi_gate": (32, 2048, 16_384),
        "model.layers.23.mlp.experts.wo": (32, 8192, 2048),
        "model.layers.23.extra_mlp.up_proj.weight": (8192, 2048),
        "model.layers.23.pre_extra_mlp_layernorm.weight": (2048,),
    }.items():
        assert found[name] == shape, name
    tensors = [hf._Written(name, shape, lambda: pytest.fail("read")) for name, shape in found.items()]
    parts = hf.split(tensors, "bfloat16", 5 * 10**9)
    assert [len(part) for part in parts] == [55, 36, 38, 46, 58, 6]
    assert max(sum(hf_files.num_bytes(t.shape, "bfloat16") for t in part) for part in parts) <= 5 * 10**9


STREAM = """
import sys
from pathlib import Path
import numpy as np
from openmoe.model import hf_checkpoint as hf, interop
from openmoe.model.config import ModelConfig

def peak_bytes():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) * 1024

def from_here():
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()

class Numbers:
    def __init__(self, seed, shape):
        self.seed, self.shape = seed, shape

    def read(self):
        return np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32)

V, d, f = 40960, 256, 512
config = ModelConfig(num_layers=1, num_heads=2, head_dim=8, d_model=d, d_ff=f, vocab_size=V, text_vocab_size=V,
                     num_experts=80, moe_every=1)
one = {"scale": (d,), "query": (d, 16), "key": (d, 16), "value": (d, 16), "out": (16, d), "w": (d, 80),
       "wi_0": (d, 2 * f), "wi_1": (d, f), "wo": (f, d), "logits_dense": (d, V), "embedding": (V, d)}
parameters = {}
for i, name in enumerate(hf.torch_names(config)):
    *_, above, last = name.split("/")
    shape = one[above if last == "kernel" else last]
    parameters[name] = Numbers(i, (80, *shape) if "/expert/" in name else shape)
for dtype in ("float32", "bfloat16"):
    start = from_here()
    path = hf.write(f"{sys.argv[1]}/{dtype}", config, parameters, dtype=dtype)
    print(peak_bytes() - start)
    stored = hf.stored_parameters(path, parameters, config)
    start = from_here()
    for array in stored.values():
        array.read()
    print(peak_bytes() - start)
"""


def test_streaming_takes_at_most_twice_the_largest_array(needs, tmp_path):
    needs(os.access("/proc/self/clear_refs", os.W_OK), "Linux: /proc, to measure peak memory")
    command, environment = [sys.executable, "-c", STREAM, str(tmp_path)], os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    largest = 80 * 256 * 1024 * 4  # 84 MB; blocks of 64 MiB come on top of it
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 4
    for peak in (peaks[0], peaks[2]):  # of writing
        assert 0.9 * largest < peak < 2 * largest
    assert 0.9 * largest < peaks[1] < 1.2 * largest  # of reading
    assert 0.4 * largest < peaks[3] < 0.7 * largest


@pytest.mark.parametrize("name", PRESETS)
def test_no_name_of_pytorch_is_used_twice_and_none_is_missing(name):
    names = hf.torch_names(PRESETS[name])
    assert sorted(names) == sorted(parameter_names(PRESETS[name]))
    assert len({torch.name for torch in names.values()}) == len(names)
