"""Checkpoints of Hugging Face, read and written: parameters under the names of the released OpenMoE models in PyTorch.

    config.json, generation_config.json
    modeling_openmoe.py and three more               what transformers runs (hf_export/), written beside the weights
    tokenizer.model, tokenizer_config.json           if a tokenizer goes along
    model.safetensors                                or model-00001-of-00003.safetensors and an index of the parts
    pytorch_model.bin                                the released ones; read only, in parts or not

PyTorch keeps matrices as [out, in], T5X as [in, out]; experts are [expert, in, out] in both. There is no state of an
optimizer. Tensors are read and written one by one: at most twice the largest one is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openmoe.model import hf_files
from openmoe.model.config import ModelConfig
from openmoe.model.hf_config import config_json, model_config
from openmoe.model.hf_files import Tensor
from openmoe.model.interop import (
    GS,
    CheckpointError,
    Dtype,
    DuplicateArray,
    MissingArray,
    Readable,
    Report,
    UnknownArray,
    each_once,
    explained,
    files,
    listed,
    whole_or_absent,
)
from openmoe.model.parameter_names import parameter_names

SHARD_BYTES = 5 * 10**9
CONFIG = "config.json"

_GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "suppress_tokens": [0]}  # as sample.draw
_SHIPPED = Path(__file__).parent / "hf_export"
_FORMATS = (  # the first that is there is read; the name of its index is one suffix longer
    ("model.safetensors", hf_files.read_safetensors),
    ("pytorch_model.bin", hf_files.read_bin),
)

# PyTorch's name, T5X's name, whether one is the other's transpose. Which of them a model has: parameter_names.py.
_ONCE = (
    ("model.embed_tokens.weight", "token_embedder/embedding", False),
    ("model.norm.weight", "decoder/decoder_norm/scale", False),
    ("lm_head.weight", "decoder/logits_dense/kernel", True),
)
_EVERY_LAYER = (
    ("input_layernorm.weight", "pre_self_attention_layer_norm/scale", False),
    ("self_attn.q_proj.weight", "self_attention/query/kernel", True),
    ("self_attn.k_proj.weight", "self_attention/key/kernel", True),
    ("self_attn.v_proj.weight", "self_attention/value/kernel", True),
    ("self_attn.o_proj.weight", "self_attention/out/kernel", True),
    ("self_attn.q_norm.weight", "self_attention/query_norm/scale", False),
    ("self_attn.k_norm.weight", "self_attention/key_norm/scale", False),
    ("post_attention_layernorm.weight", "pre_mlp_layer_norm/scale", False),
)
_DENSE_LAYER = (
    ("mlp.gate_proj.weight", "mlp/wi_0/kernel", True),
    ("mlp.up_proj.weight", "mlp/wi_1/kernel", True),
    ("mlp.down_proj.weight", "mlp/wo/kernel", True),
)
_MOE_LAYER = (
    ("mlp.gate_weight", "mlp/router/router_weights/w/kernel", True),
    ("mlp.gate_bias", "mlp/router/bias", False),
    ("mlp.experts.wi_gate", "mlp/expert/wi_0/kernel", False),
    ("mlp.experts.wi_up", "mlp/expert/wi_1/kernel", False),
    ("mlp.experts.wo", "mlp/expert/wo/kernel", False),
    ("pre_extra_mlp_layernorm.weight", "pre_extra_mlp_layer_norm/scale", False),
    ("extra_mlp.gate_proj.weight", "extra_mlp/wi_0/kernel", True),
    ("extra_mlp.up_proj.weight", "extra_mlp/wi_1/kernel", True),
    ("extra_mlp.down_proj.weight", "extra_mlp/wo/kernel", True),
)


class TorchName(NamedTuple):
    """Where PyTorch keeps a parameter."""

    name: str
    transposed: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the one shape from the other, either way."""
        return shape[::-1] if self.transposed else shape


