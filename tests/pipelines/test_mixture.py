import hashlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import mixture as mixtures
from openmoe.pipelines.mixture import WINDOW_ROWS, Mixture, Stage, block_counts, one_stage, shuffle_pass
from openmoe.pipelines.permute import Permutation, key


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
@settings(deadline=None)
def test_a_permutation_hits_every_index_once(size, seed):
    assert sorted(Permutation(size, seed)(np.arange(size)).tolist()) == list(range(size))


def test_a_permutation_of_a_huge_range_answers_for_single_indices():
    images = Permutation(10**15, "huge")(np.asarray([0, 1, 10**15 - 1]))
    assert len(set(images.tolist())) == 3
    assert ((images >= 0) & (images < 10**15)).all()


def test_permutations_and_keys_stay_what_they_are():
    assert Permutation(10, "literal", 1)(np.arange(10)).tolist() == [6, 5, 1, 7, 4, 2, 3, 8, 0, 9]
    assert key("block", 0, 1) == 0x3332B366F679BD5ACD4B7B1FCF2CDBED


def test_openmoe_weights_come_out_whole():
    counts = block_counts([15, 4.5, 2, 2.5, 4.5, 4.5, 67, 100])
    assert counts.tolist() == [150, 45, 20, 25, 45, 45, 670, 1000]


def test_remainders_go_to_the_largest():
    assert block_counts([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert block_counts([0.55, 0.35, 0.1], 10).tolist() == [6, 3, 1]


@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), block=st.integers(0, 10**9), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_every_block_holds_the_exact_proportions_and_each_source_row_once(weights, block, seed):
    counts = block_counts(weights, 400)
    source, row = Mixture(one_stage(weights), seed, 400).locate(block * 400, (block + 1) * 400)
    assert np.bincount(source, minlength=len(weights)).tolist() == counts.tolist()
    for index, count in enumerate(counts):
        assert row[source == index].tolist() == list(range(block * count, (block + 1) * count))


@pytest.mark.parametrize(
    ("weights", "lo", "hi", "sources", "rows", "digest"),
    [
        ([1, 2, 2, 5], 0, 10_000, [1, 3, 2, 3, 1, 3], [0, 0, 0, 1, 1, 2], "5fed1b03216447e1"),
        ([15, 4.5, 2, 2.5, 4.5, 4.5, 67, 100], 10**9, 10**9 + 5000, [7, 6, 6, 3, 7, 7],
         [500000000, 335000000, 335000001, 12500000, 500000001, 500000002], "372cfa9c16696fe9"),
    ],
    ids=["quickstart", "openmoe-8b"],
)  # fmt: skip
def test_a_mixture_without_stages_stays_what_it_always_was(weights, lo, hi, sources, rows, digest):
    source, row = Mixture(one_stage(weights), 0).locate(lo, hi)
    assert (source[:6].tolist(), row[:6].tolist()) == (sources, rows)
    assert hashlib.sha256(source.tobytes() + row.tobytes()).hexdigest()[:16] == digest


@st.composite
def stages(draw):
    num_sources = draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 20), min_size=num_sources, max_size=num_sources).filter(any)
    ends = sorted(draw(st.sets(st.integers(1, 3000), max_size=4)))
    return [Stage(end, draw(weights)) for end in [*ends, None]]


@given(stages=stages(), seed=st.integers(0, 99), beyond=st.integers(1, 900))
@settings(deadline=None, max_examples=60)
def test_over_all_stages_each_source_is_read_row_after_row_in_the_exact_proportions(stages, seed, beyond):
    mixture = Mixture(stages, seed, 400)
    last = ([0] + [stage.end for stage in stages if stage.end])[-1] + beyond
    source, row = mixture.locate(0, last)
    for index in range(len(stages[0].weights)):
        assert row[source == index].tolist() == list(range((source == index).sum()))
    start = 0
    for stage in stages:
        for block in range(start, min(stage.end or last, last) - 399, 400):
            counts = np.bincount(source[block : block + 400], minlength=len(stage.weights))
            assert counts.tolist() == block_counts(stage.weights, 400).tolist()
        start = stage.end or last


