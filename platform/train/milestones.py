"""When this process passed what lies before it can keep records, for the first record that it keeps."""

from __future__ import annotations

import time

import psutil

_passed: dict[str, float] = {}


def passed(name: str) -> None:
    """Notes that the process has just come this far."""
    _passed[name] = time.time()


def times() -> dict[str, float]:
    """Returns the Unix time of each milestone, and `process_s`, when the process began."""
    return {"process_s": psutil.Process().create_time(), **_passed}
