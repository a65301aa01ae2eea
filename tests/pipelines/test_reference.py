"""The original's recipe: lengths, masks, prompts, trimming and rows, against what t5 and seqio returned."""

import itertools
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import packing, permute, reference, tokenizer, ul2
from openmoe.pipelines.tokenizer import Vocabulary
from openmoe.pipelines.ul2 import Denoiser

RECIPE = json.loads((Path(__file__).parent / "goldens/ul2_recipe.json").read_text())
PROMPTS = {
    "NLU": (492, 692, 13128, 423, 273),
    "NLG": (492, 18783, 686, 423, 273),
    "S2S": (492, 436, 278, 436, 423, 273),
}
UMT5 = Vocabulary(text_vocab_size=256000, num_sentinels=300, eos_id=1, prompts=PROMPTS)
KIND = {denoiser.name: index for index, denoiser in enumerate(ul2.DENOISERS)}
ALL_CASES = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "ul2_reference.json"


def name_of(case) -> str:
    return f"{case['denoiser']}-{case.get('inputs_length', case.get('length'))}"


def denoiser_of(case) -> Denoiser:
    return Denoiser(case["denoiser"], "NLU", case["mean_span"], case["density"], 1)


@pytest.mark.parametrize("case", RECIPE["lengths"], ids=name_of)
def test_examples_are_as_long_as_the_originals(case):
    assert reference.example_tokens(denoiser_of(case), case["inputs_length"]) == case["raw_tokens"]


def test_a_prefix_lm_example_has_the_tokens_that_leave_room_for_one_eos():
    assert reference.example_tokens(ul2.DENOISERS[KIND["S"]], 1024) == 1023


@pytest.mark.parametrize("case", RECIPE["masks"], ids=name_of)
def test_as_many_tokens_in_as_many_spans_are_masked_as_in_every_mask_of_the_original(case):
    counts = ul2.noise_counts(denoiser_of(case), np.asarray([case["length"]]))
    assert (int(counts.masked[0]), int(counts.spans[0])) == (case["noise_tokens"], case["spans"])


DRAWN = [case for case in RECIPE["masks"] if case["denoiser"] in KIND and case["spans"] > 1]


@pytest.mark.parametrize("case", DRAWN, ids=name_of)
def test_spans_are_as_long_and_lie_where_those_of_a_hundred_masks_of_the_original_do(case):
    count, length, p = 300, case["length"], case["noise_tokens"] / case["length"]
    keys = permute.raw_stream("masks", case["denoiser"], length).random_raw(count * length)
    kept, masked, _ = ul2.draw_runs(np.full(count, length), np.full(count, KIND[case["denoiser"]]), keys)
    assert masked.mean() == pytest.approx(case["span_mean"], rel=1e-9)
    # The standard error of a standard deviation of near-geometric lengths is about 1.4 / sqrt(n) of it.
    assert masked.std() == pytest.approx(case["span_std"], rel=6 / np.sqrt(case["n"]), abs=0.05)
    assert kept.std() == pytest.approx(case["kept_std"], rel=6 / np.sqrt(case["n"]), abs=0.05)
    if case["rate_by_16th"]:
        runs = np.stack([kept, masked], axis=1).reshape(-1)
        mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(count, length)
        rates = [part.mean() for part in np.array_split(mask, 16, axis=1)]
        spans_in_bin = 100 * length / 16 / (2 * case["span_mean"])
        np.testing.assert_allclose(rates, case["rate_by_16th"], atol=4 * np.sqrt(p * (1 - p) / spans_in_bin))


@pytest.mark.parametrize("case", RECIPE["prefix"], ids=lambda case: str(case["length"]))
def test_prefixes_are_as_long_as_those_of_the_original(case):
    count = 2000
    keys = permute.raw_stream("prefixes").random_raw(count * case["length"])
    kept, _, _ = ul2.draw_runs(np.full(count, case["length"]), np.full(count, KIND["S"]), keys)
    assert kept.mean() == pytest.approx(case["mean"], abs=4 * case["stderr"] + 1e-9)
    assert kept.min() >= 1
    assert kept.max() <= case["length"] - 1


