"""Which stream, and which row of it, a global row is: arithmetic, with no state but the row number."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from openmoe.pipelines.config import BLOCK_ROWS
from openmoe.pipelines.permute import Permutation

# Rows are shuffled inside windows of a pass, so that a reader touches few shards at a time.
WINDOW_ROWS = 65536


class Location(NamedTuple):
    """Where global rows come from; each int64[n]."""

    stream: np.ndarray
    row: np.ndarray  # counted over all passes of that stream


class Stage(NamedTuple):
    """The mixture until a global row."""

    end: int | None  # None: for ever
    weights: Sequence[float]  # by stream; 0: not read


def one_stage(weights: Iterable[float]) -> tuple[Stage, ...]:
    """Returns the stages of a mixture that never changes."""
    return (Stage(None, tuple(weights)),)


def block_counts(weights: Sequence[float], block_rows: int = BLOCK_ROWS) -> np.ndarray:
    """Returns how many rows of a block each stream owns, int64[streams], by largest remainder."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * block_rows
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(-(shares - counts), kind="stable")
    counts[by_remainder[: block_rows - counts.sum()]] += 1
    return counts


class Mixture:
    """Exact proportions in every block of rows, in an order keyed by (seed, block).

    A stage begins with a new block and cuts off the last one of the stage before it. Every stream goes on with
    its next row, so that none is lost or read twice.
    """

    def __init__(self, stages: Sequence[Stage], seed: int, block_rows: int = BLOCK_ROWS) -> None:
        """Takes the stages in order, the last without an end; the key of the order; rows of a block."""
        self._parts = [_Part(stages[0], 0, 0, np.zeros(len(stages[0].weights), np.int64), seed, block_rows)]
        for stage in stages[1:]:
            self._parts.append(self._parts[-1].followed_by(stage))

    def locate(self, lo: int, hi: int) -> Location:
        """Returns the streams and their rows of the global rows [lo, hi)."""
        begun = [part for part in self._parts if part.start < hi and lo < part.end]
        found = [part.locate(max(lo, part.start), min(hi, part.end)) for part in begun]
        return Location(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def rows_needed(self, num_rows: int) -> np.ndarray:
        """Returns how many rows each stream must hold for the global rows [0, num_rows), int64[streams]."""
        return next(part for part in self._parts if num_rows < part.end).rows_needed(num_rows)

    def rows_available(self, stream_rows: np.ndarray) -> int:
        """Returns how many global rows, from 0 on, streams with int64[streams] rows can serve."""
        served = (part.rows_available(stream_rows) for part in self._parts)
        return next(rows for rows, part in zip(served, self._parts, strict=True) if rows < part.end)


class _Part:
    """The blocks of one stage."""

    def __init__(
        self, stage: Stage, start: int, first_block: int, first_rows: np.ndarray, seed: int, block_rows: int
    ) -> None:
        """Takes the stage; its first global row, block, and row of each stream; and how blocks are made."""
        self.start, self.end = start, math.inf if stage.end is None else stage.end
        self._first_block, self._first_rows = first_block, first_rows
        self._seed, self._block_rows = seed, block_rows
        self._counts = block_counts(stage.weights, block_rows)

    def followed_by(self, stage: Stage) -> _Part:
        """Returns the part of the next stage."""
        end = int(self.end)
        first_block = self._first_block - (self.start - end) // self._block_rows
        return _Part(stage, end, first_block, self.rows_needed(end), self._seed, self._block_rows)

    def locate(self, lo: int, hi: int | float) -> Location:
        """Returns the streams and their rows of the global rows [lo, hi), all of this part."""
        first, last = (lo - self.start) // self._block_rows, (int(hi) - 1 - self.start) // self._block_rows
        blocks = [self._block(block) for block in range(first, last + 1)]
        begin = self.start + first * self._block_rows
        return Location(*(np.concatenate(parts)[lo - begin : int(hi) - begin] for parts in zip(*blocks, strict=True)))

    def rows_needed(self, num_rows: int) -> np.ndarray:
        """Returns how many rows of each stream lie before a global row of this part, or before its end."""
        blocks, rest = divmod(num_rows - self.start, self._block_rows)
        begun = self._block(blocks).stream[:rest]
        return self._first_rows + blocks * self._counts + np.bincount(begun, minlength=len(self._counts))

    def rows_available(self, stream_rows: np.ndarray) -> int:
        """Returns how many global rows streams can serve if this part has no end; they serve what is before it."""
        left, is_read = stream_rows - self._first_rows, self._counts > 0
        blocks = int(np.min(left[is_read] // self._counts[is_read]))
        stream, row = self._block(blocks)
        missing = np.flatnonzero(row >= stream_rows[stream])
        return self.start + blocks * self._block_rows + int(missing[0])

    def _block(self, block: int) -> Location:
        stream, rank = _shuffled_block(tuple(self._counts.tolist()), self._seed, self._first_block + block)
        return Location(stream, (self._first_rows + block * self._counts)[stream] + rank)


@functools.lru_cache(maxsize=8)
def _shuffled_block(counts: tuple[int, ...], seed: int, number: int) -> Location:
    """Returns the streams of a block's rows, and each one's rank among the rows of its stream, which ascends."""
    slots = Permutation(sum(counts), "block", seed, number)(np.arange(sum(counts)))
    stream = np.searchsorted(np.cumsum(counts), slots, side="right")
    rank = np.empty_like(stream)
    rank[np.argsort(stream, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return Location(stream, rank)


def shuffle_pass(rows: np.ndarray, num_rows: int, *parts: int | str) -> np.ndarray:
    """Returns where in a pass of `num_rows` its rows in reading order lie; int64[n] to int64[n]."""
    stored = np.empty_like(rows)
    windows = rows // WINDOW_ROWS
    for window in np.unique(windows):
        start = int(window) * WINDOW_ROWS
        order = _shuffled_window(min(WINDOW_ROWS, num_rows - start), *parts, int(window))
        stored[windows == window] = start + order[rows[windows == window] - start]
    return stored


@functools.lru_cache(maxsize=64)  # of half a megabyte: each stream reads one after the other
def _shuffled_window(num_rows: int, *parts: int | str) -> np.ndarray:
    return Permutation(num_rows, "window", *parts)(np.arange(num_rows))
