"""Saves and restores the train state, together with facts about it, through Orbax.

What Orbax does: asynchronous writing by all processes, one atomic commit of a step, local paths and gs://,
restoring onto any mesh. What is added here: the layout of a step, and digests, of all and of each array, that prove
what was restored.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array

from openmoe.model import interop
from openmoe.model.interop import CheckpointError, Report, each_once
from openmoe.model.step import TrainState

_PART_NUMBERS = 2**20  # that `sum_of` takes at a time
_PARAMS = "params/"  # what the names of parameters begin with in a checkpoint


class Checkpointer:
    """The checkpoints in one folder, `<directory>/<step>` each. All processes make the same calls."""

    def __init__(self, directory: str) -> None:
        """Opens a folder: a local path, absolute or relative, or gs://..."""
        self._manager = ocp.CheckpointManager(_absolute(directory))

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Copies the state off the devices and goes on writing in the background.

        Args:
          step: names the checkpoint.
          state: may be given away (donated) as soon as this returns.
          facts: about it, the loader's position among them; JSON, the same on all processes.

        Raises:
          FileExistsError: the step has been saved before.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), loader=ocp.args.JsonSave(facts))
        if not self._manager.save(step, args=items):
            raise FileExistsError(f"{self._manager.directory}/{step}: saved before; use another folder")

    def is_saving(self) -> bool:
        """Returns whether a save has not been committed yet."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the save in progress is committed; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state of a step, laid out as `abstract_state` says (`state_shapes`), and its facts.

        Raises:
          FileNotFoundError: there is no such step, or it was never committed.
          ValueError: its shapes are others, or its bytes are damaged.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), loader=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["loader"]

    def facts(self, step: int) -> dict[str, Any]:
        """Returns the facts of a step, without reading its arrays; raises as `restore`."""
        return self._manager.restore(step, args=ocp.args.Composite(loader=ocp.args.JsonRestore()))["loader"]


@dataclass(frozen=True)
class _Unread:
    """An array to be written that has not been read yet; no tuple, so that Orbax takes it for a leaf."""

    source: interop.Readable
    dtype: np.dtype
    read_one: Callable[[], None]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        self.read_one()
        return self.source.read().astype(self.dtype, copy=False)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Reads and writes an array before the next one; Orbax's own handler is given all of them."""

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value.read()], [info], [arg])


def write(directory: str, step: int, state: Any, template: TrainState, facts: dict[str, Any], report: Report) -> None:
    """Writes a checkpoint as `Checkpointer.save` does, from arrays that are read one by one.

    Args:
      directory: its folder's parent.
      step: names the checkpoint.
      state: a tree of `Readable`.
      template: the same tree of shapes and types; what is stored in another type is converted.
      facts: about it, JSON.
      report: told before each array is read.

    Raises:
      FileExistsError: the step has been saved before.
    """
    likes, places = jax.tree.flatten(template)
    done = itertools.count(1)
    unread = [
        _Unread(source, like.dtype, lambda: report(next(done), len(likes)))
        for like, source in zip(likes, places.flatten_up_to(state), strict=True)
    ]
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_Unread, _OneByOne(deepcopy_host_arrays=False)), (Array, ocp.type_handlers.get_type_handler(Array))
    )
    item_handlers = {"state": ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)}
    manager = ocp.CheckpointManager(
        _absolute(directory), item_handlers=item_handlers | {"loader": ocp.JsonCheckpointHandler()}
    )
    tree = ocp.args.PyTreeSave(places.unflatten(unread))
    if not manager.save(step, args=ocp.args.Composite(state=tree, loader=ocp.args.JsonSave(facts))):
        raise FileExistsError(f"{directory}/{step}: saved before; use another folder")
    manager.wait_until_finished()


