"""Legacy T5X checkpoints, read and written: the format of the original's runs and of the released models.

    checkpoint_100000/
      checkpoint                           the index, in msgpack: {"version": 3, "optimizer": {"target", "state"}}
      target.decoder.decoder_norm.scale/   an array in zarr v2: .zarray, and chunks in gzip
      state.param_states.decoder.layers_5.mlp.expert.wo.kernel.v_row/

A leaf of the index is a TensorStore spec that names such a folder, or the array itself: T5X does so with what it does
not partition, the step and the factors of matrices. Every parameter has the moments `m`, `v`, `v_row` and `v_col`
there; those that Adafactor does not keep of it are one zero. What is written can be read by t5x/checkpoints.py of
XueFuzhao/t5x; up to the shape of chunks, which its reader ignores, it is what that would have written.

Arrays are read and written one by one: beside the state itself at most twice the largest array is in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

from openmoe.model.interop import (
    GS,
    CheckpointError,
    Dtype,
    DuplicateArray,
    InMemory,
    MissingArray,
    Report,
    each_once,
    explained,
    files,
    listed,
    placed,
    repeated,
    whole_or_absent,
)
from openmoe.model.optimizer import OptimizerState
from openmoe.model.step import TrainState

VERSION = 3  # since June 2021; version 2 wrote bfloat16 as uint16
CHUNK_BYTES = 64 * 2**20
MOMENTS = ("m", "v", "v_col", "v_row")
STEP = "state/step"

_INDEX = "checkpoint"
_TARGET = "target/"
_STATES = "state/param_states/"


class StoredArray(NamedTuple):
    """An array of a checkpoint, not read yet."""

    path: str  # of the checkpoint
    name: str  # as in T5X: target/decoder/decoder_norm/scale
    shape: tuple[int, ...]
    source: np.ndarray | str  # its numbers, if they stand in the index; else its folder

    def read(self) -> np.ndarray:
        """Returns the whole array in the type it was stored in.

        Raises:
          MissingArray: its folder or one of its chunks is not there.
          CheckpointError: its bytes are damaged, or its shape is not that of the index.
        """
        if isinstance(self.source, np.ndarray):
            return self.source
        spec = {
            "driver": "zarr",
            "kvstore": _kvstore(self.path, self.source),
            "metadata": {"shape": self.shape},
            "fill_missing_data_reads": False,  # else a lost chunk reads as zeros
        }
        try:
            return ts.open(spec, open=True, read=True).result().read().result()
        except ValueError as error:
            kind = MissingArray if str(error).startswith("NOT_FOUND") else CheckpointError
            problem = f"{self.path}: {self.name}: cannot be read: {_reason(error)}"
            raise kind(f"{problem}; if it is damaged, copy the checkpoint once more") from error


def restore(path: str, template: TrainState, report: Report = lambda *progress: None) -> TrainState:
    """Reads a checkpoint of the original.

    T5X counts steps once, for the schedule and for Adafactor; ours are two equal numbers. The moments of experts are
    those of a run that multiplied the gradients of experts by its number of expert partitions, and come as they are:
    that factor cancels out of updates as long as it stays the same.

    Args:
      path: `.../checkpoint_<step>`, local or gs://.
      template: shapes, types and shardings of the result (`step.state_shapes`); what is stored in another type is
        converted.
      report: told after each array.

    Raises:
      CheckpointError: it is not a whole checkpoint of such a state (UnknownArray, MissingArray, DuplicateArray,
        WrongShape), or it is damaged.
    """
    return placed(stored(path, template), template, report)


def stored(path: str, template: TrainState) -> Any:
    """Returns a state of `StoredArray`, having read the checkpoint's index only.

    Args:
      path: `.../checkpoint_<step>`, local or gs://.
      template: what has a shape (`step.state_shapes`).

    Raises:
      CheckpointError: as in `restore`.
    """
    tree = traverse_util.unflatten_dict(dict(stored_arrays(path, arrays_by_name(template))), sep="/")
    step, moments = tree["state"]["step"], tree["state"]["param_states"]
    return TrainState(step, tree["target"], OptimizerState(step, moments))


def save(folder: str, state: TrainState, *, dtype: Dtype = "float32", report: Report = lambda *progress: None) -> str:
    """Writes a checkpoint that the original can read.

    Args:
      folder: where `checkpoint_<step>` is to appear, local or gs://.
      state: all of it must be addressable from this process.
      dtype: of the parameters; moments stay as they are.
      report: told after each array.

    Returns:
      The path of the checkpoint.

    Raises:
      CheckpointError: there is a checkpoint of this step already, it cannot be written, or T5X cannot express it.
    """
    return write_state(folder, jax.tree.map(InMemory, state), dtype=dtype, report=report)


def write_state(folder: str, state: Any, *, dtype: Dtype = "float32", report: Report = lambda *progress: None) -> str:
    """As `save`, of a state of `Readable`, which are read one after the other."""
    step, updates = int(state.step.read()), int(state.opt_state.count.read())
    if step != updates:
        problem = f"step {step} with {updates} updates of the optimizer: T5X has one number for both"
        raise CheckpointError(f"{folder}: cannot be written: {problem}; make them equal")
    arrays = {name: array.read for name, array in arrays_by_name(state).items()}
    if foreign := [name for name in arrays if name.startswith("state/") and name.endswith(("/mu", "/nu"))]:
        problem = f"{listed(foreign)}: T5X has a place for Adafactor's state only; take the parameters alone (hf)"
        raise CheckpointError(f"{folder}: cannot be written: {problem}")
    return write(folder, arrays, dtype=dtype, report=report)


def arrays_by_name(state: TrainState) -> dict[str, Any]:
    """Returns the leaves of a state, or of its shapes, by T5X's names: the optimizer's count is `state/step`, too."""
    tree = {"target": state.params, "state": {"param_states": state.opt_state.moments, "step": state.step}}
    return traverse_util.flatten_dict(tree, sep="/")


def stored_arrays(path: str, wanted: Mapping[str, Any]) -> dict[str, StoredArray]:
    """Returns what a checkpoint holds, each wanted array once, having read its index only.

    Args:
      path: `.../checkpoint_<step>`, local or gs://.
      wanted: what has a shape, by T5X's names.

    Raises:
      CheckpointError: as in `restore`.
    """
    found = read_index(path)
    used = {name: array for name, array in found.items() if name in wanted or not _is_unused_moment(array)}
    return each_once(path, used, wanted, "choose the model and optimizer settings it was written with")


def stored_parameters(path: str, wanted: Mapping[str, Any]) -> dict[str, StoredArray]:
    """As `stored_arrays`, of the parameters alone and by their names below `target/`."""
    found = {name: array for name, array in read_index(path).items() if name.startswith(_TARGET)}
    full = {f"{_TARGET}{name}": like for name, like in wanted.items()}
    stored = each_once(path, found, full, "choose the model it was written with")
    return {name.removeprefix(_TARGET): array for name, array in stored.items()}


def read_index(path: str) -> dict[str, StoredArray]:
    """Returns all that a checkpoint holds, by T5X's names, having read its index only.

    Raises:
      DuplicateArray: a name occurs twice, or two names have the same folder.
      CheckpointError: there is no checkpoint, or its index is damaged.
    """
    path = path.rstrip("/")
    try:
        data = files(path).cat_file(f"{path}/{_INDEX}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: no T5X checkpoint: it has no file `{_INDEX}`; give the path of a whole checkpoint_<step>"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}/{_INDEX}: cannot be read: {_reason(error)}") from error
    try:
        # Maps become tuples of pairs: a dict would hide a key that comes twice.
        root = dict(msgpack.unpackb(data, object_pairs_hook=tuple, ext_hook=_unpack_array))
        if root["version"] != VERSION:
            raise CheckpointError(f"{path}: version {root['version']} of T5X's format; only {VERSION} can be read")
        arrays = [_stored(path, name, leaf) for name, leaf in _leaves(root["optimizer"])]
    except CheckpointError:
        raise
    except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/{_INDEX}: no index of T5X ({error!r}); copy the checkpoint once more") from error
    if twice := repeated(array.name for array in arrays):
        raise DuplicateArray(f"{path}/{_INDEX}: {listed(twice)}: there twice; write the checkpoint once more")
    if twice := repeated(array.source for array in arrays if isinstance(array.source, str)):
        raise DuplicateArray(f"{path}/{_INDEX}: {listed(twice)}: two arrays in one folder; write it once more")
    return {array.name: array for array in arrays}


def write(
    folder: str,
    arrays: Mapping[str, Callable[[], np.ndarray]],
    *,
    dtype: Dtype = "float32",
    report: Report = lambda *progress: None,
) -> str:
    """Writes a checkpoint array by array; as `save`, for arrays that need not be in memory.

    Args:
      folder: where `checkpoint_<step>` is to appear, local or gs://.
      arrays: what gives each array, by T5X's names. `state/step` must be among them; moments that are not are taken
        for unused.
      dtype: of the parameters.
      report: told after each array.

    Raises:
      CheckpointError: there is a checkpoint of this step already, or it cannot be written.
    """
    path = f"{folder.rstrip('/')}/checkpoint_{int(arrays[STEP]())}"
    if files(path).exists(f"{path}/{_INDEX}" if path.startswith(GS) else path):
        raise CheckpointError(f"{path}: is there already; remove it, or choose another folder")
    leaves: dict[str, Any] = {}
    with explained(path, _reason), whole_or_absent(path) as unfinished:
        for name, array in arrays.items():
            leaves[name] = _write_array(unfinished, name, array, dtype if name.startswith(_TARGET) else None)
            report(len(leaves), len(arrays))
        for name in arrays:
            for moment in MOMENTS if name.startswith(_TARGET) else ():
                leaves.setdefault(f"{name.replace(_TARGET, _STATES, 1)}/{moment}", np.zeros(1, np.float32))
        _write_index(unfinished, leaves)
    return path


def chunk_shape(shape: Sequence[int], max_elements: int) -> list[int]:
    """Returns the shape of chunks of at most `max_elements`: T5X's rule, the longest side taken to its next divisor."""
    chunk = list(shape)
    while np.prod(chunk, dtype=np.int64) > max_elements:
        axis = int(np.argmax(chunk))
        chunk[axis] = next(size for size in range(chunk[axis] - 1, 0, -1) if shape[axis] % size == 0)
    return chunk


