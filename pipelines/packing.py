"""Budgeted packing: rows filled with segments, each a piece of one document with its own denoiser.

The length of a piece is chosen so that prompt, inputs, targets and both EOS fill what is left of the row.
What stays empty: one or two slots where one more span would not fit, and the end of a group's last row.
(The reference cuts fixed lengths and packs afterwards: 67 % of slots used.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from openmoe.pipelines import ul2
from openmoe.pipelines.permute import raw_stream
from openmoe.pipelines.tokenizer import Vocabulary

MIN_PIECE = 32  # tokens; a document is not cut into smaller pieces
MAX_SLACK = 2  # slots: one more span costs a token and two sentinels
LOOK_AHEAD = 64  # documents among which one is sought that fills a row well
ROWS_AT_ONCE = 128  # rows whose noise is drawn together: their arrays stay in the cache

# What a piece can be: the six denoisers, plain text to be predicted, a prompt with its answer. Stored in shards: add at
# the end alone.
KINDS = (*(denoiser.name for denoiser in ul2.DENOISERS), "next_token", "chat")
NEXT_TOKEN = len(ul2.DENOISERS)
CHAT = NEXT_TOKEN + 1


class Pieces(NamedTuple):
    """Which part of which document goes where; int64[S] each, in row order.

    A segment of several documents is a piece for each of them: the first has its slots, those after it have none.
    """

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    kind: np.ndarray  # index into KINDS


class Row(NamedTuple):
    """One packed row without its padding."""

    tokens: np.ndarray  # uint32[used]
    pieces: Pieces
    num_inputs: np.ndarray  # int64[pieces]
    num_targets: np.ndarray  # int64[pieces]


class Budget:
    """How long a piece may be: tables over slots and piece lengths, by denoiser."""

    def __init__(self, seq_len: int, vocabulary: Vocabulary) -> None:
        pieces = np.arange(2, seq_len)
        slots = [ul2.segment_lengths(denoiser, vocabulary, pieces) for denoiser in ul2.DENOISERS]
        fitting = [np.searchsorted(s, np.arange(seq_len + 1), side="right") for s in slots]
        self.slots = [[0, 0, *s.tolist()] for s in slots]  # [denoiser][piece]
        self.longest = [np.where(f > 0, f + 1, 0).tolist() for f in fitting]  # [denoiser][room]
        self.min_room = max(s[MIN_PIECE] for s in self.slots)  # slots in which every denoiser fits

    def fills(self, kind: int, left: int, room: int) -> int:
        """Returns the piece to take of a document with `left` tokens, 0 when it would leave a bad gap."""
        longest = self.longest[kind][room]
        if left > longest:
            return longest if left - longest >= MIN_PIECE else 0
        gap = room - self.slots[kind][left]
        return left if gap <= MAX_SLACK or gap >= self.min_room else 0

    def forced(self, kind: int, left: int, room: int) -> int:
        """Returns the piece to take when no document fills the row well."""
        longest = self.longest[kind][room]
        if left <= longest:
            return left
        return left - MIN_PIECE if left >= 2 * MIN_PIECE else min(longest, left - 2)


def plan(
    lengths: np.ndarray, seq_len: int, vocabulary: Vocabulary, *key: int | str, shares: np.ndarray = ul2.TENTHS
) -> Pieces:
    """Cuts documents, int64[n] of at least 2 tokens, into pieces and places them into rows, in order."""
    budget, kinds = Budget(seq_len, vocabulary), draw_kinds(shares, *key)
    unread = ((document, 0, left) for document, left in enumerate(lengths.tolist()))
    waiting = list(itertools.islice(unread, LOOK_AHEAD))  # (document, start, tokens left)
    pieces: list[tuple[int, int, int, int, int]] = []
    row, room = 0, seq_len
    while waiting:
        if room < budget.min_room:
            row, room = row + 1, seq_len
        kind = next(kinds)
        at, take = _choose(waiting, budget, kind, room)
        document, start, left = waiting.pop(at)
        pieces.append((row, document, start, take, kind))
        room -= budget.slots[kind][take]
        if take < left:
            waiting.insert(at, (document, start + take, left - take))
        else:
            waiting.extend(itertools.islice(unread, 1))
    return Pieces(*np.asarray(pieces, np.int64).reshape(-1, 5).T)


def _choose(waiting: list[tuple[int, int, int]], budget: Budget, kind: int, room: int) -> tuple[int, int]:
    """Returns which waiting document to take from, and how many tokens: the first that fills the row well."""
    for at, (_, _, left) in enumerate(waiting):
        if take := budget.fills(kind, left, room):
            return at, take
    return 0, budget.forced(kind, waiting[0][2], room)


def draw_kinds(shares: np.ndarray, *key: int | str) -> Iterator[int]:
    """Yields denoisers for ever, each entry of `shares` equally likely."""
    stream = raw_stream("denoisers", *key)
    while True:
        draws = (stream.random_raw(4096) >> np.uint64(32)) * np.uint64(len(shares)) >> np.uint64(32)
        yield from shares[draws.astype(np.int64)].tolist()


def rows(
    tokens: np.ndarray,
    lengths: np.ndarray,
    seq_len: int,
    vocabulary: Vocabulary,
    *key: int | str,
    shares: np.ndarray = ul2.TENTHS,
) -> Iterator[Row]:
    """Packs documents into rows and draws their noise.

    Args:
      tokens: uint32[total], the documents one after the other.
      lengths: int64[n], tokens of each document, at least 2.
      seq_len: slots a row.
      vocabulary: the ids of prompts, EOS and sentinels.
      key: names the randomness; the rows are a pure function of all arguments.
      shares: denoisers, of which each entry is equally likely for a piece.
    """
    pieces = plan(lengths, seq_len, vocabulary, *key, shares=shares)
    stream = raw_stream("noise", *key)
    first_token = np.cumsum(lengths) - lengths
    num_rows = int(pieces.row[-1]) + 1 if len(pieces.row) else 0
    bounds = np.searchsorted(pieces.row, np.arange(num_rows + 1))
    for lo in range(0, num_rows, ROWS_AT_ONCE):
        hi = min(lo + ROWS_AT_ONCE, num_rows)
        part = Pieces(*(field[bounds[lo] : bounds[hi]] for field in pieces))
        drawn = tokens[ul2.ranges(first_token[part.document] + part.start, part.length)]
        segments = ul2.corrupt(drawn, part.length, part.kind, stream.random_raw(len(drawn)), vocabulary)
        yield from split(part, segments, bounds[lo : hi + 1] - bounds[lo])


def split(part: Pieces, segments: ul2.Segments, bounds: np.ndarray) -> Iterator[Row]:
    """Yields rows: the pieces from each of `bounds` to the next one."""
    ends = np.concatenate([[0], np.cumsum(segments.num_inputs + segments.num_targets)])
    for first, last in itertools.pairwise(bounds.tolist()):
        yield Row(
            segments.tokens[ends[first] : ends[last]],
            Pieces(*(field[first:last] for field in part)),
            segments.num_inputs[first:last],
            segments.num_targets[first:last],
        )
