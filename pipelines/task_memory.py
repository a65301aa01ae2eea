"""A limit on the memory of one task, held by the kernel: a task that wants more ends, and nothing else does.

Ray reserves memory for a task and lets it take more; when a host has none left, it may be the trainer that is ended.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any


def within(limit_bytes: int | None, work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns `work` as a task that raises MemoryError when it wants more, or whose process ends if that was in C++."""
    return work if limit_bytes is None else functools.partial(_within, limit_bytes, work)


def _within(limit_bytes: int, work: Callable[[Any], Any], argument: Any) -> Any:
    with limited(limit_bytes):
        return work(argument)


@contextlib.contextmanager
def limited(limit_bytes: int) -> Generator[None]:
    """Refuses this process more than `limit_bytes` beyond what it has, while the block runs; only Linux can."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    import pyarrow as pa

    before, pool = resource.getrlimit(resource.RLIMIT_DATA), pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own takes a GiB at once, touched or not
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        pa.set_memory_pool(pool)


def _data_bytes() -> int:
    """Returns what the kernel counts against RLIMIT_DATA: memory that this process alone may write to."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmData"].split()[0]) * 1024
