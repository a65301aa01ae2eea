"""What runs inside each Ray Train worker, and how its steps reach those who watch.

Steps go to the driver's board, for its progress bar, and to `ray.util.metrics`, which Prometheus and Ray's dashboard
read. Neither is waited for: the run directory is the record, these are the view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.util.metrics import Gauge

from openmoe.platform.run import frozen
from openmoe.platform.run.lineage import Claim
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run.stragglers import Pace
from openmoe.platform.run.verdict import Failure
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import memory_kills, stacks
from openmoe.platform.train.watchdog import Watchdog

TELL_TIMEOUT_S = 10.0


def work(config: dict[str, Any]) -> None:
    """Trains one incarnation on this worker.

    Args:
      config: "spec" (JSON of the RunSpec), "claim" (fields of the Claim), "manifest" (path), "board" (handle of a
        Board), "seen" (what the run has shown before).
    """
    import jax

    from openmoe.platform.run import worker_group
    from openmoe.platform.train import train_loop

    board, rank = config["board"], jax.process_index()
    node_id = ray.get_runtime_context().get_node_id()
    board.place.remote(rank, node_id, memory_kills.count())
    spec = RunSpec.model_validate_json(config["spec"])
    run, claim = RunDir(spec.run_dir), Claim(**config["claim"])
    gauges = StepGauges(spec, claim)

    def report(record: dict[str, Any]) -> None:
        board.put.remote({key: record[key] for key in ("step", "loss", "step_s", "time_s")})
        gauges.set(record)

    def tell_pace(pace: Pace) -> None:
        board.pace.remote(rank, pace)

    timeout_s, multiple, least_s = spec.cluster.step_timeout_s, spec.health.hang_multiple, spec.health.hang_least_s
    announced, rendered = worker_group.announced_end_s, board.rendered.remote
    keep = partial(stacks.keep, run, claim.incarnation, rank)
    with (
        frozen.telling(partial(board.lives.remote, rank, node_id)),
        watched(board, rank, timeout_s, keep, multiple=multiple, least_s=least_s) as watchdog,
    ):
        hooks = (report, watchdog.beat, rendered, config["seen"], announced, tell_pace)
        train_loop.train(spec, run, claim, config["manifest"], *hooks)


def warm(config: dict[str, Any]) -> None:
    """Compiles ahead what a run needs on this group.

    Args:
      config: "spec" (JSON of the RunSpec).
    """
    from openmoe.platform.train import compile_ahead

    compile_ahead.compile_ahead(RunSpec.model_validate_json(config["spec"]))


def watched(
    board: Any,
    rank: int,
    timeout_s: float,
    keep: Callable[[], None],
    *,
    multiple: float = math.inf,
    least_s: float = 0,
) -> Watchdog:
    """Returns the watchdog of this worker: before it ends the worker, the board hears where it was stuck.

    Then `keep` writes down where all threads stand.
    """

    def tell(stack: str) -> None:
        try:
            ray.get(board.fail.remote(Failure(rank=rank, kind="hung", text=stack)), timeout=TELL_TIMEOUT_S)
        finally:
            keep()

    return Watchdog(timeout_s, tell, multiple=multiple, least_s=least_s)


class StepGauges:
    """The figures of the newest step as Ray metrics, tagged with the run's name."""

    def __init__(self, spec: RunSpec, claim: Claim) -> None:
        self._tokens = spec.train.batch_rows * spec.data.seq_len
        self._total_steps, self._incarnation = spec.train.total_steps, claim.incarnation

        def gauge(name: str, description: str, *tags: str) -> Gauge:
            metric = Gauge(f"openmoe_{name}", description=description, tag_keys=("run", *tags))
            metric.set_default_tags({"run": spec.name})
            return metric

        self._step = gauge("step", "Optimizer steps completed")
        self._last_step = gauge("last_step", "Optimizer steps of the whole run")
        self._newest_incarnation = gauge("incarnation", "Worker group of the run that took the newest step")
        self._loss = gauge("loss", "Cross-entropy per loss-carrying token of the newest step, nats")
        self._grad_norm = gauge("grad_norm", "Norm of the newest step's gradients")
        self._tokens_per_s = gauge("tokens_per_s", "Tokens per second of the newest step, padding included")
        self._data_wait_s = gauge("data_wait_s", "Seconds that the newest step waited for its rows")
        self._drop_fraction = gauge("drop_fraction", "Share of expert choices that found their expert full")
        self._router_entropy = gauge(
            "router_entropy", "Entropy of a token's distribution over the experts, over an even one's", "layer"
        )
        self._expert_load = gauge(
            "expert_load", "Share of a layer's choices that asked for an expert", "layer", "expert"
        )

    def set(self, record: dict[str, Any]) -> None:
        """Takes over the record of a step."""
        self._step.set(record["step"])
        self._last_step.set(self._total_steps)
        self._newest_incarnation.set(self._incarnation)
        self._loss.set(record["loss"])
        self._grad_norm.set(record["grad_norm"])
        self._tokens_per_s.set(self._tokens / max(record["step_s"], 1e-9))
        self._data_wait_s.set(record["data_wait_s"])
        if "expert_load" not in record:
            return  # a dense model
        self._drop_fraction.set(record["drop_fraction"])
        for layer, entropy in enumerate(record["router_entropy"]):
            self._router_entropy.set(entropy, tags={"layer": str(layer)})
        for layer, load in enumerate(record["expert_load"]):
            for expert, share in enumerate(load):
                self._expert_load.set(share, tags={"layer": str(layer), "expert": str(expert)})
