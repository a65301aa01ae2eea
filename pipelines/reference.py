"""UL2 rows as OpenMoE's authors packed them (t5's `ul2_objective`, seqio's packing), their defects included.

Documents are concatenated, 128 at a time, and each concatenation is cut into examples of one denoiser. An example is
as many tokens as make inputs of half a row, EOS included; then inputs and targets are cut to half a row each. Examples
are drawn in the denoisers' shares and appended to a row while they fit.

Defects that are reproduced, for comparison with the original; `packing` has none of them:
- the mode prompt is put before inputs that were as long as they may be, so that as many tokens at their end are lost;
  the last of these is a sentinel, whose tokens stay in the targets;
- documents follow one another in an example without a separator;
- two examples hardly ever fit into a row: 67 % of slots are used, and 30 % carry loss.

Not reproduced is what would lose documents. The original keeps 65,536 tokens of a longer document, and once more of
each concatenation for the prefix LM. And its six branches each read every sixth concatenation of an endless stream, at
speeds of their own; a pass ends, so here the branch that needs text takes the next concatenation, and when there is
none, what the fullest branch has left. Of that, a last token alone is left out: nothing of it can be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from openmoe.pipelines import packing, ul2
from openmoe.pipelines.packing import Pieces, Row
from openmoe.pipelines.permute import raw_stream
from openmoe.pipelines.tokenizer import Vocabulary
from openmoe.pipelines.ul2 import Denoiser, Segments

CONCATENATED = 128  # documents
EXAMPLES_AT_ONCE = 128  # whose noise is drawn together: their arrays stay in the cache


class Examples(NamedTuple):
    """What is made of which tokens of the concatenated documents; int64[E] each, in the order of the rows."""

    kind: np.ndarray  # index into ul2.DENOISERS
    start: np.ndarray
    length: np.ndarray


def example_tokens(denoiser: Denoiser, inputs_length: int) -> int:
    """Returns how many tokens make an example whose inputs are as long as they may be, EOS included.

    Computed in double precision, halves to even, as the original does; its masks are in single precision.
    """
    if not denoiser.mean_span:
        return inputs_length - 1
    tokens = np.arange(inputs_length, 2 * inputs_length + 2)
    masked = np.rint(tokens * denoiser.density)
    spans = np.rint(masked / denoiser.mean_span)
    inputs, targets = tokens - masked + spans + 1, masked + spans + 1
    longest = int(np.argmax(inputs > inputs_length)) - 1
    evened = denoiser.density == 0.5 and targets[longest] > inputs[longest]
    return int(tokens[longest]) - int(evened)


def plan(lengths: np.ndarray, inputs_length: int, *key: int | str) -> Examples:
    """Cuts documents of int64[n] tokens into examples, and draws their order."""
    wanted = [example_tokens(denoiser, inputs_length) for denoiser in ul2.DENOISERS]
    ends = np.append(np.cumsum(lengths)[CONCATENATED - 1 : -1 : CONCATENATED], lengths.sum()).tolist()
    unread = iter(zip([0, *ends[:-1]], ends, strict=True))
    branches = [(0, 0)] * len(wanted)  # what each denoiser is reading, from and to
    examples: list[tuple[int, int, int]] = []
    for kind in packing.draw_kinds(ul2.TENTHS, *key):
        start, end = branches[kind]
        if start == end:
            start, end = next(unread, (0, 0))
        if start == end:
            fullest = max(range(len(branches)), key=lambda k: branches[k][1] - branches[k][0])
            start, end = branches[fullest]
            branches[fullest] = (0, 0)
        if start == end:
            break
        length = min(wanted[kind], end - start)
        branches[kind] = (start + length, end)
        if length > 1:
            examples.append((kind, start, length))
    return Examples(*np.asarray(examples, np.int64).reshape(-1, 3).T)


def rows(
    tokens: np.ndarray, lengths: np.ndarray, seq_len: int, vocabulary: Vocabulary, *key: int | str
) -> Iterator[Row]:
    """Packs documents into rows and draws their noise; see `packing.rows` for the arguments."""
    examples = plan(lengths, seq_len // 2, *key)
    stream = raw_stream("noise", *key)
    parts = []
    for at in range(0, len(examples.kind), EXAMPLES_AT_ONCE):
        part = Examples(*(field[at : at + EXAMPLES_AT_ONCE] for field in examples))
        drawn = tokens[ul2.ranges(part.start, part.length)]
        noisy = ul2.corrupt(drawn, part.length, part.kind, stream.random_raw(len(drawn)), vocabulary)
        parts.append(trim(noisy, seq_len // 2, vocabulary.eos_id))
    if not parts:
        return
    segments = Segments(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
    row = assign_rows(segments.num_inputs + segments.num_targets, seq_len)
    pieces, is_first = pieces_of(examples, row, lengths)
    counts = np.zeros((2, len(is_first)), np.int64)
    counts[:, is_first] = segments.num_inputs, segments.num_targets
    bounds = np.searchsorted(pieces.row, np.arange(row[-1] + 2))
    yield from packing.split(pieces, Segments(segments.tokens, *counts), bounds)


def cut_off(segments: np.ndarray, vocabulary: Vocabulary) -> int:
    """Returns how many tokens of inputs and targets, text and sentinels, were cut off the examples of a shard.

    Args:
      segments: SEGMENT[n] of its rows, one after the other.
      vocabulary: the ids of prompts and sentinels.
    """
    slots = segments["inputs"].astype(np.int64) + segments["targets"]
    is_first = slots > 0
    lengths = np.bincount(np.cumsum(is_first) - 1, weights=segments["length"]).astype(np.int64)
    kinds = segments["denoiser"][is_first]
    wholes = (ul2.segment_lengths(d, vocabulary, lengths[kinds == k]) for k, d in enumerate(ul2.DENOISERS))
    return int(sum(whole.sum() for whole in wholes) - slots.sum())


def trim(segments: Segments, max_tokens: int, eos_id: int) -> Segments:
    """Cuts inputs and targets to `max_tokens`, their EOS included."""
    sizes = np.stack([segments.num_inputs, segments.num_targets], axis=1).reshape(-1)
    kept = np.minimum(sizes, max_tokens)
    out = segments.tokens[ul2.ranges(np.cumsum(sizes) - sizes, kept)]
    out[np.cumsum(kept) - 1] = eos_id
    return Segments(out, kept[::2], kept[1::2])


def assign_rows(sizes: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns the row of each example, int64[E]: it follows the one before if it fits, else begins a row."""
    row, used, assigned = 0, 0, []
    for size in sizes.tolist():
        if used + size > seq_len:
            row, used = row + 1, 0
        used += size
        assigned.append(row)
    return np.asarray(assigned, np.int64)


def pieces_of(examples: Examples, row: np.ndarray, lengths: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Returns pieces, one for each document that an example runs over, and which are an example's first, bool[S]."""
    ends = np.cumsum(lengths)
    first = np.searchsorted(ends, examples.start, side="right")
    last = np.searchsorted(ends, examples.start + examples.length - 1, side="right")
    owner = np.repeat(np.arange(len(first)), last - first + 1)
    document = ul2.ranges(first, last - first + 1)
    begin = np.maximum(examples.start[owner], (ends - lengths)[document])
    end = np.minimum((examples.start + examples.length)[owner], ends[document])
    pieces = Pieces(row[owner], document, begin - (ends - lengths)[document], end - begin, examples.kind[owner])
    return pieces, document == first[owner]
