"""Runs an ablation in this process: variants, and of each its seeds, all over the same rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from openmoe.model import sharding, step
from openmoe.model.config import ModelConfig
from openmoe.pipelines import storage
from openmoe.platform.ablations import ablation, ablation_report
from openmoe.platform.ablations.ablation import BATCH_ROWS, OPTIMIZER, Outcome, Plan
from openmoe.platform.ablations.ablation_report import Section
from openmoe.platform.commands.progress import ProgressReport
from openmoe.platform.run_file.spec_errors import Problem, SpecError


class Rows(NamedTuple):
    """The rows of an ablation, each of which is read once by each run."""

    data_id: str
    batch: dict[str, np.ndarray]  # the batch keys, each [rows, seq]


class Trained(NamedTuple):
    """What a run of one variant and seed gave, step by step; without the first step's time, which compiles."""

    metrics: list[dict[str, np.ndarray]]
    seconds: float
    later_seconds: float  # from the first step's end to the last one's


def order_of(num_rows: int, judged_rows: int, seed: int) -> np.ndarray:
    """Returns a seed's order, int64[steps, BATCH_ROWS]; the rows that are judged come last for every seed."""
    rng, first = np.random.default_rng(seed), num_rows - judged_rows
    order = [rng.permutation(first), first + rng.permutation(judged_rows)]
    return np.concatenate(order).reshape(-1, BATCH_ROWS)


def load_outcomes(folder: str) -> dict[tuple[str, int], Outcome]:
    """Returns the finished runs whose files are in a folder, by variant and seed.

    Raises:
      SpecError: a file is none of ours.
    """
    found = {}
    for name in storage.list_files(folder):
        if name.endswith(".json"):
            path = storage.join(folder, name)
            try:
                outcome = Outcome(**json.loads(storage.read_bytes(path)))
            except (ValueError, TypeError) as error:
                raise SpecError([Problem("", f"no result of an ablation ({error}); remove it")], path) from error
            found[outcome.variant, outcome.seed] = outcome
    return found


def run(plan: Plan, folder: str, rows: Rows, show: ProgressReport) -> int:
    """Runs what has no outcome in a folder yet, writing one file each; returns how many that were."""
    done = load_outcomes(folder)
    left = ablation.still_to_run(plan, rows.data_id, done)
    if finished := len(plan.configs()) * plan.seeds - len(left):
        show.say(f"{finished} of {len(plan.configs()) * plan.seeds} runs are done already, in {folder}")
    ended = 0
    for name, config in plan.configs().items():
        seeds = [seed for variant, seed in left if variant == name]
        mesh = mesh_of(config)
        train_step = step.make_train_step(config, OPTIMIZER, mesh) if seeds else None  # compiled once for all seeds
        for seed in seeds:
            assert train_step is not None

            def told(steps: int, detail: str, before: int = ended * plan.tokens, name: str = f"{name}-{seed}") -> None:
                done_tokens, total = before + steps * ablation.STEP_TOKENS, len(left) * plan.tokens
                show("ablate", done_tokens, total, "tokens", f"{name}{detail}")

            trained = train(plan, config, mesh, train_step, rows, seed, told)
            outcome = outcome_of(plan, name, config, seed, rows.data_id, trained, mesh)
            path = storage.join(folder, f"{name}-{seed}.json")
            storage.write_durable(path, (json.dumps(asdict(outcome), indent=1) + "\n").encode())
            show.say(f"{name}-{seed}: loss {outcome.loss:.3f}, {outcome.tokens_per_s:,.0f} tokens/s")
            ended += 1
    return ended


