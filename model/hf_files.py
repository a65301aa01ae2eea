"""Files of tensors as Hugging Face has them: safetensors, read and written, and PyTorch's .bin, read without PyTorch.

    .safetensors   the header's length in 8 bytes, the header in JSON: {name: {dtype, shape, data_offsets}}, the numbers
    .bin           an uncompressed zip: data.pkl, a pickle of {name: tensor}, and data/0, data/1, ..., their storages

Both hold the numbers of a tensor in one piece, which is read when it is wanted. The library safetensors maps a whole
file into memory instead, and reads no gs://. A pickle can name any function of Python; here it can name a handful.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from openmoe.model.interop import GS, CheckpointError, DuplicateArray, files, listed, repeated

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK_BYTES = 64 * 2**20  # written at a time, in the type and order they are to have

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
_AGAIN = "copy it once more"


class Tensor(NamedTuple):
    """A tensor of a file, not read yet."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # in bytes, of its first element

    def read(self) -> np.ndarray:
        """Returns it in the type it was stored in.

        Raises:
          CheckpointError: the file ends before it, or cannot be read.
        """
        dtype = jnp.dtype(self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        numbers = np.empty(span if 0 not in self.shape else 0, dtype)
        try:
            with open_file(self.file, "rb") as file:
                file.seek(self.offset)
                _fill(file, numbers.view(np.uint8).data)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{self.file}: {self.name}: cannot be read: {error}; {_AGAIN}") from error
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(numbers, self.shape, strides, writeable=False)


def open_file(path: str, mode: str) -> Any:
    """Opens a file of bytes, local or gs://."""
    return files(path).open(path, mode) if path.startswith(GS) else Path(path).open(mode)


def read_safetensors(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, having read its header only.

    Raises:
      DuplicateArray: a name occurs twice.
      CheckpointError: it is no such file, is cut short, or holds what is no number.
    """
    try:
        with open_file(path, "rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            size = file.seek(0, 2)
            if length > size - 8:
                raise ValueError(f"its header is said to have {length} bytes")
            file.seek(8)
            pairs = json.loads(file.read(length), object_pairs_hook=list)
        entries = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
        tensors = [_tensor(path, name, entry, 8 + length, size) for name, entry in entries]
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no safetensors file: {_one_line(error)}; {_AGAIN}") from error
    return _by_name(path, tensors)


def write_safetensors(
    path: str, tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]], dtype: str
) -> None:
    """Writes a file tensor by tensor; beside the one at hand there are BLOCK_BYTES more in memory.

    Args:
      path: local or gs://.
      tensors: shape of each, and what gives it.
      dtype: the type that all get.
    """
    code = next(code for code, name in DTYPES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        begin, end = end, end + num_bytes(shape, dtype)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned
    with open_file(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, give) in tensors.items():
            array = give()
            if array.shape != shape:
                raise CheckpointError(f"{path}: {name}: got shape {array.shape} instead of {shape}")
            _write_blocks(file, array, jnp.dtype(dtype))
            del array  # before the next one comes


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Returns the bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize


def read_bin(path: str) -> dict[str, Tensor]:
    """Returns the tensors of a file that `torch.save` wrote of {name: tensor}, having read its pickle only.

    Raises:
      CheckpointError: it is no such file, or its pickle asks for anything but tensors of floating-point numbers.
    """
    try:
        with open_file(path, "rb") as file, zipfile.ZipFile(file) as archive:
            [index] = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            folder = index.removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            unpickler = _Unpickler(archive.open(index), path, _Storages(file, archive, f"{folder}data/"))
            found = unpickler.load()
        tensors = [t._replace(name=str(name)) for name, t in found.items() if isinstance(t, Tensor)]
        if len(tensors) != len(found):
            raise ValueError("it holds more than tensors")
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: no file of torch.save since PyTorch 1.6 ({error}); save it once more"
        ) from error
    except (OSError, EOFError, pickle.UnpicklingError, *_BAD_PICKLE) as error:
        raise CheckpointError(f"{path}: no tensors of PyTorch: {_one_line(error)}; {_AGAIN}") from error
    return _by_name(path, tensors)


_BAD_PICKLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError, OverflowError)


class _Storages:
    """Where the storages of a .bin lie."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, folder: str) -> None:
        self._file, self._archive, self._folder = file, archive, folder

    def place(self, key: str) -> tuple[int, int]:
        """Returns offset and length in bytes of a storage."""
        entry = self._archive.getinfo(f"{self._folder}{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed")
        self._file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", self._file.read(4))
        return entry.header_offset + 30 + name_length + extra_length, entry.file_size


class _Unpickler(pickle.Unpickler):
    """Knows what a dictionary of tensors needs, and nothing else."""

    def __init__(self, file: Any, path: str, storages: _Storages) -> None:
        super().__init__(file)
        self._path, self._storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return self._rebuild
            case "torch", _ if name in _STORAGES:
                return _STORAGES[name]
        raise CheckpointError(f"{self._path}: its pickle asks for {module}.{name}, which is no tensor; do not trust it")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, _, _ = pid
        if kind != "storage":
            raise ValueError(f"a {kind}")
        return dtype, key

    def _rebuild(self, storage: tuple[str, str], first: int, shape: tuple, strides: tuple, *unused: Any) -> Tensor:
        dtype, key = storage
        offset, length = self._storages.place(key)
        itemsize = jnp.dtype(dtype).itemsize
        end = first + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min((first, *shape, *strides)) < 0 or (0 not in shape and end * itemsize > length):
            raise ValueError(f"a tensor of shape {shape} in a storage of {length} bytes")
        return Tensor(self._path, "", dtype, tuple(shape), tuple(strides), offset + first * itemsize)


def _tensor(path: str, name: str, entry: dict[str, Any], data: int, size: int) -> Tensor:
    """Checks an entry of the header of a safetensors file whose numbers begin at `data` and end at `size`."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the type {entry['dtype']}; {', '.join(DTYPES)} can be read")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != num_bytes(shape, dtype) or data + end > size:
        raise ValueError(f"{name} of shape {shape} has bytes {begin} to {end} of {size - data}")
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    return Tensor(path, name, dtype, shape, tuple(strides), data + begin)


def _by_name(path: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    if twice := repeated(tensor.name for tensor in tensors):
        raise DuplicateArray(f"{path}: {listed(twice)}: there twice; write the file once more")
    return {tensor.name: tensor for tensor in tensors}


def _write_blocks(file: BinaryIO, array: np.ndarray, dtype: np.dtype) -> None:
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)  # a view
    step = max(BLOCK_BYTES // (rows.shape[1] * dtype.itemsize), 1)
    for first in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[first : first + step].astype(dtype, copy=False))
        file.write(block.view(np.uint8).data)


def _fill(file: Any, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done : done + BLOCK_BYTES])
        if not count:
            raise EOFError(f"the file ends {len(memory) - done} bytes early")
        done += count


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
