"""What one device computes, moves and exchanges in a step, from the settings alone, and its least time. Pure.

Counted is what model/ does: experts work on all their places, blocks are computed again as `remat` says, kernels are
gathered along fsdp where they are used, gradients are summed over devices once in each part of the batch. An exchange
of n devices costs each of them (n - 1) / n of the whole, a sum of what all hold twice that.
"""

from __future__ import annotations

from typing import NamedTuple

from openmoe.model import counts
from openmoe.model.config import ModelConfig
from openmoe.platform.planner.plan_hardware import Machines
from openmoe.platform.run_file import validate_memory
from openmoe.platform.run_file.spec import RunSpec

FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
FORWARD_SHARE = 1 / 3  # of a product's three, two are of the backward pass


class Work(NamedTuple):
    """Of one device in one step.

    Attributes:
      model_flops: what the mathematics asks for, the usual basis of MFU.
      device_flops: what is computed, experts' places and recomputation included.
      hbm_bytes: to and from its memory; a rough count.
      exchanged_bytes: sent to other devices, by collective.
    """

    model_flops: float
    device_flops: float
    hbm_bytes: float
    exchanged_bytes: dict[str, float]


class Bound(NamedTuple):
    """Least seconds of a step by what a device does, if all else were free."""

    compute_s: float
    memory_s: float
    links_s: float

    @property
    def step_s(self) -> float:
        """Least seconds of a step, all three at the same time."""
        return max(self)

    @property
    def limited_by(self) -> str:
        """Which of the three takes longest."""
        return max(zip(self, ("arithmetic", "memory", "links"), strict=True))[1]


def work(spec: RunSpec) -> Work:
    """Returns what one device does in a step of this run."""
    tokens = spec.train.batch_rows * spec.data.seq_len
    per_device = tokens / spec.mesh.num_devices
    return Work(
        model_flops=per_device * counts.flops_per_token(spec.model, seq_len=spec.data.seq_len),
        device_flops=per_device * device_flops_per_token(spec) + attention_flops(spec),
        hbm_bytes=_hbm_bytes(spec),
        exchanged_bytes=_exchanged_bytes(spec),
    )


def bound(spec: RunSpec, work: Work, machines: Machines) -> Bound:
    """Returns the least time of a step. Between slices gradients are summed, by each device its share of a slice's."""
    chip, slices = machines.chip, machines.slices
    links_s = sum(work.exchanged_bytes.values()) / chip.link_bytes_per_s
    if slices > 1:
        gradients = counts.parameter_counts(spec.model).total * DTYPE_BYTES[spec.model.dtype] * _parts(spec)
        between = 2 * gradients * _away(slices) / (machines.chips / slices)
        links_s = max(links_s, between / chip.network_bytes_per_s)
    return Bound(work.device_flops / chip.flops_per_s, work.hbm_bytes / chip.hbm_bytes_per_s, links_s)


def device_flops_per_token(spec: RunSpec) -> float:
    """Returns what is computed for a token in a step, attention left out, on all devices together."""
    model = spec.model
    asked = model.num_moe_layers * model.top_k * _expert(model)
    experts = asked * expert_places(model) / model.top_k
    again = FORWARD_SHARE if spec.execution.remat == "full" else 0.0
    blocks = 6 * (counts.active_parameters(model) - asked + experts) * (1 + again)
    return 6 * counts.parameter_counts(model).head + blocks


def attention_flops(spec: RunSpec) -> float:
    """Returns what attention itself takes of a device in a step, as if no mask saved anything."""
    model, seq_len = spec.model, spec.data.seq_len
    tokens = spec.train.batch_rows * seq_len / spec.mesh.num_devices
    again = 0.0 if spec.execution.remat == "none" else FORWARD_SHARE
    return 12 * tokens * model.num_layers * model.num_heads * model.head_dim * seq_len * (1 + again)


def expert_places(model: ModelConfig) -> float:
    """Returns how many places experts have for each token of a group; 0 without experts."""
    if model.dropless or not model.num_experts:
        return float(model.top_k if model.num_experts else 0)
    return model.capacity(train=True) * model.num_experts / model.group_size


def _expert(model: ModelConfig) -> int:
    return counts.parameter_counts(model).experts // max(model.num_moe_layers * model.num_experts, 1)


def _parts(spec: RunSpec) -> int:
    return spec.train.microbatches * spec.execution.accumulation_steps


