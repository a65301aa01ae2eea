"""The training step beside what it could be: the original's one-hot products, dropless experts, a dense model, matmul.

    .venv/bin/python benchmarks/model_step.py [--shape cpu|8b-block|tiny] [--dtype float32|bfloat16|both] [--json FILE]

jax, flax and optax alone, without Ray, data and checkpoints, and without installing anything: a clone does. One
process, one device, random ids, the real optimizer. Printed for each variant: tokens/s in the median step; the
arithmetic it executes, as a share of the best matrix product of this very process (measured around each variant, since
machines have other things to do); the head's part of that arithmetic; seconds to compile. Below that, ours against the
one-hot step at each group size, beside the bound that counting floating-point operations gives.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

try:
    installed = importlib.util.find_spec("openmoe.model")
except ModuleNotFoundError:
    installed = None
if installed is None:  # a clone that was not installed: its folders are the package's
    package = types.ModuleType("openmoe")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["openmoe"] = package

from openmoe.model import moe, sharding, step
from openmoe.model.config import PRESETS, ModelConfig, OptimizerConfig

OPTIMIZER = OptimizerConfig()
PRODUCTS = 3  # of each forward product, two more in the backward pass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured."""

    config: ModelConfig
    rows: int
    seq_len: int
    group_sizes: tuple[int, ...]


