"""How much memory a model and a run take: estimates, from the settings alone, held to the TPU compiler's by a test.

Assumed: parameters, gradients and optimizer state are float32, and divided as model/sharding.py says; norms and
routers, which are small, count as divided too. A step is largest either in the backward pass of a block, or at the
vocabulary; what blocks keep for the backward pass is there in both.
"""

from __future__ import annotations

from typing import NamedTuple

from openmoe.model import counts
from openmoe.model.config import ExecutionConfig, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig, MuonConfig, OptimizerConfig
from openmoe.platform.commands.facts import Fact, num_bytes
from openmoe.platform.run_file.spec import RunSpec

FLOAT32_BYTES = 4
STATES = {
    "adafactor": "row and column moments",
    "adamw": "two moments of each parameter",
    "muon": "one moment of matrices, two of all else",
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def by_dtype(model: ModelConfig) -> tuple[Fact, ...]:
    """Returns what a model takes to be kept, and to be trained, on all devices together."""
    parameters = counts.parameter_counts(model).total
    moments = sum(adafactor_elements(model, AdafactorConfig()))
    others = {config.name: sum(optimizer_elements(model, config)) for config in (AdamWConfig(), MuonConfig())}
    return (
        *(num_bytes(f"parameters_{dtype}", each * parameters, "") for dtype, each in DTYPE_BYTES.items()),
        num_bytes("adafactor_float32", FLOAT32_BYTES * moments, STATES["adafactor"]),
        *(num_bytes(f"{name}_float32", FLOAT32_BYTES * number, STATES[name]) for name, number in others.items()),
        num_bytes("training_float32", FLOAT32_BYTES * (2 * parameters + moments), "Adafactor; no activations"),
    )


class Memory(NamedTuple):
    """What one device of a run holds when it holds most, in bytes.

    Attributes:
      parameters: its share.
      gradients: its share; a second time when they are summed over microbatches or parts.
      optimizer: its share of the state.
      activations: what the blocks keep for the backward pass; without remat their kernels too, gathered and rounded.
      working: kernels of a block gathered along fsdp, their gradients and all values of the block; or the same of
        the vocabulary, with the logits of a block of positions.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def estimate(spec: RunSpec) -> Memory:
    """Returns what one device of a run holds."""
    model, mesh, execution = spec.model, spec.mesh, spec.execution
    experts = counts.parameter_counts(model).experts
    shared = counts.parameter_counts(model).total - experts
    used = (shared + experts // mesh.expert) // mesh.tensor  # of a device when gathered along fsdp
    parameters = FLOAT32_BYTES * used // mesh.fsdp
    is_summed = spec.train.microbatches * execution.accumulation_steps > 1
    state_shared, state_experts = optimizer_elements(model, spec.optimizer)
    rows = spec.train.batch_rows // spec.train.microbatches // mesh.num_batch_shares // execution.accumulation_steps
    fused = execution.attention == "auto" and spec.cluster.accelerator != "cpu"
    kept, block = activation_bytes(
        model, execution, rows=rows, seq_len=spec.data.seq_len, fused_attention=fused, tensor=mesh.tensor
    )
    size, vocabulary = DTYPE_BYTES[model.dtype], FLOAT32_BYTES * model.vocab_size * model.d_model // mesh.tensor
    kernels = used - 2 * vocabulary // FLOAT32_BYTES
    of_block = kernels * model.block_layers // model.num_layers
    block += of_block * (size + (FLOAT32_BYTES if mesh.fsdp > 1 else size))
    block_positions = max(counts.BLOCK_LOGITS * mesh.tensor // model.vocab_size, 1)
    if spec.cluster.accelerator == "cpu":
        block_positions = min(block_positions, counts.CPU_BLOCK_POSITIONS)
    logits = FLOAT32_BYTES * min(rows * spec.data.seq_len, block_positions) * model.vocab_size // mesh.tensor
    head = 2 * vocabulary + 4 * logits
    return Memory(
        parameters=parameters,
        gradients=parameters * (2 if is_summed else 1),
        optimizer=FLOAT32_BYTES * (state_shared + state_experts // mesh.expert) // (mesh.fsdp * mesh.tensor),
        activations=kept + (size * kernels if execution.remat == "none" else 0),
        working=max(block, head),
    )


def per_device(spec: RunSpec) -> tuple[Fact, ...]:
    """Returns what one device of a run holds, as facts."""
    memory, parts = estimate(spec), spec.execution.accumulation_steps
    rows = spec.train.batch_rows // spec.train.microbatches // spec.mesh.num_batch_shares // parts
    kept = {"none": "nothing recomputed", "dots": "products kept", "full": "blocks recomputed"}[spec.execution.remat]
    return (
        num_bytes("parameters", memory.parameters, "estimate: float32, experts over expert, all over fsdp and tensor"),
        num_bytes("gradients", memory.gradients, "estimate: float32; twice when summed over microbatches or parts"),
        num_bytes("optimizer", memory.optimizer, f"estimate: {spec.optimizer.name}, {STATES[spec.optimizer.name]}"),
        num_bytes("activations", memory.activations, f"estimate: {rows} rows at a time, {kept}"),
        num_bytes("working", memory.working, "estimate: kernels, gradients, values of a block, or of the vocabulary"),
        num_bytes("total", memory.total, "estimate; `openmoe plan --compile` asks the TPU compiler"),
    )


def optimizer_elements(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Returns the elements of an optimizer's state (of shared parameters, of all experts)."""
    if isinstance(optimizer, AdafactorConfig):
        return adafactor_elements(model, optimizer)
    parameters = counts.parameter_counts(model)
    shared, experts = 2 * (parameters.total - parameters.experts), 2 * parameters.experts
    if isinstance(optimizer, MuonConfig):  # one moment for each matrix
        return shared - parameters.attention - parameters.dense_ffn - parameters.extra_ffn, experts // 2
    return shared, experts


def adafactor_elements(model: ModelConfig, optimizer: AdafactorConfig) -> tuple[int, int]:
    """Returns the elements of Adafactor's state (of shared parameters, of all experts).

    A matrix whose sides are both at least min_dim_size_to_factor keeps a row and a column, another one every
    element; kernels of experts are always factored, each expert by itself.
    """

    def moments(rows: int, columns: int) -> int:
        factored = min(rows, columns) >= optimizer.min_dim_size_to_factor
        return rows + columns if factored else rows * columns

    d_model, d_ff, inner = model.d_model, model.d_ff, model.num_heads * model.head_dim
    doubled = 2 if model.ffn == "openmoe" else 1
    width = model.expert_width
    attention = 4 * moments(d_model, inner)
    ffn = moments(d_model, doubled * d_ff) + 2 * moments(d_model, d_ff)
    dense_blocks = model.num_layers - (model.num_moe_layers if model.extra_mlp == "none" else 0)
    biases = model.num_experts if model.router_bias_rate else 0
    routers = model.num_moe_layers * (moments(d_model, model.num_experts) + biases)
    shared = 2 * moments(model.vocab_size, d_model) + model.num_layers * attention + dense_blocks * ffn + routers
    one_expert = (d_model + doubled * width) + 2 * (d_model + width)
    norms = counts.parameter_counts(model).norms
    return shared + norms, model.num_moe_layers * model.num_experts * one_expert


def activation_bytes(
    model: ModelConfig, execution: ExecutionConfig, *, rows: int, seq_len: int, fused_attention: bool, tensor: int = 1
) -> tuple[int, int]:
    """Returns an estimate of the values that one device has of `rows` rows: (kept for the backward pass, of a block).

    Kept of a token, in each layer: with remat full a block's input in float32; with dots that and the products; with
    none what the derivative reads, as XLA keeps it between blocks: two float32 and two more of each norm, queries,
    keys, values and the attention's output and input, 8 * d_ff of a feed-forward block, the same of an expert place.
    A block that is computed again has less at a time, since XLA fuses and orders it: 6 * d_ff instead of 8. Attention
    that is no kernel has seq_len weights a head in both. Inner values are divided over `tensor`.
    """
    inner, d_model, tokens = model.num_heads * model.head_dim / tensor, model.d_model, rows * seq_len
    d_ff, width = model.d_ff / tensor, model.expert_width / tensor
    weights = 0 if fused_attention else model.num_heads * seq_len / tensor
    asked = model.top_k if model.dropless or model.capacity_counts_top_k else 1
    places = asked * (1 if model.dropless else model.capacity_factor_train) if model.num_experts else 0.0
    layers, moe_layers, num_blocks = model.num_layers, model.num_moe_layers, model.num_layers // model.block_layers
    inputs = 2 * num_blocks * d_model
    norms = 2 * layers + (moe_layers if model.extra_mlp == "after" else 0)
    derivatives = layers * (5 * inner + 8 * d_ff + weights) + 6 * norms * d_model
    derivatives += moe_layers * (places * (8 * width + d_model) + (2 + model.top_k) * d_model)
    products = layers * (2 * d_model + 3 * inner + 3 * d_ff)
    at_once = layers * (3 * d_model + 4 * inner + weights + 6 * d_ff) + moe_layers * places * (2 * d_model + 6 * width)
    kept = {"none": derivatives, "dots": inputs + products, "full": inputs}[execution.remat]
    again = {"none": 0, "dots": at_once - products, "full": at_once}[execution.remat]
    size = tokens * DTYPE_BYTES[model.dtype]
    return round(size * kept), round(size * again / num_blocks)
