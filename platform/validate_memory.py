"""How much memory a model and a run take: estimates, from the settings alone.

Assumed: parameters, gradients and optimizer state are float32, and divided as model/sharding.py says; norms and
routers, which are small, count as divided too. What the compiler adds is not known here.
"""

from __future__ import annotations

from openmoe.model import counts
from openmoe.model.config import ExecutionConfig, ModelConfig, OptimizerConfig
from openmoe.platform.facts import Fact, num_bytes
from openmoe.platform.spec import RunSpec

FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def by_dtype(model: ModelConfig) -> tuple[Fact, ...]:
    """Returns what a model takes to be kept, and to be trained, on all devices together."""
    parameters = counts.parameter_counts(model).total
    moments = sum(adafactor_elements(model, OptimizerConfig()))
    return (
        *(num_bytes(f"parameters_{dtype}", each * parameters, "") for dtype, each in DTYPE_BYTES.items()),
        num_bytes("adafactor_float32", FLOAT32_BYTES * moments, "row and column moments"),
        num_bytes("training_float32", FLOAT32_BYTES * (2 * parameters + moments), "with gradients; no activations"),
    )


def per_device(spec: RunSpec) -> tuple[Fact, ...]:
    """Returns what one device of a run holds."""
    model, mesh, execution = spec.model, spec.mesh, spec.execution
    slices = mesh.fsdp * mesh.tensor
    experts = counts.parameter_counts(model).experts
    shared = counts.parameter_counts(model).total - experts
    parameters = FLOAT32_BYTES * (shared + experts // mesh.expert) // slices
    is_summed = spec.train.microbatches * execution.accumulation_steps > 1
    gradients = parameters * (2 if is_summed else 1)
    state_shared, state_experts = adafactor_elements(model, spec.optimizer)
    state = FLOAT32_BYTES * (state_shared + state_experts // mesh.expert) // slices
    rows = spec.train.batch_rows // spec.train.microbatches // mesh.num_batch_shares // execution.accumulation_steps
    fused = execution.attention == "auto" and spec.cluster.accelerator != "cpu"
    activations = activation_bytes(model, execution, rows=rows, seq_len=spec.data.seq_len, fused_attention=fused)
    total = parameters + gradients + state + activations
    kept = {"none": "nothing recomputed", "dots": "products kept", "full": "blocks recomputed"}[execution.remat]
    return (
        num_bytes("parameters", parameters, "estimate: float32, experts over expert, all over fsdp and tensor"),
        num_bytes("gradients", gradients, "estimate: float32; twice when summed over microbatches or parts"),
        num_bytes("optimizer", state, "estimate: Adafactor's row and column moments"),
        num_bytes("activations", activations, f"estimate: {rows} rows at a time, {kept}"),
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
    model: ModelConfig, execution: ExecutionConfig, *, rows: int, seq_len: int, fused_attention: bool
) -> int:
    """Returns an estimate of what one device keeps of `rows` rows for the backward pass.

    A token keeps, in each layer: two block inputs, queries, keys, values and the attention's output, seq_len attention
    weights a head unless attention is one kernel, and a feed-forward block's input and 4 * d_ff inner values; in an
    MoE layer also its expert places with input, inner values and output. With remat it keeps, of each block, its input
    in float32, or that and the products, and all of one block at a time. Logits and their gradients are formed in
    blocks of positions, in float32.
    """
    inner, tokens = model.num_heads * model.head_dim, rows * seq_len
    ffn, expert = model.d_model + 4 * model.d_ff, model.d_model + 4 * model.expert_width
    attention_weights = 0 if fused_attention else model.num_heads * seq_len
    places = 0.0
    if model.num_experts:
        asked = model.top_k if model.dropless or model.capacity_counts_top_k else 1
        places = asked * (1 if model.dropless else model.capacity_factor_train)
    whole = model.num_layers * (2 * model.d_model + 4 * inner + attention_weights + ffn)
    whole += model.num_moe_layers * places * (expert + model.d_model)
    products = model.num_layers * (2 * model.d_model + 3 * inner + 3 * model.d_ff)
    num_blocks = model.num_layers // model.block_layers
    inputs = 2 * num_blocks * model.d_model
    values = {"none": whole, "dots": inputs + products + whole / num_blocks, "full": inputs + whole / num_blocks}
    logits = 2 * FLOAT32_BYTES * min(tokens * model.vocab_size, counts.BLOCK_LOGITS)
    return round(tokens * DTYPE_BYTES[model.dtype] * values[execution.remat]) + logits
