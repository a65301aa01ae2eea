"""The `openmoe` command as a user runs it: its output and its exit code, of a process of its own where that matters."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from openmoe.platform.commands import cli
from openmoe.platform.run.journal import Journal
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec

ROOT = Path(__file__).parents[3]
BAD_RUNS = Path(__file__).parent / "bad_runs"
HEAVY = ("jax", "ray", "pyarrow", "numpy", "orbax", "flax", "sentencepiece", "pydantic", "yaml", "rich")


def openmoe(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "openmoe.platform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


def test_help_names_the_commands_and_the_exit_codes():
    result = openmoe("--help")
    assert result.returncode == 0
    for command in ("quickstart", "train", "validate", "schema", "runs", "data", "model"):
        assert f"\n  {command} " in result.stdout
    assert "Exit codes: 0 it worked; 1 the run failed; 2 bad input" in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import atexit, sys; from openmoe.platform.commands import cli; sys.argv = ['openmoe', '--help'];"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr));"
        "cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "[]\n")


def test_the_shell_completes_commands():
    result = openmoe(_OPENMOE_COMPLETE="complete_bash", COMP_WORDS="openmoe val", COMP_CWORD="1")
    assert result.stdout.strip() == "validate"


def test_validate_explains_a_run_file(run_here):
    code, out, _ = run_here("validate", "quickstart", "train.steps=200")
    assert code == 0
    assert "5,082,496 (5.08 M)" in out
    assert "409,600" in out  # 200 steps of 4 rows of 512 tokens


def test_validate_prints_json_alone_when_asked():
    result = openmoe("validate", "openmoe_8b", "--json")
    explained = json.loads(result.stdout)
    assert explained["model"]["parameters"] == 11_855_046_656
    assert explained["devices"]["mesh"] == {"data": 1, "fsdp": 2, "expert": 32, "tensor": 1}
    assert result.stderr == ""


def test_schema_is_json():
    assert json.loads(openmoe("schema").stdout)["title"] == "OpenMoE run file"


def test_a_model_is_described(run_here):
    described = json.loads(run_here("model", "describe", "openmoe-34b", "--json")[1])
    assert described["model"]["parameters"] == 46_270_737_408
    assert described["parameters"]["experts"] == 38_654_705_664
    assert described["memory"]["parameters_float32"] == 4 * 46_270_737_408
    assert described["memory"]["parameters_bfloat16"] == 2 * 46_270_737_408


def test_an_empty_folder_has_no_runs(tmp_path, run_here):
    assert json.loads(run_here("runs", str(tmp_path), "--json")[1]) == []
    assert "no runs in" in run_here("runs", str(tmp_path))[1]


def test_the_json_of_a_run_whose_loss_is_not_finite_is_json(tmp_path):
    run = RunDir(str(tmp_path / "bad"))
    run.create(spec.load("quickstart"))
    metrics = Journal(run.at("metrics"), incarnation=run.claim().incarnation, process=0)
    metrics.append({"step": 1, "time_s": 5.0, "loss": math.nan})
    metrics.flush()
    [row] = json.loads(openmoe("runs", str(tmp_path), "--json").stdout, parse_constant=pytest.fail)
    assert (row["step"], row["loss"]) == (1, None)


# file: what standard error says, whole, after "<file>:"
BAD_FILES = {
    "words_of_two_meanings.yaml": [
        "1: name: YAML 1.1 reads no as false; write false for a boolean, or 'no' in quotes for text",
        "9: train.steps: '1e6' is text in YAML 1.1; write 1000000, or '1e6' in quotes for text",
    ],
    "section_twice.yaml": ["12: mesh: given twice (lines 10 and 12); keep one"],
    "impossible.yaml": [
        "9: train.batch_rows: 5 rows a microbatch cannot be divided over 3 devices (mesh); "
        "make batch_rows a multiple of 3, got 5",
        "10: mesh: data=1 x expert=3 is 3 devices, the cluster has num_workers=2 x devices_per_worker=2 = 4",
        "10: mesh.expert: must divide model.num_experts=8, got 3",
    ],
    "tab.yaml": ["10: a tab in the indentation; YAML allows spaces only"],
    "latin_1.yaml": [" not UTF-8 (byte 9 is 0xe9); save it as UTF-8"],
    "misspelt.yaml": [
        "9: train.batch_rows: missing; add `batch_rows:` to `train`",
        "9: train.batch_row: unknown key; did you mean `batch_rows`?",
        " mesh: missing; add `mesh:` to the file",
        "10: mseh: unknown key; did you mean `mesh`?",
    ],
    "alias_bomb.yaml": ["1: anchors are not allowed; remove `&a`"],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_ends_in_plain_lines_and_exit_code_2(name, run_here, monkeypatch):
    monkeypatch.chdir(BAD_RUNS)
    code, out, err = run_here("validate", name)
    assert (code, out) == (2, "")
    assert err.splitlines() == [f"{name}:{line}" for line in BAD_FILES[name]]


def test_a_bad_file_ends_a_process_with_plain_lines_and_exit_code_2():
    result = openmoe("validate", "tab.yaml", cwd=BAD_RUNS)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"tab.yaml:{BAD_FILES['tab.yaml'][0]}\n")


@pytest.mark.parametrize(
    "command", [("train",), ("data", "build"), ("data", "plan"), ("data", "tokenize"), ("data", "inspect")]
)
def test_nothing_is_started_on_a_bad_file(command, run_here, monkeypatch):
    monkeypatch.chdir(BAD_RUNS)
    code, out, err = run_here(*command, "tab.yaml")
    assert (code, out, err) == (2, "", "tab.yaml:10: a tab in the indentation; YAML allows spaces only\n")


def test_every_bad_file_is_tried():
    assert {path.name for path in BAD_RUNS.iterdir()} == BAD_FILES.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["validate", "quikstart"],
            "quikstart: no run file of this name is shipped; did you mean `quickstart`?",
        ),
        (
            ["validate", "quickstart", "train.stps=1"],
            "override: train.stps: unknown key; did you mean `steps`?",
        ),
        (["validate", "quickstart", "data.tokenizer=/missing.model"], "/missing.model"),
        (
            ["model", "describe", "openmoe-8B"],
            "openmoe-8B: no preset of this name; did you mean `openmoe-8b`?",
        ),
        (["data", "inspect", "quickstart", "data_dir=/missing"], "/missing: no build of these settings;"),
        (["data", "corpus", "/dev/null/corpus"], "/dev/null/corpus"),
        (["tarin"], "No such command 'tarin'"),
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_2(arguments, message, run_here):
    code, out, err = run_here(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def commands(group, *names):
    for name, command in group.commands.items():
        if not command.hidden:
            yield (*names, name), command
            yield from commands(command, *names, name) if hasattr(command, "commands") else ()


def test_every_command_has_a_whole_sentence_in_the_lists_of_commands():
    found = {names: command.get_short_help_str(60) for names, command in commands(typer.main.get_command(cli.app))}
    assert len(found) > 50
    assert [names for names, line in found.items() if not line or line.endswith("...")] == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("README.md", "tokenizer: README.md is no SentencePiece model; give a spiece.model file\n"),
        ("tests", "tokenizer: tests is a folder; give a spiece.model file\n"),
    ],
)
def test_what_is_no_tokenizer_is_one_line_with_the_remedy(uri, message, run_here, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_here("validate", "quickstart", f"data.tokenizer={uri}") == (2, "", message)


def train(run_dir, *overrides):
    return openmoe("train", "quickstart", f"run_dir={run_dir}", *overrides)


def test_an_object_store_larger_than_shared_memory_is_refused_in_one_line(tmp_path, needs):
    needs(sys.platform.startswith("linux"), "Linux: elsewhere object stores are not in shared memory")
    result = train(tmp_path / "run", "cluster.object_store_bytes=1000000000000000")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"cluster\.object_store_bytes: /dev/shm has [\d,]+ bytes free, Ray's object store needs 1,000,000,000,000,000; "
        r"free some, mount a larger /dev/shm, or set a smaller cluster\.object_store_bytes \(at least 80,000,000\)\n",
        result.stderr,
    )


def test_a_run_does_not_wait_for_devices_that_its_own_ray_cannot_get(tmp_path):
    result = openmoe("train", "twin", f"run_dir={tmp_path}/run", f"sample_corpus={tmp_path}/corpus")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "cluster: 2 workers with 4 tpu devices each, and Ray finds 0 on this machine; set num_workers, "
        "devices_per_worker and mesh to what there is, or hand the "
        "run to a cluster (`openmoe submit`, or RAY_ADDRESS)\n"
    )


def test_a_taken_dashboard_port_is_refused_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = train(tmp_path / "run", f"cluster.dashboard_port={port}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"cluster.dashboard_port: 127.0.0.1:{port} cannot be used (Address already in use); "
        "choose another port, or leave it out to start no dashboard\n"
    )


def test_a_run_directory_of_another_seed_is_refused_in_one_line(tmp_path):
    RunDir(str(tmp_path)).create(spec.load("quickstart"))
    result = train(tmp_path, "seed=3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"run_dir: {tmp_path} belongs to another run (data.seed: 0 there, 3 here; seed: 0 there, 3 here); "
        "choose another run_dir, or restore those settings to go on with it\n"
    )
