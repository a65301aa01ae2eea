"""What follows from a run file: every derived number, before anything is started.

Memory is an estimate, from these assumptions: parameters, gradients and optimizer state are float32; experts
are divided over the expert axis, all else is on every device; nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from dataclasses import fields

from openmoe.model import counts
from openmoe.model.config import ModelConfig, OptimizerConfig
from openmoe.platform import run_length, validate_data
from openmoe.platform.facts import Fact, Section, count, listed, num_bytes, short
from openmoe.platform.spec import RunSpec, spec_hash
from openmoe.platform.spec_checks import legal_meshes
from openmoe.platform.spec_errors import Problem, SpecError

FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
DESCRIBED_SEQ_LEN = 2048


def explain(spec: RunSpec) -> list[Section]:
    """Returns every number that follows from a run file, and from its data where that is built.

    Raises:
      SpecError: the tokenizer does not fit the model.
      DataError: the data that is built is less than one step.
    """
    built = validate_data.find_built(spec)
    epoch_rows = built.epoch_rows() if built else None
    known = run_length.resolved(spec, epoch_rows)
    return [
        Section("run", _run(spec)),
        *describe_model(spec.model, seq_len=spec.data.seq_len),
        Section("step", (*_step(spec), *validate_data.length(spec, epoch_rows))),
        Section("data", (*validate_data.rows(known), _tokenizer(spec))),
        *validate_data.stages(known),
        *validate_data.passes_reached(known, built),
        Section("memory per device", _memory(spec)),
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
    return [Section("model", model_facts), Section("parameters", tuple(components))]


def _run(spec: RunSpec) -> tuple[Fact, ...]:
    return (
        Fact("name", spec.name, spec.name),
        Fact("run_dir", spec.run_dir, spec.run_dir),
        Fact("data_dir", spec.data_dir, spec.data_dir),
        Fact("spec_hash", spec_hash(spec), spec_hash(spec)[:16], "model, data, seed, optimizer, batch"),
    )


def _step(spec: RunSpec) -> tuple[Fact, ...]:
    train, model, seq_len = spec.train, spec.model, spec.data.seq_len
    tokens = train.batch_rows * seq_len
    rows = train.batch_rows // train.microbatches
    facts = (
        count("tokens_per_step", tokens, f"{train.batch_rows} rows of {seq_len}, padding included"),
        count(
            "rows_per_microbatch",
            rows,
            f"{train.microbatches} microbatches, {rows // spec.mesh.num_devices} rows a device",
        ),
    )
    return (*facts, *(_routing(spec, tokens) if model.num_moe_layers else ()))


def _routing(spec: RunSpec, tokens: int) -> tuple[Fact, ...]:
    model = spec.model
    groups, capacity = tokens // model.group_size, model.capacity(train=True)
    per_device = groups // spec.train.microbatches // spec.mesh.num_devices
    places = capacity * model.num_experts / (model.group_size * model.top_k)
    return (
        count(
            "routing_groups_per_step",
            groups,
            f"of {model.group_size} tokens; {per_device} a device and microbatch",
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


def check_tokenizer(spec: RunSpec) -> None:
    """Raises SpecError when the tokenizer, which this reads, has not the pieces that the model expects."""
    from openmoe.pipelines import tokenizer

    uri, wanted = spec.data.tokenizer, spec.model.text_vocab_size
    size = tokenizer.load(uri).text_vocab_size
    if size != wanted:
        message = f"must be the {size} pieces of data.tokenizer={uri}, got {wanted}"
        raise SpecError([Problem("model.text_vocab_size", message)])


def _memory(spec: RunSpec) -> tuple[Fact, ...]:
    model, expert_axis = spec.model, spec.mesh.expert
    experts = counts.parameter_counts(model).experts
    shared = counts.parameter_counts(model).total - experts
    parameters = FLOAT32_BYTES * (shared + experts // expert_axis)
    gradients = parameters * (2 if spec.train.microbatches > 1 else 1)
    state_shared, state_experts = adafactor_elements(model, spec.optimizer)
    state = FLOAT32_BYTES * (state_shared + state_experts // expert_axis)
    rows = spec.train.batch_rows // spec.train.microbatches // spec.mesh.num_devices
    activations = activation_bytes(model, rows=rows, seq_len=spec.data.seq_len)
    total = parameters + gradients + state + activations
    return (
        num_bytes("parameters", parameters, "estimate: float32, experts over the expert axis, the rest everywhere"),
        num_bytes("gradients", gradients, "estimate: float32; twice when summed over microbatches"),
        num_bytes("optimizer", state, "estimate: Adafactor's row and column moments"),
        num_bytes("activations", activations, f"estimate: {rows} rows of a microbatch, nothing recomputed"),
        num_bytes("total", total, "estimate, without what the compiler adds"),
    )


def adafactor_elements(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Returns the elements of Adafactor's state (of shared parameters, of all experts).

    A matrix whose sides are both at least min_dim_size_to_factor keeps a row and a column, another one every
    element; kernels of experts are always factored, each expert by itself.
    """

    def moments(rows: int, columns: int) -> int:
        factored = min(rows, columns) >= optimizer.min_dim_size_to_factor
        return rows + columns if factored else rows * columns

    d_model, d_ff, inner = model.d_model, model.d_ff, model.num_heads * model.head_dim
    attention = 4 * moments(d_model, inner)
    ffn = moments(d_model, 2 * d_ff) + 2 * moments(d_model, d_ff)
    routers = model.num_moe_layers * moments(d_model, model.num_experts)
    shared = 2 * moments(model.vocab_size, d_model) + model.num_layers * (attention + ffn) + routers
    one_expert = (d_model + 2 * d_ff) + 2 * (d_model + d_ff)
    norms = counts.parameter_counts(model).norms
    return shared + norms, model.num_moe_layers * model.num_experts * one_expert


