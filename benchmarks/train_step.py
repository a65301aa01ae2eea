"""Tokens per second of the jitted training step in one process, beside the arithmetic it needs and what matmul reaches.

    .venv/bin/python benchmarks/train_step.py [PRESET] [ROWS] [SEQ_LEN] [DEVICES]

Without Ray, data or checkpoints: random ids, `openmoe-nano` by default. The floor is the time in which a plain matrix
product of this process would do the step's floating-point operations; the ratio to it is what is left to gain.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import replace

STEPS = 10


def main(preset: str = "openmoe-nano", rows: str = "4", seq_len: str = "512", devices: str = "1") -> None:
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", devices)
    import jax
    import numpy as np

    from openmoe.model import counts, sharding, step
    from openmoe.model.config import PRESETS, OptimizerConfig

    shape = (1, int(rows), int(seq_len))
    tokens = shape[1] * shape[2]
    config = replace(PRESETS[preset], group_size=min(PRESETS[preset].group_size, tokens // jax.device_count()))
    mesh = sharding.make_mesh(data=1, expert=jax.device_count())
    ids = np.random.default_rng(0).integers(2, config.text_vocab_size, shape).astype(np.int32)
    batch = {
        "input_ids": np.roll(ids, 1, axis=-1),
        "target_ids": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.zeros_like(ids),
        "loss_weights": np.ones_like(ids, np.float32),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    optimizer = OptimizerConfig()
    state = step.init_state(config, optimizer, 0, mesh)
    train_step = step.make_train_step(config, optimizer, mesh)

    start_s = time.perf_counter()
    state, _ = jax.block_until_ready(train_step(state, batch))
    compile_s = time.perf_counter() - start_s
    step_s = []
    for _ in range(STEPS):
        start_s = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, batch))
        step_s.append(time.perf_counter() - start_s)

    median_s = statistics.median(step_s)
    needed = counts.flops_per_token(config, seq_len=shape[2]) * tokens
    peak = matmul_flops_per_s(config.d_model, tokens)
    print(f"{preset}: {rows} rows x {seq_len}, {jax.device_count()} {jax.devices()[0].device_kind} device(s)")
    print(f"  first step    {compile_s:8.2f} s, compilation included")
    print(f"  step          {median_s:8.3f} s median of {STEPS}, {tokens / median_s:,.0f} tokens/s")
    print(f"  floor         {needed / peak:8.3f} s: {needed / 1e9:.1f} GFLOP at {peak / 1e9:.0f} GFLOP/s of matmul")
    print(f"  ratio         {needed / peak / median_s:8.2f} of the matmul rate")


def matmul_flops_per_s(d_model: int, tokens: int) -> float:
    """Returns what float32 matmul reaches here on shapes like the model's: [tokens, d] x [d, 64 d]."""
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones((tokens, d_model)), jnp.ones((d_model, 64 * d_model))
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    start_s = time.perf_counter()
    for _ in range(STEPS):
        product(left, right).block_until_ready()
    return STEPS * 2 * tokens * d_model * 64 * d_model / (time.perf_counter() - start_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
