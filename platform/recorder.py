"""Keeps what an incarnation has to tell: a record a step, its events, and the ledger of the rows it consumed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Generator
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax import Array

from openmoe.pipelines.storage import StorageError
from openmoe.platform import ledger
from openmoe.platform.event_files import EventFiles
from openmoe.platform.journal import Journal
from openmoe.platform.lineage import Claim, Position
from openmoe.platform.run_dir import RunDir
from openmoe.platform.wandb_curves import WandbCurves


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is NaN or infinite."""


class Recorder:
    """Writes metrics, ledger and events of one process; the first two only of process 0, since all are the same.

    Metrics are read one step late, so that the devices never wait for the host.
    """

    def __init__(
        self,
        run: RunDir,
        claim: Claim,
        report: Callable[[dict[str, Any]], None],
        *,
        row_tokens: int,
        trackers: Collection[str] = (),
    ) -> None:
        process = jax.process_index()
        self._leads = process == 0
        self._events = Journal(run.at("journal"), incarnation=claim.incarnation, process=process)
        self._metrics = Journal(run.at("metrics"), incarnation=claim.incarnation, process=process)
        self._ledger = Journal(run.at("ledger"), incarnation=claim.incarnation, process=process)
        self._curves = EventFiles(run.at("tensorboard"), incarnation=claim.incarnation, row_tokens=row_tokens)
        self._wandb = WandbCurves(run, row_tokens=row_tokens) if self._leads and "wandb" in trackers else None
        self._report = report
        self._in_flight: tuple[Position, Position, dict[str, Array | float]] | None = None
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
        if self._wandb:
            self._wandb.close()
        try:
            self.flush()
        except StorageError as failure:
            if error is None:
                raise
            error.add_note(f"and its last records are lost: {failure}")  # must not hide what ended the incarnation

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
          NonFiniteLoss: the step before this one gave a NaN or infinite loss.
        """
        self.catch_up()
        self._in_flight = (self._last, position, metrics)
        self._last = position

    def catch_up(self) -> None:
        """Waits for the step in flight, if any, and keeps its metrics."""
        if self._in_flight is None:
            return
        before, position, metrics = self._in_flight
        self._in_flight = None
        values = {name: _to_json(value) for name, value in jax.device_get(metrics).items()}
        rows = [before.next_row, position.next_row]
        entry = ledger.trained(self.ledger_head, position, rows[0], values["batch_checksum"])
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
        if not math.isfinite(values["total_loss"]):
            raise NonFiniteLoss(f"step {position.step}, rows {rows[0]}..{rows[1] - 1}: loss {values['total_loss']}")

    def flush(self) -> None:
        """Makes all that was kept so far durable."""
        self._ledger.flush()
        self._metrics.flush()
        self._events.flush()
        self._curves.flush()


def _to_json(value: np.ndarray) -> Any:
    return np.asarray(value).tolist()
