"""Saves, accepts and restores checkpoints: a checkpoint counts only when an acceptance record says so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

import jax
from jax.sharding import Mesh

from openmoe.model import checkpoint, step
from openmoe.pipelines import storage
from openmoe.platform import lineage
from openmoe.platform.lineage import Acceptance, Claim, Position
from openmoe.platform.recorder import Recorder
from openmoe.platform.run_dir import RunDir, RunDirError
from openmoe.platform.spec import RunSpec


class DamagedCheckpoint(RuntimeError):
    """An accepted checkpoint cannot be restored to the bits that were saved."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason

    def __str__(self) -> str:
        return f"acceptance {self.number}: {self.reason}"


class Superseded(RuntimeError):
    """A newer incarnation has claimed the run; this one must not write any more."""


class Saver:
    """The checkpoints of one incarnation, in a folder of its own."""

    def __init__(self, spec: RunSpec, run: RunDir, claim: Claim, recorder: Recorder, *, data_id: str) -> None:
        self._spec, self._run, self._claim, self._recorder = spec, run, claim, recorder
        self._data_id = data_id
        self._folder = f"checkpoints/{claim.incarnation:06d}"
        self._checkpointer = checkpoint.Checkpointer(run.at(self._folder))
        self._saving: tuple[Acceptance, float] | None = None
        self._pruned: set[str] = set()

    def restore(self, mesh: Mesh) -> tuple[step.TrainState, Position]:
        """Returns the state, in its plain form, and the position to go on from.

        They are, in this order: those of the newest accepted checkpoint; those of a run from scratch.

        Raises:
          DamagedCheckpoint: it is missing, unreadable, or its bits differ from those that were accepted.
        """
        start_s = time.time()
        spec = self._spec
        accepted = next((a for a in self._run.acceptances() if a.number == self._claim.resumes), None)
        if accepted is None:
            state = step.init_state(spec.model, spec.optimizer, spec.seed, mesh)
            self._recorder.begin(Position(), "")
            return state, Position()
        if accepted.data_id != self._data_id:
            raise RunDirError(
                f"data.dir: holds data set {self._data_id}, the run was trained on {accepted.data_id}; "
                "restore that folder, or choose another run_dir"
            )
        template = step.state_shapes(spec.model, spec.optimizer, mesh)
        folder, _, number = accepted.checkpoint.rpartition("/")
        try:
            state, loader_state = checkpoint.Checkpointer(self._run.at(folder)).restore(int(number), template)
        except (ValueError, OSError, KeyError) as error:
            raise DamagedCheckpoint(accepted.number, f"{accepted.checkpoint}: {error}") from error
        if (digest := checkpoint.checksum(state)) != accepted.digest:
            raise DamagedCheckpoint(
                accepted.number,
                f"{accepted.checkpoint}: its bits have digest {digest}, accepted was {accepted.digest}",
            )
        position = Position(accepted.step, loader_state["next_row"])
        self._recorder.begin(position, accepted.ledger_head)
        self._recorder.event("restored", step=position.step, accepted=accepted.number, seconds=time.time() - start_s)
        return state, position

    def is_due(self, step_number: int) -> bool:
        """Returns whether to save after this step: every checkpoint_every_steps, and after the last."""
        every = self._spec.train.checkpoint_every_steps
        return step_number % every == 0 or step_number == self._spec.train.total_steps

    def save(self, state: step.TrainState, position: Position) -> None:
        """Starts an asynchronous save of a state in its plain form; `accept_committed` notices its end."""
        self.wait()
        start_s = time.time()
        acceptance = Acceptance(
            number=max((a.number for a in self._run.acceptances()), default=0) + 1,
            incarnation=self._claim.incarnation,
            step=position.step,
            next_row=position.next_row,
            checkpoint=f"{self._folder}/{position.step}",
            digest=checkpoint.checksum(state),
            ledger_head=self._recorder.ledger_head,
            data_id=self._data_id,
        )
        with _full_disk_named(self._run.at(acceptance.checkpoint)):
            self._checkpointer.save(position.step, state, {"next_row": position.next_row})
        self._saving = (acceptance, start_s)
        self._recorder.event("save_started", step=position.step, stall_s=time.time() - start_s)
        self._recorder.flush()

    def accept_committed(self) -> None:
        """Writes the acceptance of the save in progress, if it has been committed since."""
        if self._saving is not None and not self._checkpointer.is_saving():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress, if any, is committed and accepted.

        Raises:
          Superseded: a newer incarnation exists, so this checkpoint will never count.
        """
        if self._saving is None:
            return
        acceptance, start_s = self._saving
        with _full_disk_named(self._run.at(acceptance.checkpoint)):
            self._checkpointer.wait()
        self._saving = None
        if any(claim.incarnation > self._claim.incarnation for claim in self._run.claims()):
            raise Superseded(f"incarnation {self._claim.incarnation} is no longer the newest")
        if jax.process_index() == 0:
            acceptance = self._run.accept(acceptance)
            self._recorder.event(
                "accepted", step=acceptance.step, number=acceptance.number, seconds=time.time() - start_s
            )
            self._recorder.flush()
            self._prune()

    def _prune(self) -> None:
        """Removes the checkpoints of all but the newest `keep_checkpoints` acceptances that count."""
        everything = self._run.acceptances()
        valid = lineage.valid_acceptances(self._run.claims(), everything, self._run.quarantined())
        kept = {a.checkpoint for a in valid[-self._spec.train.keep_checkpoints :]}
        for checkpoint_path in {a.checkpoint for a in everything} - kept - self._pruned:
            storage.remove_folder(self._run.at(checkpoint_path))
            self._pruned.add(checkpoint_path)


@contextlib.contextmanager
def _full_disk_named(path: str) -> Generator[None]:
    """Says in one line that the disk is full: Orbax and TensorStore bury it in errors of many kinds."""
    try:
        yield
    except Exception as error:
        if "no space left" not in str(error).lower():
            raise
        raise storage.StorageError(
            f"{path}: cannot be written: the disk is full; free some space, or set fewer train.keep_checkpoints"
        ) from error
