"""The tokenizer of an export: ids and texts are ours, to the last one."""

from pathlib import Path

import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.model import hf_checkpoint, hf_tokenizer, step
from openmoe.model.config import PRESETS
from openmoe.model.interop import InMemory
from openmoe.pipelines import tokenizer

NANO = PRESETS["openmoe-nano"]
UMT5 = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "umt5_256000.model"
TEXTS = [
    "import os\n\n\ndef main(argv):\n\treturn {k: v for k, v in argv}  # nothing\n",
    "  two before, two behind  ",
    "",
    " ",
    "\n",
    "Grüße, 東京 🦆 \u200b\x00 \ufffd",
    "</s> <pad> <s> <unk> <0x0A> <extra_id_300> <extra_id_> ▁",
    "[NLU] 1234567 3.14",
    Path(hf_checkpoint.__file__).read_text(),
]


@pytest.fixture(scope="module")
def ours():
    return tokenizer.load("builtin:small_8192")


def given_by(model):
    return hf_tokenizer.SentencePieceModel(model.proto, model.pieces, model.eos_id, 300)


@pytest.fixture(scope="module")
def folder(ours, mesh, tmp_path_factory):
    """An export of a nano model whose numbers are drawn."""
    rng, path = np.random.default_rng(0), str(tmp_path_factory.mktemp("hf") / "nano")
    declared = traverse_util.flatten_dict(nn.unbox(step.declarations(NANO, mesh)), sep="/")
    drawn = {name: InMemory(rng.normal(size=like.shape).astype(np.float32) / 16) for name, like in declared.items()}
    return hf_checkpoint.write(path, NANO, drawn, beside=hf_tokenizer.files(given_by(ours), NANO))


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    return load(folder, tmp_path_factory.mktemp("hf-modules"))


def load(folder, modules):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(modules))
        import transformers

        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def ids_of(model, text):
    return model.encode([text])[0].tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_ours_behind_a_zero_and_so_is_the_text_of_them(ours, theirs, text):
    ids = theirs(text)["input_ids"]
    assert ids == [0, *ids_of(ours, text)]
    assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_of_any_text_without_sentinels(ours, theirs, text):
    assert theirs(text)["input_ids"] == [0, *ids_of(ours, text)]


def test_sentinels_descend_from_the_highest_id_and_take_the_spaces_beside_them(ours, theirs):
    text = "a <extra_id_0> b <extra_id_1><extra_id_299>"
    ids = [0, *ids_of(ours, "a"), 8491, *ids_of(ours, "b"), 8490, 8192]
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids, 300)
    assert (len(theirs), theirs.convert_ids_to_tokens([8191, 8192, 8492])[1:]) == (8492, ["<extra_id_299>", "<unused>"])


def test_special_ids_are_those_of_the_model(theirs):
    special = (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.padding_side)
    assert special == (0, 0, 1, "left")


def test_a_saved_copy_is_the_same_tokenizer(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy", tmp_path / "modules")
    assert [again(text)["input_ids"] for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
    assert again("<extra_id_0>")["input_ids"] == [0, 8491]


def test_prompts_of_different_lengths_are_continued(folder, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    batch = theirs(["import os", "def main(argv):\n    for name in"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, 0].tolist() == [0, 1]
    drawn = model.generate(**batch, max_new_tokens=4, do_sample=False)
    texts = theirs.batch_decode(drawn, skip_special_tokens=True)
    assert texts[0].startswith("import os")
    assert texts[1].startswith("def main(argv):\n    for name in")


@pytest.mark.skipif(not UMT5.exists(), reason=f"no {UMT5}")
def test_of_the_vocabulary_of_the_published_models(tmp_path):
    model, base = tokenizer.load(str(UMT5)), PRESETS["openmoe-base"]
    source = Path(hf_checkpoint.__file__).parent / "hf_export" / "tokenization_openmoe.py"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "openmoe"}')
    for name, content in hf_tokenizer.files(given_by(model), base).items():
        (tmp_path / name).write_bytes(content)
    found = load(tmp_path, tmp_path / "modules")
    assert [found(text)["input_ids"] for text in TEXTS] == [[0, *ids_of(model, text)] for text in TEXTS]
    assert found("<extra_id_0> <extra_id_299>")["input_ids"] == [0, 256_299, 256_000]
    assert found.decode([256_299]) == "<extra_id_0>"
