"""Derived numbers of a run file, against values worked out by hand."""

import jax
import numpy as np
import pytest

from openmoe.model import sharding, step
from openmoe.model.config import PRESETS, ExecutionConfig
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig, MuonConfig
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import passes, tokenizer
from openmoe.pipelines.config import DataError
from openmoe.platform.planner import plan_page, plan_work
from openmoe.platform.run_file import spec, validate, validate_memory
from openmoe.platform.run_file.spec_checks import legal_meshes
from openmoe.platform.run_file.spec_errors import SpecError


def facts(name, *overrides):
    sections = validate.explain(spec.load(name, overrides))
    return {(section.title, fact.key): fact.value for section in sections for fact in section.facts}


def test_the_quickstart_is_explained():
    quickstart = facts("quickstart", "train.steps=120", "train.checkpoint_every_steps=25")
    assert quickstart["model", "parameters"] == 5_082_496
    assert quickstart["step", "tokens_per_step"] == 2048
    assert quickstart["step", "total_tokens"] == 245_760
    assert quickstart["step", "checkpoints"] == 5
    assert quickstart["step", "routing_groups_per_step"] == 4
    assert quickstart["step", "expert_capacity"] == 80
    assert quickstart["data", "rows"] == 480
    assert quickstart["devices", "legal_devices"] == [1, 2, 4]


def test_a_solved_cadence_is_explained():
    sections = validate.explain(spec.load("quickstart", ["train.checkpoint_every_steps=auto"]))
    [section] = [section for section in sections if section.title == "step"]
    [fact] = [fact for fact in section.facts if fact.key == "checkpoints"]
    said = "every 20 steps until a save is measured (one interruption per 3 h expected), 3 kept"
    assert (fact.value, fact.text, fact.note) == (None, "auto", said)


def test_the_8b_run_is_explained():
    large = facts("openmoe_8b")
    assert large["model", "parameters"] == 11_855_046_656
    assert large["model", "active_parameters"] == 2_751_834_112
    assert large["step", "tokens_per_step"] == 2_097_152
    assert large["step", "total_tokens"] == 1_048_576_000_000
    assert large["step", "rows_per_microbatch"] == 128
    assert large["step", "routing_groups_per_step"] == 512
    assert large["step", "expert_capacity"] == 160
    assert large["data", "rows_common_crawl_ul2"] == 133_785_600
    assert large["data", "rows_common_crawl_next_token"] == 48_998_400
    assert large["stage 1", "objective"] == "ul2"
    assert large["stage 2", "objective"] == "next_token"
    assert large["stage 2", "steps"] == [390_000, 500_000]
    assert large["stage 2", "share_the_stack_dedup"] == 0.1
    assert large["devices", "legal_devices"] == [1, 2, 4, 8, 16, 32, 64]


