"""What the pages show, as plain values: pure folds over a followed run, the jobs, the schedules and the clusters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from openmoe.platform.dashboard import accounts, curves, incidents
from openmoe.platform.dashboard.accounts import Account
from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.dashboard.incidents import Incarnation, Period, Stage
from openmoe.platform.jobs import story
from openmoe.platform.jobs.story import Sentence
from openmoe.platform.run_file import spec_yaml
from openmoe.platform.train.cadence import Cadence

if TYPE_CHECKING:
    from openmoe.clusters.twin import ClusterStatus
    from openmoe.platform.jobs.cron import Schedule
    from openmoe.platform.jobs.job import Job

RunState = Literal["preparing", "starting", "training", "restarting", "silent", "stopped", "failed", "finished"]
# "silent": nothing says that it ended, and it shows no sign of life.
OVER: frozenset[RunState] = frozenset({"silent", "stopped", "failed", "finished"})

SILENT_AFTER_S = 120.0
SILENT_AFTER_STEPS = 20
RECENT_STEPS = 50
SPARK_POINTS = 80
MAX_SENTENCES = 400
MAX_EVALUATIONS = 400
COLUMNS = ("step", "time_s", "step_s", "text_loss", "drop_fraction", "router_entropy", "grad_norm")
# Events after which a run has a reason not to show a step.
WAITS = {"waits_for_data": "waits for data", "renders_data": "is ahead of its data and renders it"}
CURVES = ("text_loss", "tokens_per_s", "drop_fraction", "router_entropy", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Where a run is; None where it is not known.

    Attributes:
      steps: of the whole run, as it was last asked for.
      loss: of the newest step that counts, nats a loss-carrying token, sentinels left out.
      all_loss: the same with the sentinels.
      final_loss: mean of the last steps of a finished run.
      step_s: mean of the newest steps.
      left_s: until the last step at that pace, without interruptions.
      updated_s: when it last showed that it lives.
      cadence: how often the newest worker group saves, as the run file says or as it has solved that.
      period: what the last day came to; only for a run's own page.
      problem: why its files cannot be read on.
      read_all: False while an old history is still being read.
    """

    key: str
    name: str
    path: str
    state: RunState
    reason: str
    step: int = 0
    steps: int | None = None
    tokens_per_step: int | None = None
    loss: float | None = None
    all_loss: float | None = None
    final_loss: float | None = None
    unigram_entropy: float | None = None
    step_s: float | None = None
    left_s: float | None = None
    updated_s: float = 0.0
    created_s: float = 0.0
    incarnations: int = 0
    checkpoint_step: int | None = None
    checkpoint_s: float | None = None
    cadence: str = ""
    period: Period | None = None
    problem: str = ""
    read_all: bool = False


