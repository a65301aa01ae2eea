"""Combinations of settings that cannot work together, each named with the numbers that clash.

The mathematics fixes the microbatch and the routing groups; a device always holds whole groups of whole rows,
so that a resize changes only who computes what.
"""

import difflib
import fnmatch
import math
from collections.abc import Iterator
from typing import NamedTuple

from openmoe.clusters import tpu
from openmoe.model import counts
from openmoe.model.config import ExecutionConfig, ModelConfig
from openmoe.model.optimizer_config import OptimizerConfig
from openmoe.model.parameter_names import parameter_names
from openmoe.pipelines.config import DataConfig
from openmoe.platform.run_file.spec_errors import Problem, did_you_mean
from openmoe.platform.run_file.spec_sections import (
    BudgetsConfig,
    ClusterConfig,
    EvalConfig,
    HealthConfig,
    MeshConfig,
    TrainConfig,
)
from openmoe.platform.train import saturation

_LARGEST_RATE = 0.1  # of AdamW and Muon, far above any that trains
_OLD_TPUS = ("TPU-V2", "TPU-V3")  # which Ray knows; here nothing is known of their slices


class Mesh(NamedTuple):
    """Devices along two axes. Any factor of `data` may lie on fsdp instead."""

    data: int
    expert: int


def impossible_combinations(
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    execution: ExecutionConfig,
    cluster: ClusterConfig,
    optimizer: OptimizerConfig,
) -> list[Problem]:
    """Every clash between settings that are each fine by themselves."""
    return [
        *_lengths(train, data),
        *_vocabulary(model, data),
        *_batch(train, model, data, mesh, execution),
        *_mesh(mesh, cluster, model),
        *_slices(mesh, model),
        *_cluster(cluster),
        *_tpu_slices(cluster),
        *_rate(optimizer),
        *_parameter_groups(optimizer, model),
    ]


def legal_meshes(model: ModelConfig, *, rows: int, seq_len: int) -> list[Mesh]:
    """Every mesh that can train this model on microbatches of `rows` rows, fewest devices first."""
    experts = range(1, model.num_experts + 1) if model.num_experts else (1,)
    return [
        Mesh(data=devices // expert, expert=expert)
        for devices in range(1, rows + 1)
        if _holds_whole_groups(model, rows=rows, seq_len=seq_len, shares=devices)
        for expert in experts
        if devices % expert == 0 and (model.num_experts == 0 or model.num_experts % expert == 0)
    ]


def _holds_whole_groups(model: ModelConfig, *, rows: int, seq_len: int, shares: int) -> bool:
    if rows % shares:
        return False
    if model.num_moe_layers == 0:
        return True
    groups = counts.groups_of(model, rows, seq_len)
    if groups.pad_rows or groups.pad_cols:
        return shares == 1
    return rows // shares * seq_len % groups.size == 0


def _lengths(train: TrainConfig, data: DataConfig) -> Iterator[Problem]:
    every = train.checkpoint_every_steps
    if train.steps is not None and every != "auto" and every > train.steps:
        yield Problem("train.checkpoint_every_steps", f"must be <= train.steps={train.steps}, got {every}")
    if train.sample_tokens >= data.seq_len:
        yield Problem("train.sample_tokens", f"must be < data.seq_len={data.seq_len}, got {train.sample_tokens}")


def _vocabulary(model: ModelConfig, data: DataConfig) -> Iterator[Problem]:
    needed = model.text_vocab_size + data.num_sentinels
    if model.vocab_size < needed:
        yield Problem(
            "model.vocab_size",
            f"must be >= {needed} (text_vocab_size={model.text_vocab_size} + "
            f"data.num_sentinels={data.num_sentinels}), got {model.vocab_size}",
        )


def _batch(
    train: TrainConfig, model: ModelConfig, data: DataConfig, mesh: MeshConfig, execution: ExecutionConfig
) -> Iterator[Problem]:
    devices, parts = mesh.num_batch_shares, execution.accumulation_steps
    if train.batch_rows % train.microbatches:
        yield Problem(
            "train.microbatches",
            f"must divide train.batch_rows={train.batch_rows}, got {train.microbatches}",
        )
        return
    rows = train.batch_rows // train.microbatches
    if rows % devices:
        yield Problem(
            "train.batch_rows",
            f"{rows} rows a microbatch cannot be divided over {devices} devices (mesh); "
            f"make batch_rows a multiple of {devices * train.microbatches}, got {train.batch_rows}",
        )
    elif not _holds_whole_groups(model, rows=rows, seq_len=data.seq_len, shares=devices):
        tokens = rows // devices * data.seq_len
        yield Problem(
            "model.group_size",
            f"must divide the {tokens} tokens a device holds of a microbatch ({rows // devices} rows x "
            f"{data.seq_len}), got {model.group_size}; use fewer devices, fewer microbatches or "
            "smaller groups (which changes the mathematics)",
        )
    elif parts > 1 and model.t5x_expert_copies:
        yield Problem(
            "execution.accumulation_steps",
            f"must be 1 where model.t5x_expert_copies decides the groups from whole microbatches, got {parts}",
        )
    elif rows // devices % parts or not _holds_whole_groups(
        model, rows=rows // parts, seq_len=data.seq_len, shares=devices
    ):
        yield Problem(
            "execution.accumulation_steps",
            f"must cut the {rows // devices} rows that a device holds of a microbatch into parts of whole routing "
            f"groups (model.group_size={model.group_size}), got {parts}",
        )


