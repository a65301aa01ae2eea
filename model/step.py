"""One training step: (state, batch) -> (state, metrics), and the state it starts from.

A batch is an array [microbatches, rows, seq] for each key. No randomness: the original trains without dropout and
jitter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from openmoe.model import checksum, losses, objective, optimizer, parameters, schedule, sharding, stacking, transformer
from openmoe.model.config import PLAIN, ExecutionConfig, ModelConfig
from openmoe.model.objective import Batch, Metrics
from openmoe.model.optimizer_config import OptimizerConfig
from openmoe.model.transformer import Transformer

KEPT = 8  # compiled functions of each kind: whoever trains the same again, as ablations and tests do, compiles it once


class TrainState(NamedTuple):
    """All that a run carries from step to step, besides its position in the data."""

    step: Array  # int32[], steps taken
    params: Any  # float32, named as in T5X checkpoints
    opt_state: Any  # optimizer.OptimizerState


def init_state(
    config: ModelConfig, optimizer_config: OptimizerConfig, seed: int, mesh: Mesh, execution: ExecutionConfig = PLAIN
) -> TrainState:
    """Draws the parameters where they will live; the same numbers on any mesh, stacked or not."""
    layout = _layout(config, optimizer_config, mesh)
    params = parameters.draw(declarations(config, mesh), layout.params, seed)
    state = fresh_state(config, optimizer_config, mesh, params)
    return arranged(config, optimizer_config, mesh, execution, state)


def fresh_state(config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, params: Any) -> TrainState:
    """Returns the plain state of step 0 with these parameters, which lie where they will live."""
    layout = _layout(config, optimizer_config, mesh)
    opt_state = _init_optimizer(config, optimizer_config, mesh)(params)
    return TrainState(jax.device_put(jnp.int32(0), layout.step), params, opt_state)


@functools.lru_cache(maxsize=KEPT)
def _init_optimizer(config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh) -> Callable[[Any], Any]:
    layout = _layout(config, optimizer_config, mesh).opt_state
    return jax.jit(transformation(config, optimizer_config, mesh).init, out_shardings=layout)


@functools.lru_cache(maxsize=KEPT)
def state_shapes(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, execution: ExecutionConfig = PLAIN
) -> TrainState:
    """Returns the state's shapes, types and shardings without its numbers, for restoring one."""
    declared = declarations(config, mesh)
    params, roles = nn.unbox(declared), parameters.roles_of(declared)
    if execution.scan_blocks:
        params = jax.eval_shape(functools.partial(stacking.stack, config), params)
        roles = stacking.stack_roles(config, roles)
    opt_state = jax.eval_shape(transformation(config, optimizer_config, mesh, execution).init, params)
    opt_roles = optimizer.state_roles(optimizer_config, roles, params)

    def on_mesh(shapes: Any, roles: Any) -> Any:
        layout = sharding.shardings(mesh, roles)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layout)

    count = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(on_mesh(count, PartitionSpec()), on_mesh(params, roles), on_mesh(opt_state, opt_roles))


def arranged(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, execution: ExecutionConfig, state: TrainState
) -> TrainState:
    """Returns the state as `make_train_step` wants it, a copy if checkpoints hold it in another form."""
    if not execution.scan_blocks:
        return state
    return _stack(config, optimizer_config, mesh, execution)(state)


@functools.lru_cache(maxsize=KEPT)
def _stack(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, execution: ExecutionConfig
) -> Callable[[TrainState], TrainState]:
    layout = _layout(config, optimizer_config, mesh, execution)
    return jax.jit(functools.partial(_over_blocks, functools.partial(stacking.stack, config)), out_shardings=layout)


def plain(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, execution: ExecutionConfig, state: TrainState
) -> TrainState:
    """Returns the state as checkpoints hold it; undoes `arranged`."""
    if not execution.scan_blocks:
        return state
    return _unstack(config, optimizer_config, mesh)(state)


@functools.lru_cache(maxsize=KEPT)
def _unstack(config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh) -> Callable[[TrainState], TrainState]:
    layout = _layout(config, optimizer_config, mesh)
    return jax.jit(functools.partial(_over_blocks, functools.partial(stacking.unstack, config)), out_shardings=layout)


def _over_blocks(change: Callable[[Any], Any], state: TrainState) -> TrainState:
    opt_state = state.opt_state._replace(moments=change(state.opt_state.moments))
    return TrainState(state.step, change(state.params), opt_state)


@functools.lru_cache(maxsize=KEPT)
def _layout(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, execution: ExecutionConfig = PLAIN
) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state_shapes(config, optimizer_config, mesh, execution))


@functools.cache
def declarations(config: ModelConfig, mesh: Mesh) -> Any:
    """Returns the parameters' tree with an abstract `parameters.Parameter` in place of arrays."""
    ids = jax.ShapeDtypeStruct((mesh.size, config.group_size), jnp.int32)  # any whole groups do
    one_block = replace(config, num_layers=config.block_layers)  # a restart waits for this trace
    init = Transformer(one_block, mesh, train=True).init
    return stacking.repeat(config, jax.eval_shape(init, jax.random.key(0), ids, ids, ids)["params"])


