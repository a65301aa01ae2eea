"""Conversations: the template, what is refused, and rows whose loss is on answers alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import chat, objectives, packing, shards, sources, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, SourceConfig
from openmoe.pipelines.tokenizer import Vocabulary

VOCABULARY = Vocabulary(8192, 300, 1, {"NLU": (380, 802, 684), "NLG": (380, 802), "S2S": (380, 7, 8)})


def said(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [*([{"role": "system", "content": system}] if system is not None else []), *messages]}


def test_each_answer_is_an_example_after_all_that_was_said_before():
    assert chat.examples(said("Hi", "Hello.", "Bye", "See you.", "And?", system="Be brief.")) == [
        ("<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>[INST] Hi [/INST]", "Hello. </s>"),
        (
            "<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>[INST] Hi [/INST] Hello. </s><s>[INST] Bye [/INST]",
            "See you. </s>",
        ),
    ]
    [(asked, _)] = chat.examples(said("Hi", "Hello."))
    assert asked == chat.prompt("Hi")
    assert asked == ("<<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n<s>[INST] Hi [/INST]")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "no conversation"}, "no_messages"),
        (["a list"], "no_messages"),
        ({"messages": ["Hi"]}, "no_messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "not_string"),
        ({"messages": []}, "bad_roles"),
        (said("Hi"), "bad_roles"),
        ({"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]}, "bad_roles"),
        ({"messages": [*said("Hi", "Hello.")["messages"], {"role": "tool", "content": "x"}]}, "bad_roles"),
        (said("Hi", " "), "empty"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_reason(record, reason):
    assert chat.examples(record) == reason


def test_bad_lines_are_counted_and_kept_while_the_others_are_tokenized(tmp_path):
    lines = [json.dumps(said("Hi", "Hello \ud800", "Bye", "See you.")), "{", json.dumps({"messages": 1}), ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    source = SourceConfig(name="talks", format="chat", paths=(f"{tmp_path}/a.jsonl",), weight=1)
    [unit] = sources.inventory(source, 2**20)
    text = tokenizer.load("builtin:small_8192")
    receipt = token_cache.tokenize(unit, text, str(tmp_path / "tokens"))
    assert receipt["bad"] == {"bad_json": 1, "empty": 1, "no_messages": 1}
    assert (receipt["documents"], receipt["repaired"]) == (2, 2)
    found = token_cache.read(str(tmp_path / "tokens"), receipt["key"], sha256=receipt["sha256"])
    first, second = np.split(found.tokens, np.cumsum(found.lengths)[:-1])
    assert [int((ids == text.eos_id).sum()) for ids in (first, second)] == [1, 1]
    end = first.tolist().index(text.eos_id)
    assert first[:end].tolist() == text.encode([chat.prompt("Hi")])[0].tolist()
    assert text.decode(second[second.tolist().index(text.eos_id) + 1 :]) == "See you. </s>"


def packed(*pairs, seq_len):
    """Rows of (prompt tokens, answer tokens) each; prompts count from 100, answers from 200."""
    documents = [[*range(100, 100 + p), 1, *range(200, 200 + a)] for p, a in pairs]
    tokens = np.asarray([token for document in documents for token in document], np.uint32)
    lengths = np.asarray([len(document) for document in documents], np.int64)
    return list(objectives.packer("chat", "budgeted")(tokens, lengths, seq_len, VOCABULARY, "key"))


def test_loss_is_on_answers_and_their_end_alone():
    first, second = packed((3, 2), (4, 3), (1, 1), seq_len=10)
    assert first.tokens.tolist() == [100, 101, 102, 200, 201, 1, 100, 200, 1]
    assert second.tokens.tolist() == [100, 101, 102, 103, 200, 201, 202, 1]
    assert (first.pieces.document.tolist(), second.pieces.document.tolist()) == ([0, 2], [1])
    origin = np.zeros((3, 2), np.int64)
    records = [shards.encode(row.tokens, shards._Statistics().add(row, origin)) for row in (first, second)]
    batch = shards.batch(records, 10)
    assert batch["loss_weights"].astype(int).tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
    ]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["input_ids"][0].tolist() == [0, 100, 101, 102, 200, 201, 0, 100, 200, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    assert shards.count(records)[0]["pieces"] == {"chat": 3}


def test_too_long_an_example_keeps_the_end_of_its_prompt_and_the_beginning_of_its_answer():
    asked_long, told_long, both = packed((20, 2), (3, 20), (20, 20), seq_len=10)
    assert asked_long.tokens.tolist() == [113, 114, 115, 116, 117, 118, 119, 200, 201, 1]
    assert told_long.tokens.tolist() == [100, 101, 102, *range(200, 207)]
    assert both.tokens.tolist() == [*range(115, 120), *range(200, 205)]
    assert [row.num_targets.tolist() for row in (asked_long, told_long, both)] == [[3], [7], [5]]
    assert sum(int(row.pieces.length.sum()) for row in (asked_long, told_long, both)) == 23 + 24 + 41


@given(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=90), st.integers(64, 128))
@settings(deadline=None)
def test_every_example_is_in_one_row_once_and_no_row_overflows(pairs, seq_len):
    rows = packed(*pairs, seq_len=seq_len)
    assert max(len(row.tokens) for row in rows) <= seq_len
    assert sorted(np.concatenate([row.pieces.document for row in rows]).tolist()) == list(range(len(pairs)))
    assert all((row.num_targets >= 1).all() and (row.num_inputs >= 1).all() for row in rows)
    assert {kind for row in rows for kind in row.pieces.kind.tolist()} == {packing.CHAT}


@pytest.mark.parametrize(("form", "objective"), [("chat", "ul2"), ("redpajama", "chat")])
def test_format_chat_and_objective_chat_belong_together(form, objective):
    source = SourceConfig(name="talks", format=form, paths=("a",), weight=1)
    message = f"sources.0.format: format chat and objective chat belong together, got {form} under {objective}"
    with pytest.raises(ValueError, match=message):
        DataConfig(tokenizer="t", seq_len=512, objective=objective, seed=0, sources=(source,))
