"""The training step beside what it could be: the original's one-hot products, dropless experts, dense models, matmul.

    .venv/bin/python benchmarks/model_step.py [--shape cpu|8b-block|tiny] [--dtype float32|bfloat16|both] [--json FILE]

jax, flax and optax alone, without Ray, data and checkpoints, and without installing anything: a clone does. One
process, one device, random ids, the real optimizer. All variants are compiled, then take turns, step by step, and so
does matmul: what else the machine does meets them all, and ratios are those of neighbouring steps.

Printed for each variant: tokens/s in the median step; the arithmetic it executes, as a share of the best matrix product
of this very process; on a CPU the same by CPU time, which other processes disturb less; the head's part of the
arithmetic; seconds to compile. Below that, ours against the others, beside the bound that counting floating-point
operations gives.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import clone  # noqa: F401

from openmoe.model import losses, moe, sharding, step
from openmoe.model.config import PRESETS, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig

OPTIMIZER = AdafactorConfig()
KINDS = ("ours", "one-hot", "dropless", "dense, equal FLOPs", "dense, same width", "head alone")
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
)
KEPT_MEMORY = {"GLIBC_TUNABLES": MALLOC}  # as the platform's CPU workers have it
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
        group_sizes=(64,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the step."""

    kind: str
    config: ModelConfig
    rows: int
    seq_len: int

    @property
    def name(self) -> str:
        in_groups = self.kind in ("ours", "one-hot")
        return f"{self.kind}, groups of {self.config.group_size}" if in_groups else self.kind

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of the same work again and again."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of all threads

    def measure(self, work: Callable[[], Any]) -> Any:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(work())
        self.wall_s.append(time.perf_counter() - wall_s)
        self.cpu_s.append(time.process_time() - cpu_s)
        return result


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a variant did."""

    name: str
    dtype: str
    tokens: int
    flops_per_token: float
    head_share: float
    compile_s: float
    loss: float
    times: Times

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token


def variants_of(shape: Shape, dtype: str) -> list[Variant]:
    base, rest = replace(shape.config, dtype=dtype), {"rows": shape.rows, "seq_len": shape.seq_len}
    found = []
    for size in shape.group_sizes:
        grouped = replace(base, group_size=size)
        rows = max(shape.rows, size // shape.seq_len)
        found += [Variant(kind=k, config=grouped, rows=rows, seq_len=shape.seq_len) for k in ("ours", "one-hot")]
    group = replace(base, group_size=min(shape.rows * shape.seq_len, max(shape.group_sizes)))
    found.append(Variant(kind="dropless", config=replace(group, dropless=True), **rest))
    found.append(Variant(kind="dense, equal FLOPs", config=dense(group, equal_flops=True), **rest))
    found.append(Variant(kind="dense, same width", config=dense(group, equal_flops=False), **rest))
    found.append(Variant(kind="head alone", config=replace(group, dtype="float32"), **rest))  # it is that in any model
    return found


def dense(config: ModelConfig, *, equal_flops: bool) -> ModelConfig:
    """The dense model of the same width, or that whose feed-forward blocks execute as many FLOPs as `config`'s."""
    blocks = config.num_layers
    if equal_flops:
        blocks += config.num_moe_layers * places_per_token(config)
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
    head = 2 * PRODUCTS * d_model * config.vocab_size
    if variant.kind == "head alone":
        return head, head
    inner, block = config.num_heads * config.head_dim, 4 * config.d_model * config.d_ff
    layer = 4 * d_model * inner + 2 * variant.seq_len * inner + block  # the dense or the extra block
    experts = block * places_per_token(config) + d_model * config.num_experts if config.num_experts else 0
    total = 2 * PRODUCTS * (config.num_layers * layer + config.num_moe_layers * experts) + head
    if variant.kind == "one-hot":
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


def compiled_step(variant: Variant, mesh: jax.sharding.Mesh) -> tuple[Any, Any, float]:
    """Returns the compiled step, its batch and the seconds that took."""
    batch = jax.device_put(batch_of(variant), sharding.batch_sharding(mesh))
    start_s = time.perf_counter()
    state = step.state_shapes(variant.config, OPTIMIZER, mesh)

    def lowered(train_step: Any) -> Any:
        return train_step.lower(state, batch)

    if variant.kind == "one-hot":
        dispatch = mock.Mock(wraps=one_hot_dispatch)
        with mock.patch.multiple(moe, dispatch=dispatch, combine=one_hot_combine):
            # Not through the cache of steps, whose key does not know of the patch.
            make_step = step.make_train_step.__wrapped__
            compiled = lowered(make_step(variant.config, OPTIMIZER, mesh)).compile()
        assert dispatch.called, "not the one-hot step"
    else:
        compiled = lowered(step.make_train_step(variant.config, OPTIMIZER, mesh)).compile()
    return compiled, batch, time.perf_counter() - start_s