@pytest.mark.skipif(not ALL_CASES.exists(), reason=f"{ALL_CASES} is not on this machine: 12 of its 54 cases were run")
def test_inputs_and_targets_equal_the_original_for_every_mask_that_was_recorded():
    cases = json.loads(ALL_CASES.read_text())["goldens"] if ALL_CASES.exists() else []
    for case in cases:
        runs = np.asarray(case["runs"])
        tokens = np.arange(case["first_token"], case["first_token"] + runs.sum(), dtype=np.uint32)
        kind = KIND.get(case["denoiser"], KIND["X64"])  # the paper's seventh is laid out as all others
        segments = ul2.assemble(tokens, np.asarray([kind]), runs[::2], runs[1::2], np.asarray([0]), UMT5)
        prompt = PROMPTS[ul2.DENOISERS[kind].mode]
        assert segments.tokens.tolist() == [*prompt, *case["inputs"], 1, *case["targets"], 1]
    assert len(cases) == 54


def test_inputs_and_targets_are_cut_and_end_with_eos():
    segments = ul2.Segments(np.arange(10, 21, dtype=np.uint32), np.asarray([3, 2]), np.asarray([5, 1]))
    cut = reference.trim(segments, 3, eos_id=1)
    assert cut.tokens.tolist() == [10, 11, 1, 13, 14, 1, 18, 1, 1]
    assert (cut.num_inputs.tolist(), cut.num_targets.tolist()) == ([3, 2], [3, 1])


def test_examples_share_a_row_as_seqio_packs_them():
    assert reference.assign_rows(np.asarray([7, 7, 7]), 15).tolist() == [0, 0, 1]
    assert reference.assign_rows(np.asarray([9, 9, 2, 4, 1]), 15).tolist() == [0, 1, 1, 1, 2]


def packed(lengths, seq_len, *key, vocabulary=UMT5):
    lengths = np.asarray(lengths, np.int64)
    tokens = np.arange(1000, 1000 + lengths.sum(), dtype=np.uint32) % 200_000 + 20
    return tokens, list(reference.rows(tokens, lengths, seq_len, vocabulary, *key))


def test_the_prompt_cuts_the_last_sentinel_off_the_inputs_while_the_targets_keep_it():
    _, rows = packed([60_000] * 4, 2048, "cut")
    seen = set()
    for row in rows:
        kinds = row.pieces.kind[row.num_inputs > 0]
        if len(kinds) > 1 or (row.num_inputs[0], row.num_targets[0]) == (2, 2) or len(row.tokens) < 1000:
            continue
        inputs, targets = np.split(row.tokens, [row.num_inputs[0]])
        name = ul2.DENOISERS[kinds[0]].name
        if name != "S" and row.pieces.length.sum() == reference.example_tokens(ul2.DENOISERS[kinds[0]], 1024):
            seen.add(name)
            asked = {"R3": 57, "R8": 22, "X3": 256, "X8": 114, "X64": 16}[name]
            assert len(inputs) == 1024
            assert (targets >= 256000).sum() == asked
            assert (inputs >= 256000).sum() < asked
            assert inputs.min() == targets[-1] == 1
            assert 256300 - asked not in inputs
    assert seen == {"R3", "R8", "X3", "X8", "X64"}


