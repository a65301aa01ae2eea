"""The run file: one frozen `RunSpec` is all that decides what a run does.

    runs/quickstart.yaml --load--> RunSpec --dump--> the resolved file in the run directory

The settings of the model and of the data belong to their packages; this file puts them together with those of
the run itself, and is the only door: unknown keys, wrong types and impossible combinations end here, all of
them at once, each with its dotted path and what to write instead.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from openmoe.model import optimizer_config
from openmoe.model.config import DEPARTURES, PRESETS, ExecutionConfig, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig, OptimizerConfig, RateConfig
from openmoe.pipelines.config import DataConfig, identity
from openmoe.pipelines.stage_presets import STAGE_PRESETS
from openmoe.platform.run.lineage import Retention
from openmoe.platform.run_file import spec_checks, spec_optimizer, spec_source, spec_yaml
from openmoe.platform.run_file.spec_errors import Problem, SpecError, did_you_mean, problems_of, show
from openmoe.platform.run_file.spec_sections import (
    BudgetsConfig,
    ClusterConfig,
    EvalConfig,
    HealthConfig,
    MeshConfig,
    Section,
    TrainConfig,
)


class RunSpec(Section):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="Shown in lists and dashboards.")
    run_dir: str = Field(min_length=1, description="Everything the run leaves behind: local path or gs://.")
    data_dir: str = Field(
        default_factory=lambda fields: f"{fields.get('run_dir', '').rstrip('/')}/data",
        min_length=1,
        description="Token cache, shards and manifest; <run_dir>/data if not given. Runs may share one.",
    )
    sample_corpus: str | None = Field(
        default=None,
        min_length=1,
        description="Local folder into which Python's own library is written first, as sample text and code.",
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="Run directory, or one checkpoint of Orbax, whose parameters a new run begins with; at step 0.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of initialisation, order, noise and mixture.")
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = Field(
        default_factory=AdafactorConfig,
        discriminator="name",
        description="Adafactor, AdamW or Muon, each with its own.",
    )
    mesh: MeshConfig
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)
    cluster: ClusterConfig
    budgets: BudgetsConfig = Field(default_factory=BudgetsConfig)
    trackers: tuple[Literal["wandb"], ...] = Field(
        default=(),
        description="Who gets the curves besides TensorBoard's files: wandb, where it is installed and logged in.",
    )
    health: HealthConfig = Field(default_factory=HealthConfig)
    eval: EvalConfig | None = Field(default=None, description="Held-out evaluation; without it there is none.")

    @model_validator(mode="after")
    def _refuse_the_impossible(self) -> Self:
        problems = spec_checks.impossible_combinations(
            model=self.model,
            data=self.data,
            train=self.train,
            mesh=self.mesh,
            execution=self.execution,
            cluster=self.cluster,
            optimizer=self.optimizer,
        )
        problems += spec_checks.evaluation(self.eval, self.train, self.data)
        problems += spec_checks.health(self.health, self.budgets)
        if problems:
            raise SpecError(problems)
        return self

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        train = self.train
        return Retention(
            newest=train.keep_checkpoints,
            every_steps=train.keep_every_steps,
            best=train.keep_best,
            metric=train.best_metric,
            behind_steps=self.health.rewound_steps,
        )


def load(path_or_name: str, overrides: Sequence[str] = ()) -> RunSpec:
    """Reads a run file.

    Args:
      path_or_name: a path, or the bare name of a run file shipped with the package ("quickstart").
      overrides: "key.path=value" each, the value in YAML; they win over the file.

    Raises:
      SpecError: with every problem of the file and the overrides.
    """
    source = spec_source.read(path_or_name, spec_source.RUN_FILE)
    for override in overrides:
        source.override(override)
    problems = [*source.problems, *_resolve_preset(source.values), *_share_seed(source.values)]
    problems += [*_resolve_stages(source.values), *_resolve_batch(source)]
    refused = {problem.path for problem in problems}
    problems += [problem for problem in spec_optimizer.resolve(source) if problem.path not in refused]
    refused |= {problem.path for problem in problems}
    try:
        spec = RunSpec.model_validate_json(json.dumps(source.values))
    except ValidationError as error:
        problems += [problem for problem in problems_of(error, json_schema()) if problem.path not in refused]
    if problems:
        raise SpecError(problems, source.where, source.origins)
    return spec


def dump(spec: RunSpec) -> str:
    """The resolved run file: every setting written out, and `load` reads it back equal."""
    values = spec.model_dump(mode="json")
    del values["data"]["seed"]
    return spec_yaml.dump(values)


# A run directory is bound to these. The rest may change while a run goes on: where and how it runs and is kept (name,
# run_dir, data_dir, sample_corpus, mesh, execution, cluster, budgets; folders of sources and tokenizer), how long it
# goes, when it saves and what it samples (the rest of train), and how much a source may lack. That moved files
# are the same files is held by the data id, which is compared at every restore.
HASHED_SECTIONS = ("seed", "model", "data", "optimizer")
HASHED_TRAIN_FIELDS = ("batch_rows", "microbatches")
SOURCE_TOLERANCES = ("paths", "max_bad_share", "max_quarantined_units", "missing")
LATER_MODEL_FIELDS = ("t5x_expert_copies", *DEPARTURES)


def mathematics(spec: RunSpec) -> dict[str, Any]:
    """The settings that decide the numbers: model, data, seed, optimizer, and what one step consumes."""
    values = spec.model_dump(mode="json")
    values["data"], values["optimizer"] = identity(spec.data), optimizer_config.identity(spec.optimizer)
    for source in values["data"]["sources"]:
        for name in SOURCE_TOLERANCES:
            source.pop(name, None)
    values["data"]["tokenizer"] = values["data"]["tokenizer"].rpartition("/")[2]
    for field in fields(ModelConfig):  # runs from before there were these settings keep their hash
        if field.name in LATER_MODEL_FIELDS and values["model"][field.name] == field.default:
            del values["model"][field.name]
    begins_with = {} if spec.init_from is None else {"init_from": spec.init_from.rstrip("/").rpartition("/")[2]}
    return {
        **begins_with,
        **{section: values[section] for section in HASHED_SECTIONS},
        "train": {field: values["train"][field] for field in HASHED_TRAIN_FIELDS},
    }


def spec_hash(spec: RunSpec) -> str:
    """SHA-256 of `mathematics(spec)`, in hex; a resize, a move or a longer run keeps it."""
    canonical = json.dumps(mathematics(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a run file, for editors and for the names of known keys."""
    schema = RunSpec.model_json_schema()
    for definition in schema["$defs"].values():
        definition["description"] = _describe_properties(definition, definition["description"])
    for choice in spec_optimizer.CHOICES.values():
        _describe_properties(schema["$defs"][choice.__name__], inspect.getdoc(RateConfig) or "")
    spec_optimizer.describe(schema["$defs"])
    model, data = schema["$defs"]["ModelConfig"], schema["$defs"]["DataConfig"]
    preset = {"enum": list(PRESETS), "description": "Where the fields not given here come from."}
    model["properties"] = {"preset": preset, **model["properties"]}
    model["anyOf"] = [{"required": ["preset"]}, {"required": model.pop("required")}]
    train = schema["$defs"]["TrainConfig"]
    tokens = {"type": "integer", "minimum": 1, "description": "Instead of batch_rows: the same in tokens, whole rows."}
    train["properties"]["batch_tokens"] = tokens
    train["required"].remove("batch_rows")
    train["oneOf"] = [{"required": ["batch_rows"]}, {"required": ["batch_tokens"]}]
    stages = data["properties"]["stages"]
    stages["anyOf"] = [{"type": stages.pop("type")}, {"enum": list(STAGE_PRESETS)}]
    del data["properties"]["seed"]
    data["required"].remove("seed")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "OpenMoE run file"}


