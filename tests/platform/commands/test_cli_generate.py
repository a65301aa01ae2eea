"""`openmoe generate` on a run whose model has learned four rows by heart, one of each format."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from openmoe.model import sharding, step
from openmoe.pipelines import tokenizer
from openmoe.platform.commands import cli_generate
from openmoe.platform.commands.cli_generate import Answer
from openmoe.platform.run.lineage import Position
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.train.saver import Saver

SETTINGS = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=64", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.steps=80", "train.batch_rows=4", "train.checkpoint_every_steps=80"),
    *("mesh.expert=1", "cluster.num_workers=1", "cluster.devices_per_worker=1"),
)
CHAT = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n"
    "<s>[INST] Who jumps? [/INST] The fox does, now & then. </s> and more"
)


def rows_to_learn():
    model, eos = tokenizer.load("builtin:small_8192"), [1]

    def ids(text):
        return model.encode([text])[0].tolist()

    code, start = ids("import os, sys\ndef main(argv):\n    pass"), len(ids("import os, sys\n"))
    hole = [model.vocabulary(300).first_sentinel]
    return [
        ids("The fox jumps over the dog.") + eos,
        ids("[S2S] ") + code[:start] + eos + code[start:] + eos,
        ids("[NLU] ") + ids("A quick") + hole + ids("fox") + eos + hole + ids("brown") + eos,
        ids(CHAT),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory, trained in this process on one device."""
    loaded = spec.load("quickstart", [*SETTINGS, f"run_dir={tmp_path_factory.mktemp('run')}/foxes"])
    run = RunDir(loaded.run_dir)
    run.create(loaded)
    mesh = sharding.make_mesh(data=1, expert=1, devices=jax.devices()[:1])
    target_ids = np.zeros((1, 4, 128), np.int32)
    for row, ids in enumerate(rows_to_learn()):
        target_ids[0, row, : len(ids)] = ids
    is_real = (target_ids > 0).astype(np.int32)
    input_ids = np.pad(target_ids[..., :-1], ((0, 0), (0, 0), (1, 0)))
    batch = {"input_ids": input_ids, "target_ids": target_ids, "segment_ids": is_real, "positions": is_real}
    batch |= {"loss_weights": is_real.astype(np.float32)}
    claim = run.claim()
    with Recorder(run, claim, lambda record: None, row_tokens=128) as recorder:
        saver = Saver(loaded, run, claim, recorder, data_id="rows")
        state, _ = saver.restore(mesh)
        train_step = step.make_train_step(loaded.model, loaded.optimizer, mesh)
        for _ in range(80):
            state, metrics = train_step(state, batch)
        assert metrics["loss"] < 0.2
        saver.save(state, Position(80, 320))
        saver.wait()
    return run


def generate(*arguments, text=None):
    """What the command prints; errors are raised, as they are before `cli.main` shows them."""
    app = typer.Typer()
    app.command()(cli_generate.generate)
    return CliRunner().invoke(app, arguments, input=text, catch_exceptions=False, standalone_mode=False).stdout


@pytest.mark.parametrize(
    ("style", "prompt", "printed"),
    [
        ("text", "The fox", "The fox jumps over the dog.\n"),
        ("ul2-s2s", "import os, sys\n", "import os, sys\ndef main(argv):\n    pass\n"),
        ("ul2-nlu", "A quick <extra_id_0> fox", "<extra_id_0>brown\n"),
        ("chat", "Who jumps?", "The fox does, now & then.\n"),
    ],
)
def test_a_prompt_of_each_format_is_answered_as_it_was_learned(run, style, prompt, printed):
    assert generate(run.path, prompt, "--greedy", "--format", style, "--max-tokens", "20") == printed


def test_prompts_of_standard_input_are_answered_together_and_shown_in_their_order(run):
    lines = "The fox jumps over\n\nThe\n"
    wanted = "The fox jumps over the dog.\nThe fox jumps over the dog.\n"
    assert generate(run.path, "--greedy", "--max-tokens", "20", text=lines) == wanted


def test_json_says_what_ended_each_answer(run):
    arguments = (run.path, "The fox", "The", "--top-k", "1", "--max-tokens", "8", "--json")
    first, second = json.loads(generate(*arguments))
    assert first == {"prompt": "The fox", "text": " jumps over the dog.", "ids": first["ids"], "ended": "model"}
    assert second["text"] == " fox jumps over the dog"
    assert (len(second["ids"]), second["ended"]) == (8, "max-tokens")


