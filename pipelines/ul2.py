"""UL2's six denoisers as OpenMoE trained with them (arXiv:2205.05131; t5's `random_spans_noise_mask`).

A piece of a document becomes `prompt + inputs + EOS + targets + EOS`. Kept and masked runs alternate, kept
first. Each masked run is one sentinel in the inputs, each kept run one in the targets; prefix LM is one kept
and one masked run without sentinels. Letters: S pieces, R runs of all pieces (kept tokens, then masked ones).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from openmoe.pipelines.tokenizer import Vocabulary

# Limits of one call, from a sort key's bits: list (20, two lists a piece), random (28), position (16).
MAX_PIECES = 1 << 19
MAX_PIECE_TOKENS = 1 << 16


class Denoiser(NamedTuple):
    """One corruption; its share is in tenths of the pieces."""

    name: str
    mode: str  # names the prompt
    mean_span: float  # masked tokens a run; 0: prefix LM
    density: float  # share of masked tokens; 0: prefix LM
    tenths: int


DENOISERS = (
    Denoiser("R3", "NLU", 3.0, 0.15, 1),
    Denoiser("R8", "NLU", 8.0, 0.15, 1),
    Denoiser("X3", "NLG", 3.0, 0.5, 1),
    Denoiser("X8", "NLG", 8.0, 0.5, 1),
    Denoiser("X64", "NLG", 64.0, 0.5, 1),
    Denoiser("S", "S2S", 0.0, 0.0, 5),
)
PREFIX_LM = len(DENOISERS) - 1
TENTHS = np.repeat(np.arange(len(DENOISERS)), [d.tenths for d in DENOISERS])


class Noise(NamedTuple):
    """How much of a piece is masked, in how many runs; int64 arrays of one shape."""

    masked: np.ndarray
    spans: np.ndarray


class Segments(NamedTuple):
    """Finished segments, one after the other."""

    tokens: np.ndarray  # uint32[total]
    num_inputs: np.ndarray  # int64[S], prompt and EOS included
    num_targets: np.ndarray  # int64[S], EOS included


def noise_counts(denoiser: Denoiser, length: np.ndarray) -> Noise:
    """Returns masked tokens and spans of pieces of int64[n] tokens, at least 2 each.

    Float32 and halves to even, as the reference rounds; both counts depend on the length alone.
    """
    exact = length.astype(np.float32)
    masked = np.clip(np.rint(exact * np.float32(denoiser.density)), 1, exact - 1)
    spans = np.maximum(np.rint(masked / np.float32(denoiser.mean_span)), 1)
    return Noise(masked.astype(np.int64), spans.astype(np.int64))


def segment_lengths(denoiser: Denoiser, vocabulary: Vocabulary, length: np.ndarray) -> np.ndarray:
    """Returns the tokens of the finished segment, int64[n], for pieces of int64[n] tokens."""
    overhead = len(vocabulary.prompts[denoiser.mode]) + 2
    sentinels = 2 * noise_counts(denoiser, length).spans if denoiser.mean_span else 0
    return length + overhead + sentinels


def corrupt(
    pieces: np.ndarray, lengths: np.ndarray, kinds: np.ndarray, keys: np.ndarray, vocabulary: Vocabulary
) -> Segments:
    """Turns pieces of documents into finished segments.

    Args:
      pieces: uint32[total], the pieces' tokens one after the other.
      lengths: int64[S], tokens of each piece, at least 2.
      kinds: int64[S], index into DENOISERS.
      keys: uint64[total], a random number for each token.
      vocabulary: the ids of prompts, EOS and sentinels.
    """
    if len(lengths) > MAX_PIECES or lengths.max() >= MAX_PIECE_TOKENS:
        raise ValueError(f"{len(lengths)} pieces of up to {lengths.max()} tokens are too many for one call")
    kept, masked, first_run = draw_runs(lengths, kinds, keys)
    return assemble(pieces, kinds, kept, masked, first_run, vocabulary)


def draw_runs(lengths: np.ndarray, kinds: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the kept and the masked tokens of every run, int64[R], and each piece's first run, int64[S]."""
    is_span = kinds != PREFIX_LM
    masked, spans = np.empty_like(lengths), np.ones_like(lengths)
    for kind, denoiser in enumerate(DENOISERS[:PREFIX_LM]):
        masked[kinds == kind], spans[kinds == kind] = noise_counts(denoiser, lengths[kinds == kind])
    first_key = keys[np.cumsum(lengths) - lengths]
    prefix = 1 + ((first_key >> np.uint64(32)) * (lengths - 1).astype(np.uint64) >> np.uint64(32))
    masked[~is_span] = (lengths - prefix.astype(np.int64))[~is_span]

    kept_runs, masked_runs = (np.empty(spans.sum(), np.int64) for _ in range(2))
    run_of_span = np.repeat(is_span, spans)
    kept_runs[~run_of_span], masked_runs[~run_of_span] = (lengths - masked)[~is_span], masked[~is_span]
    # Every other piece is two lists to cut, its masked and its kept tokens, each into `spans` parts.
    sizes = np.stack([masked, lengths - masked], axis=1)[is_span].reshape(-1)
    num_parts = np.repeat(spans[is_span], 2)
    parts = _cut(sizes, num_parts, keys[np.repeat(is_span, lengths)])
    is_kept = np.repeat(np.arange(len(sizes)) % 2 == 1, num_parts)
    kept_runs[run_of_span], masked_runs[run_of_span] = parts[is_kept], parts[~is_kept]
    return kept_runs, masked_runs, np.cumsum(spans) - spans


