"""What follows from a run file: every derived number, before anything is started."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from openmoe.model import counts
from openmoe.model.config import ModelConfig
from openmoe.platform.commands.facts import Fact, Section, count, listed, short
from openmoe.platform.run_file import run_length, validate_data, validate_memory
from openmoe.platform.run_file.spec import RunSpec, spec_hash
from openmoe.platform.run_file.spec_checks import legal_meshes
from openmoe.platform.run_file.spec_errors import Problem, SpecError

if TYPE_CHECKING:
    from openmoe.pipelines.tokenizer import Tokenizer

DESCRIBED_SEQ_LEN = 2048


def explain(spec: RunSpec) -> list[Section]:
    """Returns every number that follows from a run file, and from its data where that is built.

    Raises:
      SpecError: the tokenizer does not fit the model.
      RunDirError: `init_from` is none to begin with.
      DataError: the data that is built is less than one step.
    """
    built = validate_data.find_built(spec)
    epoch_rows = built.epoch_rows() if built else None
    known = run_length.resolved(spec, epoch_rows)
    return [
        Section("run", (*_run(spec), *_init_from(spec))),
        *describe_model(spec.model, seq_len=spec.data.seq_len),
        Section("step", (*_step(spec), *validate_data.length(spec, epoch_rows))),
        Section("data", (*validate_data.rows(known), *validate_data.how(spec), _tokenizer(spec))),
        *validate_data.stages(known),
        *validate_data.passes_reached(known, built),
        Section("memory per device", validate_memory.per_device(spec)),
        Section("devices", _devices(spec)),
    ]


def describe_model(model: ModelConfig, *, seq_len: int = DESCRIBED_SEQ_LEN) -> list[Section]:
    """Returns what follows from a model's settings alone."""
    parameters = counts.parameter_counts(model)
    components = [count(field.name, getattr(parameters, field.name)) for field in fields(parameters)]
    vocabulary = parameters.embedding + parameters.head
    active = counts.active_parameters(model)
    moe_layers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
    model_facts = (
        Fact("layers", model.num_layers, str(model.num_layers), f"MoE: {listed(moe_layers)}"),
        count("parameters", parameters.total, "stored"),
        count("active_parameters", active, f"act on one token, the vocabulary's {short(vocabulary)} left out"),
        count(
            "flops_per_token",
            counts.flops_per_token(model, seq_len=seq_len),
            f"forward and backward, rows of {seq_len}",
        ),
    )
    return [
        Section("model", model_facts),
        Section("parameters", tuple(components)),
        Section("memory", validate_memory.by_dtype(model)),
    ]


def _run(spec: RunSpec) -> tuple[Fact, ...]:
    return (
        Fact("name", spec.name, spec.name),
        Fact("run_dir", spec.run_dir, spec.run_dir),
        Fact("data_dir", spec.data_dir, spec.data_dir),
        Fact("spec_hash", spec_hash(spec), spec_hash(spec)[:16], "model, data, seed, optimizer, batch"),
    )


def _init_from(spec: RunSpec) -> tuple[Fact, ...]:
    """Returns what a run begins with; raises RunDirError when it cannot be begun with."""
    from openmoe.pipelines import storage
    from openmoe.platform.train import init_source

    if spec.init_from is None:
        return ()
    if storage.is_remote(spec.init_from) or storage.is_remote(spec.run_dir):
        note = "not looked for: it is remote; training checks it"
    else:
        tokenizer = None if storage.is_remote(spec.data.tokenizer) else check_tokenizer(spec)
        told: list[str] = []
        what = init_source.check(spec, tokenizer, told.append) or "not looked for: the run has its own checkpoints"
        note = f"{what}; it does not say of which tokenizer" if told else what
    return (Fact("init_from", spec.init_from, spec.init_from, note),)


def _step(spec: RunSpec) -> tuple[Fact, ...]:
    train, model, seq_len = spec.train, spec.model, spec.data.seq_len
    tokens = train.batch_rows * seq_len
    rows = train.batch_rows // train.microbatches
    facts = (
        count("tokens_per_step", tokens, f"{train.batch_rows} rows of {seq_len}, padding included"),
        count(
            "rows_per_microbatch",
            rows,
            f"{train.microbatches} microbatches, {rows // spec.mesh.num_batch_shares} rows a device",
        ),
    )
    return (*facts, *(_routing(spec, tokens) if model.num_moe_layers else ()))


def _routing(spec: RunSpec, tokens: int) -> tuple[Fact, ...]:
    model = spec.model
    rows = spec.train.batch_rows // spec.train.microbatches
    group_size = counts.groups_of(model, rows, spec.data.seq_len).size
    groups, capacity = tokens // group_size, model.capacity(train=True, group_size=group_size)
    per_device = groups // spec.train.microbatches // spec.mesh.num_batch_shares
    places = capacity * model.num_experts / (group_size * model.top_k)
    return (
        count(
            "routing_groups_per_step",
            groups,
            f"of {group_size} tokens; {per_device} a device and microbatch",
        ),
        count(
            "expert_capacity",
            capacity,
            f"tokens of a group; places for {min(places, 1):.1%} of all assignments",
        ),
    )


def _tokenizer(spec: RunSpec) -> Fact:
    from openmoe.pipelines import storage

    uri, wanted = spec.data.tokenizer, spec.model.text_vocab_size
    if storage.is_remote(uri):
        return Fact("tokenizer", uri, uri, "not read: it is remote; training checks it")
    check_tokenizer(spec)
    return Fact("tokenizer", uri, uri, f"{wanted:,} pieces, as model.text_vocab_size wants")


def check_tokenizer(spec: RunSpec) -> Tokenizer:
    """Reads the tokenizer; raises SpecError when it has not the pieces that the model expects."""
    from openmoe.pipelines import tokenizer

    uri, wanted = spec.data.tokenizer, spec.model.text_vocab_size
    found = tokenizer.load(uri)
    if found.text_vocab_size != wanted:
        message = f"must be the {found.text_vocab_size} pieces of data.tokenizer={uri}, got {wanted}"
        raise SpecError([Problem("model.text_vocab_size", message)])
    return found


def _devices(spec: RunSpec) -> tuple[Fact, ...]:
    mesh, cluster = spec.mesh, spec.cluster
    rows = spec.train.batch_rows // spec.train.microbatches
    legal = legal_meshes(spec.model, rows=rows, seq_len=spec.data.seq_len)
    numbers = sorted({data * expert for data, expert in legal})
    here = ", ".join(f"{data} x {expert}" for data, expert in legal if data * expert == mesh.num_batch_shares)
    crossed = cluster.num_slices > 1 and mesh.data % cluster.num_slices
    hosts = f"{cluster}; more than the data axis lies between slices, which is slow" if crossed else str(cluster)
    return (
        Fact("mesh", mesh.model_dump(), str(mesh), hosts),
        Fact("legal_devices", numbers, listed(numbers), "same rows, groups and losses on each; times mesh.tensor"),
        Fact("legal_meshes", [list(m) for m in legal], here, "data x expert, as many; fsdp may take factors of data"),
    )