def test_a_seed_gives_the_same_answer_again_and_another_one_another(run):
    def answer(seed):
        return generate(run.path, "dog", "--temperature", "3", "--max-tokens", "8", "--seed", seed)

    assert answer("1") == answer("1") != answer("2")


def test_the_command_runs_on_as_many_devices_as_there_are(run, quickly):
    command = [sys.executable, "-m", "openmoe.platform", "generate", run.path, "The fox", "--greedy"]
    environment = os.environ | quickly | {"JAX_NUM_CPU_DEVICES": "3"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (0, "The fox jumps over the dog.\n"), result.stderr


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "openmoe.platform", "generate", str(tmp_path), "The fox"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{tmp_path}: no run is here; `openmoe runs` lists those of a folder\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--temperature", "-1"], "--temperature: must be finite and not negative, got -1.0"),
        (["x", "--top-p", "0"], "--top-p: must be above 0 and at most 1, got 0.0"),
        (["x", "--top-k", "-3"], "--top-k: must be at least 1, or 0 for all tokens; got -3"),
        ([], "PROMPT: none given; write one behind RUN_DIR, or one a line to standard input"),
        (["<extra_id_300>", "--format", "ul2-nlg"], "PROMPT: <extra_id_300>: this model has 300 sentinels, from 0 on"),
        (
            ["The fox", "The", "--max-tokens", "126"],
            "prompt 1: 3 tokens, and --max-tokens 126 leaves room for 1 in rows of 128, as the run was trained on; "
            "shorten it, or ask for fewer",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, arguments, message):
    with pytest.raises(SpecError) as error:
        generate(run.path, *arguments, text="")
    assert str(error.value) == message


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    RunDir(str(tmp_path)).create(spec.load("quickstart"))
    with pytest.raises(RunDirError, match="the run has no accepted checkpoint yet; train it until its first one"):
        generate(str(tmp_path), "The fox")


def test_a_checkpoint_of_other_bits_than_were_accepted_is_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    record = tmp_path / "copy/accepted/000001.json"
    record.write_text(record.read_text().replace(run.newest_accepted().digest, "0" * 64))
    with pytest.raises(RunDirError, match="acceptance 1: checkpoints/000001/80: its bits have digest"):
        generate(str(tmp_path / "copy"), "The fox")
    shutil.rmtree(tmp_path / "copy/checkpoints/000001/80")
    with pytest.raises(RunDirError, match="acceptance 1: checkpoints/000001/80: is gone; train on"):
        generate(str(tmp_path / "copy"), "The fox")


def test_a_tokenizer_that_is_no_longer_that_of_the_training_is_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    record = tmp_path / "copy/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(RunDirError, match="was trained with another tokenizer than builtin:small_8192 is now; put"):
        generate(str(tmp_path / "copy"), "The fox")


def heard(steps, answers):
    """What is written after each step, where ids are bytes of UTF-8."""
    written = []

    def tell():
        for tokens in steps:
            written.append("")
            yield tokens

    def write(text):
        written[-1] += text

    cli_generate.listen(tell(), answers, lambda ids: bytes(ids).decode(errors="replace"), write)
    return written


def test_the_first_answer_is_written_as_it_comes_and_the_next_one_when_it_has_ended():
    answers = [Answer("", [], said_before=[*b"say:"]), Answer("", [])]
    assert heard([[*b"aw"], [*b"bx"], [0, *b"y"], [0, *b"z"]], answers) == ["say:a", "b", "\nwxy", "z\n"]
    assert [(a.text, a.ended) for a in answers] == [("ab", "model"), ("wxyz", "max-tokens")]


def test_a_character_is_written_when_all_its_bytes_are_there():
    steps = [[token] for token in [*"né \nx".encode(), 0]]
    assert heard(steps, [Answer("", [])]) == ["n", "", "é", "", " \n", "x", "\n"]


def test_a_chat_ends_where_its_training_wrote_the_end_as_text():
    steps = [[token] for token in b"a<b </s> more"]
    assert heard(steps, [Answer("", [], end=" ?</s>")]) == ["a", "", "<b", "", "", "", "", "\n"]
