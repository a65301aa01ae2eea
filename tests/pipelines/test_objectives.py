"""Next-token prediction and prefix LM: what rows they make of documents, and what a trainer is given of these."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import objectives, packing, reference, shards, storage, ul2
from openmoe.pipelines.packing import Pieces, Row
from openmoe.pipelines.tokenizer import Vocabulary

VOCABULARY = Vocabulary(8192, 300, 1, {"NLU": (380, 802, 684), "NLG": (380, 802), "S2S": (380, 7, 8)})


def documents(*lengths) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.asarray(lengths, np.int64)
    return np.arange(sizes.sum(), dtype=np.uint32) % 8000 + 10, sizes


def next_token(*lengths, seq_len) -> list[Row]:
    return list(objectives.packer("next_token", "budgeted")(*documents(*lengths), seq_len, VOCABULARY, "key"))


def test_next_token_rows_are_documents_with_eos_cut_where_a_row_is_full():
    first, second, third = next_token(3, 5, 2, seq_len=5)
    assert [row.tokens.tolist() for row in (first, second, third)] == [
        [10, 11, 12, 1, 13],
        [14, 15, 16, 17, 1],
        [18, 19, 1],
    ]
    assert [row.num_targets.tolist() for row in (first, second, third)] == [[4, 1], [5], [3]]
    assert [row.num_inputs.tolist() for row in (first, second, third)] == [[0, 0], [0], [0]]
    assert first.pieces.document.tolist() == [0, 1]
    assert (second.pieces.document.tolist(), second.pieces.start.tolist()) == ([1], [1])
    assert (first.pieces.length.tolist(), second.pieces.length.tolist()) == ([3, 1], [4])


def test_an_eos_for_which_there_is_no_room_begins_the_next_row():
    first, second = next_token(4, 2, seq_len=4)
    assert second.tokens.tolist() == [1, 14, 15, 1]
    assert (second.pieces.start.tolist(), second.pieces.length.tolist()) == ([4, 0], [0, 2])
    assert (first.num_targets.tolist(), second.num_targets.tolist()) == ([4], [1, 3])


@given(lengths=st.lists(st.integers(2, 400), min_size=1, max_size=40), seq_len=st.integers(64, 300))
@settings(deadline=None)
def test_every_token_is_a_target_once_and_all_rows_but_the_last_are_full(lengths, seq_len):
    tokens, _ = documents(*lengths)
    rows = next_token(*lengths, seq_len=seq_len)
    assert {len(row.tokens) for row in rows[:-1]} <= {seq_len}
    assert all(row.num_targets.sum() == len(row.tokens) for row in rows)
    text = np.concatenate([row.tokens for row in rows])
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert text.tolist() == [token for part in parts for token in (*part.tolist(), 1)]
    assert sum(int(row.pieces.length.sum()) for row in rows) == len(tokens)


def write(path, rows, origin):
    content, facts, _ = shards.render(rows, origin)
    storage.write_durable(path, content)
    return facts


def test_a_trainer_sees_each_document_of_a_next_token_row_as_a_segment_with_loss_on_all_of_it(tmp_path):
    path = str(tmp_path / "shard")
    facts = write(path, next_token(3, 5, 2, seq_len=5), np.asarray([[0, 0], [0, 1], [4, 7]]))
    assert facts["pieces"] == {"next_token": 4}
    assert (facts["rows"], facts["slots_used"], facts["loss_slots"], facts["raw_tokens"]) == (3, 13, 13, 10)
    records = shards.Shard(path, sha256=facts["sha256"], cache_dir="").read([0, 2])
    batch = shards.batch(records, 5)
    assert batch["target_ids"].tolist() == [[10, 11, 12, 1, 13], [18, 19, 1, 0, 0]]
    assert batch["input_ids"].tolist() == [[0, 10, 11, 12, 0], [0, 18, 19, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert shards.decode(records[1])[1].tolist() == [(0, 3, 6, 4, 7, 0, 2)]


def test_prefix_lm_rows_are_the_s_denoiser_alone_and_as_full_as_ul2s():
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6, 1.2, 800)).astype(int)
    pack = objectives.packer("prefix_lm", "reference")
    rows = list(pack(*documents(*lengths), 512, VOCABULARY, "prefix"))
    kinds = np.concatenate([row.pieces.kind for row in rows])
    assert set(kinds.tolist()) == {ul2.PREFIX_LM}
    assert sum(len(row.tokens) for row in rows) / (512 * len(rows)) >= 0.995
    assert sum(int(row.pieces.length.sum()) for row in rows) == lengths.sum()
    prefixes, totals = [], []
    for row in rows:
        at = 0
        for inputs, targets, length in zip(row.num_inputs, row.num_targets, row.pieces.length, strict=True):
            segment = row.tokens[at : at + inputs + targets]
            assert segment[:3].tolist() == [380, 7, 8]
            assert segment[inputs - 1] == segment[-1] == 1
            assert inputs - 4 + targets - 1 == length
            prefixes.append(inputs - 4)
            totals.append(length)
            at += inputs + targets
    where = (np.asarray(prefixes) - 0.5) / (np.asarray(totals) - 1)
    assert np.histogram(where, 4, (0, 1))[0] / len(where) == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize("objective", ["ul2", "prefix_lm"])
def test_noise_is_a_function_of_the_key(objective):
    pack = objectives.packer(objective, "budgeted")
    once, again, other = (
        [row.tokens.tolist() for row in pack(*documents(900, 40, 300), 128, VOCABULARY, key)] for key in "aab"
    )
    assert once == again
    assert once != other


def test_reference_packing_is_for_ul2_alone():
    assert objectives.packer("ul2", "reference") is reference.rows
    assert objectives.packer("ul2", "budgeted") is packing.rows
    assert objectives.packer("next_token", "reference") is objectives.next_token_rows


def test_a_segment_that_runs_over_several_documents_is_one_segment_to_a_trainer(tmp_path):
    """Its further documents have entries without slots; also where the row is full to the last slot."""
    pieces = Pieces(*(np.asarray(column) for column in ([0] * 4, [0, 1, 2, 2], [1, 0, 0, 3], [2, 3, 1, 2], [5] * 4)))
    row = Row(np.arange(20, 30, dtype=np.uint32), pieces, np.asarray([3, 0, 1, 0]), np.asarray([4, 0, 2, 0]))
    path = str(tmp_path / "shard")
    facts = write(path, [row], np.asarray([[0, 0], [0, 1], [3, 9]]))
    assert (facts["raw_tokens"], facts["loss_slots"], facts["pieces"]["S"]) == (8, 6, 2)
    records = shards.Shard(path, sha256=facts["sha256"], cache_dir="").read([0])
    batch = shards.batch(records, 10)
    assert batch["segment_ids"].tolist() == [[1] * 7 + [2] * 3]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[0, 20, 21, 22, 23, 24, 25, 0, 27, 28]]
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 1, 1]]
    assert shards.decode(records[0])[1][["unit", "document"]].tolist() == [(0, 0), (0, 1), (3, 9), (3, 9)]


def test_stored_kinds_keep_their_numbers():
    assert packing.KINDS == ("R3", "R8", "X3", "X8", "X64", "S", "next_token", "chat")
    assert [packing.KINDS[k] for k in (ul2.PREFIX_LM, packing.NEXT_TOKEN, packing.CHAT)] == ["S", "next_token", "chat"]


def test_rows_follow_the_documents_in_their_order():
    documents_of = [row.pieces.document.tolist() for row in next_token(50, 60, 70, seq_len=64)]
    assert list(itertools.chain(*documents_of)) == sorted(itertools.chain(*documents_of))
