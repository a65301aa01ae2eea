"""Saves, accepts and restores checkpoints: a checkpoint counts only when an acceptance record says so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from openmoe.model import checkpoint, interop, step
from openmoe.pipelines import storage
from openmoe.platform.run import lineage
from openmoe.platform.run.lineage import Acceptance, Claim, Position
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import init_from, init_source, restore
from openmoe.platform.train.cadence import NOTHING_SEEN, Seen
from openmoe.platform.train.notice import Notice
from openmoe.platform.train.pace import Pace
from openmoe.platform.train.recorder import Recorder


class NonFiniteState(ArithmeticError):
    """A parameter or a moment of the optimizer is NaN or infinite; such a state is not saved."""


class Superseded(RuntimeError):
    """A newer incarnation has claimed the run; this one must not write any more."""


class Saver:
    """The checkpoints of one incarnation, in a folder of its own."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunDir,
        claim: Claim,
        recorder: Recorder,
        *,
        data_id: str,
        seen: Seen = NOTHING_SEEN,
    ) -> None:
        self._spec, self._run, self._claim, self._recorder = spec, run, claim, recorder
        self._data_id, self._record = data_id, run.record()
        self._pace = Pace(spec, seen, recorder)
        self._folder = f"checkpoints/{claim.incarnation:06d}"
        self._checkpointer = checkpoint.Checkpointer(run.at(self._folder))
        self._saving: tuple[Acceptance, float] | None = None  # what is saved, and when that began
        self._stored: set[str] | None = None  # what lies below checkpoints/, once it has been listed

    def restore(self, mesh: Mesh) -> tuple[step.TrainState, Position]:
        """Returns the state, in its plain form, and the position to go on from.

        They are, in this order: those of the newest accepted checkpoint; from the start, with the parameters
        that `init_from` names; from scratch.

        Raises:
          DamagedCheckpoint: it is missing, unreadable, or its bits differ from those that were accepted.
          RunDirError: what was accepted is not on record here, or was trained on other data.
        """
        start_s = time.time()
        spec = self._spec
        accepted = next((a for a in self._run.acceptances() if a.number == self._claim.resumes), None)
        if accepted is None and self._claim.resumes:
            raise RunDirError(
                f"run_dir: {self._run.path}: acceptance {self._claim.resumes}, which incarnation "
                f"{self._claim.incarnation} goes on from, is not there; all hosts must see the same run_dir"
            )
        if accepted is None:
            state = init_from.initial_state(spec, mesh, self._recorder.event)
            self._recorder.begin(Position(), "", 0)
            self._pace.begin(0)
            return state, Position()
        if accepted.data_id != self._data_id:
            raise RunDirError(
                f"data_dir: holds data set {self._data_id}, the run was trained on {accepted.data_id}; "
                "restore that folder, or choose another run_dir"
            )
        template = step.state_shapes(spec.model, spec.optimizer, mesh)
        state, facts = restore.restored(self._run, accepted, template)
        position = Position(accepted.step, accepted.next_row)
        self._recorder.begin(position, accepted.ledger_head, facts.get("loss_tokens"))
        self._pace.begin(position.step)
        self._recorder.newest = dict(accepted.metrics)
        self._recorder.event("restored", step=position.step, accepted=accepted.number, seconds=time.time() - start_s)
        return state, position

    def after_step(
        self,
        position: Position,
        notice: Notice,
        plain: Callable[[], step.TrainState],
        beat: Callable[[], None] = lambda: None,
        *,
        ends: bool = False,
    ) -> None:
        """Saves where the cadence or a notice asks for it, and accepts what has been committed.

        Args:
          position: after the step, the same in all processes.
          notice: what this process may have heard.
          plain: returns the state in its plain form.
          beat: called when what follows takes longer than a step.
          ends: it is the run's last step, whatever the run file says.
        """
        noticed, due = notice.reached(position.step), self._pace.is_due(position.step) or ends
        if noticed or due:
            beat()
            self._recorder.catch_up()
            if (noticed and self._fits(notice, position)) or due:
                self.save(plain(), position)
        if self._saving is not None and (noticed or not self._checkpointer.is_saving()):
            beat()
            self.wait()

    def _fits(self, notice: Notice, position: Position) -> bool:
        """Returns whether a save is done before the machines go; all processes ask at once, and agree."""
        save_s = self._pace.seen.save_s or 0.0
        left_s = max(0.0, self._saving[1] + save_s - time.monotonic()) if self._saving else 0.0
        answer = notice.answer(left_s + save_s)
        if jax.process_index() == 0:
            self._recorder.event("notice", step=position.step, **answer._asdict())
            self._recorder.flush()
        return answer.saves

    def save(self, state: step.TrainState, position: Position) -> None:
        """Starts an asynchronous save of a state in its plain form; `after_step` notices its end.

        Raises:
          NonFiniteState: it is none to go on from.
        """
        self._recorder.catch_up()
        self.wait()
        start_s = time.monotonic()
        examined = checkpoint.examine(state)
        if examined.not_finite:
            what = f"{interop.listed(examined.not_finite)}: holds numbers that are not finite; it is not saved"
            guilty = (1 + self._spec.health.guilty_steps_before) * self._spec.train.batch_rows
            rows = [max(position.next_row - guilty, 0), position.next_row]
            facts = {"rows": rows, "what": what, "is_spike": False, "ends": True}
            self._recorder.event("bad_numbers", step=position.step, **facts)
            raise NonFiniteState(f"step {position.step}: {what}")
        acceptance = Acceptance(
            number=max((a.number for a in self._run.acceptances()), default=0) + 1,
            incarnation=self._claim.incarnation,
            step=position.step,
            next_row=position.next_row,
            checkpoint=f"{self._folder}/{position.step}",
            digest=checkpoint.digest(state, examined.sums),
            ledger_head=self._recorder.ledger_head,
            data_id=self._data_id,
            metrics=self._recorder.newest,
        )
        with _storage_named(self._run.at(acceptance.checkpoint)):
            self._checkpointer.save(position.step, state, self._facts(acceptance) | {"sums": examined.sums})
        self._saving = (acceptance, start_s)
        stall_s = time.monotonic() - start_s
        self._recorder.event("save_started", step=position.step, stall_s=stall_s)
        self._recorder.flush()
        self._pace.saved(position.step, stall_s)

    def _facts(self, acceptance: Acceptance) -> dict[str, Any]:
        """Returns what lies inside a checkpoint, besides its arrays; with the spec it says what it is, wherever it is.

        A step's randomness is fold_in(seed, step), so these two are the state of the random numbers.
        """
        train, row_tokens = self._spec.train, self._spec.data.seq_len
        known = {name: self._record[name] for name in (init_source.TOKENIZER,) if name in self._record}
        return {
            **known,
            "run": self._record["name"],
            "spec_hash": self._record["spec_hash"],
            "seed": self._spec.seed,
            "tokens": acceptance.step * train.batch_rows * row_tokens,
            "loss_tokens": self._recorder.loss_tokens,
            **{name: getattr(acceptance, name) for name in restore.SAME_IN_BOTH},
        }

    def wait(self) -> None:
        """Waits until the save in progress, if any, is committed and accepted; journals how long.

        Raises:
          Superseded: a newer incarnation exists, so this checkpoint will never count.
        """
        if self._saving is not None:
            with self._recorder.charged("save"):
                self._accept(*self._saving)

    def _accept(self, acceptance: Acceptance, start_s: float) -> None:
        with _storage_named(self._run.at(acceptance.checkpoint)):
            self._checkpointer.wait()
        self._saving = None
        if any(claim.incarnation > self._claim.incarnation for claim in self._run.claims()):
            raise Superseded(f"incarnation {self._claim.incarnation} is no longer the newest")
        if jax.process_index() == 0:
            acceptance = self._run.accept(replace(acceptance, time_s=time.time()))
        seconds = time.monotonic() - start_s
        self._pace.accepted(seconds)  # in all processes: the slowest of them says what fits a notice
        if jax.process_index() == 0:
            self._recorder.event("accepted", step=acceptance.step, number=acceptance.number, seconds=seconds)
            self._recorder.flush()
            self._prune(acceptance)

    def _prune(self, newest: Acceptance) -> None:
        """Removes the checkpoints that need not be kept, and what earlier incarnations have left unfinished."""
        claims, everything, keep = self._run.claims(), self._run.acceptances(), self._spec.retention
        valid = lineage.valid_acceptances(claims, everything, self._run.quarantined())
        if newest.number not in {a.number for a in valid}:
            return  # another has claimed the run: what stays is its affair
        self._stored = {*(self._run.stored_checkpoints() if self._stored is None else self._stored), newest.checkpoint}
        for path in lineage.removable(self._stored, valid, everything, keep, writer=self._claim.incarnation):
            try:
                storage.remove_folder(self._run.at(path))
            except storage.StorageError as error:  # tried again at the next save: no reason to end a run
                self._recorder.event("not_removed", checkpoint=path, error=str(error))
                if isinstance(error, storage.StorageUnavailable):
                    return
            else:
                self._stored.discard(path)


@contextlib.contextmanager
def _storage_named(path: str) -> Generator[None]:
    """Says in one line that storage is full, silent or closed: Orbax and TensorStore bury it in errors of theirs."""
    try:
        yield
    except Exception as error:
        if "no space left" in str(error).lower():
            raise storage.StorageError(
                f"{path}: cannot be written: the disk is full; free some space, or set fewer train.keep_checkpoints"
            ) from error
        if isinstance(error, restore.NOT_DAMAGE) or (refusal := restore.refused(error, path, "be written")) is None:
            raise
        raise refusal from error