class StoredParameter(NamedTuple):
    """A parameter of a checkpoint in T5X's shape, not read yet."""

    tensor: Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it has in T5X."""
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    def read(self) -> np.ndarray:
        """Returns it in the type it was stored in; a transposed one is a view of what was read."""
        array = self.tensor.read()
        return array.T if self.transposed else array


class _Written(NamedTuple):
    """A parameter that is going to be written, in PyTorch's shape."""

    name: str
    shape: tuple[int, ...]
    give: Callable[[], np.ndarray]


def torch_names(config: ModelConfig) -> dict[str, TorchName]:
    """Returns where PyTorch keeps each parameter, by T5X's names in the order of the layers."""
    names = {ours: TorchName(theirs, transposed) for theirs, ours, transposed in _ONCE}
    for layer in range(config.num_layers):
        rest = _MOE_LAYER if config.is_moe_layer(layer) else _DENSE_LAYER
        for theirs, ours, transposed in _EVERY_LAYER + rest:
            names[f"decoder/layers_{layer}/{ours}"] = TorchName(f"model.layers.{layer}.{theirs}", transposed)
    there = set(parameter_names(config))
    return {ours: name for ours, name in names.items() if ours in there}


def read_config(path: str) -> ModelConfig:
    """Returns the settings of the model in a folder, local or gs://.

    Raises:
      CheckpointError: there is no config.json, or none of an OpenMoE model.
    """
    return model_config(f"{path}/{CONFIG}", _read_json(path, CONFIG))


def stored_parameters(path: str, wanted: Mapping[str, Any], config: ModelConfig) -> dict[str, StoredParameter]:
    """Returns the parameters of a checkpoint by T5X's names, each once, having read its indices only.

    Args:
      path: the folder, local or gs://.
      wanted: what has a shape, by T5X's names: the model's parameters.
      config: of the model.

    Raises:
      CheckpointError: it is not a whole checkpoint of such a model (UnknownArray, MissingArray, DuplicateArray,
        WrongShape), or it is damaged.
    """
    names = torch_names(config)
    in_torch = {names[name].name: _Like(names[name].shape(tuple(like.shape))) for name, like in wanted.items()}
    found = each_once(path, stored_tensors(path), in_torch, "choose the model it was written with")
    return {name: StoredParameter(found[names[name].name], names[name].transposed) for name in wanted}


class _Like(NamedTuple):
    shape: tuple[int, ...]


