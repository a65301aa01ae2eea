"""The run file and the RunSpec it becomes: round trip, overrides, hash, schema."""

import re
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from openmoe.model.config import PRESETS, ExecutionConfig, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig, GroupConfig, MuonConfig, ScheduleConfig
from openmoe.pipelines.config import DataConfig, SourceConfig, StageConfig
from openmoe.platform.run_file import spec, spec_sections, spec_source, spec_yaml

SHIPPED = ("openmoe_8b", "openmoe_8b_chat", "quickstart", "twin")


def test_every_shipped_run_file_is_known_by_its_name():
    assert tuple(spec_source.RUN_FILE.shipped()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_run_file_loads_to_the_same_spec(tmp_path, name):
    loaded = spec.load(name)
    file = tmp_path / "resolved.yaml"
    file.write_text(spec.dump(loaded))
    assert spec.load(str(file)) == loaded


@pytest.mark.parametrize("name", SHIPPED)
def test_a_spec_travels_to_the_workers_as_json(name):
    loaded = spec.load(name)
    assert spec.RunSpec.model_validate_json(loaded.model_dump_json()) == loaded


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_file_opens_with_command_hardware_time_and_loss(name):
    source = spec_source.read(name, spec_source.RUN_FILE)
    with open(source.where) as file:
        header = re.match(r"(#.*\n)+", file.read())[0]
    assert re.search(rf"openmoe (train|submit) {name}\b", header)
    assert re.findall(r"^# (Hardware|Time|Loss) ", header, re.MULTILINE) == ["Hardware", "Time", "Loss"]


def test_the_8b_run_file_has_the_settings_of_the_original():
    loaded = spec.load("openmoe_8b")
    assert loaded.train.batch_rows * loaded.data.seq_len == 2_097_152
    assert (loaded.train.steps, loaded.train.microbatches) == (500_000, 8)
    assert (loaded.model.num_experts, loaded.model.group_size, loaded.mesh.expert) == (32, 4096, 32)
    first, second = loaded.data.stages
    assert (first.objective, second.objective) == ("ul2", "next_token")
    assert (first.until_tokens, second.until_tokens) == (390_000 * 2_097_152, None)
    assert first.weights == {
        "c4": 15,
        "wikipedia": 4.5,
        "stackexchange": 2,
        "arxiv": 2.5,
        "book": 4.5,
        "github": 4.5,
        "common_crawl": 67,
        "the_stack_dedup": 100,
    }
    assert second.weights == {
        "c4": 15,
        "wikipedia": 13,
        "stackexchange": 2.5,
        "arxiv": 4.5,
        "book": 6.5,
        "github": 5,
        "common_crawl": 43.5,
        "the_stack_dedup": 10,
    }


def test_the_stages_of_the_34b_model_keep_the_third_mixture_and_change_the_objective_after_25_000_steps():
    first, second = spec.load("openmoe_8b", ["data.stages=openmoe-34b"]).data.stages
    assert (first.until_tokens, first.objective, second.objective) == (52_428_800_000, "ul2", "next_token")
    assert first.weights == second.weights
    assert sum(first.weights.values()) == 100
    assert (first.weights["the_stack_dedup"], first.weights["github"], first.weights["wikipedia"]) == (30, 5, 7)


def test_overrides_win_over_the_file():
    loaded = spec.load(
        "quickstart",
        [
            "train.steps=7",
            "train.checkpoint_every_steps=7",
            "data.sources.1.weight=0.5",
            "name='1e6'",
            "budgets.hang=9",
        ],
    )
    assert (loaded.train.steps, loaded.data.sources[1].weight, loaded.name) == (7, 0.5, "1e6")
    assert loaded.budgets.hang == 9


def test_a_batch_in_tokens_is_the_same_in_rows_and_an_override_wins(tmp_path):
    file = tmp_path / "run.yaml"
    text = Path(spec_source.read("quickstart", spec_source.RUN_FILE).where).read_text()
    file.write_text(text.replace("  batch_rows: 4 ", "  batch_tokens: 2048 "))
    assert spec.load(str(file)) == spec.load("quickstart")
    assert spec.load(str(file), ["train.batch_rows=8"]).train.batch_rows == 8
    assert spec.load("quickstart", ["train.batch_tokens=4096"]).train.batch_rows == 8


def test_a_model_field_wins_over_its_preset():
    loaded = spec.load("quickstart", ["model.num_layers=2"])
    assert (loaded.model.num_layers, loaded.model.d_model) == (2, PRESETS["openmoe-nano"].d_model)


def test_another_preset_can_be_chosen_from_the_command_line():
    changes = ["model.preset=openllama-base", "mesh.expert=1", "mesh.data=4"]
    assert spec.load("quickstart", changes).model == PRESETS["openllama-base"]


def test_the_data_lies_in_the_run_directory_unless_told_otherwise():
    assert spec.load("quickstart", ["run_dir=/runs/a/"]).data_dir == "/runs/a/data"
    assert spec.load("quickstart", ["run_dir=gs://b/a"]).data_dir == "gs://b/a/data"
    assert spec.load("quickstart", ["run_dir=/runs/a", "data_dir=/data"]).data_dir == "/data"


def test_the_data_has_the_seed_of_the_run():
    assert spec.load("quickstart", ["seed=17"]).data.seed == 17


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "run_dir=/elsewhere",
        "data_dir=/elsewhere",
        "sample_corpus=/elsewhere",
        "train.steps=1000",
        "train.keep_checkpoints=9",
        "train.keep_every_steps=40",
        "train.keep_best=2",
        "train.checkpoint_every_steps=5",
        "train.sample_tokens=0",
        "data.sources.0.max_bad_share=0.5",
        "cluster.object_store_bytes=100000000",
        "budgets.preemption=3",
    ],
)
def test_what_may_change_in_a_running_run_keeps_the_hash(override):
    assert spec.spec_hash(spec.load("quickstart", [override])) == spec.spec_hash(spec.load("quickstart"))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("quickstart", "05b34be0b2dea21493652520fa8b6fc4a1e08fdfc4baadf4465faf1e985753c8"),
        ("twin", "d72b93991245d1de5024e3ba9ddee38f1604bb0826c079fcb8d0ab0a90f0c7b2"),
    ],
)
def test_runs_that_began_keep_their_hash(name, digest):
    assert spec.spec_hash(spec.load(name)) == digest


