"""`openmoe convert` as a user runs it: the nano model from T5X to Orbax and Hugging Face, back again, and bad input."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from openmoe.model import checkpoint, sharding, step
from openmoe.model import t5x_checkpoint as t5x
from openmoe.model.config import PRESETS
from openmoe.model.interop import InMemory
from openmoe.model.optimizer import OptimizerState
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec

NANO = PRESETS["openmoe-nano"]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=1, expert=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def state(mesh):
    """A state of step 5, with moments that are no zeros."""
    fresh = step.init_state(NANO, AdafactorConfig(), 0, mesh)
    moments = jax.tree.map(lambda v: v + 0.5, fresh.opt_state.moments)
    return step.TrainState(fresh.step + 5, fresh.params, OptimizerState(fresh.opt_state.count + 5, moments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    """A folder with t5x/checkpoint_5."""
    path = tmp_path_factory.mktemp("convert")
    t5x.save(str(path / "t5x"), state)
    return path


@pytest.fixture
def convert(folder, monkeypatch, run_here):
    """Returns the function that runs `openmoe convert` in this process: exit code, output, errors."""
    monkeypatch.chdir(folder)
    return lambda line: run_here("convert", *line.split())


def test_from_t5x_to_orbax_and_back_is_the_same_state(convert, folder, state, mesh):
    template = step.state_shapes(NANO, AdafactorConfig(), mesh)
    code, out, err = convert("t5x/checkpoint_5 orbax --from t5x --to orbax --model openmoe-nano")
    assert (code, out) == (0, "orbax/5\n"), err
    assert "write: 136 of 136 arrays" in err
    restored, loader_state = checkpoint.Checkpointer(str(folder / "orbax")).restore(5, template)
    assert checkpoint.checksum(restored) == checkpoint.checksum(state)
    assert loader_state == {"next_row": 0}

    code, out, err = convert("orbax/5 again --from orbax --to t5x --model openmoe-nano --json")
    assert (code, json.loads(out)) == (0, {"path": "again/checkpoint_5"}), err
    restored = t5x.restore(str(folder / "again" / "checkpoint_5"), template)
    assert checkpoint.checksum(restored) == checkpoint.checksum(state)
    index = Path("checkpoint_5", "checkpoint")
    assert (folder / "again" / index).read_bytes() == (folder / "t5x" / index).read_bytes()


def test_parameters_can_be_rewritten_in_bfloat16(convert, folder, state, mesh):
    line = "t5x/checkpoint_5 small --from t5x --to t5x --model openmoe-nano --dtype bfloat16"
    code, out, _ = convert(line)
    assert (code, out) == (0, "small/checkpoint_5\n")
    assert '"bfloat16"' in (folder / out.strip() / "target.decoder.decoder_norm.scale" / ".zarray").read_text()
    restored = t5x.restore(out.strip(), step.state_shapes(NANO, AdafactorConfig(), mesh))
    for name, array in t5x.arrays_by_name(restored).items():
        wanted = t5x.arrays_by_name(state)[name]
        wanted = wanted.astype("bfloat16").astype("float32") if name.startswith("target/") else wanted
        np.testing.assert_array_equal(array, wanted, err_msg=name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "t5x/checkpoint_5 new --from t5x --to orbax --model openmoe-nan",
            "--model openmoe-nan: no preset of this name; did you mean `openmoe-nano`?",
        ),
        (
            "t5x/checkpoint_5 new --from t5x --to orbax --model openmoe-nano --dtype bfloat16",
            "--dtype bfloat16: orbax checkpoints have float32 only; leave it out",
        ),
        (
            "t5x new --from t5x --to orbax --model openmoe-nano",
            "t5x: no T5X checkpoint: it has no file `checkpoint`; give the path of a whole checkpoint_<step>",
        ),
        (
            "t5x new --from orbax --to t5x --model openmoe-nano",
            "t5x: no checkpoint of Orbax; give the path of one step, such as DIR/1000",
        ),
        (
            "t5x new --from hf --to t5x",
            "t5x: no checkpoint of Hugging Face: it has no config.json; give its folder",
        ),
        (
            "t5x/checkpoint_5 new --from t5x --to hf",
            "--model: needed with --from t5x; such as --model openmoe-8b",
        ),
        (
            "t5x/checkpoint_5 new --from t5x --to orbax --model openmoe-nano --tokenizer builtin:small_8192",
            "--tokenizer builtin:small_8192: a tokenizer goes along to hf only; leave it out",
        ),
        (
            "t5x/checkpoint_5 new --from t5x --to hf --model openmoe-base --tokenizer builtin:small_8192",
            "tokenizer: the model has 256000 pieces of text and room for 384 sentinels, got 8192 and 300; "
            "give the one it was trained with",
        ),
        (
            "t5x/checkpoint_5 t5x --from t5x --to t5x --model openmoe-nano",
            "t5x/checkpoint_5: is there already; remove it, or choose another folder",
        ),
        (
            "t5x/checkpoint_5 new --from t5x --to t5x --model openmoe-base",
            "t5x/checkpoint_5: target/decoder/layers_1/extra_mlp/wi_0/kernel and 21 more: "
            "there is no such array in this model; choose the model and optimizer settings it was written with",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(convert, folder, line, message):
    assert convert(line) == (2, "", f"{message}\n")
    assert not (folder / "new").exists()


def openmoe_here(convert, line):
    code, out, err = convert(line)
    assert code == 0, err
    return out, err


def test_to_hugging_face_and_back_keeps_every_parameter(convert, folder, state, mesh):
    out, err = openmoe_here(
        convert, "t5x/checkpoint_5 hf --from t5x --to hf --model openmoe-nano --tokenizer builtin:small_8192"
    )
    assert out == "hf\n"
    assert "hf has parameters only: the step and the optimizer's state of t5x/checkpoint_5 stay behind\n" in err
    assert "tokenizer: tokenizer.model, tokenizer_config.json\n" in err
    assert "write: 49 of 49 arrays" in err
    assert "checked: 4 layers, largest difference 0.0 of " in err
    assert sorted(path.name for path in (folder / "hf").iterdir()) == [
        "config.json",
        "configuration_openmoe.py",
        "generation_config.json",
        "layers_openmoe.py",
        "model.safetensors",
        "modeling_openmoe.py",
        "tokenization_openmoe.py",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    template, fresh = (
        step.state_shapes(NANO, AdafactorConfig(), mesh),
        step.init_state(NANO, AdafactorConfig(), 0, mesh),
    )
    wanted = fresh._replace(params=state.params)  # step 0, moments of zeros

    out, err = openmoe_here(convert, "hf new-t5x --from hf --to t5x")
    assert out == "new-t5x/checkpoint_0\n"
    assert "hf has parameters only: t5x begins at step 0 with a fresh state of the optimizer\n" in err
    assert "t5x has no place for a tokenizer: tokenizer.model, tokenizer_config.json stay behind\n" in err
    assert checkpoint.checksum(t5x.restore(out.strip(), template)) == checkpoint.checksum(wanted)

    out, err = openmoe_here(convert, "hf new-orbax --from hf --to orbax --no-check")
    assert (out, "checked" in err) == ("new-orbax/0\n", False)
    restored, _ = checkpoint.Checkpointer(str(folder / "new-orbax")).restore(0, template)
    assert checkpoint.checksum(restored) == checkpoint.checksum(wanted)

    out, err = openmoe_here(convert, "new-orbax/0 hf-again --from orbax --to hf --model openmoe-nano --no-check")
    assert "tokenizer: none goes along; --tokenizer MODEL adds one\n" in err
    assert (folder / "hf-again/model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()

    (folder / "hf/special_tokens_map.json").write_text("{}")  # as others' exports have it
    out, err = openmoe_here(convert, "hf half --from hf --to hf --dtype bfloat16")
    carried = ["special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"]
    assert f"tokenizer: {', '.join(carried)}\n" in err
    of_both = [[(folder / name / file).read_bytes() for file in carried] for name in ("hf", "half")]
    assert of_both[0] == of_both[1]
    assert "checked: 4 layers, largest difference 0.0 of " in err
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("hf", "half")]
    assert 1.99 < sizes[0] / sizes[1] < 2


@pytest.fixture(scope="module")
def improved(folder, mesh):
    """Parameters of a run with one accepted checkpoint, whose model departs from the original and is no preset."""
    sizes = ("num_layers=2", "d_model=16", "d_ff=16", "d_ff_expert=8", "head_dim=8", "num_experts=8", "top_k=3")
    settings = [f"model.{size}" for size in sizes]
    loaded = spec.load("quickstart", ["model.preset=openmoe-next-nano", *settings, f"run_dir={folder}/run"])
    template, rng, run = (
        step.state_shapes(loaded.model, loaded.optimizer, mesh),
        np.random.default_rng(0),
        RunDir("run"),
    )
    state = jax.tree.map(lambda like: InMemory(rng.normal(size=like.shape).astype(like.dtype)), template)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        checkpoint.write("run/checkpoints/000001", 3, state, template, {"next_row": 24}, lambda *progress: None)
        run.create(loaded)
        run.claim()
        where = {"checkpoint": "checkpoints/000001/3", "digest": "", "ledger_head": "", "data_id": ""}
        run.accept(Acceptance(number=1, incarnation=1, step=3, next_row=24, **where))
    return template.params, state.params


def test_an_improved_run_goes_to_hugging_face_and_back_with_the_same_bits(convert, improved):
    template, params = improved
    out, err = openmoe_here(convert, "run run-hf --from orbax --to hf --no-check")
    assert out == "run-hf\n"
    assert "the step and the optimizer's state of run/checkpoints/000001/3 stay behind\n" in err
    assert "tokenizer: tokenizer.model, tokenizer_config.json\n" in err
    assert "write: 35 of 35 arrays" in err
    out, _ = openmoe_here(convert, "run-hf run-again --from hf --to orbax --no-check")
    for found, like in zip(
        jax.tree.leaves(checkpoint.stored_parameters(out.strip(), template), is_leaf=is_array),
        jax.tree.leaves(params, is_leaf=is_array),
        strict=True,
    ):
        np.testing.assert_array_equal(found.read(), like.array)


def is_array(node):
    return hasattr(node, "read")


def test_a_checkpoint_of_a_run_says_what_model_it_is_of_and_an_option_says_otherwise(convert, improved):
    line = "run/checkpoints/000001/3 other --from orbax --to hf --no-check"
    assert "write: 35 of 35 arrays" in openmoe_here(convert, line)[1]
    code, _, err = convert(f"{line} --model openmoe-nano".replace(" other ", " another "))
    assert code == 2
    assert err.splitlines()[-1].endswith("there is no such array in this model; choose the model it was written with")


def test_a_checkpoint_outside_its_run_can_be_given_the_run_s_model(convert, folder, improved):
    shutil.copytree(folder / "run/checkpoints/000001/3", folder / "loose/3")
    line = "loose/3 third --from orbax --to hf --no-check"
    assert convert(line) == (2, "", "--model: needed with --from orbax; such as --model openmoe-8b\n")
    assert "write: 35 of 35 arrays" in openmoe_here(convert, f"{line} --model run")[1]


def test_a_run_without_a_checkpoint_is_one_line(convert, folder, improved):
    shutil.copytree(folder / "run", folder / "young", ignore=shutil.ignore_patterns("accepted"))
    message = "young: the run has no accepted checkpoint yet; train it until its first one\n"
    assert convert("young new --from orbax --to hf") == (2, "", message)
