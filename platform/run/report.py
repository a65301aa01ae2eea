"""What a run has to say at its end: a fold over the run directory, printed and kept."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from openmoe.pipelines.loader import Loader
from openmoe.platform.dashboard import summary
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import run_length
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import saturation

LAST_STEPS = 10
UNIGRAM_ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The result of a run.

    Attributes:
      steps: optimizer steps along the line of truth.
      epoch_rows: rows of pass 0 of all sources together; None where one of them was never needed.
      epochs: rows that were read, by epoch_rows.
      tokens: rows x row length consumed by them, padding included.
      loss: mean cross-entropy of the last 10 steps, nats per loss-carrying token, sentinels left out.
      unigram_entropy: of the same kind of tokens over the stream that was read, its first 20,000 rows, nats.
      tokens_per_s: of the median step.
      incarnations: worker groups that were started, restarts included.
      samples: [prompt, continuation] pairs from the final state.
      reason: "all steps", or "saturated" when the run's stop_when ended it.
      stop_when: the rule that ended it; None if none did.
      held_out: losses of the newest evaluation, by name, nats; {} without any.
      go_on: the setting that makes the run longer.
    """

    steps: int
    epoch_rows: int | None
    epochs: float | None
    tokens: int
    loss: float
    unigram_entropy: float
    tokens_per_s: float
    incarnations: int
    samples: list[list[str]]
    go_on: str
    reason: str = "all steps"
    stop_when: dict[str, Any] | None = None
    held_out: dict[str, float] = field(default_factory=dict)

    def lines(self, run: str) -> list[str]:
        """Returns the report for a terminal."""
        gain = self.unigram_entropy - self.loss
        than = "above" if gain >= 0 else "below"
        epochs = "" if self.epochs is None else f"{self.epochs:.2f} epochs, "
        samples = [f"  sample         {prompt!r} -> {text!r}" for prompt, text in self.samples]
        saturated = f", saturated ({_words(self.stop_when)})" if self.stop_when else ""
        held_out = (f"{name.removeprefix('loss/')} {loss:.3f}" for name, loss in self.held_out.items())
        evaluated = [f"  held out       {', '.join(held_out)}"] if self.held_out else []
        return [
            f"{self.steps:,} steps{saturated}, {self.tokens:,} tokens, {epochs}{self.incarnations} incarnation(s)",
            f"  final loss     {self.loss:.3f} nats: cross-entropy of the last {LAST_STEPS} steps, sentinels left out",
            f"  unigram        {self.unigram_entropy:.3f} nats: entropy of the same tokens, "
            f"{abs(gain):.3f} {than} the loss",
            *evaluated,
            f"  speed          {self.tokens_per_s:,.0f} tokens/s in the median step",
            *samples,
            f"  run directory  {run}",
            f"  look           {run}/summary.html",
            f"  go on          the same command with {self.go_on}",
        ]


def _words(rule: dict[str, Any]) -> str:
    return f"{rule['metric']} gained less than {rule['min_gain']:g} in {rule['patience']} evaluations"


def compute(spec: RunSpec, run: RunDir, manifest_path: str) -> RunReport:
    """Folds the run directory into its report; the run's length in `spec` as its owner gave it."""
    tokens_per_step = spec.train.batch_rows * spec.data.seq_len
    newest, step_s, losses = _of_steps(run)
    loader = Loader(manifest_path)
    epoch_rows, rows = loader.epoch_rows, newest["rows"][1]
    samples = [event["samples"] for event in run.events() if event["event"] == "sampled"]
    evaluations, rule = run.evaluations(), spec.train.stop_when
    is_saturated = rule is not None and saturation.saturated_at(rule, evaluations) is not None
    return RunReport(
        steps=newest["step"],
        epoch_rows=epoch_rows,
        epochs=rows / epoch_rows if epoch_rows else None,
        tokens=len(step_s) * tokens_per_step,
        loss=statistics.fmean(losses or [math.nan]),
        unigram_entropy=loader.unigram_entropy(0, min(rows, UNIGRAM_ROWS)),
        tokens_per_s=tokens_per_step / statistics.median(step_s),
        incarnations=len(run.claims()),
        samples=samples[-1] if samples else [],
        go_on="another train.stop_when, or train.stop_when=null" if is_saturated else run_length.longer(spec.train),
        reason="saturated" if is_saturated else "all steps",
        stop_when=rule.model_dump() if rule and is_saturated else None,
        held_out=evaluations[-1]["losses"] if evaluations else {},
    )


def _of_steps(run: RunDir) -> tuple[dict[str, Any], list[float], list[float]]:
    """Returns the newest step's record, the seconds of each step, and the last losses; not all records at a time."""
    newest: dict[str, Any] = {}
    step_s: list[float] = []
    losses: list[float] = []
    for record in run.newest_steps():
        newest = newest or record
        step_s.append(record["step_s"])
        if len(losses) < LAST_STEPS and not record.get("update_skipped"):
            losses.append(record["text_loss"])
    return newest, step_s, losses


def finish(spec: RunSpec, run: RunDir, manifest_path: str, attempt: str = "") -> RunReport:
    """Writes finished.json and summary.html, the end of a successful run, which `attempt` brought about."""
    result = compute(spec, run, manifest_path)
    summary.write(spec, run, result.lines(run.path), result.unigram_entropy)
    run.finish({"time_s": time.time(), "attempt": attempt, **asdict(result)})
    return result