def transformation(
    config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh, execution: ExecutionConfig = PLAIN
) -> optax.GradientTransformation:
    """Returns the optimizer of the model's parameters, as `execution` arranges them."""
    roles = parameters.roles_of(declarations(config, mesh))
    treatments = optimizer.treatments_of(optimizer_config, roles)
    if execution.scan_blocks:
        roles, treatments = stacking.stack_roles(config, roles), stacking.stack(config, treatments, np.stack)
    return optimizer.make(optimizer_config, roles, treatments)


@functools.lru_cache(maxsize=KEPT)
def make_train_step(
    config: ModelConfig,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    execution: ExecutionConfig = PLAIN,
    *,
    skip_bad_numbers: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the compiled step, which consumes the state it is given.

    Rows of a microbatch must divide over the mesh's batch axes and the parts of it that are accumulated so that each
    device holds whole routing groups of each part.

    Args:
      config: of the model.
      optimizer_config: of the optimizer.
      mesh: over whose devices the state and the rows are divided.
      execution: how it is carried out.
      skip_bad_numbers: a step whose loss or gradients are not finite is counted and changes nothing else, and the
        metric `update_skipped` is 1.
    """
    transform = transformation(config, optimizer_config, mesh, execution)
    rate = schedule.learning_rate(optimizer_config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = objective.gradients(config, mesh, state.params, batch, execution)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        if config.router_bias_rate:
            params = balanced(config, params, metrics["expert_load"])
        metrics["grad_norm"] = jnp.asarray(optax.tree.norm(grads))
        metrics["learning_rate"] = jnp.asarray(rate(state.step))
        metrics["batch_checksum"] = checksum.batch_checksum(batch)
        if skip_bad_numbers:
            is_sound = jnp.isfinite(metrics["total_loss"]) & jnp.isfinite(metrics["grad_norm"])
            metrics["update_skipped"] = 1 - is_sound.astype(jnp.float32)
            choose = functools.partial(jnp.where, is_sound)
            params = jax.tree.map(choose, params, state.params)
            opt_state = jax.tree.map(choose, opt_state, state.opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    layout = _layout(config, optimizer_config, mesh, execution)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(layout, sharding.replicated(mesh)),
    )


class EvalSums(NamedTuple):
    """Sums over the loss-carrying positions of each row, kind by kind: float32[rows, kinds] each."""

    cross_entropy: Array
    tokens: Array  # positions
    text_cross_entropy: Array  # where the target is a piece of text, not a sentinel
    text_tokens: Array


def make_eval_step(
    config: ModelConfig,
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    execution: ExecutionConfig = PLAIN,
    *,
    num_kinds: int,
) -> Callable[[Any, Batch], EvalSums]:
    """Returns the compiled (parameters, batch) -> sums, with the capacity that experts have at evaluation.

    Its batch is one part of a microbatch, [1, rows, seq] for each key, and `kinds`, int32: which sum a position belongs
    to; one whose kind is not in [0, num_kinds) counts for nothing. The sums are the same on all devices.
    """

    def eval_step(params: Any, batch: Batch) -> EvalSums:
        rows = {key: values[0] for key, values in batch.items()}
        output = transformer.forward(config, mesh, params, rows, train=False, execution=execution)
        weights, targets, head = rows["loss_weights"], rows["target_ids"], transformer.head_of(params)
        _, per_token = losses.vocabulary_loss(output.hidden, head, targets, weights, z_loss_weight=0, mesh=mesh)
        is_of_kind = rows["kinds"][..., None] == jnp.arange(num_kinds)  # [rows, seq, kinds]

        def by_kind(values: Array) -> Array:
            return jnp.sum(jnp.where(is_of_kind, values[..., None], 0), axis=1)

        text_weights = weights * (targets < config.text_vocab_size)
        sums = (weights * per_token.cross_entropy, weights, text_weights * per_token.cross_entropy, text_weights)
        return EvalSums(*map(by_kind, sums))

    layout = _layout(config, optimizer_config, mesh, execution)
    return jax.jit(
        eval_step,
        in_shardings=(layout.params, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def balanced(config: ModelConfig, params: Any, load: Array) -> Any:
    """Moves the routers' biases by router_bias_rate towards equal load (arXiv:2408.15664, algorithm 1).

    Args:
      config: of the model.
      params: of the model, stacked or not.
      load: float32[MoE layers, E], share of the choices that asked for each expert.
    """
    moves = config.router_bias_rate * jnp.sign(1 / config.num_experts - load)
    blocks = params["decoder"].get("blocks")
    if blocks is not None:
        name = f"layers_{config.block_layers - 1}"
        moved = _with_moved_bias(blocks[name], moves)
        return {**params, "decoder": {**params["decoder"], "blocks": {**blocks, name: moved}}}
    names = [f"layers_{i}" for i in range(config.num_layers) if config.is_moe_layer(i)]
    moved = {name: _with_moved_bias(params["decoder"][name], move) for name, move in zip(names, moves, strict=True)}
    return {**params, "decoder": {**params["decoder"], **moved}}


def _with_moved_bias(layer: Any, move: Array) -> Any:
    router = layer["mlp"]["router"]
    return {**layer, "mlp": {**layer["mlp"], "router": {**router, "bias": router["bias"] + move}}}
