"""The optimizer's section of a run file: choices, lengths in tokens, groups, hash."""

from dataclasses import replace

import jax
import jsonschema
import pytest
import yaml
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from openmoe.model import sharding, step
from openmoe.model.config import PRESETS
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig, GroupConfig, MuonConfig, ScheduleConfig
from openmoe.model.parameter_names import parameter_names
from openmoe.platform.run_file import spec, spec_optimizer, spec_source
from openmoe.platform.run_file.spec_errors import SpecError

STEP_TOKENS = 4 * 512  # of the quickstart


def optimizer(*overrides):
    return spec.load("quickstart", list(overrides)).optimizer


def test_a_rate_that_the_schedule_makes_small_is_none_of_adafactors():
    slow = "{name: muon, learning_rate: 1.0, warmup_steps: 10000, schedule: {name: inverse_sqrt}}"
    assert optimizer(f"optimizer={slow}").learning_rate == 1.0


def test_a_run_file_has_the_settings_of_the_optimizer_it_names():
    assert optimizer("optimizer={}") == AdafactorConfig()
    assert optimizer("optimizer={name: adamw, weight_decay: 0.01}") == AdamWConfig(weight_decay=0.01)
    cosine = "{name: cosine, end_steps: 9000, final_factor: 0.1}"
    found = optimizer(f"optimizer={{name: muon, schedule: {cosine}, groups: [{{match: ['*/router/*']}}]}}")
    wanted = MuonConfig(schedule=ScheduleConfig(name="cosine", end_steps=9000, final_factor=0.1))
    assert found == replace(wanted, groups=(GroupConfig(match=("*/router/*",)),))


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon"])
def test_a_resolved_optimizer_loads_and_travels_as_it_is(tmp_path, name):
    group = "{match: [decoder/layers_0/*], learning_rate_factor: 0.5, weight_decay: 0}"
    wsd = "{name: wsd, end_tokens: 2048000, cooldown_tokens: 204800, cooldown: one_minus_sqrt}"
    section = f"optimizer={{name: {name}, max_grad_norm: 1, schedule: {wsd}, warmup_steps: 10, groups: [{group}]}}"
    loaded = spec.load("quickstart", [section])
    file = tmp_path / "resolved.yaml"
    file.write_text(spec.dump(loaded))
    assert spec.load(str(file)) == loaded
    assert spec.RunSpec.model_validate_json(loaded.model_dump_json()) == loaded
    assert (loaded.optimizer.schedule.end_steps, loaded.optimizer.schedule.cooldown_steps) == (1000, 100)
    jsonschema.validate(yaml.safe_load(spec.dump(loaded)), spec.json_schema())


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 10**6), st.tuples(*[st.booleans()] * 3))
def test_a_length_is_the_same_in_steps_and_in_tokens(warmup, steady, cooldown, in_tokens):
    end = warmup + steady + cooldown
    lengths = [("warmup", warmup), ("end", end), ("cooldown", cooldown)]
    written = [
        f"{name}_tokens: {steps * STEP_TOKENS}" if tokens else f"{name}_steps: {steps}"
        for (name, steps), tokens in zip(lengths, in_tokens, strict=True)
    ]
    values = {"optimizer": yaml.safe_load(f"{{{written[0]}, schedule: {{name: wsd, {written[1]}, {written[2]}}}}}")}
    values |= {"train": {"batch_rows": 4}, "data": {"seq_len": 512}}
    source = spec_source.Source(kind=spec_source.RUN_FILE, where="x", values=values, origins={})
    assert spec_optimizer.resolve(source) == []
    schedule = {"name": "wsd", "end_steps": end, "cooldown_steps": cooldown}
    assert values["optimizer"] == {"name": "adafactor", "warmup_steps": warmup, "schedule": schedule}


def test_tokens_are_rounded_to_whole_steps_of_the_batch():
    assert optimizer("optimizer={warmup_tokens: 1}").warmup_steps == 1
    assert optimizer("optimizer={warmup_tokens: 1000000}", "train.batch_rows=8").warmup_steps == 244


def test_an_override_in_tokens_wins_over_the_steps_of_the_file():
    assert optimizer("optimizer.warmup_tokens=204800").warmup_steps == 100


