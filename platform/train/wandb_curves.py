"""Weights & Biases' view of a run, if `trackers: [wandb]` asks for it: one W&B run for all incarnations.

W&B can only append. So a step is sent once a checkpoint at or after it was accepted: what may yet be undone is not
there, and nothing has to be taken back. An incarnation begins by sending what W&B lacks of the steps before it, from
the run directory. All of it happens in a thread of process 0: W&B may be slow or away, and training does not wait.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.train.event_files import scalars

CLOSE_S = 30.0  # what W&B has not taken by then, the next incarnation sends
INIT_S = 60.0
EVALUATION = "evaluation"  # held-out losses after a step, with its record

Record = Mapping[str, Any]


def run_id(record: Record) -> str:
    """Returns the id of the W&B run that belongs to a run.json."""
    return hashlib.sha256(f"{record['name']} {record['created_s']} {record['spec_hash']}".encode()).hexdigest()[:12]


class Outbox:
    """Records of steps that wait for a checkpoint."""

    def __init__(self) -> None:
        self._waiting: deque[Record] = deque()

    def put(self, record: Record) -> None:
        """Takes the record of a step."""
        self._waiting.append(record)

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Adds the held-out losses after a step to its record, while that waits."""
        if self._waiting and self._waiting[-1]["step"] == step:
            self._waiting[-1] = {**self._waiting[-1], EVALUATION: losses}

    def accepted(self, step: int) -> list[Record]:
        """Returns the records up to the step of an accepted checkpoint, each once."""
        found = []
        while self._waiting and self._waiting[0]["step"] <= step:
            found.append(self._waiting.popleft())
        return found


class WandbCurves:
    """Sends one incarnation's steps that count."""

    def __init__(self, run: RunDir, *, row_tokens: int) -> None:
        """Takes the run directory.

        Raises:
          RunDirError: wandb is not installed here.
        """
        if importlib.util.find_spec("wandb") is None:
            raise RunDirError("trackers: wandb is not installed on this worker; install the extra wandb, or remove it")
        self._run, self._row_tokens = run, row_tokens
        self._outbox = Outbox()
        self._to_send: queue.SimpleQueue[list[Record] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Begins to send; first what W&B lacks up to `step`, from which the incarnation goes on."""
        self._thread = threading.Thread(target=self._send_all, args=(step,), name="wandb", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> None:
        """Takes the record of a step."""
        self._outbox.put(record)

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """Takes the held-out losses after the newest step."""
        self._outbox.evaluated(step, losses)

    def accepted(self, step: int) -> None:
        """Lets go of the steps up to that of an accepted checkpoint; nobody keeps them where W&B was given up."""
        records = self._outbox.accepted(step)
        if self._thread and self._thread.is_alive():
            self._to_send.put(records)

    def close(self) -> None:
        """Waits a while until W&B has what was let go."""
        self._to_send.put(None)
        if self._thread:
            self._thread.join(CLOSE_S)

    def _send_all(self, step: int) -> None:
        try:
            wandb = importlib.import_module("wandb")  # optional, so that type checkers may not find it
            record = self._run.record()
            settings = wandb.Settings(console="off", disable_git=True, disable_code=True, init_timeout=INIT_S)
            there = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "openmoe"),
                id=run_id(record),
                name=record["name"],
                resume="allow",
                config=record["spec"],
                settings=settings,
            )
            if there.step <= step:
                evaluations = {e["step"]: {EVALUATION: e["losses"]} for e in self._run.evaluations()}
                lacking = itertools.takewhile(lambda record: record["step"] >= there.step, self._run.newest_steps())
                before = [{**r, **evaluations.get(r["step"], {})} for r in lacking if r["step"] <= step]
                self._send(there, before[::-1])
            while (records := self._to_send.get()) is not None:
                self._send(there, records)
            there.finish()
        except Exception as error:  # of any kind: a view of the run must not end it
            print(f"wandb: {error}; the run goes on, and the next incarnation sends what is missing", file=sys.stderr)

    def _send(self, there: Any, records: Iterable[Record]) -> None:
        for record in records:
            if record["step"] >= there.step:  # W&B has those before
                evaluated = {f"eval/{name}": loss for name, loss in record.get(EVALUATION, {}).items()}
                there.log({**scalars(record, row_tokens=self._row_tokens), **evaluated}, step=record["step"])
