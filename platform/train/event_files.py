"""TensorBoard's view of a run: the scalars of every step, in <run_dir>/tensorboard/.

    events.out.tfevents.<incarnation>-<sequence>      created if absent, never changed

TensorBoard reads a folder's files in the order of their names, as one curve. An incarnation begins with a session
start at its first step, at which TensorBoard drops what earlier incarnations did beyond it, and every file is
complete when its name appears. The metrics are the record, this is a view of them.

TensorBoard keeps every file of a folder open, and 1,000 are a usual limit. So a file is closed at each save, since
what is accepted must be in one, and between saves only when it holds a good part of all steps so far.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from typing import Any

from openmoe.pipelines import storage
from openmoe.platform.run import journal
from openmoe.platform.train import health

LEAST_SHARE = 0.01  # of the steps so far, in a file that is closed between saves

TAGS = {
    "loss": "loss/cross_entropy",
    "text_loss": "loss/text_cross_entropy",
    "total_loss": "loss/total",
    "z_loss": "loss/z",
    "aux_loss": "loss/router_balance",
    "router_z_loss": "loss/router_z",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "drop_fraction": "router/drop_fraction",
    "tokens_left_behind": "router/tokens_left_behind",
    "router_confidence": "router/confidence",
    "expert_usage": "router/expert_usage",
    "step_s": "speed/step_s",
    "data_wait_s": "speed/data_wait_s",
    "rendered_groups": "speed/rendered_groups",
}


def scalars(record: Mapping[str, Any], *, row_tokens: int) -> dict[str, float]:
    """Returns what TensorBoard shows of a step's metric record, by tag.

    The load of the experts is two numbers a layer: the largest expert's share of the choices, and their evenness,
    which is the entropy of the shares over that of equal ones: 1 when all experts are asked alike, 0 when one is.
    The router's entropy is the mean of that of each token's distribution, over an even one's.
    """
    values = {tag: record[name] for name, tag in TAGS.items() if name in record}
    first_row, end_row = record["rows"]
    values["speed/tokens_per_s"] = (end_row - first_row) * row_tokens / max(record["step_s"], 1e-9)
    for layer, load in enumerate(record.get("expert_load", ())):
        values[f"expert_load/layer_{layer}_largest"] = max(load)
        values[f"expert_load/layer_{layer}_evenness"] = health.load_entropy(load)
    for layer, entropy in enumerate(record.get("router_entropy", ())):
        values[f"router_entropy/layer_{layer}"] = entropy
    return values


class EventFiles:
    """Writes one incarnation's event files into `folder`."""

    def __init__(self, folder: str, *, incarnation: int, row_tokens: int, flush_s: float = 10.0) -> None:
        self._folder = folder
        self._incarnation, self._row_tokens, self._flush_s = incarnation, row_tokens, flush_s
        self._sequence = 0
        self._events: list[dict[str, Any]] = []  # fields of each
        self._steps = 0  # in the open file, and evaluations
        self._flushed_at_s = time.monotonic()

    def begin(self, step: int) -> None:
        """Ends all curves after `step`, from which the incarnation goes on."""
        self._events.append({"wall_time": time.time(), "step": step + 1, "session_log": {"status": "START"}})

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a step's metric record; it is durable after the next flush."""
        self._add(record["time_s"], record["step"], scalars(record, row_tokens=self._row_tokens))
        self._steps += 1
        is_late = time.monotonic() - self._flushed_at_s >= self._flush_s
        if is_late and self._steps >= LEAST_SHARE * record["step"]:
            self.flush()

    def append_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds what was measured after a step, by tag."""
        self._add(time.time(), step, values)
        self._steps += 1

    def _add(self, time_s: float, step: int, values: Mapping[str, float]) -> None:
        shown = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._events.append({"wall_time": time_s, "step": step, "summary": {"value": shown}})

    def flush(self) -> None:
        """Closes the open file: what was appended is durable when this returns."""
        self._flushed_at_s = time.monotonic()
        if not self._steps:
            return
        version = {"wall_time": time.time(), "file_version": "brain.Event:2"}
        path = storage.join(self._folder, f"events.out.tfevents.{self._incarnation:06d}-{self._sequence:06d}")
        journal.create(path, b"".join(map(_framed, [version, *self._events])), incarnation=self._incarnation)
        self._sequence += 1
        self._events, self._steps = [], 0


def _framed(fields: Mapping[str, Any]) -> bytes:
    """Returns an event as it stands in a file: length, its check, the event, its check."""
    # Imported at the first flush: it imports Google's storage client, and a restart waits for the imports of a worker.
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    data = event_pb2.Event(**fields).SerializeToString()  # ty: ignore[missing-attribute]
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])