def compiled_head(variant: Variant, mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...], float]:
    """Returns the compiled loss over the vocabulary with its gradients, its operands and the seconds that took."""
    config, batch, rng = variant.config, batch_of(variant), np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(variant.rows, variant.seq_len, config.d_model)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(config.d_model, config.vocab_size)), jnp.float32)
    operands = (hidden, head, batch["target_ids"][0], batch["loss_weights"][0])

    def loss(*operands: Any) -> Any:
        return losses.vocabulary_loss(*operands, z_loss_weight=config.z_loss_weight, mesh=mesh)[0]

    start_s = time.perf_counter()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*operands).compile()
    return compiled, operands, time.perf_counter() - start_s


def measure(variants: list[Variant], num_steps: int) -> tuple[list[Measured], dict[str, Peak]]:
    """Compiles all, checks where they start, and lets them take turns. Models of equal parameters share a state."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    works, measured, states = [], [], {}
    for number, variant in enumerate(variants, 1):
        print(f"{number} of {len(variants)}: {variant.name}, {variant.config.dtype}", file=sys.stderr, flush=True)
        of_head = variant.kind == "head alone"
        compiled, given, compile_s = (compiled_head if of_head else compiled_step)(variant, mesh)
        loss, per_token, head = 0.0, *flops_per_token(variant)
        if of_head:
            works.append((compiled, given, None))
            jax.block_until_ready(compiled(*given))
        else:
            key = replace(variant.config, group_size=1, dropless=False, dtype="float32")
            states.pop(key, None)  # there is room for one of a kind
            state = step.init_state(variant.config, OPTIMIZER, 0, mesh)
            states[key], metrics = jax.block_until_ready(compiled(state, given))
            loss = float(metrics["loss"])
            works.append((compiled, given, key))
        rest = {"tokens": variant.tokens, "flops_per_token": per_token, "head_share": head / per_token}
        found = Measured(
            name=variant.name, dtype=variant.config.dtype, compile_s=compile_s, loss=loss, times=Times(), **rest
        )
        measured.append(found)

    peaks: dict[str, Peak] = {v.config.dtype: Peak(v) for v in variants}
    for _ in range(num_steps):
        for peak in peaks.values():
            peak.measure()
        for (compiled, given, key), found in zip(works, measured, strict=True):
            if key is None:
                found.times.measure(functools.partial(compiled, *given))
            else:
                states[key], _ = found.times.measure(functools.partial(compiled, states[key], given))
    return measured, peaks


def batch_of(variant: Variant) -> dict[str, np.ndarray]:
    shape = (1, variant.rows, variant.seq_len)
    ids = np.random.default_rng(0).integers(2, variant.config.text_vocab_size, shape).astype(np.int32)
    ones = np.ones_like(ids)
    inputs = np.roll(ids, 1, axis=-1)
    inputs[..., 0] = 0
    rest = {"segment_ids": ones, "positions": ones, "loss_weights": np.ones_like(ids, np.float32)}
    return {"input_ids": inputs, "target_ids": ids} | rest


class Peak:
    """What plain products of the model's shapes and type reach here at best."""

    def __init__(self, variant: Variant) -> None:
        config, self.works, self.per_wall_s, self.per_cpu_s = variant.config, [], 0.0, 0.0
        for inner, outer in ((config.d_model, 2 * config.d_ff), (config.d_ff, config.d_model), (config.d_model, 8192)):
            keys = jax.random.split(jax.random.key(0))  # equal numbers take a GPU less power, hence less time
            shapes = (variant.tokens, inner), (inner, outer)
            operands = tuple(jax.random.normal(k, s, config.dtype) for k, s in zip(keys, shapes, strict=True))
            product = jax.jit(jnp.matmul).lower(*operands).compile()
            jax.block_until_ready(product(*operands))
            self.works.append((product, operands, 2 * variant.tokens * inner * outer))

    def measure(self) -> None:
        for product, operands, flops in self.works:
            times = max(3, int(5e9 // flops) if jax.default_backend() == "cpu" else 20)
            taken = Times()
            taken.measure(functools.partial(_again, times, product, operands))
            self.per_wall_s = max(self.per_wall_s, times * flops / taken.wall_s[0])
            self.per_cpu_s = max(self.per_cpu_s, times * flops / taken.cpu_s[0])


def _again(times: int, work: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    for _ in range(times):
        result = work(*operands)
    return result


def report(shape: Shape, measured: list[Measured], peaks: dict[str, Peak]) -> None:
    on_cpu = jax.default_backend() == "cpu"
    unit, name = (1e9, "GFLOP") if on_cpu else (1e12, "TFLOP")
    print(f"\n{shape.rows} rows x {shape.seq_len}, one {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if on_cpu:
        print(f"{os.cpu_count()} cores, GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}")
    for dtype, peak in peaks.items():
        by_cpu = f", {peak.per_cpu_s / unit:,.1f} {name} per CPU second" if on_cpu else ""
        print(f"matmul peak in {dtype}: {peak.per_wall_s / unit:,.1f} {name}/s{by_cpu}")
    size, padded = shape.config.vocab_size, shape.config.vocab_size - shape.config.text_vocab_size
    print(f"vocabulary: {size} rows, {padded} of them no text ({padded / size:.1%})\n")
    by_cpu = f" {'tokens/CPU s':>13} {'of peak':>8}" if on_cpu else ""
    print(
        f"{'variant':24} {'type':9} {'tokens/s':>9} {name + '/s':>9} {'of peak':>8}{by_cpu} {'head':>5} {'compile':>9}"
    )
    for m in measured:
        wall_s, cpu_s, peak = statistics.median(m.times.wall_s), statistics.median(m.times.cpu_s), peaks[m.dtype]
        line = f"{m.name:24} {m.dtype:9} {m.tokens / wall_s:9,.0f} {m.flops / wall_s / unit:9,.1f}"
        line += f" {m.flops / wall_s / peak.per_wall_s:8.0%}"
        if on_cpu:
            line += f" {m.tokens / cpu_s:13,.0f} {m.flops / cpu_s / peak.per_cpu_s:8.0%}"
        print(f"{line} {m.head_share:5.0%} {m.compile_s:7.1f} s")
    report_ratios(measured, on_cpu=on_cpu)


def report_ratios(measured: list[Measured], *, on_cpu: bool) -> None:
    by_name = {(m.name, m.dtype): m for m in measured}
    print(f"\nspeed of ours over that of others, by {'CPU' if on_cpu else 'wall'} time, and the bound from FLOPs")
    for (name, dtype), ours in by_name.items():
        others = (name.replace("ours", "one-hot"), "dropless", "dense, equal FLOPs", "dense, same width")
        for other in others if name.startswith("ours") else ():
            theirs = by_name.get((other, dtype))
            if theirs is None or theirs.tokens != ours.tokens:
                continue
            if other.startswith("one-hot"):
                assert abs(ours.loss - theirs.loss) < 1e-5 * ours.loss, "not the same model"
            pairs = [(m.times.cpu_s if on_cpu else m.times.wall_s) for m in (theirs, ours)]
            ratio = statistics.median(a / b for a, b in zip(*pairs, strict=True))
            bound = theirs.flops_per_token / ours.flops_per_token
            print(f"  {name} / {other:24} {dtype:9} {ratio:5.2f} of {bound:5.2f}: {ratio / bound:4.0%} of the bound")


def with_kept_memory() -> None:
    """Starts this command anew with what malloc reads before a process starts, unless it is set."""
    if sys.platform == "linux" and not KEPT_MEMORY.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEPT_MEMORY)


def main() -> None:
    with_kept_memory()
    parser = argparse.ArgumentParser(description="Training step benchmark; the module's docstring says what it prints.")
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=f"of {KINDS}")
    parser.add_argument(
        "--groups", type=int, nargs="+", metavar="TOKENS", help="sizes of routing groups, not the shape's"
    )
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    shape = SHAPES[chosen.shape]
    shape = replace(shape, group_sizes=tuple(chosen.groups or shape.group_sizes))
    dtypes = ("float32", "bfloat16") if chosen.dtype == "both" else (chosen.dtype,)
    found = [v for dtype in dtypes for v in variants_of(shape, dtype) if v.kind in chosen.only]
    variants = list(dict.fromkeys(found))  # one head is enough
    measured, peaks = measure(variants, chosen.steps)
    report(shape, measured, peaks)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(m) for m in measured], indent=2))


if __name__ == "__main__":
    main()