class StoredLeaf(NamedTuple):
    """An array of a checkpoint, not read yet."""

    folder: epath.Path  # of the state's arrays
    keys: tuple[str, ...]  # from the state to it
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Returns the whole array on the host, and reads nothing else.

        Raises:
          CheckpointError: its bytes are damaged.
        """
        item: Any = jax.ShapeDtypeStruct(
            self.shape, np.float32
        )  # of the type that it was stored in, whatever this says
        how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(self.keys):
            item, how = {key: item}, {key: how}
        wanted = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            leaf = ocp.PyTreeCheckpointHandler().restore(self.folder, args=wanted)
        except (MemoryError, RuntimeError):
            raise
        except Exception as error:  # of many kinds: Orbax passes some on as a plain Exception
            name, reason = "/".join(self.keys), interop.origin(error)
            problem = f"{self.folder}: {name}: cannot be read: {reason}"
            raise CheckpointError(f"{problem}; if it is damaged, copy the checkpoint once more") from error
        for key in self.keys:
            leaf = leaf[key]
        return leaf


def stored(path: str, template: TrainState) -> Any:
    """Returns a state of `StoredLeaf`, having read the names and shapes of its arrays only.

    Args:
      path: of one step, local or gs://.
      template: what has a shape (`step.state_shapes`).

    Raises:
      CheckpointError: there is no such checkpoint, or it is of another model (UnknownArray, MissingArray, WrongShape).
    """
    found, wanted = stored_leaves(path), _by_name(template)
    remedy = "choose the model and optimizer settings it was written with"
    if wanted.keys() != found.keys() and _parameters(found).keys() == _parameters(wanted).keys():
        remedy = "choose the optimizer it was trained with, or take the parameters alone (hf has no place for others)"
    each_once(path, found, wanted, remedy)
    return jax.tree.map_with_path(lambda at, like: found["/".join(_keys(at))], template)


def stored_parameters(path: str, template: Any) -> Any:
    """As `stored`, of the parameters alone, whatever optimizer they were trained with.

    Args:
      path: of one step, local or gs://.
      template: the parameters' tree, of what has a shape.
    """
    wanted = {f"{_PARAMS}{name}": like for name, like in _by_name(template).items()}
    found = each_once(path, _parameters(stored_leaves(path)), wanted, "choose the model it was written with")
    return jax.tree.map_with_path(lambda at, like: found[f"{_PARAMS}{'/'.join(_keys(at))}"], template)


def _parameters(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if name.startswith(_PARAMS)}


def stored_leaves(path: str) -> dict[str, StoredLeaf]:
    """Returns all arrays of a checkpoint by name, whatever model it is of; raises CheckpointError if there is none."""
    folder = epath.Path(_absolute(path)) / "state"
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: no checkpoint of Orbax; give the path of one step, such as DIR/1000") from error
    leaves = [(_keys(at), like.shape) for at, like in jax.tree.leaves_with_path(tree)]
    return {"/".join(keys): StoredLeaf(folder, keys, shape) for keys, shape in leaves}


def _by_name(tree: Any) -> dict[str, Any]:
    return {"/".join(_keys(at)): leaf for at, leaf in jax.tree.leaves_with_path(tree)}


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100, not for gs://


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the names along a path into a tree of dicts and named tuples."""
    return tuple(str(getattr(entry, "name", getattr(entry, "key", entry))) for entry in path)


class Examined(NamedTuple):
    """What the bits of a tree of arrays add up to, by the arrays' names, and which arrays hold NaN or infinities."""

    sums: dict[str, int]
    not_finite: list[str]


def examine(state: Any) -> Examined:
    """Returns the sums of all arrays of a tree, the same however they are laid out on devices."""
    leaves = jax.tree.leaves_with_path(state)
    found = jax.device_get(_examined([leaf for _, leaf in leaves]))
    names = ["/".join(_keys(path)) for path, _ in leaves]
    return Examined(
        {name: int(total) for name, (total, _) in zip(names, found, strict=True)},
        [name for name, (_, finite) in zip(names, found, strict=True) if not finite],
    )


def checksum(state: Any) -> str:
    """Returns a digest of all bits of a tree of arrays, the same however they are laid out on devices."""
    return digest(state, examine(state).sums)


def digest(like: Any, sums: Mapping[str, int]) -> str:
    """Returns the `checksum` of a tree of these shapes and types whose arrays have these sums."""
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {sums['/'.join(_keys(path))]}"
        for path, leaf in jax.tree.leaves_with_path(like)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _examined(leaves: list[Array]) -> list[tuple[Array, Array]]:
    # One program: several small ones in flight, each waiting for all devices, can deadlock XLA's CPU threads.
    return [(_position_weighted_sum(leaf), _is_finite(leaf)) for leaf in leaves]


def _is_finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all() if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.bool_(True)


@jax.jit
def _position_weighted_sum(leaf: Array) -> Array:
    """Returns uint32[], the sum of each element's bits times an odd weight of its own, modulo 2**32.

    Integers, so the order of summation does not matter; odd, so that no single wrong element goes unseen.
    """
    bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    index = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def sum_of(array: np.ndarray) -> int:
    """Returns the same sum of one array on the host, to examine a checkpoint array by array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits, total = flat.view({2: np.uint16, 4: np.uint32}[flat.itemsize]), 0
    for start in range(0, len(bits), _PART_NUMBERS):
        part = bits[start : start + _PART_NUMBERS].astype(np.uint32)
        weights = 2 * np.arange(start, start + len(part)) + 1
        total += int(np.sum(part * weights.astype(np.uint32), dtype=np.uint32))
    return total % 2**32