def _mesh(mesh: MeshConfig, cluster: ClusterConfig, model: ModelConfig) -> Iterator[Problem]:
    experts = model.num_experts
    workers, each = cluster.num_workers, cluster.devices_per_worker
    if mesh.num_devices != workers * each:
        yield Problem(
            "mesh",
            f"{mesh} is {mesh.num_devices} devices, the cluster has "
            f"num_workers={workers} x devices_per_worker={each} = {workers * each}",
        )
    if experts == 0 and mesh.expert != 1:
        yield Problem("mesh.expert", f"must be 1 for a dense model (num_experts=0), got {mesh.expert}")
    elif experts and experts % mesh.expert:
        yield Problem("mesh.expert", f"must divide model.num_experts={experts}, got {mesh.expert}")


def _slices(mesh: MeshConfig, model: ModelConfig) -> Iterator[Problem]:
    if model.d_model % mesh.fsdp:
        yield Problem("mesh.fsdp", f"must divide model.d_model={model.d_model}, got {mesh.fsdp}")
    for name in ("num_heads", "d_ff", "d_ff_expert", "vocab_size"):
        if getattr(model, name) % mesh.tensor:
            yield Problem("mesh.tensor", f"must divide model.{name}={getattr(model, name)}, got {mesh.tensor}")


def _cluster(cluster: ClusterConfig) -> Iterator[Problem]:
    for field in ("topology", "accelerator_type"):
        given = getattr(cluster, field)
        if cluster.accelerator == "tpu" and given is None:
            example = "4x4x4" if field == "topology" else "TPU-V4"
            yield Problem(f"cluster.{field}", f"needed when accelerator is tpu; add it, such as `{field}: {example}`")
        if cluster.accelerator != "tpu" and given is not None:
            yield Problem(
                f"cluster.{field}",
                f"only means something when accelerator is tpu (it is {cluster.accelerator}); remove it",
            )


