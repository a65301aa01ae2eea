"""Which source, pass and row of a pass a global row is: arithmetic, with no state but the row number."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from openmoe.pipelines.config import BLOCK_ROWS
from openmoe.pipelines.permute import Permutation

# Rows are shuffled inside windows of a pass, so that a reader touches few shards at a time.
WINDOW_ROWS = 65536


class Location(NamedTuple):
    """Where global rows come from; each int64[n]."""

    source: np.ndarray
    row: np.ndarray  # counted over all passes of that source


def block_counts(weights: list[float], block_rows: int = BLOCK_ROWS) -> np.ndarray:
    """Returns how many rows of a block each source owns, int64[sources], by largest remainder."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * block_rows
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(-(shares - counts), kind="stable")
    counts[by_remainder[: block_rows - counts.sum()]] += 1
    return counts


class Mixture:
    """Exact proportions in every block of rows, in an order keyed by (seed, block)."""

    def __init__(self, weights: list[float], seed: int, block_rows: int = BLOCK_ROWS) -> None:
        self._block_rows = block_rows
        self._seed = seed
        self._counts = block_counts(weights, block_rows)

    def locate(self, lo: int, hi: int) -> Location:
        """Returns the sources and their rows of the global rows [lo, hi)."""
        first, last = lo // self._block_rows, (hi - 1) // self._block_rows
        blocks = [self._block(block) for block in range(first, last + 1)]
        window = slice(lo - first * self._block_rows, hi - first * self._block_rows)
        return Location(*(np.concatenate(parts)[window] for parts in zip(*blocks, strict=True)))

    def _block(self, block: int) -> Location:
        return _block(tuple(self._counts.tolist()), self._seed, block)

    def rows_needed(self, num_rows: int) -> np.ndarray:
        """Returns how many rows each source must hold for the global rows [0, num_rows), int64[sources]."""
        blocks, rest = divmod(num_rows, self._block_rows)
        begun = self._block(blocks).source[:rest]
        return blocks * self._counts + np.bincount(begun, minlength=len(self._counts))

    def rows_available(self, source_rows: np.ndarray) -> int:
        """Returns how many global rows, from 0 on, sources with int64[sources] rows can serve."""
        blocks = int(np.min(np.asarray(source_rows) // self._counts))
        source, row = self._block(blocks)
        missing = np.flatnonzero(row >= np.asarray(source_rows)[source])
        return blocks * self._block_rows + int(missing[0])


@functools.lru_cache(maxsize=8)
def _block(counts: tuple[int, ...], seed: int, block: int) -> Location:
    """Returns the rows of one block; a source's own rows stay in ascending order."""
    slots = Permutation(sum(counts), "block", seed, block)(np.arange(sum(counts)))
    source = np.searchsorted(np.cumsum(counts), slots, side="right")
    row = np.empty_like(source)
    by_source = np.argsort(source, kind="stable")
    row[by_source] = np.concatenate([block * count + np.arange(count) for count in counts])
    return Location(source, row)


def shuffle_pass(rows: np.ndarray, num_rows: int, *parts: int | str) -> np.ndarray:
    """Returns where in a pass of `num_rows` its rows in reading order lie; int64[n] to int64[n]."""
    stored = np.empty_like(rows)
    windows = rows // WINDOW_ROWS
    for window in np.unique(windows):
        start = int(window) * WINDOW_ROWS
        permutation = Permutation(min(WINDOW_ROWS, num_rows - start), "window", *parts, int(window))
        stored[windows == window] = start + permutation(rows[windows == window] - start)
    return stored
