"""The checkpoints of a run: which there are and why, whether they are whole, and how two differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from openmoe.model import checkpoint, interop, sharding, step
from openmoe.model.checkpoint import Examined, StoredLeaf
from openmoe.pipelines import storage
from openmoe.platform.run import lineage
from openmoe.platform.run import run_dir as run_dirs
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import init_source, restore

_PART_NUMBERS = 2**20  # compared at a time

State = Literal["kept", "missing", "quarantined", "undone", "removed"]


class Listed(NamedTuple):
    """An accepted checkpoint.

    Attributes:
      number: of its acceptance.
      step: steps completed.
      tokens: trained on until there, padding included.
      incarnation: that saved it.
      accepted_s: when it was accepted; 0 if an earlier version did.
      checkpoint: its folder, relative to the run directory.
      stored_bytes: that its files take; None if it has none.
      metric: value of train.best_metric when it was saved; None if it is not known.
      state: whether it can be restored (kept), or what became of it.
      why: it is kept, quarantined or undone.
    """

    number: int
    step: int
    tokens: int
    incarnation: int
    accepted_s: float
    checkpoint: str
    stored_bytes: int | None
    metric: float | None
    state: State
    why: str


def listed(run: RunDir, spec: RunSpec) -> list[Listed]:
    """Returns all checkpoints that were ever accepted, oldest first."""
    claims, everything, quarantined = run.claims(), run.acceptances(), run.quarantined()
    valid = lineage.valid_acceptances(claims, everything, quarantined)
    kept, stored = lineage.kept(valid, spec.retention), set(run.stored_checkpoints())
    counts = {a.number for a in valid}

    def state(a: Acceptance) -> tuple[State, str]:
        if a.number in quarantined:
            return "quarantined", quarantined[a.number]
        if a.number not in counts:
            later = next(c for c in claims if c.incarnation > a.incarnation and c.resumes < a.number)
            return "undone", f"incarnation {later.incarnation} went on from step {run.step_of(later.resumes)}"
        why = ", ".join(kept.get(a.number, ()))
        if a.checkpoint in stored:
            return "kept", why or "until the next save"
        return ("missing", f"should be kept: {why}") if why else ("removed", "")

    return [
        Listed(
            number=a.number,
            step=a.step,
            tokens=a.step * spec.train.batch_rows * spec.data.seq_len,
            incarnation=a.incarnation,
            accepted_s=a.time_s,
            checkpoint=a.checkpoint,
            stored_bytes=storage.folder_bytes(run.at(a.checkpoint)) if a.checkpoint in stored else None,
            metric=a.metrics.get(spec.train.best_metric),
            state=(found := state(a))[0],
            why=found[1],
        )
        for a in everything
    ]


def damage(run: RunDir, spec: RunSpec, accepted: Acceptance, report: interop.Report = lambda *progress: None) -> str:
    """Returns what is wrong with an accepted checkpoint, or ""; it is read array by array, on this host alone."""
    if not storage.exists(run.at(accepted.checkpoint)):
        return "is gone"
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    template = step.state_shapes(spec.model, spec.optimizer, mesh)
    folder, _, number = accepted.checkpoint.rpartition("/")
    try:
        facts = checkpoint.Checkpointer(run.at(folder)).facts(int(number))
        if reason := restore.foreign(facts, accepted, run.record()):
            return reason
        leaves = checkpoint.stored_leaves(path := run.at(accepted.checkpoint))
        checkpoint.stored(path, template)  # that it is of this model
        return restore.differing(_examined(leaves, report), template, facts, accepted)
    except restore.NOT_DAMAGE:
        raise
    except Exception as error:
        return restore.reason_of(error, run.at(accepted.checkpoint))


def _examined(leaves: Mapping[str, StoredLeaf], report: interop.Report) -> Examined:
    found = Examined({}, [])
    for done, (name, leaf) in enumerate(leaves.items(), 1):
        array = leaf.read()
        found.sums[name] = checkpoint.sum_of(array)
        if not np.isfinite(array).all():
            found.not_finite.append(name)
        report(done, len(leaves))
    return found


class Difference(NamedTuple):
    """An array in two checkpoints A and B; what cannot be compared is None."""

    name: str
    status: Literal["equal", "changed", "another shape", "only in A", "only in B"]
    max_abs: float | None = None
    max_rel: float | None = None  # of numbers both not zero, by the larger of the two
    norm_a: float | None = None
    norm_b: float | None = None


class Compared(NamedTuple):
    """How two checkpoints differ: in their arrays, in what is saved with them, and in their runs' mathematics."""

    arrays: list[Difference]
    facts: list[str]
    spec: list[str]

    @property
    def equal(self) -> bool:
        """Whether all arrays are the same, bit by bit."""
        return all(array.status == "equal" for array in self.arrays)


def located(path: str) -> str:
    """Returns the folder of a checkpoint, given that, or a run directory, which stands for its newest one."""
    run = RunDir(path.rstrip("/"))
    if not run.exists():
        return run.path
    newest = run.newest_accepted()
    if newest is None:
        raise RunDirError(f"{path}: the run has no accepted checkpoint yet; train it until its first one")
    return run.at(newest.checkpoint)


def compare(path_a: str, path_b: str, report: interop.Report = lambda *progress: None) -> Compared:
    """Compares the checkpoints in two folders array by array; at most one array of each is in memory.

    Raises:
      CheckpointError: one of them is none, or cannot be read.
    """
    a, b = checkpoint.stored_leaves(path_a), checkpoint.stored_leaves(path_b)
    names = list(dict.fromkeys([*a, *b]))
    arrays = []
    for name in names:
        arrays.append(_difference(name, a.get(name), b.get(name)))
        report(len(arrays), len(names))
    facts = run_dirs.differences(_facts(path_a), _facts(path_b))
    return Compared(arrays, facts, run_dirs.differences(_mathematics(path_a), _mathematics(path_b)))


def _facts(path: str) -> dict[str, Any]:
    return {name: value for name, value in init_source.facts_of(path).items() if name != "sums"}


def _mathematics(path: str) -> dict[str, Any]:
    """Returns what the run of a checkpoint's folder computes; nothing of a folder that is in no run."""
    match = re.fullmatch(r"(.+)/checkpoints/\d+/\d+", path)
    run = RunDir(match[1] if match else path)
    return run.record()["mathematics"] if match and run.exists() else {}


def _difference(name: str, a: StoredLeaf | None, b: StoredLeaf | None) -> Difference:
    if a is None or b is None:
        return Difference(name, "only in A" if b is None else "only in B")
    if a.shape != b.shape:
        return Difference(name, "another shape")
    first, second = a.read(), b.read()
    if first.dtype == second.dtype and first.tobytes() == second.tobytes():
        norm = _norm(first)
        return Difference(name, "equal", 0.0, 0.0, norm, norm)
    largest = [0.0, 0.0]
    for x, y in _parts(first, second):
        off, size = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        relative = off[size > 0] / size[size > 0]
        largest = [max(largest[0], _max(off)), max(largest[1], _max(relative))]
    return Difference(name, "changed", *largest, _norm(first), _norm(second))


def _parts(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, len(flat[0]), _PART_NUMBERS):
        yield [array[start : start + _PART_NUMBERS].astype(np.float64) for array in flat]


def _norm(array: np.ndarray) -> float:
    return math.sqrt(math.fsum(float(part @ part) for [part] in _parts(array)))


def _max(array: np.ndarray) -> float:
    return float(array.max()) if array.size else 0.0