BAD = {
    "no such optimizer": (
        "optimizer.name=adamww",
        "override: optimizer.name: must be one of adafactor, adamw, muon; got 'adamww'; did you mean `adamw`?",
    ),
    "a setting of another optimizer": ("optimizer.beta1=0.9", "override: optimizer.beta1: unknown key; known: "),
    "a wrong type below a choice": (
        "optimizer={name: adamw, beta1: many}",
        "override: optimizer.beta1: expected a number, got 'many'",
    ),
    "a bad value below a choice": (
        "optimizer={name: adamw, beta2: 1.0}",
        "override: optimizer.beta2: must be in [0, 1), got 1.0",
    ),
    "a setting of another schedule": (
        "optimizer.schedule={name: constant, end_steps: 5}",
        "override: optimizer.schedule.end_steps: schedule constant has no such setting; remove it, got 5",
    ),
    "no end": (
        "optimizer.schedule={name: cosine}",
        "override: optimizer.schedule.end_steps: missing; schedule cosine needs it",
    ),
    "an end before the warm-up": (
        "optimizer.schedule={name: wsd, end_steps: 100, cooldown_steps: 80}",
        "override: optimizer.schedule.end_steps: must leave room for warmup_steps=25 and cooldown_steps=80, got 100",
    ),
    "steps and tokens": (
        "optimizer={warmup_tokens: 4096, warmup_steps: 3}",
        "override: optimizer.warmup_tokens: warmup_steps is given too; remove one",
    ),
    "half a token": (
        "optimizer={warmup_tokens: 0.5}",
        "override: optimizer.warmup_tokens: must be whole tokens, at least 1, got 0.5",
    ),
    "Adafactor's rate": (
        "optimizer.name=adamw",
        "optimizer.learning_rate: adamw moves parameters by about the rate, whatever their size, so at most 0.1 in a "
        "step; 3e-4 is usual, Adafactor's are larger; got 0.5",
    ),
    "a group of nothing": (
        "optimizer.groups=[{match: [decoder/layers_0/*, '*/ruoter/*']}]",
        "override: optimizer.groups.0.match.1: no parameter is named '*/ruoter/*'; did you mean `router`?",
    ),
    "a layer that is not there": (
        "optimizer.groups=[{match: [decoder/layers_9/mlp/wo/kernel]}]",
        "override: optimizer.groups.0.match.0: no parameter is named 'decoder/layers_9/mlp/wo/kernel'; did you mean "
        "`layers_3`?",
    ),
}


@pytest.mark.parametrize(("override", "message"), [pytest.param(*case, id=name) for name, case in BAD.items()])
def test_a_bad_optimizer_is_named_with_its_remedy(override, message):
    with pytest.raises(SpecError) as caught:
        spec.load("quickstart", [override])
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_settings_that_came_later_change_the_hash_only_where_they_are_used():
    digest = spec.spec_hash(spec.load("quickstart"))
    same = ["optimizer.schedule={name: inverse_sqrt}", "optimizer.groups=[]", "optimizer.max_grad_norm=null"]
    assert spec.spec_hash(spec.load("quickstart", same)) == digest
    for change in ("schedule={name: constant}", "groups=[{match: ['*/router/*']}]", "max_grad_norm=1.0"):
        assert spec.spec_hash(spec.load("quickstart", [f"optimizer.{change}"])) != digest


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("openmoe-nano", {}), ("openmoe-next-nano", {}), ("openllama-base", {}), ("openmoe-nano", {"extra_mlp": "none"})],
)
def test_parameters_have_the_names_that_the_settings_say(preset, changes):
    config = replace(PRESETS[preset], **changes)
    declared = step.declarations(config, sharding.make_mesh(devices=jax.devices("cpu")[:1]))
    names = traverse_util.flatten_dict(declared, sep="/")
    assert sorted(parameter_names(config)) == sorted(names)


def test_the_schema_wants_a_name_of_all_but_adafactor():
    with open(spec_source.read("quickstart", spec_source.RUN_FILE).where) as file:
        values = yaml.safe_load(file)
    for section in ({"warmup_tokens": 4096}, {"name": "adamw", "beta1": 0.5}):
        jsonschema.validate(values | {"optimizer": section}, spec.json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | {"optimizer": {"beta1": 0.5}}, spec.json_schema())
