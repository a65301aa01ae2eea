"""What checkpoints of all formats share: their errors, and arrays that are read one by one."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import fsspec
import jax
import numpy as np

GS = "gs://"

Report = Callable[[int, int], None]  # arrays done, of how many
Dtype = Literal["float32", "bfloat16"]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; one line: where, what, the value, the remedy."""


class UnknownArray(CheckpointError):
    """A checkpoint holds an array that the model does not have."""


class MissingArray(CheckpointError):
    """A checkpoint lacks an array that the model has, or a part of one."""


class DuplicateArray(CheckpointError):
    """A checkpoint has two arrays for one place, or two places for one array."""


class WrongShape(CheckpointError):
    """An array of a checkpoint has another shape than in the model."""


class Readable(Protocol):
    """An array of a checkpoint that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it has in the model."""
        ...

    def read(self) -> Any:
        """Returns it as a NumPy array, whose memory may be a view of what was stored."""
        ...


class InMemory(NamedTuple):
    """An array that needs no reading."""

    array: Any  # np.ndarray or jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.array.shape

    def read(self) -> np.ndarray:
        """Returns it on the host."""
        # JAX keeps what it has copied to the host as long as the array; so it gets one that is gone right away.
        return np.asarray(self.array.copy())


class Zeros(NamedTuple):
    """An array that is made when it is wanted."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Returns it on the host."""
        return np.zeros(self.shape, self.dtype)


ReadableT = TypeVar("ReadableT", bound=Readable)


def placed(state: Any, template: Any, report: Report = lambda *progress: None) -> Any:
    """Reads a tree of `Readable` onto the devices where it will live, array by array.

    Args:
      state: the arrays.
      template: the same tree of shapes, types and shardings; what is stored in another type is converted.
      report: told after each array.
    """
    likes, places = jax.tree.flatten(template)
    arrays = []
    for like, readable in zip(likes, places.flatten_up_to(state), strict=True):
        array = readable.read().astype(like.dtype, copy=False)
        # Never the same array twice: a step gives all of them away.
        arrays.append(jax.make_array_from_callback(array.shape, like.sharding, lambda index, array=array: array[index]))
        report(len(arrays), len(likes))
    return places.unflatten(arrays)


def each_once(
    path: str, found: Mapping[str, ReadableT], wanted: Mapping[str, Any], remedy: str
) -> dict[str, ReadableT]:
    """Returns what was found in the order in which it is wanted, each wanted array once and nothing else.

    Args:
      path: of the checkpoint, for errors.
      found: what it holds, by name.
      wanted: what has a shape, by name.
      remedy: what to do about an error.

    Raises:
      UnknownArray, MissingArray, WrongShape: there is more, less or something else than wanted.
    """
    if unknown := found.keys() - wanted.keys():
        raise UnknownArray(f"{path}: {listed(unknown)}: there is no such array in this model; {remedy}")
    if missing := wanted.keys() - found.keys():
        raise MissingArray(f"{path}: {listed(missing)}: missing, this model has it; {remedy}")
    for name, like in wanted.items():
        if (shape := found[name].shape) != like.shape:
            raise WrongShape(f"{path}: {name}: has shape {shape}, in this model {like.shape}; {remedy}")
    return {name: found[name] for name in wanted}


@contextlib.contextmanager
def whole_or_absent(path: str) -> Generator[str]:
    """Gives the directory to write to, which at no moment has this name and an index without being whole.

    A local one gets its name at the end. On gs:// that would copy all objects: there the index must be written last.
    """
    if path.startswith(GS):
        with contextlib.suppress(FileNotFoundError):
            files(path).rm(path, recursive=True)  # what an unfinished one left
        yield path
        return
    unfinished = Path(f"{path}.tmp-{secrets.token_hex(4)}")
    unfinished.mkdir(parents=True)
    try:
        yield str(unfinished)
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def explained(path: str, reason: Callable[[Exception], str] = str) -> Generator[None]:
    """Turns failures of the file system, and of TensorStore, which are ValueErrors, into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be written: {reason(error)}") from error


def origin(error: BaseException) -> str:
    """Returns in one line what began an error: Orbax wraps TensorStore's words, which name the array."""
    while error.__cause__ is not None and not isinstance(error, CheckpointError):
        error = error.__cause__
    return " ".join(str(error).split()).partition(" [tensorstore_spec")[0][:500] or type(error).__name__


def files(path: str) -> Any:
    """Returns the file system of a path, local or gs://."""
    return fsspec.core.url_to_fs(path, use_listings_cache=False)[0]


def repeated(words: Iterable[str]) -> set[str]:
    """Returns the words that occur more than once."""
    return {word for word, times in Counter(words).items() if times > 1}


def listed(names: Iterable[str]) -> str:
    """Returns the first name, parameters before moments, and how many more there are."""
    first, *rest = sorted(names, key=lambda name: (name.startswith(("state/", "opt_state/")), name))
    return f"{first} and {len(rest)} more" if rest else first