class Evaluation(NamedTuple):
    """Held-out losses after a step, nats, by name; None where one is not finite."""

    step: int
    time_s: float
    losses: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class History:
    """What changes seldom: what happened, and what the run is.

    Attributes:
      story: in words, oldest first; the newest MAX_SENTENCES of them.
      samples: (prompt, continuation) of the newest sampling.
      held_out: the newest MAX_EVALUATIONS evaluations that count, oldest first.
      spec: the resolved run file.
      account: where its time went; None before its first attempt.
      result: lines of the report of a finished run.
    """

    incarnations: tuple[Incarnation, ...]
    stages: tuple[Stage, ...]
    story: tuple[Sentence, ...]
    story_left_out: int
    samples: tuple[tuple[str, str], ...]
    held_out: tuple[Evaluation, ...]
    facts: tuple[tuple[str, str], ...]
    spec: str
    account: Account | None
    result: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job; `run` is the key of its run if that is known."""

    id: str
    name: str
    run: str | None
    run_dir: str
    state: str
    next: str | None
    attempt: int
    cluster: str
    cluster_lost: bool
    reason: str
    schedule: str | None
    submitted_s: float
    changed_s: float


@dataclass(frozen=True, kw_only=True)
class ScheduleView:
    """A run that starts by the clock; `problem` says why nobody knows when."""

    name: str
    run_name: str
    cron: str
    timezone: str
    paused: bool
    next_s: float | None
    last_result: str
    problem: str = ""


def figures(run: RunFollower, key: str, now_s: float, *, with_period: bool = False) -> Figures:
    """Returns where a run is at a Unix time."""
    state, reason = _state(run, now_s)
    finished = run.finished or {}
    view = Figures(
        key=key,
        name=str(run.record.get("name") or run.run.path.rstrip("/").rpartition("/")[2]),
        path=run.run.path,
        state=state,
        reason=reason,
        steps=_steps_wanted(run),
        tokens_per_step=run.tokens_per_step,
        unigram_entropy=_finite(finished.get("unigram_entropy")),
        final_loss=_finite(finished.get("loss")) if state == "finished" else None,
        updated_s=_last_sign(run),
        created_s=run.record.get("created_s", 0.0),
        incarnations=len(run.claims),
        checkpoint_step=run.checkpoint["step"] if run.checkpoint else None,
        checkpoint_s=run.checkpoint["time_s"] if run.checkpoint else None,
        cadence=_cadence(run),
        problem=run.problem,
        read_all=run.complete,
    )
    view = _with_newest_step(run, view)
    if not with_period:
        return view
    return replace(view, period=incidents.period(run, now_s, last_sign_s=view.updated_s, over=state in OVER))


def _with_newest_step(run: RunFollower, view: Figures) -> Figures:
    newest = run.newest()
    if newest is None:
        return view
    steps, last = run.steps[newest[0]], newest[1].stop - 1
    # The first step of a worker group contains its compilation.
    recent = steps.get("step_s", slice(min(max(last + 1 - RECENT_STEPS, 1), last), last + 1))
    step, step_s = int(steps.at("step", last)), float(recent.mean())
    wanted = max(view.steps, step) if view.steps else None
    return replace(
        view,
        step=step,
        steps=wanted,
        loss=_finite(steps.at("text_loss", last)),
        all_loss=_finite(steps.at("loss", last)),
        step_s=step_s,
        left_s=(wanted - step) * step_s if wanted and view.state == "training" else None,
    )


def _cadence(run: RunFollower) -> str:
    newest = run.claims[-1].incarnation if run.claims else 0
    events = [e for e in run.events[::-1] if e["incarnation"] == newest]
    if event := incidents.first(events, "cadence"):
        return str(Cadence(**{name: event[name] for name in Cadence._fields}))
    every = (incidents.first(events, "started") or {}).get("checkpoint_every_steps")
    return ("every step" if every == 1 else f"every {every:,} steps") if isinstance(every, int) else ""


def _state(run: RunFollower, now_s: float) -> tuple[RunState, str]:
    if incidents.is_finished(run):
        return "finished", ""
    if not run.claims:
        return "preparing", "no worker group has started yet: its data is being built, or the command has ended"
    newest = run.claims[-1].incarnation
    ended = incidents.first([e for e in run.events[::-1] if e["incarnation"] == newest], "ended")
    if ended:
        decision = ended.get("decision", {})
        if decision.get("action") == "retry":
            return "restarting", str(decision.get("reason", ""))
        return ("stopped" if ended.get("cause") == "operator" else "failed"), str(ended.get("reason", ""))
    steps = run.steps.get(newest)
    pace_s = float(np.median(steps.get("step_s", slice(-RECENT_STEPS, None)))) if steps else 0.0
    event = run.events[-1] if run.events else {}
    doing = WAITS.get(str(event.get("event"))) if not (steps and steps.at("time_s", -1) > event["time_s"]) else None
    waiting = f"{doing}: {event.get('missing')}" if doing else ""
    if now_s - _last_sign(run) > max(SILENT_AFTER_S, SILENT_AFTER_STEPS * pace_s):
        safe = run.checkpoint["step"] if run.checkpoint else 0
        before = f"{waiting}; since then " if waiting else ""
        return "silent", f"{before}no sign of life; the same command goes on from the checkpoint of step {safe:,}"
    return ("training" if steps else "starting"), waiting


def _last_sign(run: RunFollower) -> float:
    """When the run last showed that it lives, Unix time."""
    signs = [run.record.get("created_s", 0.0)]
    signs += [claim.time_s for claim in run.claims[-1:]]
    signs += [event["time_s"] for event in run.events[-1:]]
    signs += [steps.at("time_s", -1) for steps in run.steps.values()]
    return max(signs)


def _steps_wanted(run: RunFollower) -> int | None:
    """The newest start says how far the run is to go; run.json only how far it was to go at first."""
    if run.finished and incidents.is_finished(run):
        return run.finished.get("steps")
    started = next((e for e in reversed(run.events) if e["event"] == "started" and "steps" in e), {})
    return started.get("steps", run.record.get("spec", {}).get("train", {}).get("steps"))


def history(run: RunFollower, of_jobs: Iterable[Sentence] = (), result: Iterable[str] = ()) -> History:
    """Returns what happened in a run, and what it is.

    Args:
      run: as its files have it.
      of_jobs: what the controller has to tell about it.
      result: lines of its report.
    """
    sampled = next((event for event in reversed(run.events) if "samples" in event), {})
    records = story.RunRecords(
        claims=run.claims,
        starts=run.starts,
        events=run.events,
        reached={n: int(steps.at("step", -1)) for n, steps in run.steps.items()},
        finished=run.finished,
    )
    told = story.merged(story.of_run(records), of_jobs)
    return History(
        incarnations=tuple(incidents.incarnations(run)),
        stages=tuple(incidents.stages(run)),
        story=tuple(told[-MAX_SENTENCES:]),
        story_left_out=max(len(told) - MAX_SENTENCES, 0),
        samples=tuple((str(prompt), str(text)) for prompt, text in sampled.get("samples", ())),
        held_out=tuple(_held_out(run))[-MAX_EVALUATIONS:],
        facts=tuple(_facts(run)),
        spec=spec_yaml.dump(run.record["spec"]) if run.record else "",
        account=accounts.account(run),
        result=tuple(line.strip() for line in result),
    )


def _held_out(run: RunFollower) -> Iterable[Evaluation]:
    for event in run.events:
        if event["event"] == "evaluated" and event["step"] <= run.ends.get(event["incarnation"], math.inf):
            losses = {name: _finite(loss) for name, loss in event["losses"].items()}
            yield Evaluation(event["step"], event["time_s"], losses)


def _facts(run: RunFollower) -> Iterable[tuple[str, str]]:
    """Yields what the run is, and where its newest worker group runs."""
    yield "run directory", run.run.path
    yield "spec hash", str(run.record.get("spec_hash", ""))
    yield "tokens a step", f"{run.tokens_per_step or 0:,}"
    if started := incidents.first(run.events[::-1], "started"):
        yield "devices", f"{started.get('devices')} x {started.get('device')}, {started.get('processes')} processes"
        yield "mesh", " x ".join(f"{axis} {size}" for axis, size in started.get("mesh", {}).items())
        yield "software", f"jax {started.get('jax')}, jaxlib {started.get('jaxlib')}"
        yield "data id", str(started.get("data_id", ""))


def run_curves(run: RunFollower) -> dict[str, curves.Curves]:
    """Returns the curves of a run: "line" along the line of truth, "undone" beside it."""
    return {
        "line": curves.thin(_with_speed(run, run.line(*COLUMNS)), values=CURVES),
        "undone": curves.thin(run.undone(*COLUMNS), values=("text_loss",)),
    }


def newer_points(run: RunFollower, step: int) -> curves.Curves:
    """Returns the points of all steps after `step` that count."""
    return curves.thin(_with_speed(run, run.line(*COLUMNS, after_step=step)), values=CURVES)


def _with_speed(run: RunFollower, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return columns | {"tokens_per_s": (run.tokens_per_step or math.nan) / np.maximum(columns["step_s"], 1e-9)}


def expert_load(run: RunFollower, since_step: int = 0) -> dict[str, Any]:
    """Returns the columns of the expert load from the one of `since_step` on."""
    return {"width": run.load.width, "columns": run.load.columns(since_step)}


def sparkline(run: RunFollower) -> list[float | None]:
    """Returns the loss in at most SPARK_POINTS means."""
    loss = run.line("text_loss")["text_loss"]
    parts = np.array_split(loss, min(SPARK_POINTS, len(loss))) if len(loss) else []
    return [_finite(round(float(part.mean()), 4)) for part in parts]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def snapshot(
    run: RunFollower,
    key: str,
    now_s: float,
    jobs: Iterable[dict[str, Any]] = (),
    of_jobs: Iterable[Sentence] = (),
    result: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns all that a run's page shows, as JSON values; arguments as those of `figures` and `history`."""
    return {
        "figures": asdict(figures(run, key, now_s, with_period=True)),
        "history": asdict(history(run, of_jobs, result)),
        "jobs": list(jobs),
        "curves": run_curves(run),
        "load": expert_load(run),
    }