def _cut(sizes: np.ndarray, num_parts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Cuts lists of `sizes` items into `num_parts` non-empty parts, every composition equally likely.

    Returns the parts' sizes one after the other. Each list takes the items with the lowest random keys as
    starts of parts, its first item always; keys hold their position, so that no two are equal and any sort
    gives the same answer.
    """
    starts = np.cumsum(sizes) - sizes
    position = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    random = (keys >> np.uint64(37)) + np.uint64(1)
    random[position == 0] = 0
    lists = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    order = np.sort(lists << np.uint64(44) | random << np.uint64(16) | position.astype(np.uint64))
    chosen = position < np.repeat(num_parts, sizes)
    is_start = np.zeros(len(position), bool)
    is_start[np.repeat(starts, num_parts) + (order[chosen] & np.uint64(0xFFFF)).astype(np.int64)] = True
    return np.diff(np.flatnonzero(is_start), append=len(position))


def assemble(
    pieces: np.ndarray,
    kinds: np.ndarray,
    kept: np.ndarray,
    masked: np.ndarray,
    first_run: np.ndarray,
    vocabulary: Vocabulary,
) -> Segments:
    """Lays out prompt, inputs, EOS, targets, EOS of every piece, given its runs (see `draw_runs`)."""
    num_kept, num_masked = np.add.reduceat(kept, first_run), np.add.reduceat(masked, first_run)
    num_runs = np.diff(first_run, append=len(kept))
    num_sentinels = np.where(kinds == PREFIX_LM, 0, num_runs)
    prompts = [np.asarray(vocabulary.prompts[d.mode], np.uint32) for d in DENOISERS]
    num_prompt = np.asarray([len(p) for p in prompts])[kinds]
    num_inputs = num_prompt + num_kept + num_sentinels + 1
    num_targets = num_masked + num_sentinels + 1
    ends = np.cumsum(num_inputs + num_targets)
    inputs_at = ends - num_inputs - num_targets + num_prompt
    targets_at = ends - num_targets

    out = np.full(ends[-1], vocabulary.eos_id, np.uint32)
    for mode_kind, prompt in enumerate(prompts):
        at = (inputs_at - num_prompt)[kinds == mode_kind]
        out[at[:, None] + np.arange(len(prompt))] = prompt

    owner = np.repeat(np.arange(len(kinds)), num_runs)
    run = np.arange(len(kept)) - first_run[owner]
    sentinels_before = np.minimum(run, num_sentinels[owner])
    before_kept = np.cumsum(kept) - kept - (np.cumsum(num_kept) - num_kept)[owner]
    before_masked = np.cumsum(masked) - masked - (np.cumsum(num_masked) - num_masked)[owner]
    kept_at = inputs_at[owner] + before_kept + sentinels_before
    masked_at = targets_at[owner] + before_masked + sentinels_before + (num_sentinels[owner] > 0)

    is_masked = np.repeat(np.tile([False, True], len(kept)), np.stack([kept, masked], axis=1).reshape(-1))
    out[ranges(kept_at, kept)] = pieces[~is_masked]
    out[ranges(masked_at, masked)] = pieces[is_masked]
    with_sentinel = num_sentinels[owner] > 0
    sentinel = (vocabulary.first_sentinel - run[with_sentinel]).astype(np.uint32)
    out[(kept_at + kept)[with_sentinel]] = sentinel
    out[masked_at[with_sentinel] - 1] = sentinel
    return Segments(out, num_inputs, num_targets)


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns start, start + 1, ... of each range, one after the other."""
    return np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
