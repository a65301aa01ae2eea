import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import permute, ul2
from openmoe.pipelines.tokenizer import Vocabulary

GOLDENS = json.loads((Path(__file__).parent / "goldens/ul2.json").read_text())
PROMPTS = {"NLU": (492, 692, 13128, 423, 273), "NLG": (492, 18783, 686, 423, 273), "S2S": (492, 436, 278)}
UMT5 = Vocabulary(text_vocab_size=256000, num_sentinels=300, eos_id=1, prompts=PROMPTS)
KIND = {denoiser.name: index for index, denoiser in enumerate(ul2.DENOISERS)}


def undo(inputs: list[int], targets: list[int], text_vocab_size: int) -> list[int]:
    """Puts the runs that follow sentinels in the targets back where the inputs name them."""
    runs: dict[int, list[int]] = {}
    for token in targets:
        if token >= text_vocab_size:
            current = runs.setdefault(token, [])
        else:
            current.append(token)
    restored: list[int] = []
    for token in inputs:
        restored += runs[token] if token >= text_vocab_size else [token]
    return restored


@pytest.mark.parametrize("case", GOLDENS["cases"], ids=lambda c: f"{c['denoiser']}-{sum(c['runs'])}")
def test_inputs_and_targets_equal_the_reference_for_the_same_mask(case):
    runs = np.asarray(case["runs"])
    tokens = np.arange(case["first_token"], case["first_token"] + runs.sum(), dtype=np.uint32)
    kind = KIND[case["denoiser"]]
    segments = ul2.assemble(tokens, np.asarray([kind]), runs[::2], runs[1::2], np.asarray([0]), UMT5)
    prompt = PROMPTS[ul2.DENOISERS[kind].mode]
    assert segments.tokens.tolist() == [*prompt, *case["inputs"], 1, *case["targets"], 1]
    assert segments.num_inputs.tolist() == [len(prompt) + len(case["inputs"]) + 1]
    assert segments.num_targets.tolist() == [len(case["targets"]) + 1]


@pytest.mark.parametrize(
    ("name", "length", "masked", "spans"),
    [
        ("R3", 1137, 171, 57), ("R3", 100, 15, 5), ("R3", 17, 3, 1), ("R3", 3, 1, 1), ("R3", 2, 1, 1),
        ("R8", 1178, 177, 22), ("R8", 100, 15, 2), ("R8", 17, 3, 1),
        ("X3", 1534, 767, 256), ("X3", 100, 50, 17), ("X3", 17, 8, 3), ("X3", 3, 2, 1), ("X3", 2, 1, 1),
        ("X8", 1818, 909, 114), ("X8", 100, 50, 6), ("X64", 2014, 1007, 16), ("X64", 100, 50, 1),
    ],
)  # fmt: skip
def test_masked_tokens_and_spans_equal_the_reference(name, length, masked, spans):
    counts = ul2.noise_counts(ul2.DENOISERS[KIND[name]], np.asarray([length]))
    assert (counts.masked.tolist(), counts.spans.tolist()) == ([masked], [spans])


@pytest.mark.parametrize(
    ("name", "raw", "total"), [("R3", 1137, 1253), ("R8", 1178, 1224), ("X3", 1534, 2048), ("X8", 1818, 2048)]
)
def test_segment_lengths_equal_the_reference_plus_the_prompt(name, raw, total):
    denoiser = ul2.DENOISERS[KIND[name]]
    prompt = len(PROMPTS[denoiser.mode])
    assert ul2.segment_lengths(denoiser, UMT5, np.asarray([raw])).tolist() == [total + prompt]


@pytest.mark.parametrize(
    ("name", "length", "deviation", "last_rate"),
    [("R3", 1137, 2.41, 0.18), ("R8", 1178, 6.93, 0.21), ("X3", 1534, 2.41, 0.52), ("X64", 2014, 58.2, 0.64)],
)
def test_span_lengths_and_positions_are_distributed_as_the_reference_masks(name, length, deviation, last_rate):
    count = 400
    keys = permute.raw_stream("test", name).random_raw(count * length)
    kinds = np.full(count, KIND[name])
    kept, masked, first_run = ul2.draw_runs(np.full(count, length), kinds, keys)
    runs = np.stack([kept, masked], axis=1).reshape(-1)
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(count, length)
    assert not mask[:, 0].any()
    assert mask[:, -1].all()
    assert masked.std() == pytest.approx(deviation, rel=0.1)
    assert mask[:, -(length // 16) :].mean() == pytest.approx(last_rate, abs=0.045)
    assert len(first_run) == count


def test_every_composition_is_equally_likely():
    keys = permute.raw_stream("compositions").random_raw(60_000)
    # R8 masks 3 of 20 tokens in one span; X3 masks 5 of 10 in 2 spans: 4 ways each for kept and masked.
    kept, masked, _ = ul2.draw_runs(np.full(6000, 10), np.full(6000, KIND["X3"]), keys)
    for runs in (kept, masked):
        firsts = np.bincount(runs[::2], minlength=5)[1:]
        assert firsts.sum() == 6000
        np.testing.assert_allclose(firsts, 1500, atol=150)


def test_the_prefix_is_uniform_over_all_splits():
    keys = permute.raw_stream("prefix").random_raw(40_000)
    kept, masked, _ = ul2.draw_runs(np.full(10_000, 4), np.full(10_000, KIND["S"]), keys)
    assert np.bincount(kept).tolist()[0] == 0
    np.testing.assert_allclose(np.bincount(kept)[1:], 10_000 / 3, rtol=0.06)
    assert (kept + masked == 4).all()


@given(
    pieces=st.lists(st.tuples(st.integers(2, 300), st.integers(0, 5)), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_segments_can_be_turned_back_into_their_pieces(pieces, seed):
    lengths, kinds = (np.asarray(column) for column in zip(*pieces, strict=True))
    tokens = np.arange(5, 5 + lengths.sum(), dtype=np.uint32)
    keys = permute.raw_stream(seed).random_raw(len(tokens))
    segments = ul2.corrupt(tokens, lengths, kinds, keys, UMT5)
    start = at = 0
    for kind, length, inputs, targets in zip(kinds, lengths, segments.num_inputs, segments.num_targets, strict=True):
        segment = segments.tokens[at : at + inputs + targets].tolist()
        prompt = list(PROMPTS[ul2.DENOISERS[kind].mode])
        assert segment[: len(prompt)] == prompt
        assert (segment[inputs - 1], segment[-1]) == (1, 1)
        inner = segment[len(prompt) : inputs - 1], segment[inputs:-1]
        whole = inner[0] + inner[1] if kind == KIND["S"] else undo(*inner, 256000)
        assert whole == tokens[start : start + length].tolist()
        start, at = start + length, at + inputs + targets
    assert at == len(segments.tokens)


def test_the_result_does_not_depend_on_how_pieces_are_batched():
    lengths, kinds = np.asarray([40, 90, 33, 200]), np.asarray([0, 2, 5, 4])
    tokens = np.arange(lengths.sum(), dtype=np.uint32)
    keys = permute.raw_stream("batching").random_raw(len(tokens))
    whole = ul2.corrupt(tokens, lengths, kinds, keys, UMT5).tokens
    parts = [
        ul2.corrupt(tokens[a:b], lengths[s], kinds[s], keys[a:b], UMT5).tokens
        for a, b, s in [(0, 130, slice(0, 2)), (130, 363, slice(2, 4))]
    ]
    assert whole.tolist() == np.concatenate(parts).tolist()