def _describe_properties(definition: dict[str, Any], docstring: str) -> str:
    """Gives the `Attributes:` of a class docstring to the properties they describe; returns what comes before them."""
    summary, _, attributes = docstring.partition("\n\nAttributes:\n")
    for name, text in re.findall(r"^  (\w+): (.+(?:\n    .+)*)", attributes, re.MULTILINE):
        definition["properties"][name]["description"] = " ".join(text.split())
    return summary


def _resolve_preset(values: dict[str, Any]) -> list[Problem]:
    """Replaces `model.preset` by the preset's fields under those given beside it."""
    model = values.get("model")
    if isinstance(model, str):
        values["model"] = asdict(PRESETS["openmoe-nano"])
        return [Problem("model", f"expected a mapping; write `model: {{preset: {model}}}`")]
    if not isinstance(model, dict):
        return []
    preset = model.pop("preset", None)
    if isinstance(preset, str) and preset in PRESETS:
        values["model"] = asdict(PRESETS[preset]) | model
        return []
    required = {field.name for field in fields(ModelConfig) if field.default is MISSING}
    if preset is None and required <= model.keys():
        return []
    values["model"] = asdict(PRESETS["openmoe-nano"]) | model
    if preset is None:
        missing = ", ".join(sorted(required - model.keys()))
        return [Problem("model", f"missing {missing}; add them, or `preset:` (one of {', '.join(PRESETS)})")]
    return [Problem("model.preset", f"no preset {show(preset)}; {did_you_mean(str(preset), PRESETS)}")]


def _resolve_stages(values: dict[str, Any]) -> list[Problem]:
    """Replaces the name of a model's stages by the stages."""
    data = values.get("data")
    name = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(name, str):
        return []
    if name not in STAGE_PRESETS:
        return [Problem("data.stages", f"no stages {show(name)}; {did_you_mean(name, STAGE_PRESETS)}")]
    values["data"]["stages"] = STAGE_PRESETS[name]
    return []


def _resolve_batch(source: spec_source.Source) -> list[Problem]:
    """Replaces `train.batch_tokens` by the rows that hold so many; of the two settings an override wins."""
    train, data = source.values.get("train"), source.values.get("data")
    if not isinstance(train, dict) or "batch_tokens" not in train:
        return []
    tokens, seq_len = train.pop("batch_tokens"), data.get("seq_len") if isinstance(data, dict) else None
    if "batch_rows" in train:
        overridden = [source.origins.get(f"train.{name}") == "override" for name in ("batch_tokens", "batch_rows")]
        if overridden == [False, True]:
            return []
        if overridden != [True, False]:
            message = (
                f"a step has batch_rows or batch_tokens, got batch_rows={show(train['batch_rows'])} too; remove one"
            )
            return [Problem("train.batch_tokens", message)]
    if type(tokens) is int and type(seq_len) is int and tokens > 0 and seq_len > 0 and tokens % seq_len == 0:
        train["batch_rows"] = tokens // seq_len
        return []
    train.setdefault("batch_rows", 2**20)  # divides over most meshes: this problem is told, not what follows from it
    message = f"must be a multiple of data.seq_len={show(seq_len)}, whole rows, got {show(tokens)}"
    return [Problem("train.batch_tokens", message)]


def _share_seed(values: dict[str, Any]) -> list[Problem]:
    """Gives the data the run's one seed."""
    data = values.get("data")
    if not isinstance(data, dict):
        return []
    given = "seed" in data
    seed = values.get("seed", 0)
    data["seed"] = seed if type(seed) is int else 0
    return [Problem("data.seed", "a run has one seed; write it as the top-level `seed`")] if given else []
