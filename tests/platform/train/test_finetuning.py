"""A tiny pretraining, then a run on conversations that begins with its parameters."""

import json
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from openmoe.model import checkpoint
from openmoe.model.config import PRESETS
from openmoe.pipelines import build, explain, stdlib_corpus, tokenizer
from openmoe.platform.commands import cli
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec, validate
from openmoe.platform.train import init_source

pytestmark = pytest.mark.timeout(300)

SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.batch_rows=8", "train.checkpoint_every_steps=2", "train.sample_tokens=4"),
    *("mesh.expert=8", "cluster.num_workers=1", "cluster.devices_per_worker=8"),
)
CHAT = "data={seq_len: 128, objective: chat, sources: [{name: talks, format: chat, "
CONSTANT = "optimizer={name: adafactor, learning_rate: 0.05, warmup_steps: 0, schedule: {name: constant}}"


def trained(loaded, manifest):
    from openmoe.platform.train import train_loop

    run = RunDir(loaded.run_dir)
    run.create(loaded, tokenizer_sha256=tokenizer.load(loaded.data.tokenizer).sha256)
    train_loop.train(loaded, run, run.claim(), manifest.path, lambda record: None)
    return run


@pytest.fixture(scope="module")
def base(ray_local, few_pieces, tmp_path_factory):
    """A run of two steps of next-token prediction."""
    folder = tmp_path_factory.mktemp("base")
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=60_000, max_code_bytes=60_000)
    source = f"{{name: wikipedia, format: redpajama, weight: 1, paths: [{folder}/corpus/wikipedia/*.jsonl]}}"
    data = f"data={{seq_len: 128, objective: next_token, sources: [{source}]}}"
    loaded = spec.load("quickstart", [data, *few_pieces, *SMALL, f"run_dir={folder}/run", "train.steps=2", CONSTANT])
    return trained(loaded, build.build(loaded.data, loaded.data_dir, min_rows=16))


@pytest.fixture(scope="module")
def other_tokenizer(base, tmp_path_factory):
    """The tokenizer of the base run with two pieces exchanged: as many, and other text."""
    from sentencepiece import sentencepiece_model_pb2

    folder = tmp_path_factory.mktemp("tokenizer")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(Path(base.spec().data.tokenizer).read_bytes())
    one, two = model.pieces[500], model.pieces[501]
    one.piece, two.piece = two.piece, one.piece
    (folder / "other.model").write_bytes(model.SerializeToString())
    return f"{folder}/other.model"


@pytest.fixture(scope="module")
def talks(ray_local, few_pieces, tmp_path_factory):
    """(overrides of a run on 30 conversations, its data)."""
    folder = tmp_path_factory.mktemp("talks")
    questions = [f"What is {i} and {i + 1}?" for i in range(30)]
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"It is {2 * i + 1}."}]}
        for i, asked in enumerate(questions)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"{CHAT}weight: 1, paths: [{folder}/a.jsonl]}}]}}"
    overrides = [data, *few_pieces, *SMALL, f"data_dir={folder}/data", CONSTANT]
    loaded = spec.load("quickstart", overrides)
    return overrides, build.build(loaded.data, loaded.data_dir, min_rows=96)


def test_a_run_on_conversations_begins_with_the_parameters_of_another_and_learns_the_answers(base, talks, tmp_path):
    overrides, manifest = talks
    more = [f"run_dir={tmp_path}/chat", f"init_from={base.path}", "train.steps=12", "train.checkpoint_every_steps=12"]
    run = trained(spec.load("quickstart", [*overrides, *more]), manifest)
    [began] = [event for event in run.events() if event["event"] == "initialized"]
    accepted = base.newest_accepted()
    assert began["checkpoint"] == base.at(accepted.checkpoint)
    losses = [record["loss"] for record in run.trace()]
    assert losses[11] < losses[5] < losses[0]

    shown = explain.explain(manifest.path, 0)
    segment = shown.segments[0]
    assert segment.denoiser == "chat"
    asked, answer = (" ".join(part.text for part in parts) for parts in (segment.inputs, segment.targets))
    assert "[INST] What is" in asked
    assert asked.endswith("[/INST]")
    assert answer.strip().startswith("It is")
    assert answer.endswith("</s> </s>")  # of the template, and EOS


@pytest.mark.faults  # a minute of real processes, as those have
def test_a_run_on_gs_is_fine_tuned_from_one_there_by_the_real_driver_and_answers(base, talks, gcs, capsys):
    from openmoe.platform.run import driver

    source, place = f"{gcs}/finetuning/base", f"{gcs}/finetuning/chat"
    fsspec.filesystem("gs", use_listings_cache=False).put(base.path, source, recursive=True)
    lengths = ("train.steps=4", "train.checkpoint_every_steps=2", "train.sample_tokens=0")
    loaded = spec.load("quickstart", [*talks[0], f"run_dir={place}", f"init_from={source}", *lengths])
    assert driver.train(loaded) == 0
    run = RunDir(place)
    [began] = [event for event in run.events() if event["event"] == "initialized"]
    assert began["checkpoint"] == f"{source}/{base.newest_accepted().checkpoint}"
    losses = [record["loss"] for record in run.trace()]
    assert len(losses) == 4
    assert losses[3] < losses[0]
    assert "does not say what tokenizer" not in capsys.readouterr().err

    def openmoe(*arguments):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    [answer] = openmoe("generate", place, "--format", "chat", "--max-tokens", "4", "--json", "What is 3 and 4?")
    assert (answer["prompt"], 1 <= len(answer["ids"]) <= 4) == ("What is 3 and 4?", True)
    shown = CliRunner().invoke(cli.app, ["data", "explain", place, "--row", "0"])
    assert shown.exit_code == 0, shown.output
    assert "segment 1: denoiser chat, " in shown.stdout
    proven = openmoe("ledger", "verify", place, "--json")
    assert (proven["compared"], proven["head"]) == (4, run.newest_accepted().ledger_head)