def _write_array(directory: str, name: str, give: Callable[[], np.ndarray], dtype: str | None) -> np.ndarray | dict:
    """Writes an array into a folder of its own, or does not, where T5X does not; returns its leaf of the index."""
    array = give() if dtype is None else give().astype(dtype, copy=False)
    if name == STEP or (name.endswith(("/v_row", "/v_col")) and array.ndim == 1):
        return np.asarray(array)
    folder = f"{name.replace('/', '.')}/"
    spec = {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": _kvstore(directory, folder),
        "metadata": {
            "chunks": chunk_shape(array.shape, CHUNK_BYTES // array.dtype.itemsize),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        },
    }
    store = ts.open(spec, create=True).result()
    store.write(array, can_reference_source_data_indefinitely=True).result()
    # A checkpoint can be moved: the index knows neither its directory nor its bucket.
    anywhere = {"bucket": "t5x-dummy-bucket"} if directory.startswith(GS) else {}
    return spec | {"kvstore": {**anywhere, "driver": spec["kvstore"]["driver"], "path": folder}}


def _write_index(directory: str, leaves: Mapping[str, Any]) -> None:
    in_order = {name: leaves[name] for name in sorted(leaves, key=lambda name: name.split("/"))}
    tree = {"version": VERSION, "optimizer": traverse_util.unflatten_dict(in_order, sep="/")}
    data = serialization.msgpack_serialize(tree, in_place=True)  # else it sorts the keys
    if directory.startswith(GS):
        files(directory).pipe_file(f"{directory}/{_INDEX}", data)
        return
    with Path(directory, _INDEX).open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    """The first line of an error, without TensorStore's account of what it was doing."""
    return re.sub(r" \[(tensorstore_spec|source locations)=.*", "", str(error), flags=re.DOTALL).partition("\n")[0]


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields the names and leaves of an unpacked index: arrays, numbers, specs."""
    if not isinstance(node, tuple) or any(key == "driver" for key, _ in node):
        yield "/".join(path), node
        return
    for key, below in node:
        yield from _leaves(below, (*path, key))


def _stored(path: str, name: str, leaf: Any) -> StoredArray:
    if not isinstance(leaf, tuple):
        value = np.asarray(leaf)
        if value.dtype == object or value.dtype.kind in "SU":
            raise ValueError(f"{name}: neither an array nor a spec of one")
        return StoredArray(path, name, value.shape, value)
    spec = dict(leaf)
    kvstore = dict(spec["kvstore"])
    folder = kvstore["path"] if "path" in kvstore else spec["path"]  # the latter before TensorStore 0.1.14
    folder = f"{folder.rstrip('/')}/"
    if folder in ("/", "./", "../") or folder.count("/") > 1:
        raise ValueError(f"{name}: lies outside of the checkpoint, in {folder}")
    return StoredArray(path, name, tuple(dict(spec["metadata"])["shape"]), folder)


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    """Reads Flax's extensions of msgpack: 1, an array; 3, a NumPy scalar."""
    if code not in (1, 3):
        raise ValueError(f"msgpack extension {code}")
    shape, dtype, buffer = msgpack.unpackb(data)
    return np.frombuffer(buffer, jnp.dtype(dtype)).reshape(shape)


def _is_unused_moment(array: StoredArray) -> bool:
    return array.name.startswith(_STATES) and array.name.rpartition("/")[2] in MOMENTS and array.shape == (1,)


def _kvstore(directory: str, folder: str) -> dict[str, str]:
    """Returns where TensorStore finds a folder of a directory, local or gs://."""
    if not directory.startswith(GS):
        return {"driver": "file", "path": f"{Path(directory).absolute()}/{folder}"}
    bucket, _, path = f"{directory}/{folder}".removeprefix(GS).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path}