SHAPES = {
    "cpu": Shape(
        config=replace(
            PRESETS["openmoe-nano"],
            d_model=256,
            d_ff=512,
            num_heads=4,
            head_dim=64,
            vocab_size=8192,
            text_vocab_size=8000,
        ),
        rows=8,
        seq_len=256,
        group_sizes=(256, 2048, 4096),
    ),
    "8b-block": Shape(
        config=replace(PRESETS["openmoe-8b"], num_layers=6, vocab_size=32_768, text_vocab_size=32_000),
        rows=8,
        seq_len=2048,
        group_sizes=(4096,),
    ),
    "tiny": Shape(
        config=replace(PRESETS["openmoe-nano"], num_layers=2, d_model=32, d_ff=32, head_dim=16, vocab_size=8576),
        rows=2,
        seq_len=64,
        group_sizes=(64, 128),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the step."""

    name: str
    config: ModelConfig
    rows: int
    seq_len: int
    one_hot: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a variant did."""

    name: str
    dtype: str
    tokens_per_s: float
    flops_per_token: float
    head_share: float
    flops_per_s: float
    peak_flops_per_s: float
    compile_s: float
    loss: float


def variants_of(shape: Shape, dtype: str) -> list[Variant]:
    base, found = replace(shape.config, dtype=dtype), []
    for size in shape.group_sizes:
        rows = max(shape.rows, size // shape.seq_len)
        grouped = replace(base, group_size=size)
        found.append(Variant(name=f"ours, groups of {size}", config=grouped, rows=rows, seq_len=shape.seq_len))
        one_hot = Variant(
            name=f"one-hot, groups of {size}", config=grouped, rows=rows, seq_len=shape.seq_len, one_hot=True
        )
        found.append(one_hot)
    group = replace(base, group_size=min(shape.rows * shape.seq_len, max(shape.group_sizes)))
    rest = {"rows": shape.rows, "seq_len": shape.seq_len}
    found.append(Variant(name="dropless", config=replace(group, dropless=True), **rest))
    found.append(Variant(name="dense, equal FLOPs", config=dense_equal(group), **rest))
    return found


def dense_equal(config: ModelConfig) -> ModelConfig:
    """The dense model whose feed-forward blocks execute as many FLOPs as all blocks and expert places of `config`."""
    blocks = config.num_layers + config.num_moe_layers * places_per_token(config)
    width = round(config.d_ff * blocks / config.num_layers / 8) * 8
    return replace(config, num_experts=0, moe_every=0, d_ff=width)


def places_per_token(config: ModelConfig) -> float:
    """Tokens that all experts of a layer compute, for each token there is: places are computed, taken or not."""
    if config.dropless:
        return config.top_k
    return config.num_experts * config.capacity(train=True) / config.group_size


def flops_per_token(variant: Variant) -> tuple[float, float]:
    """Floating-point operations really executed by one token's step, and those of the head among them.

    Attention's logits are all computed, the mask does not save any. The one-hot step multiplies [S, E C] masks with
    [S, d] tokens and [E C, d] answers: two products for the dispatch, whose mask has no gradient, three for the rest.
    """
    config, d_model = variant.config, variant.config.d_model
    inner, block = config.num_heads * config.head_dim, 4 * config.d_model * config.d_ff
    layer = 4 * d_model * inner + 2 * variant.seq_len * inner + block  # the dense or the extra block
    experts = block * places_per_token(config) + d_model * config.num_experts if config.num_experts else 0
    head = 2 * PRODUCTS * d_model * config.vocab_size
    total = 2 * PRODUCTS * (config.num_layers * layer + config.num_moe_layers * experts) + head
    if variant.one_hot:
        places = config.num_experts * config.capacity(train=True)
        total += config.num_moe_layers * 5 * 2 * places * d_model
    return total, head


def one_hot_dispatch(tokens: jax.Array, routed: moe.Routing) -> jax.Array:
    """`moe.dispatch` as the original does it."""
    num_experts, capacity = routed.choice.shape
    mask = jax.nn.one_hot(routed.place, num_experts * capacity, dtype=tokens.dtype).sum(axis=1)
    return jnp.einsum("sp,sd->pd", mask, tokens).reshape(num_experts, capacity, -1)


def one_hot_combine(answers: jax.Array, routed: moe.Routing) -> jax.Array:
    """`moe.combine` as the original does it."""
    num_experts, capacity, d_model = answers.shape
    weights = jnp.einsum("sk,skp->sp", routed.gate, jax.nn.one_hot(routed.place, num_experts * capacity))
    return weights @ answers.reshape(-1, d_model).astype(jnp.float32)


def measure(variant: Variant, num_steps: int) -> Measured:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    train_step = step.make_train_step(variant.config, OPTIMIZER, mesh)
    state = step.init_state(variant.config, OPTIMIZER, 0, mesh)
    batch = jax.device_put(batch_of(variant), sharding.batch_sharding(mesh))
    original = mock.patch.multiple(moe, dispatch=one_hot_dispatch, combine=one_hot_combine)
    start_s = time.perf_counter()
    if variant.one_hot:
        with original:
            compiled = train_step.lower(state, batch).compile()
    else:
        compiled = train_step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start_s

    peaks, step_s, loss = [matmul_flops_per_s(variant)], [], 0.0
    for number in range(num_steps + 1):
        start_s = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch))
        step_s.append(time.perf_counter() - start_s)
        if number == 0:
            loss = float(metrics["loss"])
    peaks.append(matmul_flops_per_s(variant))
    per_token, head = flops_per_token(variant)
    tokens_per_s = variant.tokens / statistics.median(step_s[1:])
    return Measured(
        name=variant.name,
        dtype=variant.config.dtype,
        tokens_per_s=tokens_per_s,
        flops_per_token=per_token,
        head_share=head / per_token,
        flops_per_s=per_token * tokens_per_s,
        peak_flops_per_s=max(peaks),
        compile_s=compile_s,
        loss=loss,
    )


def batch_of(variant: Variant) -> dict[str, np.ndarray]:
    shape = (1, variant.rows, variant.seq_len)
    ids = np.random.default_rng(0).integers(2, variant.config.text_vocab_size, shape).astype(np.int32)
    ones = np.ones_like(ids)
    inputs = np.roll(ids, 1, axis=-1)
    inputs[..., 0] = 0
    rest = {"segment_ids": ones, "positions": ones, "loss_weights": np.ones_like(ids, np.float32)}
    return {"input_ids": inputs, "target_ids": ids} | rest


def matmul_flops_per_s(variant: Variant) -> float:
    """What plain products of the model's shapes and type reach here at best."""
    config, best = variant.config, 0.0
    for inner, outer in ((config.d_model, 2 * config.d_ff), (config.d_ff, config.d_model), (config.d_model, 8192)):
        left = jnp.ones((variant.tokens, inner), config.dtype)
        right = jnp.ones((inner, outer), config.dtype)
        product = jax.jit(jnp.matmul).lower(left, right).compile()
        product(left, right).block_until_ready()
        flops = 2 * variant.tokens * inner * outer
        times = max(3, int(5e9 // flops) if jax.default_backend() == "cpu" else 20)
        for _ in range(3):
            start_s = time.perf_counter()
            for _ in range(times):
                result = product(left, right)
            result.block_until_ready()
            best = max(best, times * flops / (time.perf_counter() - start_s))
    return best


def report(shape: Shape, measured: list[Measured]) -> None:
    peaks = {m.dtype: max(x.peak_flops_per_s for x in measured if x.dtype == m.dtype) for m in measured}
    unit = 1e9 if jax.default_backend() == "cpu" else 1e12
    name = {1e9: "GFLOP/s", 1e12: "TFLOP/s"}[unit]
    print(f"\n{shape.rows} rows x {shape.seq_len}, one {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for dtype, peak in peaks.items():
        print(f"matmul peak in {dtype}: {peak / unit:,.1f} {name}")
    padded = shape.config.vocab_size - shape.config.text_vocab_size
    print(
        f"vocabulary: {shape.config.vocab_size} rows, {padded} of them no text ({padded / shape.config.vocab_size:.1%})"
    )
    print(f"\n{'variant':28} {'type':9} {'tokens/s':>9} {name:>9} {'of peak':>8} {'head':>6} {'compile':>8}")
    for m in measured:
        share = m.flops_per_s / m.peak_flops_per_s
        line = f"{m.name:28} {m.dtype:9} {m.tokens_per_s:9,.0f} {m.flops_per_s / unit:9,.1f} {share:8.0%}"
        print(f"{line} {m.head_share:6.0%} {m.compile_s:6.1f} s")
    by_name = {(m.name, m.dtype): m for m in measured}
    print("\nours over one-hot: measured, and the bound from FLOPs")
    for (kind, dtype), ours in by_name.items():
        theirs = by_name.get((kind.replace("ours", "one-hot"), dtype))
        if kind.startswith("ours") and theirs is not None:
            assert abs(ours.loss - theirs.loss) < 1e-5 * ours.loss, "not the same model"
            ratio = ours.tokens_per_s / theirs.tokens_per_s
            bound = theirs.flops_per_token / ours.flops_per_token
            print(f"  {kind:26} {dtype:9} {ratio:5.2f} of {bound:5.2f}: {ratio / bound:4.0%} of the bound")


def main() -> None:
    parser = argparse.ArgumentParser(description="Training step benchmark; the module's docstring says what it prints.")
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="names of variants that contain this")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    shape, measured = SHAPES[chosen.shape], []
    dtypes = ("float32", "bfloat16") if chosen.dtype == "both" else (chosen.dtype,)
    variants = [v for dtype in dtypes for v in variants_of(shape, dtype) if chosen.only in v.name]
    for number, variant in enumerate(variants, 1):
        print(f"{number} of {len(variants)}: {variant.name}, {variant.config.dtype}", file=sys.stderr, flush=True)
        measured.append(measure(variant, chosen.steps))
    report(shape, measured)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(m) for m in measured], indent=2))


if __name__ == "__main__":
    main()
