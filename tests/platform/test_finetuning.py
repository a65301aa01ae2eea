"""A tiny pretraining, then a run on conversations that begins with its parameters."""

import json

import pytest

from openmoe.model import checkpoint
from openmoe.pipelines import build, explain, stdlib_corpus
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec

pytestmark = pytest.mark.timeout(300)

SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.batch_rows=8", "train.checkpoint_every_steps=2", "train.sample_tokens=4"),
    *("mesh.expert=8", "cluster.num_workers=1", "cluster.devices_per_worker=8"),
)
CHAT = "data={tokenizer: 'builtin:small_8192', seq_len: 128, objective: chat, sources: [{name: talks, format: chat, "
CONSTANT = "optimizer={name: adafactor, learning_rate: 0.05, warmup_steps: 0, schedule: {name: constant}}"


def trained(loaded, manifest):
    from openmoe.platform.train import train_loop

    run = RunDir(loaded.run_dir)
    run.create(loaded)
    train_loop.train(loaded, run, run.claim(), manifest.path, lambda record: None)
    return run


@pytest.fixture(scope="module")
def base(ray_local, tmp_path_factory):
    """A run of two steps of next-token prediction."""
    folder = tmp_path_factory.mktemp("base")
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=60_000, max_code_bytes=60_000)
    source = f"{{name: wikipedia, format: redpajama, weight: 1, paths: [{folder}/corpus/wikipedia/*.jsonl]}}"
    data = f"data={{tokenizer: 'builtin:small_8192', seq_len: 128, objective: next_token, sources: [{source}]}}"
    loaded = spec.load("quickstart", [data, *SMALL, f"run_dir={folder}/run", "train.steps=2", CONSTANT])
    return trained(loaded, build.build(loaded.data, loaded.data_dir, min_rows=16))


@pytest.fixture(scope="module")
def talks(ray_local, tmp_path_factory):
    """(overrides of a run on 30 conversations, its data)."""
    folder = tmp_path_factory.mktemp("talks")
    questions = [f"What is {i} and {i + 1}?" for i in range(30)]
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"It is {2 * i + 1}."}]}
        for i, asked in enumerate(questions)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [f"{CHAT}weight: 1, paths: [{folder}/a.jsonl]}}]}}", *SMALL, f"data_dir={folder}/data", CONSTANT]
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


def test_a_converted_checkpoint_serves_too_and_another_model_is_refused_in_one_line(base, talks, tmp_path):
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
