import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import packing, ul2
from openmoe.pipelines.tokenizer import Vocabulary

VOCABULARY = Vocabulary(8192, 300, 1, {"NLU": (380, 802, 684, 841, 353, 260), "NLG": (380, 802), "S2S": (380,)})


def documents(lengths) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.asarray(lengths, np.int64)
    return np.arange(lengths.sum(), dtype=np.uint32) % 8000 + 4, lengths


@given(
    lengths=st.lists(st.integers(2, 700), min_size=1, max_size=60),
    seq_len=st.sampled_from([64, 128, 512]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_every_token_of_every_document_is_in_one_piece_and_no_row_overflows(lengths, seq_len, seed):
    tokens, sizes = documents(lengths)
    rows = list(packing.rows(tokens, sizes, seq_len, VOCABULARY, seed))
    seen: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        assert 0 < len(row.tokens) <= seq_len
        assert len(row.tokens) == (row.num_inputs + row.num_targets).sum()
        for document, start, length in zip(row.pieces.document, row.pieces.start, row.pieces.length, strict=True):
            seen.setdefault(int(document), []).append((int(start), int(length)))
    for document, size in enumerate(lengths):
        at = 0
        for start, length in sorted(seen[document]):
            assert start == at
            assert length >= 2
            at += length
        assert at == size


@pytest.mark.parametrize("seq_len", [512, 2048])
@pytest.mark.parametrize("median", [60, 400, 3000])
def test_more_than_995_of_1000_slots_are_used(seq_len, median):
    lengths = np.random.default_rng(0).lognormal(np.log(median), 1.2, 1_500_000 // median // 2)
    tokens, sizes = documents(np.maximum(2, lengths))
    rows = list(packing.rows(tokens, sizes, seq_len, VOCABULARY, "fill"))
    used = sum(len(row.tokens) for row in rows)
    assert used / (len(rows) * seq_len) >= 0.995


def test_pieces_of_long_documents_have_at_least_32_tokens():
    _, sizes = documents(np.random.default_rng(1).integers(64, 3000, 400))
    pieces = packing.plan(sizes, 512, VOCABULARY, "minimum")
    assert pieces.length.min() >= 32


def test_denoisers_are_drawn_in_their_shares():
    _, sizes = documents(np.full(20_000, 100))
    pieces = packing.plan(sizes, 512, VOCABULARY, "shares")
    shares = np.bincount(pieces.kind) / len(pieces.kind)
    np.testing.assert_allclose(shares, [0.1, 0.1, 0.1, 0.1, 0.1, 0.5], atol=0.01)


def test_rows_are_a_function_of_the_key_alone():
    tokens, sizes = documents([300, 40, 900, 5, 77])
    once, again, other = (
        [row.tokens.tolist() for row in packing.rows(tokens, sizes, 128, VOCABULARY, key, 0)] for key in "aab"
    )
    assert once == again
    assert once != other


@pytest.mark.parametrize("room", [64, 65, 511, 512])
def test_the_longest_piece_fits_and_one_token_more_does_not(room):
    budget = packing.Budget(1024, VOCABULARY)
    for kind, denoiser in enumerate(ul2.DENOISERS):
        longest = budget.longest[kind][room]
        lengths = ul2.segment_lengths(denoiser, VOCABULARY, np.asarray([longest, longest + 1]))
        assert lengths[0] <= room < lengths[1]
