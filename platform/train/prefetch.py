"""Reads what comes next in a thread of its own, in order, so that a step finds its rows there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent import futures
from itertools import islice
from types import TracebackType
from typing import Generic, TypeVar

AHEAD = 2  # batches read before they are asked for: one that is wanted next, one that is being read
TELL_EVERY_S = 0.5
THREAD_NAME = "prefetch"

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Results of a function for numbers that are known beforehand, each read while those before it are used."""

    def __init__(self, read: Callable[[int], T], numbers: Iterable[int]) -> None:
        """Takes the function, which is called by one thread at a time, and its arguments, in order."""
        self._read, self._numbers = read, iter(numbers)
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)
        self._coming = deque(self._pool.submit(read, number) for number in islice(self._numbers, AHEAD))

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, on_wait: Callable[[], None] = lambda: None) -> tuple[T, float]:
        """Returns the next result, and the seconds that were waited for it.

        Args:
          on_wait: called now and then while it is waited.

        Raises:
          Whatever the function raised for this number.
          IndexError: there is no number left.
        """
        start_s, wanted = time.monotonic(), self._coming.popleft()
        while not futures.wait([wanted], TELL_EVERY_S).done:
            on_wait()
        result, waited_s = wanted.result(), time.monotonic() - start_s
        self._coming.extend(self._pool.submit(self._read, number) for number in islice(self._numbers, 1))
        return result, waited_s
