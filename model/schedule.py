"""The learning rate of each step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from openmoe.model.optimizer_config import OptimizerConfig, ScheduleConfig


def learning_rate(config: OptimizerConfig) -> Callable[[Array], Array]:
    """Returns the rate as a function of the step, int32[] counted from 0."""
    peak, warmup, schedule = config.learning_rate, config.warmup_steps, config.schedule
    if schedule.name == "inverse_sqrt":
        return lambda step: peak * jax.lax.rsqrt(jnp.maximum(step, warmup).astype(jnp.float32))

    def rate(step: Array) -> Array:
        now = jnp.asarray(step, jnp.float32)
        risen = jnp.minimum(now / warmup, 1.0) if warmup else 1.0
        return peak * risen * _share_left(schedule, warmup, now)

    return rate


def _share_left(schedule: ScheduleConfig, warmup_steps: int, step: Array) -> Array:
    """Returns what is left of the largest rate, float32[] in [final_factor, 1]."""
    if schedule.end_steps is None:
        return jnp.float32(1)
    falling_steps = schedule.cooldown_steps or schedule.end_steps - warmup_steps
    gone = jnp.clip((step - (schedule.end_steps - falling_steps)) / max(falling_steps, 1), 0.0, 1.0)
    if schedule.name == "cosine":
        left = (1 + jnp.cos(jnp.pi * gone)) / 2
    else:
        left = 1 - (jnp.sqrt(gone) if schedule.cooldown == "one_minus_sqrt" else gone)
    return schedule.final_factor + (1 - schedule.final_factor) * left
