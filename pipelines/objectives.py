"""What each objective makes of documents: the function that packs them into rows.

`ul2`         six denoisers; `packing.rows`, or `reference.rows` as the original packed them
`prefix_lm`   the last of the six alone, S, with its mode prompt: the original has no prefix LM without one. Any
              number of pieces a row, split points uniform, loss on what follows them
`next_token`  documents with EOS, one after the other, cut into rows; every token is a target. A document is a segment
              of its own in each row, so that attention stays inside it. (The original: rows are one segment, and EOS
              overwrites the last token of each.)
`chat`        a prompt without loss, then its answer and EOS, on which the loss is: a segment of its own, never cut at a
              row's end. One longer than a row keeps the end of its prompt and the beginning of its answer
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from openmoe.pipelines import packing, reference, ul2
from openmoe.pipelines.packing import Pieces, Row
from openmoe.pipelines.tokenizer import Vocabulary

Packer = Callable[..., Iterator[Row]]  # (tokens, lengths, seq_len, vocabulary, *key): see `packing.rows`


def packer(objective: str, ul2_packing: str) -> Packer:
    """Returns the function that packs a group of documents; `ul2_packing` is `budgeted` or `reference`."""
    if objective == "next_token":
        return next_token_rows
    if objective == "chat":
        return chat_rows
    if objective == "prefix_lm":
        return functools.partial(packing.rows, shares=np.asarray([ul2.PREFIX_LM]))
    return reference.rows if ul2_packing == "reference" else packing.rows


def next_token_rows(
    tokens: np.ndarray, lengths: np.ndarray, seq_len: int, vocabulary: Vocabulary, *key: int | str
) -> Iterator[Row]:
    """Yields the rows of documents for next-token prediction; nothing in them is random.

    Args:
      tokens: uint32[total], the documents one after the other.
      lengths: int64[n], tokens of each document.
      seq_len: slots a row; only the last row is not full.
      vocabulary: the id of EOS.
      key: not used.
    """
    del key
    if not len(lengths):
        return
    first_slot = np.cumsum(lengths + 1) - (lengths + 1)
    slots = np.full(int((lengths + 1).sum()), vocabulary.eos_id, np.uint32)
    slots[ul2.ranges(first_slot, lengths)] = tokens
    cuts = np.union1d(first_slot, np.arange(0, len(slots), seq_len))
    num_targets = np.diff(cuts, append=len(slots))
    document = np.searchsorted(first_slot, cuts, side="right") - 1
    start = cuts - first_slot[document]
    length = np.minimum(num_targets, lengths[document] - start)  # without EOS
    pieces = Pieces(cuts // seq_len, document, start, length, np.full_like(cuts, packing.NEXT_TOKEN))
    bounds = np.searchsorted(pieces.row, np.arange(pieces.row[-1] + 2))
    yield from packing.split(pieces, ul2.Segments(slots, np.zeros_like(cuts), num_targets), bounds)


def chat_rows(
    tokens: np.ndarray, lengths: np.ndarray, seq_len: int, vocabulary: Vocabulary, *key: int | str
) -> Iterator[Row]:
    """Yields the rows of prompts with their answers; nothing in them is random.

    Args:
      tokens: uint32[total], documents of prompt, EOS and answer, one after the other.
      lengths: int64[n], tokens of each document, which are the slots it needs: EOS goes to the end.
      seq_len: slots a row. Of a longer document, the answer has at least half of the row if it needs it.
      vocabulary: the id of EOS.
      key: not used.
    """
    del key
    if not len(lengths):
        return
    starts = np.cumsum(lengths) - lengths
    ends = np.flatnonzero(tokens == vocabulary.eos_id)  # of the prompts
    prompts = ends - starts
    targets = np.minimum(lengths - prompts, np.maximum(seq_len // 2, seq_len - prompts))
    inputs = np.minimum(prompts, seq_len - targets)
    row, document = _placed(inputs + targets, seq_len)
    inputs, targets, ends, lengths = inputs[document], targets[document], ends[document], lengths[document]
    answers = np.minimum(targets, lengths - prompts[document] - 1)
    first = np.stack([ends - inputs, ends + 1, ends], axis=1).ravel()
    slots = tokens[ul2.ranges(first, np.stack([inputs, answers, targets - answers], axis=1).ravel())]
    pieces = Pieces(row, document, np.zeros_like(row), lengths, np.full_like(row, packing.CHAT))
    bounds = np.searchsorted(row, np.arange(row[-1] + 2))
    yield from packing.split(pieces, ul2.Segments(slots, inputs, targets), bounds)


def _placed(sizes: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and which document goes there, int64[n] each in row order: the first of some that fits is next."""
    unread = iter(range(len(sizes)))
    waiting = list(itertools.islice(unread, packing.LOOK_AHEAD))
    placed, row, room = [], 0, seq_len
    while waiting:
        at = next((at for at, document in enumerate(waiting) if sizes[document] <= room), None)
        if at is None:
            row, room = row + 1, seq_len
            continue
        document = waiting.pop(at)
        placed.append((row, document))
        room -= int(sizes[document])
        waiting.extend(itertools.islice(unread, 1))
    rows, documents = np.asarray(placed, np.int64).T
    return rows, documents