@given(stages=stages(), seed=st.integers(0, 99), num_rows=st.integers(1, 4000))
@settings(deadline=None, max_examples=60)
def test_in_stages_too_the_rows_needed_are_exactly_those_that_serve(stages, seed, num_rows):
    mixture = Mixture(stages, seed, 400)
    source, _ = mixture.locate(0, num_rows)
    needed = mixture.rows_needed(num_rows)
    assert needed.tolist() == np.bincount(source, minlength=len(needed)).tolist()
    available = mixture.rows_available(needed)
    assert available == num_rows
    plenty = needed + 1000 * (np.arange(len(needed)) != mixture.locate(num_rows, num_rows + 1).stream[0])
    assert mixture.rows_available(plenty) == num_rows


def test_a_stage_changes_the_mixture_at_its_row_and_every_source_goes_on():
    mixture = Mixture([Stage(6, [1, 0]), Stage(8, [0, 1]), Stage(None, [1, 1])], 0, 4)
    source, row = mixture.locate(0, 16)
    assert source[:8].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert row[:8].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert sorted(zip(source[8:12].tolist(), row[8:12].tolist(), strict=True)) == [(0, 6), (0, 7), (1, 2), (1, 3)]
    assert [mixture.rows_needed(n).tolist() for n in (6, 8, 12)] == [[6, 0], [6, 2], [8, 4]]


@given(lo=st.integers(0, 5000), size=st.integers(1, 900), cut=st.integers(0, 900))
@settings(deadline=None, max_examples=40)
def test_a_row_does_not_depend_on_the_range_it_was_asked_in(lo, size, cut):
    mixture = Mixture(one_stage([5, 3, 2]), 1, 400)
    whole = mixture.locate(lo, lo + size)
    middle = lo + min(cut, size - 1) + 1
    parts = [mixture.locate(lo, middle)] + ([mixture.locate(middle, lo + size)] if middle < lo + size else [])
    for index in range(2):
        assert whole[index].tolist() == np.concatenate([part[index] for part in parts]).tolist()


@pytest.mark.parametrize("num_rows", [1, 399, 400, 401, 1999, 4000])
def test_the_rows_needed_are_exactly_those_that_serve(num_rows):
    mixture = Mixture(one_stage([5, 3, 2]), 1, 400)
    needed = mixture.rows_needed(num_rows)
    assert needed.sum() == num_rows
    assert mixture.rows_available(needed) == num_rows


@given(num_rows=st.integers(1, 300), window_rows=st.integers(20, 90), number=st.integers(0, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_whatever_the_window_a_pass_is_a_permutation_inside_it_and_the_next_pass_is_another(
    num_rows, window_rows, number, seed
):
    with mock.patch.object(mixtures, "WINDOW_ROWS", window_rows):
        stored, after = (shuffle_pass(np.arange(num_rows), num_rows, seed, "a", n) for n in (number, number + 1))
        one_by_one = [
            int(shuffle_pass(np.asarray([row]), num_rows, seed, "a", number)[0]) for row in range(0, num_rows, 97)
        ]
    assert sorted(stored.tolist()) == list(range(num_rows))
    assert (stored // window_rows == np.arange(num_rows) // window_rows).all()
    assert stored[::97].tolist() == one_by_one
    assert min(num_rows, window_rows) < 30 or stored.tolist() != after.tolist()


@pytest.mark.parametrize("num_rows", [1, 100, WINDOW_ROWS, WINDOW_ROWS + 7])
def test_a_shuffled_pass_reads_every_stored_row_once_inside_its_window(num_rows):
    rows = np.arange(num_rows)
    stored = shuffle_pass(rows, num_rows, 0, "wiki", 0)
    assert sorted(stored.tolist()) == rows.tolist()
    assert (stored // WINDOW_ROWS == rows // WINDOW_ROWS).all()
