"""Held-out loss in training: of the right rows, once for each step that asks for it, and a rule that ends the run."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.model import sharding, step, transformer
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.pipelines import heldout, packing, selection, shards, sources, token_cache, tokenizer
from openmoe.pipelines import manifest as manifests
from openmoe.platform.run import report
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import run_length, spec
from openmoe.platform.run_file.spec_errors import SpecError
from openmoe.platform.run_file.spec_sections import EvalConfig, StopWhenConfig
from openmoe.platform.train import sampling, saturation
from openmoe.platform.train.evaluation import losses_of

pytestmark = pytest.mark.timeout(180)

SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.steps=6", "train.batch_rows=8", "train.checkpoint_every_steps=2"),
    *("train.sample_tokens=0", "mesh.expert=8", "cluster.num_workers=1", "cluster.devices_per_worker=8"),
)
EVERY_2 = ("eval={every_steps: 2, rows: 5}",)


@pytest.fixture(scope="module")
def data(few_pieces, tmp_path_factory):
    """(overrides that name two sources, the manifest of their build): a fifth of the documents is kept apart."""
    folder = tmp_path_factory.mktemp("data")
    named = []
    for name, count in (("wiki", 60), ("code", 30)):
        texts = [" ".join(f"{name} {37 * i + n} is {i * n}" for n in range(30)) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        named.append(f"{{name: {name}, format: redpajama, paths: [{folder}/{name}.jsonl], weight: 1}}")
    named_sources = f"data.sources=[{', '.join(named)}]"
    overrides = [*few_pieces, f"data_dir={folder}/data", named_sources, "data.validation_share=0.2"]
    config = spec.load("quickstart", [*SMALL, *overrides]).data
    text = tokenizer.load(config.tokenizer)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    data_dir = f"{folder}/data"
    tokenized = {
        name: [token_cache.tokenize(unit, text, f"{data_dir}/tokens") for unit in u] for name, u in units.items()
    }
    everything = [receipt for receipts in tokenized.values() for receipt in receipts]
    plan = selection.plan(data_dir, everything, dedup=False, validation_share=0.2)
    selection.write_plan(plan)
    [[name]] = [names for _, names in selection.stages(plan)]
    splits = selection.run(plan, name)["units"]
    receipts = {name: [{**unit, "split": splits[unit["key"]]} for unit in u] for name, u in tokenized.items()}
    path = manifests.manifest_path(data_dir, config, text, [unit for u in units.values() for unit in u])
    manifests.commit(manifests.assemble(path, config, text, receipts))
    return overrides, manifests.load(path)


@pytest.fixture
def train(data, tmp_path):
    """Trains one incarnation in `tmp_path/name`; returns its RunDir."""
    from openmoe.platform.train import train_loop

    def run(name, *more, report=lambda record: None, beat=lambda **what: None):
        loaded = spec.load("quickstart", [*SMALL, *data[0], f"run_dir={tmp_path}/{name}", *more])
        run_dir = RunDir(loaded.run_dir)
        run_dir.create(loaded)
        train_loop.train(loaded, run_dir, run_dir.claim(), data[1].path, report, beat)
        return run_dir

    return run


def bits(run):
    return [(r["step"], r["rows"], r["loss"].hex(), r["grad_norm"].hex()) for r in run.trace()]


def evaluated(run):
    return [(e["step"], {name: loss.hex() for name, loss in e["losses"].items()}) for e in run.evaluations()]


def interrupt_at(number):
    """A function that raises when it is called for the nth time."""
    calls = iter(range(1, number + 1))

    def count(*_, **what):
        if next(calls) == number:
            raise InterruptedError

    return count


def test_held_out_rows_are_documents_that_no_row_of_a_pass_contains(data):
    manifest = data[1]
    held_out = heldout.read(manifest.path, 1000)
    seen = {0: set(), 1: set()}
    for stream, record in zip(held_out.stream.tolist(), held_out.records, strict=True):
        _, segments = shards.decode(record)
        seen[stream] |= {(int(s["unit"]), int(s["document"])) for s in segments}
    for stream, source in enumerate(manifest.sources):
        kept_apart = {
            (number, document)
            for number, unit in enumerate(source.units)
            for document in np.flatnonzero(selection.read(manifest.data_dir, unit) == selection.VALIDATION).tolist()
        }
        assert kept_apart
        assert seen[stream] == kept_apart
    assert held_out.streams == ("wiki", "code")
    assert heldout.read(manifest.path, 2).records == (
        *held_out.records[:2],
        *held_out.records[(held_out.stream == 0).sum() :][:2],
    )


def test_slots_know_their_denoiser_and_rows_beyond_the_last_count_for_nothing(data):
    held_out = heldout.read(data[1].path, 3)
    assert len(held_out.records) == 6
    batch = heldout.batch(held_out, 4, 4)
    assert (batch["kinds"][2:] == heldout.NO_KIND).all()
    assert (batch["loss_weights"][2:] == 0).all()
    np.testing.assert_array_equal(batch["target_ids"][2:], heldout.batch(held_out, 0, 2)["target_ids"])
    prompts = {ids: mode for mode, ids in data[1].vocabulary.prompts.items()}
    modes = {"R3": "NLU", "R8": "NLU", "X3": "NLG", "X8": "NLG", "X64": "NLG", "S": "S2S"}
    checked = 0
    for row in range(6):
        one = heldout.batch(held_out, row, 1)
        for segment in range(1, one["segment_ids"].max() + 1):
            slots = np.flatnonzero(one["segment_ids"][0] == segment)
            [kind] = set(one["kinds"][0, slots].tolist())
            beginning = tuple(one["target_ids"][0, slots].tolist())
            [mode] = [mode for ids, mode in prompts.items() if beginning[: len(ids)] == ids]
            assert modes[packing.KINDS[kind]] == mode
            checked += 1
    assert checked >= 6


def test_the_kinds_are_those_of_the_packing():
    assert saturation.KINDS == packing.KINDS


def test_sums_are_those_of_the_models_own_logits_kind_by_kind(moe_config):
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 512, (8, 32), dtype=np.int32)
    segments = np.ones((8, 32), np.int32)
    weights = (rng.random((8, 32)) < 0.5).astype(np.float32)
    kinds = rng.integers(-1, 3, (8, 32), dtype=np.int32)
    batch = {
        "input_ids": np.roll(ids, 1, axis=-1) * (np.arange(32) > 0), "target_ids": ids, "loss_weights": weights,
        "segment_ids": segments, "positions": np.tile(np.arange(32, dtype=np.int32), (8, 1)), "kinds": kinds,
    }  # fmt: skip
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = replace(moe_config, num_layers=2)
    plan = (config, AdafactorConfig(warmup_steps=100), mesh)
    params = step.init_state(*plan[:2], 0, mesh).params
    placed = jax.device_put({key: value[None] for key, value in batch.items()}, sharding.batch_sharding(mesh))
    sums = jax.device_get(step.make_eval_step(*plan, num_kinds=3)(params, placed))
    forward = jax.jit(lambda params, batch: transformer.forward(config, mesh, params, batch, train=False).logits)
    logits = forward(params, batch)
    losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], axis=-1)[..., 0]
    for kind in range(3):
        counts = weights * (kinds == kind)
        np.testing.assert_allclose(sums.cross_entropy[:, kind], (counts * losses).sum(axis=1), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(sums.tokens[:, kind], counts.sum(axis=1))
        is_text = ids < config.text_vocab_size
        np.testing.assert_array_equal(sums.text_tokens[:, kind], (counts * is_text).sum(axis=1))
        np.testing.assert_allclose(
            sums.text_cross_entropy[:, kind], (counts * is_text * losses).sum(axis=1), rtol=1e-5, atol=1e-5
        )


def test_losses_are_means_over_positions_by_source_and_denoiser():
    held_out = heldout.HeldOut(("wiki", "code"), np.asarray([0, 0, 1]), (b"",) * 3, 4)
    tokens = np.zeros((4, 7))
    tokens[0, 0], tokens[1, 5], tokens[2, 5], tokens[3, 0] = 2, 4, 2, 99  # the last row only fills a part
    cross_entropy = tokens * [[1.0], [2.0], [3.0], [50.0]]
    found = losses_of(held_out, [cross_entropy, tokens, cross_entropy / 2, tokens / 2])
    assert found == {
        "loss": 2.0, "text_loss": 2.0, "loss/wiki": 10 / 6, "loss/code": 3.0, "loss/R3": 1.0, "loss/S": 14 / 6
    }  # fmt: skip


def test_an_evaluation_changes_no_bit_of_training_and_belongs_to_its_step_whenever_it_was_interrupted(train, curves):
    plain, whole = train("plain"), train("whole", *EVERY_2)
    assert bits(whole) == bits(plain)
    assert whole.newest_accepted().digest == plain.newest_accepted().digest
    assert [e["step"] for e in whole.evaluations()] == [2, 4, 6]
    first = whole.evaluations()[0]
    assert list(first["losses"])[:4] == ["loss", "text_loss", "loss/wiki", "loss/code"]
    assert set(first["losses"]) - {f"loss/{kind}" for kind in packing.KINDS} == set(list(first["losses"])[:4])
    assert (first["rows"], first["next_row"]) == (10, 16)
    # A beat a step, one a save and two an evaluation: in that of step 4; then the step after it.
    with pytest.raises(InterruptedError):
        train("a", *EVERY_2, beat=interrupt_at(9))
    with pytest.raises(InterruptedError):
        train("a", *EVERY_2, report=interrupt_at(3))
    run = train("a", *EVERY_2)
    assert [c.incarnation for c in run.claims()] == [1, 2, 3]
    assert evaluated(run) == evaluated(whole)
    assert bits(run) == bits(whole)
    drawn, losses = curves(run.at("tensorboard"))["eval/loss/code"], [e["losses"] for e in run.evaluations()]
    assert drawn == dict(zip((2, 4, 6), (pytest.approx(each["loss/code"], rel=1e-6) for each in losses), strict=True))


def test_a_saturated_run_is_finished_with_a_checkpoint_and_stays_so_until_the_rule_changes(train, data):
    rule = ("eval={every_tokens: 1024, rows: 5, sample_tokens: 2}", "train.stop_when={patience: 2, min_gain: 9.0}")
    run = train("a", *rule)
    assert [e["step"] for e in run.evaluations()] == [1, 2, 3]
    assert [[prompt for prompt, _ in e["samples"]] for e in run.evaluations()] == [list(sampling.PROMPTS)] * 3
    assert [a.step for a in run.acceptances()] == [2, 3]
    loaded = spec.load("quickstart", [*SMALL, *data[0], f"run_dir={run.path}", *rule])
    result = report.finish(loaded, run, data[1].path)
    assert (result.steps, result.reason) == (3, "saturated")
    assert result.held_out == run.evaluations()[-1]["losses"]
    lines = result.lines(run.path)
    assert lines[0].startswith("3 steps, saturated (loss gained less than 9 in 2 evaluations), 3,072 tokens")
    train("a", *rule)
    assert [r["step"] for r in run.trace()] == [1, 2, 3]
    assert run_length.is_reached(loaded.train, run.finished())
    more = spec.load("quickstart", [*SMALL, *data[0], *rule[:1], "train.stop_when={patience: 5, min_gain: 9.0}"])
    assert not run_length.is_reached(more.train, run.finished())


def evaluations(*losses):
    return [{"step": 10 * n, "losses": {} if loss is None else {"loss": loss}} for n, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "patience", "min_gain", "step"),
    [
        ([], 1, 0.0, None),
        ([5.0], 1, 0.0, None),
        ([5.0, 5.0], 1, 0.0, 20),
        ([5.0, 4.0, 3.0], 1, 0.5, None),
        ([5.0, 4.0, 3.9], 1, 0.5, 30),
        ([5.0, 4.0, 3.9, 3.9], 2, 0.5, 40),
        ([5.0, 4.0, 3.9, 3.4, 3.3], 2, 0.5, None),  # 3.4 gains 0.6 on 4.0
        ([5.0, 4.8, 4.6, 4.4], 3, 0.5, None),  # small gains add up
        ([5.0, 4.8, 4.7, 4.6], 3, 0.5, 40),
        ([5.0, float("nan"), 4.0], 1, 0.1, 20),
        ([5.0, None, 4.0, None], 1, 0.1, None),
        ([5.0, 6.0, 7.0, 1.0], 2, 0.1, 30),  # what comes after changes nothing
    ],
)
def test_a_run_is_saturated_after_so_many_evaluations_without_a_gain(losses, patience, min_gain, step):
    rule = StopWhenConfig(patience=patience, min_gain=min_gain)
    assert saturation.saturated_at(rule, evaluations(*losses)) == step


@given(st.lists(st.floats(0, 10), max_size=12), st.integers(1, 4), st.floats(0, 3))
def test_whoever_asks_after_each_evaluation_hears_it_at_the_step_that_the_whole_record_names(losses, patience, gain):
    rule, records = StopWhenConfig(patience=patience, min_gain=gain), evaluations(*losses)
    found = saturation.saturated_at(rule, records)
    heard = [r["step"] for n, r in enumerate(records) if saturation.saturated_at(rule, records[: n + 1]) == r["step"]]
    assert heard == ([] if found is None else [found])


@pytest.mark.parametrize(
    ("every", "due"),
    [
        ({"every_steps": 3}, [3, 6, 9]),
        ({"every_tokens": 1000}, [2, 4, 5, 7, 9, 10]),
        ({"every_tokens": 100}, list(range(1, 11))),
        ({"every_tokens": 2400}, [4, 8]),
    ],
)
def test_an_evaluation_is_due_where_a_multiple_of_the_distance_is_reached(every, due):
    config = EvalConfig(**every)
    assert [step for step in range(1, 11) if config.is_due(step, step_tokens=600)] == due


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval={every_steps: 5}"], r"data\.validation_share: must be > 0 where there is `eval`"),
        (["eval={rows: 5}"], "eval.*give either every_steps or every_tokens"),
        (["train.stop_when={patience: 2, min_gain: 0.1}"], r"train\.stop_when: needs evaluations"),
        (
            [
                "eval={every_steps: 5}",
                "data.validation_share=0.1",
                "train.stop_when={patience: 2, min_gain: 0.1, metric: loss/c5}",
            ],
            r"train\.stop_when\.metric: did you mean `loss/c4`\?, got loss/c5",
        ),
    ],
)  # fmt: skip
def test_settings_that_lack_what_they_need_are_refused(overrides, message):
    with pytest.raises(SpecError, match=message):
        spec.load("quickstart", overrides)


def test_a_run_that_asks_for_none_keeps_its_hash():
    assert spec.spec_hash(spec.load("quickstart", ["eval=null", "train.stop_when=null"])) == spec.spec_hash(
        spec.load("quickstart")
    )