def test_a_resize_keeps_the_hash():
    resize = ["cluster.num_workers=1", "mesh.expert=2"]
    assert spec.spec_hash(spec.load("quickstart", resize)) == spec.spec_hash(spec.load("quickstart"))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.d_ff=512",
        "model.dtype=bfloat16",
        "data.sources.0.weight=3",
        "data.packing=reference",
        "data.objective=next_token",
        "data.sources.0.name=other",
        "data.num_sentinels=200",
        "train.batch_rows=8",
        "optimizer.learning_rate=0.25",
    ],
)
def test_what_changes_the_numbers_changes_the_hash(override):
    assert spec.spec_hash(spec.load("quickstart", [override])) != spec.spec_hash(spec.load("quickstart"))


def test_microbatches_change_the_hash():
    base = ["train.batch_rows=8"]
    split = [*base, "train.microbatches=2"]
    assert spec.spec_hash(spec.load("quickstart", base)) != spec.spec_hash(spec.load("quickstart", split))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_json_schema_accepts_what_load_accepts(name):
    schema = spec.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    with open(spec_source.read(name, spec_source.RUN_FILE).where) as file:
        validator.validate(yaml.safe_load(file))
    validator.validate(yaml.safe_load(spec.dump(spec.load(name))))


@pytest.mark.parametrize(
    ("section", "key"), [("train", "stps"), ("data", "seed"), ("model", "layers"), ("cluster", "gpus")]
)
def test_the_json_schema_refuses_unknown_keys(section, key):
    with open(spec_source.read("quickstart", spec_source.RUN_FILE).where) as file:
        values = yaml.safe_load(file)
    values[section][key] = 1
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(values, spec.json_schema())


def test_every_setting_is_described_for_the_editor():
    schema = spec.json_schema()
    properties = [
        (owner, key, node)
        for owner, definition in [("RunSpec", schema), *schema["$defs"].items()]
        for key, node in definition["properties"].items()
    ]
    assert [
        f"{owner}.{key}" for owner, key, node in properties if "description" not in node and "$ref" not in node
    ] == []


# Every setting is one more thing to know before a run can be understood. To add one, raise its number here
# and say in the commit why no existing setting will do.
NUM_FIELDS = {
    spec.RunSpec: 17,
    spec_sections.TrainConfig: 11,
    spec_sections.StopWhenConfig: 3,
    spec_sections.EvalConfig: 4,
    spec_sections.HealthConfig: 12,
    spec_sections.MeshConfig: 4,
    spec_sections.ClusterConfig: 17,
    spec_sections.BudgetsConfig: 9,
    ModelConfig: 34,
    ExecutionConfig: 4,
    AdafactorConfig: 11,
    AdamWConfig: 10,
    MuonConfig: 12,
    ScheduleConfig: 5,
    GroupConfig: 3,
    DataConfig: 12,
    SourceConfig: 8,
    StageConfig: 3,
}


@pytest.mark.parametrize("section", NUM_FIELDS, ids=lambda section: section.__name__)
def test_settings_do_not_grow_unnoticed(section):
    names = getattr(section, "model_fields", None) or [field.name for field in fields(section)]
    assert len(names) == NUM_FIELDS[section]


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(plain_data)
def test_dumped_yaml_reads_back_as_it_was(value):
    document = spec_yaml.Document(spec_yaml.dump({"value": value}))
    assert (document.value, document.problems) == ({"value": value}, [])


@given(st.text() | st.from_regex(r"[-+0-9._eExob:yYnNtTfFaAlLsSuUrRiI~=<]{1,8}", fullmatch=True))
def test_a_word_means_to_us_what_it_means_to_pyyaml_or_is_refused(word):
    value, problem = spec_yaml.plain_scalar(word)
    if problem is None and word == word.strip():
        resolver = yaml.SafeLoader("")
        tag = resolver.resolve(yaml.ScalarNode, word, (True, False))
        node = yaml.ScalarNode(tag, word)
        assert resolver.construct_object(node) == value
