"""Exports in the hands of transformers: loaded by name in another process, and generating what openmoe generates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from openmoe.model import hf_checkpoint, hf_files, sample

PROMPTS = [[5, 6, 7, 8, 300, 301], [9, 10], [17] * 11]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def ours(jax_params, moe_config, mesh):
    """What openmoe continues each prompt with, by the likeliest token."""
    settings = {"sampling": sample.Sampling(temperature=0.0), "eos_id": 1, "seed": 0, "mesh": mesh}
    return sample.by_prompt(sample.stream(jax_params, moe_config, PROMPTS, NUM_TOKENS, **settings))


def batch_of(prompts, side="left"):
    """BOS and tokens of each prompt, padded with 0, and their attention mask."""
    longest = max(map(len, prompts)) + 1
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        at = slice(longest - len(prompt) - 1, None) if side == "left" else slice(0, len(prompt) + 1)
        ids[row, at], mask[row, at] = torch.tensor([0, *prompt]), 1
    return ids, mask


def continuation(row):
    """The ids up to the end of the sequence, which is not among them."""
    ids = row.tolist()
    return ids[: ids.index(1)] if 1 in ids else ids


def without_end(ids):
    return [token for token in ids if token != 1]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
def test_generate_draws_token_for_token_what_openmoe_draws(load, ours, use_cache):
    model = load().eval()
    assert len({tuple(ids) for ids in ours}) == 3
    for prompt, wanted in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([[0, *prompt]])
        drawn = model.generate(ids, max_new_tokens=NUM_TOKENS, use_cache=use_cache)
        assert continuation(drawn[0, ids.shape[1] :]) == without_end(wanted)


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
def test_left_padded_prompts_are_continued_as_each_alone_is(load, ours, with_mask):
    ids, mask = batch_of(PROMPTS)
    given = {"attention_mask": mask} if with_mask else {}
    drawn = load().eval().generate(ids, max_new_tokens=NUM_TOKENS, **given)
    for row, wanted in zip(drawn[:, ids.shape[1] :], ours, strict=True):
        assert continuation(row) == without_end(wanted)


def test_positions_in_the_cache_are_those_of_a_full_pass(load):
    """The earlier port took position + 1 for the query."""
    model = load(router_drop_tks=False).eval()
    ids = torch.tensor([[0, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        whole = model(ids).logits
        read = model(ids[:, :3], use_cache=True, generating=True)
        steps = [model(ids[:, t : t + 1], cache=read.cache, generating=True).logits for t in (3, 4, 5)]
    torch.testing.assert_close(torch.cat([read.logits, *steps], 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logits(load, side):
    model = load(router_drop_tks=False).eval()
    ids, mask = batch_of(PROMPTS, side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([[0, *prompt]])).logits[0]
            torch.testing.assert_close(together[row, mask[row] == 1], alone, rtol=0, atol=1e-5)
    assert (together[mask == 0] == 0).all()


def test_bfloat16_weights_are_loaded_and_generate(load, parameters, moe_config, tmp_path):
    path = hf_checkpoint.write(str(tmp_path / "small"), moe_config, parameters, dtype="bfloat16")
    model = load(path)
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=3).shape == (1, 6)


ALONE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not [m for m in sys.modules if m.split(".")[0] in ("openmoe", "jax")]
print(model.generate(torch.tensor([[0, 9, 10]]), max_new_tokens=12)[0, 3:].tolist())
"""


def test_an_export_needs_neither_openmoe_nor_the_hub(export, ours, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", ALONE, export]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr
    drawn = np.array(json.loads(result.stdout))
    assert continuation(drawn) == without_end(ours[1])


def test_the_library_safetensors_reads_what_we_write(export):
    for part in sorted(Path(export).glob("*.safetensors")):
        found = hf_files.read_safetensors(str(part))
        with safe_open(part, "pt") as theirs:
            assert set(theirs.keys()) == found.keys()
            for name, tensor in found.items():
                np.testing.assert_array_equal(tensor.read(), theirs.get_tensor(name).numpy())


def test_we_read_what_the_library_safetensors_writes(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = hf_files.read_safetensors(str(tmp_path / "x.safetensors"))
    np.testing.assert_array_equal(found["a"].read(), [[0, 1, 2], [3, 4, 5]])
    assert found["b"].read().dtype.name == "bfloat16"


def test_what_torch_saves_is_read_without_torch(tmp_path):
    weight = torch.arange(24.0).view(4, 6)
    saved = {"plain": weight, "transposed": weight.T, "part": weight[1:3, 2:], "half": weight.bfloat16()}
    torch.save(saved, tmp_path / "x.bin")
    found = hf_files.read_bin(str(tmp_path / "x.bin"))
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(found[name].read().astype(np.float32), tensor.float().numpy())


def test_a_released_model_in_bin_files_is_read(load, export, golden, moe_config, tmp_path):
    model = load()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    stored = hf_checkpoint.stored_parameters(str(tmp_path), golden("moe_params"), moe_config)
    for name, array in golden("moe_params").items():
        np.testing.assert_array_equal(stored[name].read(), array, err_msg=name)


@pytest.mark.parametrize(
    "content",
    [torch.nn.Linear(2, 2), {"weight": torch.nn.Parameter(torch.ones(2))}, {"step": 3}, {"ids": torch.ones(2).int()}],
)
def test_anything_but_tensors_of_numbers_is_one_line(content, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(hf_checkpoint.CheckpointError, match=r"x\.bin: ") as raised:
        hf_files.read_bin(str(tmp_path / "x.bin"))
    assert "\n" not in str(raised.value)