def job_view(job: Job, run_key: str | None) -> JobView:
    """Returns a job as it is shown; the run file and the cluster file stay behind."""
    return JobView(
        id=job.id,
        name=job.name,
        run=run_key,
        run_dir=job.run_dir,
        state=job.state,
        next=job.next,
        attempt=job.attempt,
        cluster=job.cluster,
        cluster_lost=job.cluster_lost,
        reason=job.reason,
        schedule=job.schedule,
        submitted_s=job.submitted_s,
        changed_s=job.changed_s,
    )


def schedule_view(schedule: Schedule, next_s: float | None, problem: str = "") -> ScheduleView:
    """Returns a schedule as it is shown."""
    return ScheduleView(
        name=schedule.name,
        run_name=schedule.run_name,
        cron=schedule.cron,
        timezone=schedule.timezone,
        paused=schedule.paused,
        next_s=None if schedule.paused else next_s,
        last_result=schedule.last_result,
        problem=problem,
    )


def cluster_view(status: ClusterStatus) -> dict[str, Any]:
    """Returns a cluster of this machine and its slices, without addresses and tokens."""
    slices = [{"name": s.name, "state": s.state, "hosts": len(s.hosts)} for s in status.slices]
    return {"name": status.name, "provider": status.provider, "head_alive": status.head_alive, "slices": slices}