@given(
    lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=300),
    seq_len=st.sampled_from([64, 128, 512]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_every_document_is_read_once_but_for_lone_last_tokens_and_no_row_overflows(lengths, seq_len, seed):
    _, rows = packed(lengths, seq_len, seed)
    read = [np.zeros(length, np.int64) for length in lengths]
    for row in rows:
        assert 0 < len(row.tokens) <= seq_len
        assert len(row.tokens) == (row.num_inputs + row.num_targets).sum()
        assert max(row.num_inputs.max(), row.num_targets.max()) <= seq_len // 2
        for document, start, length in zip(row.pieces.document, row.pieces.start, row.pieces.length, strict=True):
            read[document][start : start + length] += 1
    counts = np.concatenate(read)
    assert counts.max() == 1
    assert (counts == 0).sum() <= 6 + len(lengths) // reference.CONCATENATED


def test_a_segment_names_every_document_that_it_runs_over():
    sizes = [300, 40, 500, 2, 3, 700] * 8
    tokens, rows = packed(sizes, 2048, "several")
    starts, checked = np.cumsum([0, *sizes]), 0
    for row in rows:
        at = 0
        firsts = np.flatnonzero(row.num_inputs + row.num_targets > 0)
        for first, last in itertools.pairwise([*firsts.tolist(), len(row.num_inputs)]):
            pieces = [
                tokens[starts[document] + start :][:length]
                for document, start, length in list(zip(*row.pieces[1:4], strict=True))[first:last]
            ]
            num_inputs, num_targets = row.num_inputs[first], row.num_targets[first]
            segment, at = row.tokens[at : at + num_inputs + num_targets], at + num_inputs + num_targets
            if row.pieces.kind[first] == KIND["S"] and num_inputs < 1024:
                text = np.concatenate([segment[6 : num_inputs - 1], segment[num_inputs:-1]])
                assert text.tolist() == np.concatenate(pieces).tolist()
                checked += len(pieces) > 1
        assert at == len(row.tokens)
    assert checked > 2


def test_denoisers_keep_their_shares_and_a_concatenation_belongs_to_one_of_them():
    lengths = np.full(128 * 60, 2000)
    examples = reference.plan(lengths, 1024, "shares")
    shares = np.bincount(examples.kind) / len(examples.kind)
    np.testing.assert_allclose(shares, [0.1, 0.1, 0.1, 0.1, 0.1, 0.5], atol=0.02)
    owners = [set(examples.kind[examples.start // 256_000 == number].tolist()) for number in range(60)]
    assert sum(len(owner) == 1 for owner in owners) >= 54  # the last ones are shared out at the end


def test_rows_are_as_full_and_carry_as_much_loss_as_those_of_the_original():
    text = tokenizer.load("builtin:small_8192")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:90]
    documents = [ids for ids in text.encode([file.read_text("utf-8") for file in files]) if len(ids) > 1]
    lengths = np.asarray([len(ids) for ids in documents])
    rows = list(reference.rows(np.concatenate(documents), lengths, 2048, text.vocabulary(300), "figures"))
    used = np.asarray([len(row.tokens) for row in rows]) / 2048
    loss = np.asarray([row.num_targets.sum() for row in rows]) / 2048
    assert len(rows) > 300
    three_errors = 3 / np.sqrt(len(rows))
    assert used.mean() == pytest.approx(RECIPE["pipeline"]["mixture_used"], abs=three_errors * used.std())
    # The recorded share of loss is of 24 examples a denoiser, with an error of its own.
    of_record = 0.5 * RECIPE["pipeline"]["denoisers"][-1]["targets_stderr"] / 2048
    tolerance = three_errors * loss.std() + 3 * of_record
    assert loss.mean() == pytest.approx(RECIPE["pipeline"]["mixture_loss_share"], abs=tolerance)
    for case in RECIPE["pipeline"]["denoisers"][:-1]:
        of_kind = [
            (len(row.tokens) / 2048, row.num_targets[0] / 2048)
            for row in rows
            if row.pieces.kind[0] == KIND[case["denoiser"]] and (row.num_inputs > 0).sum() == 1
        ]
        assert np.median(of_kind, axis=0).tolist() == [case["used"], case["loss_share"]]


def test_rows_are_a_function_of_the_key_alone():
    once, again, other = ([row.tokens.tolist() for row in packed([300, 900, 77], 128, key)[1]] for key in "aab")
    assert once == again
    assert once != other


def test_sentinels_never_run_out():
    """The settings demand one for every eighth token of a row."""
    for seq_len in range(64, 4097, 62):
        for denoiser in ul2.DENOISERS[: ul2.PREFIX_LM]:
            tokens = reference.example_tokens(denoiser, seq_len // 2)
            assert ul2.noise_counts(denoiser, np.asarray([tokens])).spans[0] <= seq_len // 8


def test_no_documents_are_no_rows():
    assert packed([], 128)[1] == []
    assert packing.plan(np.asarray([], np.int64), 128, UMT5).row.tolist() == []