def activation_bytes(model: ModelConfig, *, rows: int, seq_len: int) -> int:
    """Returns an estimate of what one device keeps of a microbatch for the backward pass.

    A token keeps, in each layer: two block inputs, queries, keys, values and the attention's output, seq_len
    attention weights a head, and a feed-forward block's input and 4 * d_ff inner values; in an MoE layer also
    capacity_factor_train expert places with input, inner values and output. At the end it has vocab_size
    logits and their gradients, in float32, which is most of it in a small model.
    """
    inner, ffn = model.num_heads * model.head_dim, model.d_model + 4 * model.d_ff
    layer = 2 * model.d_model + 4 * inner + model.num_heads * seq_len + ffn
    moe = model.capacity_factor_train * (ffn + model.d_model)
    values = model.num_layers * layer + model.num_moe_layers * moe
    token = DTYPE_BYTES[model.dtype] * values + 2 * FLOAT32_BYTES * model.vocab_size
    return round(rows * seq_len * token)


def _devices(spec: RunSpec) -> tuple[Fact, ...]:
    mesh, cluster = spec.mesh, spec.cluster
    rows = spec.train.batch_rows // spec.train.microbatches
    legal = legal_meshes(spec.model, rows=rows, seq_len=spec.data.seq_len)
    numbers = sorted({data * expert for data, expert in legal})
    here = ", ".join(f"{data} x {expert}" for data, expert in legal if data * expert == mesh.num_devices)
    hosts = f"{cluster.num_workers} workers with {cluster.devices_per_worker} {cluster.accelerator} devices"
    return (
        Fact("mesh", [mesh.data, mesh.expert], f"{mesh.data} x {mesh.expert}", f"data x expert; {hosts}"),
        Fact("legal_devices", numbers, listed(numbers), "same rows, groups and losses on each"),
        Fact("legal_meshes", [list(m) for m in legal], here, f"data x expert, on {mesh.num_devices} devices"),
    )