def _hbm_bytes(spec: RunSpec) -> float:
    """Kernels and vocabulary, read and written so often in each part; activations; gradients and optimizer.

    The factors are those that come near to what libtpu's programs of the 8B and 34B models move.
    """
    model, mesh, parts, size = spec.model, spec.mesh, _parts(spec), DTYPE_BYTES[spec.model.dtype]
    parameters, again = counts.parameter_counts(model), spec.execution.remat != "none"
    memory = validate_memory.estimate(spec)
    used = (parameters.total - parameters.experts * (1 - 1 / mesh.expert)) / mesh.tensor  # gathered along fsdp
    vocabulary = FLOAT32_BYTES * parameters.head / mesh.tensor
    kernels = used - 2 * parameters.head / mesh.tensor
    gathers = 1 + again if mesh.fsdp > 1 else 0
    passes = {"none": 3, "dots": 3, "full": 4}[spec.execution.remat]
    positions = spec.train.batch_rows * spec.data.seq_len / mesh.num_batch_shares
    loss_blocks = max(positions / parts * model.vocab_size / mesh.tensor / counts.BLOCK_LOGITS, 1)
    inner = model.num_heads * model.head_dim
    of_layer = 6 * model.d_model + (8 * inner + 12 * model.d_ff) / mesh.tensor
    of_experts = expert_places(model) * (4 * model.d_model + 12 * model.expert_width / mesh.tensor)
    values = model.num_layers * of_layer + model.num_moe_layers * of_experts
    return (
        parts * kernels * (FLOAT32_BYTES * (gathers + passes) + 3 * size)
        + parts * vocabulary * (5 * loss_blocks + 10)
        + 4.7 * positions * values * size
        + 4 * _redistributed_bytes(spec)
        + 2 * parts * memory.activations
        + (3 * parts + 6) * FLOAT32_BYTES * used / mesh.fsdp
        + 2 * memory.optimizer
    )


def _exchanged_bytes(spec: RunSpec) -> dict[str, float]:
    """By collective, as XLA writes them for TPUs: only gradients of experts are scattered over fsdp while summed."""
    model, mesh, size = spec.model, spec.mesh, DTYPE_BYTES[spec.model.dtype]
    parameters, parts = counts.parameter_counts(model), _parts(spec)
    vocabulary = (parameters.embedding + parameters.head) / mesh.tensor
    experts = parameters.experts / mesh.expert / mesh.tensor
    others = (parameters.total - parameters.experts) / mesh.tensor - vocabulary
    tokens = spec.train.batch_rows * spec.data.seq_len / mesh.num_batch_shares
    again = spec.execution.remat != "none"
    gathered = (experts + others) * (1 + again) + vocabulary
    places = tokens * expert_places(model) * model.d_model * size
    sums = 4 + 2 * again  # two of a layer forward, two backward; a block behind the experts has its own
    width = model.num_layers * sums + (model.num_moe_layers * sums / 2 if model.extra_mlp != "none" else 0)
    everywhere = (others * size + vocabulary * FLOAT32_BYTES) * _away(mesh.num_batch_shares)
    return {
        "all-to-all over expert": model.num_moe_layers * (4 + 2 * again) * places * _away(mesh.expert),
        "all-gather over fsdp": parts * gathered * FLOAT32_BYTES * _away(mesh.fsdp),
        "reduce-scatter over fsdp": parts * experts * size * _away(mesh.fsdp),
        "all-reduce of gradients": parts * 2 * (everywhere + experts / mesh.fsdp * size * _away(mesh.data)),
        "all-reduce over tensor": 2 * tokens * width * model.d_model * size * _away(mesh.tensor),
        "redistribution over tensor": _redistributed_bytes(spec),
    }


def _redistributed_bytes(spec: RunSpec) -> float:
    """What kernels with two halves cost under tensor, since their columns travel where they are used.

    Three times a use is what XLA was seen to send for a v4.
    """
    model, mesh, parameters = spec.model, spec.mesh, counts.parameter_counts(spec.model)
    if mesh.tensor == 1 or model.ffn != "openmoe":
        return 0.0
    kernels = (parameters.dense_ffn + parameters.extra_ffn + parameters.experts / mesh.expert) / 2 / mesh.tensor
    return _parts(spec) * (2 + (spec.execution.remat != "none")) * 3 * FLOAT32_BYTES * kernels


def _away(devices: int) -> float:
    return (devices - 1) / devices
