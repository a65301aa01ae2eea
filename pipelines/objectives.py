"""What each objective makes of documents: the function that packs them into rows.

`ul2`         six denoisers; `packing.rows`, or `reference.rows` as the original packed them
`prefix_lm`   the last of the six alone, S, with its mode prompt: the original has no prefix LM without one. Any
              number of pieces a row, split points uniform, loss on what follows them
`next_token`  documents with EOS, one after the other, cut into rows; every token is a target. A document is a segment
              of its own in each row, so that attention stays inside it. (The original: rows are one segment, and EOS
              overwrites the last token of each.)
"""

from __future__ import annotations

import functools
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