def write_page(out: str, plan: Plan, data_id: str) -> list[Section]:
    """Writes the page `out`.md and its pictures from all results below `out`; returns what is in it."""
    sections = []
    for scale, base in (ablation.SCALES | {plan.scale: plan.base}).items():
        outcomes = list(load_outcomes(storage.join(out, scale)).values())
        wanted = (plan.tokens, data_id) if scale == plan.scale else None
        if chosen := ablation.comparable(outcomes, base, wanted):
            sections.append(Section(scale, base, chosen, ablation.summarize(chosen, base)))
    for section in sections:
        drawn = ablation_report.picture(section.summaries)
        storage.write_durable(storage.join(out, f"{section.scale}.svg"), drawn.encode())
    text = ablation_report.page(sections, out.rstrip("/").rpartition("/")[2])
    storage.write_durable(f"{out.rstrip('/')}.md", text.encode())
    return sections


def default_scale() -> str:
    """Returns the scale for the devices that are here."""
    return "100m" if jax.default_backend() in ("gpu", "tpu") else "small"


def mesh_of(config: ModelConfig) -> Mesh:
    """One device on CPU; of accelerators as many as the routing groups of a step divide over."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return sharding.make_mesh(devices=devices[:1])
    used = math.gcd(len(devices), ablation.STEP_TOKENS // config.group_size)
    return sharding.make_mesh(data=used, devices=devices[:used])


def train(
    plan: Plan,
    config: ModelConfig,
    mesh: Mesh,
    train_step: Callable[[step.TrainState, step.Batch], tuple[step.TrainState, step.Metrics]],
    rows: Rows,
    seed: int,
    told: Callable[[int, str], None],
) -> Trained:
    """Trains from a seed to the plan's last token.

    Args:
      plan: how long.
      config: of the variant.
      mesh: of the devices.
      train_step: of the variant, for this mesh.
      rows: all that are read.
      seed: of the parameters and of the order of rows.
      told: how many steps are done, and a word on the last one.
    """
    start_s = time.monotonic()
    state = step.init_state(config, OPTIMIZER, seed, mesh)
    metrics: list[dict[str, np.ndarray]] = []
    first_ended_s = start_s
    told(0, "")
    running: step.Metrics | None = None
    for batch in _batches(rows, order_of(plan.num_steps * BATCH_ROWS, plan.judged_steps * BATCH_ROWS, seed), mesh):
        state, started = train_step(state, batch)
        if running is not None:  # waits for the step before this one, which stays in flight
            metrics.append(jax.device_get(running))
            told(len(metrics), f": loss {metrics[-1]['loss']:.3f}")
            first_ended_s = first_ended_s if len(metrics) > 1 else time.monotonic()
        running = started
    metrics.append(jax.device_get(running))
    ended_s = time.monotonic()
    told(len(metrics), f": loss {metrics[-1]['loss']:.3f}")
    return Trained(metrics, ended_s - start_s, ended_s - first_ended_s)


def _batches(rows: Rows, order: np.ndarray, mesh: Mesh) -> Iterator[dict[str, Array]]:
    layout = sharding.batch_sharding(mesh)
    for chosen in order:
        yield jax.device_put({key: values[chosen][None] for key, values in rows.batch.items()}, layout)


def outcome_of(
    plan: Plan, name: str, config: ModelConfig, seed: int, data_id: str, trained: Trained, mesh: Mesh
) -> Outcome:
    """Sums up a run."""
    judged: list[dict[str, Any]] = trained.metrics[-plan.judged_steps :]

    def mean(key: str) -> float:
        return float(np.mean([metrics[key] for metrics in judged], dtype=np.float64))

    load = np.mean([metrics["expert_load"] for metrics in judged], axis=0)  # [MoE layers, E]
    device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return Outcome(
        variant=name,
        seed=seed,
        settings=ablation.settings_id(config, plan.tokens, data_id),
        tokens=plan.tokens,
        data_id=data_id,
        loss=mean("loss"),
        text_loss=mean("text_loss"),
        drop_fraction=mean("drop_fraction"),
        load_cv=float(np.mean(load.std(axis=-1) / load.mean(axis=-1))),
        tokens_per_s=(plan.num_steps - 1) * ablation.STEP_TOKENS / trained.later_seconds,
        seconds=trained.seconds,
        device=device,
    )
