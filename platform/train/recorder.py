"""Keeps what an incarnation has to tell: a record a step, its events, and the ledger of the rows it consumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax import Array

from openmoe.pipelines.storage import StorageError
from openmoe.platform.run import ledger
from openmoe.platform.run.journal import Journal
from openmoe.platform.run.lineage import Claim, Position
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.train.event_files import EventFiles
from openmoe.platform.train.wandb_curves import WandbCurves

Check = Callable[[dict[str, Any], Callable[..., None]], None]


class Recorder:
    """Writes metrics, ledger and events of one process; the first two only of process 0, since all are the same.

    Metrics are read one step late, so that the devices never wait for the host; those of the first step at once, since
    whoever restarted the run waits for them.
    """

    def __init__(
        self,
        run: RunDir,
        claim: Claim,
        report: Callable[[dict[str, Any]], None],
        *,
        row_tokens: int,
        trackers: Collection[str] = (),
        check: Check = lambda record, event: None,
    ) -> None:
        """Takes where to write; `report` is told each record, `check` gets it too, and `event`, and may end it all."""
        process = jax.process_index()
        self._leads = process == 0
        self._events = Journal(run.at("journal"), incarnation=claim.incarnation, process=process)
        self._metrics = Journal(run.at("metrics"), incarnation=claim.incarnation, process=process)
        self._ledger = Journal(run.at("ledger"), incarnation=claim.incarnation, process=process)
        self._curves = EventFiles(run.at("tensorboard"), incarnation=claim.incarnation, row_tokens=row_tokens)
        self._wandb = WandbCurves(run, row_tokens=row_tokens) if self._leads and "wandb" in trackers else None
        self._report, self._check = report, check
        self._in_flight: tuple[Position, Position, dict[str, Array | float]] | None = None
        self._has_recorded = False
        self._last = Position()
        self._last_time_s = time.time()
        self.ledger_head = ""
        self.newest: dict[str, float] = {}  # values of the metrics that are one number
        self.loss_tokens: int | None = 0  # loss-carrying tokens trained on; None: unknown

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.event("raised", error=f"{type(error).__name__}: {error}")
        try:
            self.flush()  # before all else: a peer that ended as well may have Ray kill this process at any moment
        except StorageError as failure:
            if error is None:
                raise
            error.add_note(f"and its last records are lost: {failure}")  # must not hide what ended the incarnation
        finally:
            if self._wandb:
                self._wandb.close()

    def begin(self, position: Position, ledger_head: str, loss_tokens: int | None) -> None:
        """Says where the incarnation starts; the time of the first step counts from here."""
        self._last, self.ledger_head, self._last_time_s = position, ledger_head, time.time()
        self.loss_tokens = loss_tokens
        self._curves.begin(position.step)
        if self._wandb:
            self._wandb.begin(position.step)

    def event(self, kind: str, **facts: Any) -> None:
        """Journals something that happened, with the time it happened."""
        self._events.append({"event": kind, "time_s": time.time(), **facts})
        if self._wandb and kind == "accepted":
            self._wandb.accepted(facts["step"])

    @contextlib.contextmanager
    def charged(self, cause: str) -> Generator[None]:
        """Journals that the block's time was spent on `cause`, as `openmoe goodput` names it."""
        start_s = time.time()
        try:
            yield
        finally:
            self.event("charged", cause=cause, seconds=time.time() - start_s)

    def record(self, position: Position, metrics: dict[str, Array | float]) -> None:
        """Takes the metrics of the step that led to `position`, and keeps those of the step before it.

        Raises:
          BadNumbers: as the check of the step before this one, or of the first step, found.
        """
        self.catch_up()
        self._in_flight = (self._last, position, metrics)
        self._last = position
        if not self._has_recorded:
            self.catch_up()
            self._has_recorded = True

    def catch_up(self) -> None:
        """Waits for the step in flight, if any, and keeps its metrics."""
        if self._in_flight is None:
            return
        before, position, metrics = self._in_flight
        self._in_flight = None
        values = {name: _to_json(value) for name, value in jax.device_get(metrics).items()}
        rows = [before.next_row, position.next_row]
        entry = ledger.trained(self.ledger_head, position, rows[0], values["batch_checksum"], _incident(values))
        self.ledger_head = entry.digest
        now_s = time.time()
        record = {
            "step": position.step,
            "rows": rows,
            "time_s": now_s,
            "step_s": now_s - self._last_time_s,
            **values,
        }
        self._last_time_s = now_s
        self.newest = {**self.newest, **{name: value for name, value in values.items() if isinstance(value, float)}}
        if self.loss_tokens is not None:
            self.loss_tokens += int(values["loss_tokens"])
        if self._leads:
            self._ledger.append(ledger.to_json(entry))
            self._metrics.append(record)
            self._curves.append(record)
            if self._wandb:
                self._wandb.append(record)
            self._report(record)
        self._check(record, self.event if self._leads else lambda kind, **facts: None)

    def leave_out(self, position: Position, hi: int, incident: str) -> Position:
        """Enters the rows up to `hi` into the ledger as skipped; returns the position after them."""
        self.catch_up()
        self._last = Position(position.step, hi)
        entry = ledger.skipped(self.ledger_head, self._last, position.next_row, incident)
        self.ledger_head = entry.digest
        if self._leads:
            self._ledger.append(ledger.to_json(entry))
            self.event("left_out", step=position.step, rows=[position.next_row, hi], incident=incident)
        return self._last

    def evaluated(self, position: Position, *, seconds: float, losses: dict[str, float], **facts: Any) -> None:
        """Journals an evaluation after the step that led to `position`, of which the next step's time is free."""
        self._last_time_s += seconds
        self.newest |= {f"eval/{name}": loss for name, loss in losses.items()}
        if not self._leads:
            return
        facts = {"step": position.step, "next_row": position.next_row, "seconds": seconds, "losses": losses, **facts}
        self.event("evaluated", **facts)
        self._curves.append_scalars(position.step, {f"eval/{name}": loss for name, loss in losses.items()})
        if self._wandb:
            self._wandb.evaluated(position.step, losses)

    def flush(self) -> None:
        """Makes all that was kept so far durable; first the events, which say why an incarnation ends."""
        self._events.flush()
        self._ledger.flush()
        self._metrics.flush()
        self._curves.flush()


def _incident(values: dict[str, Any]) -> str:
    """Returns why a step's update was not made; "" if it was."""
    if not values.get("update_skipped"):
        return ""
    return f"update skipped: loss {values['total_loss']}, gradient norm {values['grad_norm']}"


def _to_json(value: np.ndarray) -> Any:
    return np.asarray(value).tolist()
