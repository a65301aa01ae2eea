import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from openmoe.pipelines import objectives, sources, token_cache
from openmoe.pipelines.config import DataError, SourceConfig
from openmoe.pipelines.storage import StorageError
from openmoe.pipelines.tokenizer import Tokenizer

SMALL = "builtin:small_8192"
UMT5 = Path(__file__).resolve().parents[3] / "shared/tokenizers/umt5_256000.model"


@pytest.fixture(scope="module")
def umt5():
    if not UMT5.exists():
        pytest.skip(f"{UMT5} is not there")
    return Tokenizer(str(UMT5))


def test_code_and_spaces_survive_a_round_trip():
    text = "def f(x):\n\treturn  x  # två\n\n    pass \u2028 \x00"
    tokenizer = Tokenizer(SMALL)
    ids = tokenizer.encode([text])[0]
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == text


def test_text_cannot_inject_sentinels_or_ends():
    ids = Tokenizer(SMALL).encode(["<extra_id_0> </s> <pad> <s>"])[0]
    assert ids.max() < 8192
    assert not {0, 1, 2} & set(ids.tolist())


def test_sentinels_descend_from_the_highest_id_and_prompts_are_pieces():
    vocabulary = Tokenizer(SMALL).vocabulary(300)
    assert (vocabulary.text_vocab_size, vocabulary.first_sentinel, vocabulary.eos_id) == (8192, 8491, 1)
    assert vocabulary.prompts == {
        "NLU": (380, 802, 684, 841, 353, 260),
        "NLG": (380, 802, 684, 677, 353, 260),
        "S2S": (380, 399, 287, 399, 353, 260),
    }
    assert Tokenizer(SMALL).decode([8491, 8490, 8192], 300) == "<extra_id_0><extra_id_1><extra_id_299>"


def test_the_fingerprint_is_of_the_content_not_of_the_path(tmp_path):
    with resources.as_file(resources.files("openmoe.pipelines.assets") / "small_8192.model") as model:
        shutil.copy(model, tmp_path / "spiece.model")
    assert Tokenizer(str(tmp_path / "spiece.model")).fingerprint == Tokenizer(SMALL).fingerprint


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x00" * 100])
def test_a_file_that_is_no_tokenizer_is_one_clear_line(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer: .*spiece.model is no SentencePiece model; give a spiece"):
        Tokenizer(str(path))


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({}, False),  # SentencePiece's own defaults: unknown text is 0
        ({"byte_fallback": True, "vocab_size": 300}, True),
        ({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, True),
    ],
)
def test_a_tokenizer_that_gives_id_0_to_text_is_refused(tmp_path, options, accepted):
    texts = iter([f"hello world this is text number {i}" for i in range(200)])
    settings = {"vocab_size": 45, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(tmp_path / "spiece"), num_threads=1, **settings
    )
    uri = str(tmp_path / "spiece.model")
    if accepted:
        assert 0 not in Tokenizer(uri).encode(["hello \u2603"])[0]
        return
    with pytest.raises(DataError, match=r"spiece.model gives id 0, which is padding to the model, for text that it"):
        Tokenizer(uri)


def test_a_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError) as error:
        Tokenizer(str(tmp_path))
    assert str(error.value) == f"tokenizer: {tmp_path} is a folder; give a spiece.model file"


def test_an_unknown_or_missing_tokenizer_is_named():
    with pytest.raises(DataError, match="builtin:huge does not exist; built in: builtin:small_8192"):
        Tokenizer("builtin:huge")
    with pytest.raises(StorageError, match=r"/nowhere/spiece.model: cannot be read: no such file"):
        Tokenizer("/nowhere/spiece.model")


def test_the_real_umt5_has_the_ids_that_the_original_was_trained_with(umt5):
    vocabulary = umt5.vocabulary(300)
    assert (vocabulary.text_vocab_size, vocabulary.first_sentinel, vocabulary.eos_id) == (256_000, 256_299, 1)
    assert vocabulary.prompts == {
        "NLU": (492, 692, 13128, 423, 273),
        "NLG": (492, 18783, 686, 423, 273),
        "S2S": (492, 436, 278, 436, 423, 273),
    }
    assert [ids.tolist() for ids in umt5.encode(["[code]\n", "\t"])] == [[273, 11, 27], [273, 26]]
    assert umt5.decode([256_299, 256_298, 256_000], 300) == "<extra_id_0><extra_id_1><extra_id_299>"


def test_documents_in_the_real_umt5_become_rows_with_sentinels_of_ours_alone(umt5, tmp_path):
    code = "def f(x):\n\treturn  x  # <extra_id_0> </s>\n\n" * 200
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} {code}"}) + "\n" for n in range(20)))
    source = SourceConfig(name="s", format="redpajama", paths=(f"{tmp_path}/a.jsonl",), weight=1.0)
    [unit] = sources.inventory(source, 2**20)
    receipt = token_cache.tokenize(unit, umt5, str(tmp_path))
    cached = token_cache.read(str(tmp_path), receipt["key"], sha256=receipt["sha256"])
    assert cached.tokens.max() < 256_000
    assert umt5.decode(cached.tokens[: cached.lengths[0]]) == f"0 {code}"
    packed = list(objectives.packer("ul2", "budgeted")(*cached, 2048, umt5.vocabulary(300), "a key"))
    slots = np.concatenate([row.tokens for row in packed])
    sentinels = slots[slots >= 256_000]
    assert (sentinels.max(), len(packed[0].tokens)) == (256_299, 2048)
    assert np.count_nonzero(slots == umt5.eos_id) == 2 * sum(len(row.pieces.row) for row in packed)