def _tpu_slices(cluster: ClusterConfig) -> Iterator[Problem]:
    """Slices that do not exist, for which a run would wait for ever, and workers that do not fill them."""
    if cluster.accelerator != "tpu" or cluster.accelerator_type is None or cluster.topology is None:
        return
    types = [tpu.ray_accelerator_type(kind) for kind in tpu.GENERATIONS]
    if (kind := cluster.generation) is None:
        if cluster.accelerator_type not in _OLD_TPUS:
            message = f"must be one of {', '.join(types)}, got {cluster.accelerator_type}"
            yield Problem("cluster.accelerator_type", message)
        return
    if cluster.topology not in (topologies := tpu.GENERATIONS[kind].topologies):
        message = f"no {kind} slice is {cluster.topology}; write one of {', '.join(topologies)}"
        yield Problem("cluster.topology", message)
        return
    hosts, chips = tpu.hosts_per_slice(kind, cluster.topology), tpu.chips_per_host(kind, cluster.topology)
    if cluster.num_workers % hosts:
        message = f"must be a multiple of the {hosts} hosts of a {kind} slice of {cluster.topology}"
        yield Problem("cluster.num_workers", f"{message}, got {cluster.num_workers}")
    if cluster.devices_per_worker > (most := chips * tpu.GENERATIONS[kind].devices_per_chip):
        message = f"must be at most {most}, the devices of a host of {chips} {kind} chips"
        yield Problem("cluster.devices_per_worker", f"{message}, got {cluster.devices_per_worker}")


def _rate(optimizer: OptimizerConfig) -> Iterator[Problem]:
    """Refuses a rate of Adafactor's kind, as it is left over where only the optimizer's name was changed."""
    slowed = math.sqrt(optimizer.warmup_steps) if optimizer.schedule.name == "inverse_sqrt" else 1
    largest = optimizer.learning_rate / slowed
    if optimizer.name != "adafactor" and largest > _LARGEST_RATE:
        yield Problem(
            "optimizer.learning_rate",
            f"{optimizer.name} moves parameters by about the rate, whatever their size, so at most {_LARGEST_RATE} in "
            f"a step; 3e-4 is usual, Adafactor's are larger; got {optimizer.learning_rate:g}",
        )


def _parameter_groups(optimizer: OptimizerConfig, model: ModelConfig) -> Iterator[Problem]:
    names = parameter_names(model) if optimizer.groups else []
    for index, group in enumerate(optimizer.groups):
        for at, pattern in enumerate(group.match):
            if not fnmatch.filter(names, pattern):
                message = f"no parameter is named {pattern!r}; {_near(pattern, names)}"
                yield Problem(f"optimizer.groups.{index}.match.{at}", message)


def _near(pattern: str, names: list[str]) -> str:
    """Returns the nearest word for the first of a pattern that no name has, or names that are near."""
    known = dict.fromkeys(part for name in names for part in name.split("/"))
    for word in pattern.split("/"):
        if not set("*?[") & set(word) and word not in known and difflib.get_close_matches(word, known):
            return did_you_mean(word, known)
    near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3) or names[:2]
    return f"names are such as {' and '.join(near)}"


def evaluation(config: EvalConfig | None, train: TrainConfig, data: DataConfig) -> list[Problem]:
    """What evaluations need and lack, and what asks for evaluations that there are not."""
    problems = []
    if config is not None and not data.validation_share:
        problems.append(Problem("data.validation_share", "must be > 0 where there is `eval`, got 0; such as 0.001"))
    if config is not None and config.sample_tokens >= data.seq_len:
        problems.append(Problem("eval.sample_tokens", f"must be < data.seq_len={data.seq_len}"))
    rule, known = train.stop_when, saturation.metrics(data.stream_names())
    if rule is not None and config is None:
        problems.append(Problem("train.stop_when", "needs evaluations; add `eval: {every_steps: 1000}`"))
    elif rule is not None and rule.metric not in known:
        problems.append(Problem("train.stop_when.metric", f"{did_you_mean(rule.metric, known)}, got {rule.metric}"))
    return problems


def health(config: HealthConfig, budgets: BudgetsConfig) -> list[Problem]:
    """What the policy for bad numbers needs and lacks."""
    if config.on_bad_numbers == "rewind" and not budgets.bad_numbers:
        return [Problem("budgets.bad_numbers", "must be >= 1 where health.on_bad_numbers is rewind, got 0")]
    return []