def test_experts_are_divided_and_everything_else_is_on_every_device():
    whole = facts("quickstart", "mesh.expert=1", "cluster.num_workers=1", "cluster.devices_per_worker=1")
    divided = facts("quickstart")
    experts = divided["parameters", "experts"]
    key = ("memory per device", "parameters")
    assert whole[key] == 4 * 5_082_496
    assert divided[key] == 4 * (5_082_496 - experts * 3 // 4)


def test_microbatches_keep_a_second_set_of_gradients():
    one = facts("quickstart", "train.batch_rows=8")
    two = facts("quickstart", "train.batch_rows=8", "train.microbatches=2")
    key = ("memory per device", "gradients")
    assert two[key] == 2 * one[key]
    assert two["memory per device", "activations"] < one["memory per device", "activations"]


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only():
    shared, experts = validate_memory.adafactor_elements(PRESETS["openmoe-nano"], AdafactorConfig())
    vocabulary, attention, ffn = 2 * (8576 + 128), 4 * (4 * 256), 4 * (640 + 384 + 384)
    routers, norms = 2 * 128 * 8, (2 * 4 + 2 + 1) * 128
    assert shared == vocabulary + attention + ffn + routers + norms
    assert experts == 2 * 8 * (640 + 384 + 384)


@pytest.mark.parametrize("preset", ["openmoe-nano", "openmoe-next-nano", "openllama-base"])
@pytest.mark.parametrize("optimizer", [AdafactorConfig(), AdamWConfig(), MuonConfig()], ids=lambda config: config.name)
def test_the_state_that_is_charged_is_the_one_that_the_step_keeps(preset, optimizer):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    moments = step.state_shapes(PRESETS[preset], optimizer, mesh).opt_state.moments
    kept = [0, 0]  # of shared parameters, of experts
    for path, leaf in jax.tree.leaves_with_path(moments):
        kept["['expert']" in map(str, path)] += leaf.size
    assert validate_memory.optimizer_elements(PRESETS[preset], optimizer) == tuple(kept)


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "muon"}])
def test_a_plan_charges_the_optimizer_of_its_run_file_to_memory_and_to_traffic(optimizer):
    base = spec.load("openmoe_8b", ["mesh={fsdp: 2, expert: 32}"])
    other = spec.load("openmoe_8b", ["mesh={fsdp: 2, expert: 32}", f"optimizer={optimizer}"])
    more = {"adamw": 6_530_224_128 // 2 + 17_179_869_184 // 64, "muon": 4_315_631_616 // 2 + 8_589_934_592 // 64}
    adafactor = 2_312_960 // 2 + 4_980_736 // 64
    added = validate_memory.estimate(other).total - validate_memory.estimate(base).total
    assert added == 4 * (more[optimizer["name"]] - adafactor)
    assert plan_work.work(other).hbm_bytes - plan_work.work(base).hbm_bytes == pytest.approx(2 * added)


@pytest.mark.parametrize(
    ("remat", "kept_gib", "at_once_gib"), [("none", 22.52, 0), ("dots", 7.06, 1.87), ("full", 0.125, 3.60)]
)
def test_activations_of_the_8b_shrink_with_what_is_recomputed(remat, kept_gib, at_once_gib):
    """What XLA carries from block to block for a v4 at dots is 7.06 GiB, at none 22.4, kernels left out."""
    model, execution = PRESETS["openmoe-8b"], ExecutionConfig(remat=remat)

    def gib(rows, fused):
        return np.asarray(
            validate_memory.activation_bytes(model, execution, rows=rows, seq_len=2048, fused_attention=fused)
        ) / 2**30  # fmt: skip

    assert gib(2, True) == pytest.approx((kept_gib, at_once_gib), abs=0.01)
    assert gib(4, True) == pytest.approx(2 * gib(2, True))
    assert sum(gib(2, False)) >= sum(gib(2, True))


@pytest.mark.parametrize("peak", plan_page.PEAKS, ids=lambda peak: f"{peak.preset}-{peak.slice_name}-{peak.remat}")
def test_the_estimate_is_near_what_the_tpu_compiler_takes(peak):
    run = peak.run(spec.load("openmoe_8b"))
    assert validate_memory.estimate(run).total / 2**30 == pytest.approx(peak.gib, rel=0.1)


def test_sharded_parameters_take_their_share_of_a_device():
    one = facts("openmoe_8b", "mesh={data: 2, expert: 32}")
    two = facts("openmoe_8b", "mesh={fsdp: 2, expert: 32}")
    for part in ("parameters", "gradients", "optimizer"):
        assert two["memory per device", part] == one["memory per device", part] // 2


def test_legal_meshes_hold_whole_groups_and_divide_the_experts():
    assert legal_meshes(PRESETS["openmoe-nano"], rows=6, seq_len=1024) == [
        (1, 1),
        (2, 1),
        (1, 2),
        (3, 1),
        (6, 1),
        (3, 2),
    ]


def test_a_group_of_two_rows_halves_the_devices():
    assert {d * e for d, e in legal_meshes(PRESETS["openmoe-8b"], rows=8, seq_len=2048)} == {1, 2, 4}


def test_a_dense_model_has_no_expert_axis_and_no_groups():
    assert legal_meshes(PRESETS["openllama-base"], rows=2, seq_len=512) == [(1, 1), (2, 1)]


def test_every_legal_mesh_loads():
    for data, expert in legal_meshes(PRESETS["openmoe-nano"], rows=4, seq_len=512):
        devices = [f"cluster.num_workers={data}", f"cluster.devices_per_worker={expert}"]
        spec.load("quickstart", [f"mesh.data={data}", f"mesh.expert={expert}", *devices])


def test_a_tokenizer_of_another_size_than_the_model_is_refused():
    with pytest.raises(SpecError) as caught:
        facts("quickstart", "model.text_vocab_size=8000")
    assert str(caught.value) == (
        "model.text_vocab_size: must be the 8192 pieces of data.tokenizer=builtin:small_8192, got 8000"
    )


def test_a_dense_model_has_no_routing_to_explain():
    dense = facts(
        "quickstart",
        "model={preset: openmoe-nano, num_experts: 0, moe_every: 0}",
        "mesh={data: 4, expert: 1}",
    )
    assert ("step", "routing_groups_per_step") not in dense
    assert dense["parameters", "experts"] == 0


STAGES = (
    "data.stages=[{until_tokens: 4096000, weights: {c4: 3, the_stack: 1}}, "
    "{until_tokens: 5120000, weights: {wikipedia: 1}}, {weights: {common_crawl: 1, c4: 1}}]",
    *(f"data.sources.{index}.weight=null" for index in range(4)),
)


def test_each_stage_is_explained_with_its_steps_and_exact_rows():
    staged = facts("quickstart", *STAGES, "train.steps=3500")
    assert staged["stage 1", "steps"] == [0, 2000]
    assert staged["stage 2", "steps"] == [2000, 2500]
    assert staged["stage 3", "steps"] == [2500, 3500]
    assert staged["stage 1", "tokens"] == 4_096_000
    assert staged["stage 3", "tokens"] == 2_048_000
    assert staged["stage 1", "share_c4"] == 0.75
    assert staged["stage 2", "share_c4"] == 0
    assert [staged["data", f"rows_{name}"] for name in ("wikipedia", "c4", "common_crawl", "the_stack")] == [
        2000,
        8000,
        2000,
        2000,
    ]


def test_how_rows_are_made_is_explained():
    plain, staged = facts("quickstart"), facts("quickstart", *STAGES)
    assert (plain["data", "objective"], plain["data", "packing"]) == ("ul2", "budgeted")
    assert ("data", "objective") not in staged
    assert (staged["stage 1", "objective"], staged["data", "packing"]) == ("ul2", "budgeted")
    assert ("data", "packing") not in facts("quickstart", "data.objective=next_token")
    original = facts("quickstart", "data.packing=reference")
    assert original["data", "expected_shards"] <= plain["data", "expected_shards"]
    assert original["data", "packing"] == "reference"


def test_a_stage_that_the_run_does_not_reach_says_so():
    staged = facts("quickstart", *STAGES, "train.steps=2000")
    assert staged["stage 2", "reached"] == "no"
    assert staged["data", "rows_wikipedia"] == 0


def test_a_run_in_epochs_has_no_steps_before_its_data_is_built(tmp_path):
    epochs = facts("quickstart", "train.steps=null", "train.epochs=1.5", f"run_dir={tmp_path}")
    assert epochs["step", "epochs"] == 1.5
    assert ("step", "steps") not in epochs
    assert ("data", "rows") not in epochs
    assert epochs["mixture", "share_the_stack"] == 0.5


@pytest.fixture
def built(tmp_path):
    """A run directory whose data has pass 0 of all sources of the quickstart, and pass 1 of the first."""
    loaded = spec.load("quickstart", [f"run_dir={tmp_path}"])
    text = tokenizer.load(loaded.data.tokenizer)
    receipts = {source.name: [{"tokens": 9, "documents_sha256": source.name}] for source in loaded.data.sources}
    path = manifests.manifest_path(loaded.data_dir, loaded.data, text, [])
    manifest = manifests.assemble(path, loaded.data, text, receipts)
    manifests.commit(manifest)
    for source, number, rows in ((0, 0, 50), (0, 1, 52), (1, 0, 100), (2, 0, 101), (3, 0, 300)):
        passes.finish(manifest, source, number, [{"rows": rows}])
    return f"run_dir={tmp_path}"


def test_epochs_are_steps_once_the_data_is_built_and_rows_short_of_a_step_are_left_out(built):
    sections = validate.explain(spec.load("quickstart", ["train.steps=null", "train.epochs=1.5", built]))
    [step] = [section for section in sections if section.title == "step"]
    [epochs] = [fact for fact in step.facts if fact.key == "epochs"]
    assert epochs == ("epochs", 824 / 551, "1.50", "of 551 rows, pass 0 of all sources; "
                      "the last 2, less than a step, left out")  # fmt: skip
    assert {fact.key: fact.value for fact in step.facts}["steps"] == 206


def test_after_a_build_the_passes_that_each_source_reaches_are_shown(built):
    known = facts("quickstart", "train.steps=500", built)
    assert known["data", "rows"] == 2000
    assert known["passes", "passes_wikipedia"] == pytest.approx(2 + 98 / 52)
    assert known["passes", "passes_c4"] == 4
    assert known["passes", "passes_common_crawl"] == pytest.approx(400 / 101)
    assert known["passes", "passes_the_stack"] == pytest.approx(10 / 3)


def test_epochs_that_are_not_one_step_are_refused(built):
    with pytest.raises(DataError) as caught:
        facts("quickstart", "train.steps=null", "train.epochs=0.005", built)
    assert str(caught.value) == (
        "train.epochs: 0.005 epochs of 551 rows are 2 rows, less than one step of batch_rows=4; "
        "give more epochs, more data or a smaller batch"
    )