def stored_tensors(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a folder by PyTorch's names, having read its indices only.

    Raises:
      MissingArray, UnknownArray, DuplicateArray: the parts are not what their index says.
      CheckpointError: there are no weights, or they are damaged.
    """
    path = path.rstrip("/")
    for name, read in _FORMATS:
        if files(path).exists(f"{path}/{name}.index.json"):
            return _read_parts(path, f"{name}.index.json", read)
        if files(path).exists(f"{path}/{name}"):
            return read(f"{path}/{name}")
    looked_for = " nor ".join(name for name, _ in _FORMATS)
    raise CheckpointError(f"{path}: no checkpoint of Hugging Face: it has neither {looked_for}; give its folder")


def _read_parts(path: str, index: str, read: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    where = _read_json(path, index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(part, str) and "/" not in part for part in where.values()):
        raise CheckpointError(f"{path}/{index}: no index of parts; copy the checkpoint once more")
    tensors: dict[str, Tensor] = {}
    for part in sorted(set(where.values())):
        found = read(f"{path}/{part}")
        if twice := tensors.keys() & found.keys():
            raise DuplicateArray(
                f"{path}/{part}: {listed(twice)}: in another part, too; write the checkpoint once more"
            )
        if unknown := [name for name in found if where.get(name) != part]:
            raise UnknownArray(f"{path}/{part}: {listed(unknown)}: not in {index}; write the checkpoint once more")
        tensors |= found
    if missing := where.keys() - tensors.keys():
        raise MissingArray(f"{path}: {listed(missing)}: in {index}, but in no part; copy the checkpoint once more")
    return tensors


def write(
    path: str,
    config: ModelConfig,
    parameters: Mapping[str, Readable],
    *,
    dtype: Dtype = "float32",
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, bytes] | None = None,
    report: Report = lambda *progress: None,
) -> str:
    """Writes a checkpoint that transformers loads with `trust_remote_code=True`, tensor by tensor.

    Args:
      path: the folder that is to appear, local or gs://.
      config: of the model.
      parameters: all of them, by T5X's names.
      dtype: of the parameters.
      shard_bytes: most bytes of numbers in a file, unless a tensor has more.
      beside: further files by name, such as those of the tokenizer.
      report: told after each tensor.

    Returns:
      The path.

    Raises:
      CheckpointError: there is something at the path already, or it cannot be written.
    """
    path, content, names = path.rstrip("/"), config_json(config, dtype), torch_names(config)
    if files(path).exists(f"{path}/{CONFIG}" if path.startswith(GS) else path):
        raise CheckpointError(f"{path}: is there already; remove it, or choose another folder")
    if missing := names.keys() - parameters.keys():
        raise MissingArray(f"{path}: {listed(missing)}: missing, this model has it; choose the model it is of")
    if unknown := parameters.keys() - names.keys():
        raise UnknownArray(
            f"{path}: {listed(unknown)}: there is no such array in this model; choose the model it is of"
        )
    tensors = [_written(names[name], parameters[name]) for name in names]
    with explained(path), whole_or_absent(path) as unfinished:
        _write_parts(unfinished, tensors, dtype, shard_bytes, report)
        shipped = {file.name: file.read_bytes() for file in sorted(_SHIPPED.glob("*.py"))}
        for name, written in (shipped | dict(beside or {})).items():
            _write(unfinished, name, written)
        _write_json(unfinished, "generation_config.json", _GENERATION)
        _write_json(unfinished, CONFIG, dict(sorted(content.items())))  # last: gs:// has no rename
    return path


def _written(torch: TorchName, parameter: Readable) -> _Written:
    def give() -> np.ndarray:
        array = parameter.read()
        return array.T if torch.transposed else array

    return _Written(torch.name, torch.shape(tuple(parameter.shape)), give)


def _write_parts(path: str, tensors: list[_Written], dtype: Dtype, shard_bytes: int, report: Report) -> None:
    parts = split(tensors, dtype, shard_bytes)
    where: dict[str, str] = {}

    def counted(give: Callable[[], np.ndarray], name: str, part: str) -> Callable[[], np.ndarray]:
        def give_and_tell() -> np.ndarray:
            report(len(where), len(tensors))
            where[name] = part
            return give()

        return give_and_tell

    for number, tensors_of_part in enumerate(parts, 1):
        part = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        planned = {t.name: (t.shape, counted(t.give, t.name, part)) for t in tensors_of_part}
        hf_files.write_safetensors(f"{path}/{part}", planned, dtype)
    report(len(tensors), len(tensors))
    if len(parts) > 1:
        total = sum(hf_files.num_bytes(t.shape, dtype) for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(path, "model.safetensors.index.json", index)


def split(tensors: list[_Written], dtype: str, shard_bytes: int) -> list[list[_Written]]:
    """Returns the tensors file by file: in order, as many as fit into shard_bytes, at least one."""
    parts: list[list[_Written]] = []
    room = 0
    for tensor in tensors:
        size = hf_files.num_bytes(tensor.shape, dtype)
        if size > room or not parts:
            parts.append([])
            room = shard_bytes
        parts[-1].append(tensor)
        room -= size
    return parts


def _read_json(path: str, name: str) -> dict[str, Any]:
    where = f"{path.rstrip('/')}/{name}"
    try:
        with hf_files.open_file(where, "rb") as file:
            content = json.load(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: no checkpoint of Hugging Face: it has no {name}; give its folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds no settings; copy the checkpoint once more")
    return content


def _write_json(path: str, name: str, content: Mapping[str, Any]) -> None:
    _write(path, name, (json.dumps(content, indent=2) + "\n").encode())


def _write(path: str, name: str, content: bytes) -> None:
    with hf_files.open_file(f"{path}/{name}", "wb") as file:
        file.write(content)