def test_a_source_of_another_tokenizer_is_refused_in_one_line_before_anything_is_written(
    base, talks, other_tokenizer, tmp_path, capsys
):
    from openmoe.platform.run import driver

    same, other = tokenizer.load(base.spec().data.tokenizer), tokenizer.load(other_tokenizer)
    checkpoint_path = base.at(base.newest_accepted().checkpoint)
    told = []
    for place in (base.path, checkpoint_path):
        overrides = [*talks[0], f"init_from={place}", f"run_dir={tmp_path}/chat"]
        loaded = spec.load("quickstart", overrides)
        assert init_source.check(loaded, same, told.append) in ("step 2 of run quickstart", "a checkpoint of Orbax")
        assert init_from_of(loaded) == init_source.check(loaded, same, told.append)
        unlike = spec.load("quickstart", [*overrides, f"data.tokenizer={other_tokenizer}"])
        with pytest.raises(RunDirError) as refused:
            driver.train(unlike)
        with pytest.raises(RunDirError) as invalid:
            validate.explain(unlike)
        assert str(refused.value) == (
            f"init_from: {place} was trained with another tokenizer than data.tokenizer={other_tokenizer} "
            f"(SHA-256 {same.sha256[:16]} there, {other.sha256[:16]} here): its tokens mean other text; "
            "give the tokenizer it was trained with"
        )
        assert str(invalid.value) == str(refused.value)
    assert told == []
    assert not (tmp_path / "chat").exists()
    assert same.fingerprint != other.fingerprint

    for place in (f"{tmp_path}/nothing", str(tmp_path)):
        nowhere = spec.load("quickstart", [*talks[0], f"init_from={place}", f"run_dir={tmp_path}/chat"])
        with pytest.raises(RunDirError, match=f"^init_from: {place}: no run directory, and no checkpoint of Orbax; "):
            validate.explain(nowhere)


def init_from_of(loaded):
    """What `openmoe validate` says of where a run begins."""
    [run, *_] = validate.explain(loaded)
    return run.facts[-1].note


@pytest.mark.parametrize("kind", ["hf", "t5x"])
def test_a_conversion_serves_and_that_its_tokenizer_is_not_known_is_said(base, talks, kind, tmp_path, monkeypatch):
    from openmoe.model import sharding
    from openmoe.platform.train import init_from

    path = base.at(base.newest_accepted().checkpoint)
    monkeypatch.setitem(PRESETS, "tiny", base.spec().model)

    def convert(source, destination, *arguments):
        result = CliRunner().invoke(cli.app, ["convert", source, destination, *arguments, "--no-check", "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["path"]

    there = convert(path, f"{tmp_path}/{kind}", "--from", "orbax", "--to", kind, "--model", "tiny")
    converted = convert(there, f"{tmp_path}/orbax", "--from", kind, "--to", "orbax", "--model", "tiny")
    loaded = spec.load("quickstart", [*talks[0], f"init_from={converted}", f"run_dir={tmp_path}/chat"])
    told, found = [], []
    init_source.check(loaded, tokenizer.load(loaded.data.tokenizer), told.append)
    assert told == [f"init_from: {converted} does not say what tokenizer it was trained with; taken to be the same"]
    assert init_from_of(loaded) == "a checkpoint of Orbax; it does not say of which tokenizer"
    state = init_from.initial_state(
        loaded, sharding.make_mesh(**loaded.mesh.model_dump()), lambda event, **facts: found.append(facts["digest"])
    )
    base_params = init_from.initial_state(
        loaded.model_copy(update={"init_from": path}), sharding.make_mesh(**loaded.mesh.model_dump())
    ).params
    assert found == [checkpoint.checksum(base_params)] == [checkpoint.checksum(state.params)]


def test_one_checkpoint_serves_too_and_another_model_is_refused_in_one_line(base, talks, tmp_path):
    import jax

    from openmoe.model import sharding, step
    from openmoe.platform.train import init_from

    loaded = spec.load("quickstart", [*talks[0], f"run_dir={tmp_path}/x"])
    mesh = sharding.make_mesh(**loaded.mesh.model_dump())
    found = []

    def event(kind, **facts):
        found.append((kind, facts))

    path = base.at(base.newest_accepted().checkpoint)
    states = [
        init_from.initial_state(loaded.model_copy(update={"init_from": place}), mesh, event)
        for place in (path, base.path)
    ]
    assert [kind for kind, _ in found] == ["initialized", "initialized"]
    digests = [checkpoint.checksum(state.params) for state in states]
    assert digests == [facts["digest"] for _, facts in found]
    assert digests[0] == digests[1]
    assert int(states[0].step) == int(states[0].opt_state.count) == 0
    fresh = step.init_state(loaded.model, loaded.optimizer, loaded.seed, mesh)
    assert checkpoint.checksum(fresh.params) != digests[0]
    assert len(jax.tree.leaves(states[0].opt_state)) == len(jax.tree.leaves(fresh.opt_state))

    for place in (path, base.path):
        other = spec.load("quickstart", [*talks[0], "model.d_ff=64", f"init_from={place}"])
        with pytest.raises(RunDirError, match=r"^init_from: \S+: params/decoder/\S+: has shape \S+.*in this model"):
            init_from.initial_state(other, mesh, event)
    nowhere = spec.load("quickstart", [*talks[0], f"init_from={tmp_path}/nothing"])
    with pytest.raises(RunDirError, match="no checkpoint of Orbax; give the path of one step"):
        init_from.initial_state(nowhere, mesh, event)
