"""TensorBoard's view of a run: the scalars of every step, in <run_dir>/tensorboard/.

    events.out.tfevents.<incarnation>-<sequence>      created if absent, never changed

TensorBoard reads a folder's files in the order of their names, as one curve. An incarnation begins with a session
start at its first step, at which TensorBoard drops what earlier incarnations did beyond it, and every file is
complete when its name appears. The metrics are the record, this is a view of them.

TensorBoard keeps every file of a folder open, and 1,000 are a usual limit. So a file is closed at each save, since
what is accepted must be in one, and between saves only when it holds a good part of all steps so far.

The bytes are written here: tensorboardX imports Google's storage client, a quarter of what a worker imports otherwise.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from openmoe.pipelines import storage
from openmoe.platform.run import journal

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
    """
    values = {tag: record[name] for name, tag in TAGS.items() if name in record}
    first_row, end_row = record["rows"]
    values["speed/tokens_per_s"] = (end_row - first_row) * row_tokens / max(record["step_s"], 1e-9)
    for layer, load in enumerate(record.get("expert_load", ())):
        values[f"expert_load/layer_{layer}_largest"] = max(load)
        values[f"expert_load/layer_{layer}_evenness"] = _evenness(load)
    return values


def _evenness(shares: Sequence[float]) -> float:
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


class EventFiles:
    """Writes one incarnation's event files into `folder`."""

    def __init__(self, folder: str, *, incarnation: int, row_tokens: int, flush_s: float = 10.0) -> None:
        self._folder = folder
        self._incarnation, self._row_tokens, self._flush_s = incarnation, row_tokens, flush_s
        self._sequence = 0
        self._framed: list[bytes] = []
        self._steps = 0  # in the open file
        self._flushed_at_s = time.monotonic()

    def begin(self, step: int) -> None:
        """Ends all curves after `step`, from which the incarnation goes on."""
        self._framed.append(_framed(_event(time.time(), step + 1, _SESSION_START)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a step's metric record; it is durable after the next flush."""
        self._frame(record["time_s"], record["step"], scalars(record, row_tokens=self._row_tokens))
        self._steps += 1
        is_late = time.monotonic() - self._flushed_at_s >= self._flush_s
        if is_late and self._steps >= LEAST_SHARE * record["step"]:
            self.flush()

    def append_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds what was measured after a step, by tag."""
        self._frame(time.time(), step, values)

    def _frame(self, time_s: float, step: int, values: Mapping[str, float]) -> None:
        shown = b"".join(
            _sized(1, _sized(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items()
        )
        self._framed.append(_framed(_event(time_s, step, _sized(5, shown))))

    def flush(self) -> None:
        """Closes the open file: what was appended is durable when this returns."""
        self._flushed_at_s = time.monotonic()
        if not self._steps:
            return
        version = _framed(_event(time.time(), 0, _FILE_VERSION))
        path = storage.join(self._folder, f"events.out.tfevents.{self._incarnation:06d}-{self._sequence:06d}")
        journal.create(path, b"".join([version, *self._framed]), incarnation=self._incarnation)
        self._sequence += 1
        self._framed, self._steps = [], 0


# Messages of TensorFlow's event.proto and summary.proto as protocol buffers lay them out: the number of a field and its
# type in one byte, then its value, which for texts and messages is a length and so many bytes.


def _varint(number: int) -> bytes:
    """Returns a number in groups of seven bits, the lowest first."""
    parts = bytearray()
    while number >= 128:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _sized(field: int, content: bytes) -> bytes:
    return bytes([8 * field + 2]) + _varint(len(content)) + content


def _event(time_s: float, step: int, what: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time_s) + (b"\x10" + _varint(step) if step else b"") + what


_SESSION_START = _sized(7, b"\x08\x01")
_FILE_VERSION = _sized(3, b"brain.Event:2")


def _framed(event: bytes) -> bytes:
    """Returns an event as it stands in a file: length, its check, the event, its check."""
    length = struct.pack("<Q", len(event))
    return b"".join([length, _check(length), event, _check(event)])


def _table() -> list[int]:
    values = list(range(256))
    for _ in range(8):
        values = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in values]
    return values


_CRC32C = _table()


def _check(data: bytes) -> bytes:
    """Returns the CRC-32C of some bytes, turned and shifted as TFRecord files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 255] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
