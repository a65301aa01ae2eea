"""An attempt: the driver builds the data, runs one incarnation after another, and judges how each one ended.

claim n -> worker group (worker_group.py) -> evidence -> diagnose -> decide -> claim n+1, or the end
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from openmoe.pipelines import storage
from openmoe.pipelines.manifest import Manifest
from openmoe.platform import ray_session, report, validate
from openmoe.platform.journal import Journal
from openmoe.platform.lineage import Claim
from openmoe.platform.progress import ProgressReport
from openmoe.platform.run_dir import RunDir
from openmoe.platform.spec import RunSpec
from openmoe.platform.verdict import Decision, Evidence, Verdict, decide, diagnose

DRIVER = 99_999  # the driver's process number in the journal; workers count from 0


class Stopped(BaseException):
    """Somebody asked the driver to stop: Ctrl-C, or SIGTERM as `ray job stop` sends it."""


def train(spec: RunSpec) -> int:
    """Runs `spec` to its end: data, incarnations, summary.

    Returns:
      Exit code: 0 the run is finished, 1 it ended before, 2 its input is wrong.
    """
    run = RunDir(_absolute(spec.run_dir))
    run.create(spec)
    spec = with_absolute_paths(spec)
    with ProgressReport() as show:
        finished = run.finished()
        if finished and finished["steps"] >= spec.train.steps:
            show.say(f"{spec.name} is finished already ({finished['steps']} steps): {run.at('summary.html')}")
            show.say(f"to train on: train.steps={2 * spec.train.steps}, or another run_dir to start over")
            return 0
        try:
            with stops_raise(), ray_session.started(spec.cluster) as where:
                show.say(f"Ray: {where}")
                manifest = build_data(spec, show)
                return Attempt(spec, run, manifest.path, show).run()
        except Stopped:
            show.say(f"stopped on request; the same command goes on from the last checkpoint in {run.path}")
            return 1


def build_data(spec: RunSpec, show: ProgressReport) -> Manifest:
    """Writes the sample corpus if the run file wants it, then the shards this run reads; what is there stays.

    Ray must be running.
    """
    from openmoe.pipelines import build, stdlib_corpus

    validate.check_tokenizer(spec)
    if spec.sample_corpus:
        stdlib_corpus.write_corpus(spec.sample_corpus)
    rows = spec.train.steps * spec.train.batch_rows
    return build.build(spec.data, spec.data_dir, min_rows=rows, report=show)


class Attempt:
    """The incarnations of one driver, each judged by its end."""

    def __init__(self, spec: RunSpec, run: RunDir, manifest_path: str, show: ProgressReport) -> None:
        self._spec, self._run, self._manifest_path, self._show = spec, run, manifest_path, show
        self._spent: Counter[str] = Counter()
        self._last_end: tuple[str, int] | None = None

    def run(self) -> int:
        """Runs incarnations until one finishes the run or a verdict says stop; returns the exit code."""
        while True:
            claim = self._run.claim()
            start = self._run.step_of(claim.resumes)
            self._show.say(f"incarnation {claim.incarnation} starts at step {start} of {self._spec.train.steps}")
            verdict = self._incarnate(claim)
            if verdict is None:
                result = report.finish(self._spec, self._run, self._manifest_path)
                print("\n".join([f"{self._spec.name} is finished", *result.lines(self._run.path)]))
                return 0
            decision = self._judge(claim, verdict)
            if decision.action == "stop":
                return 2 if verdict.cause == "bad_input" else 1

    def _incarnate(self, claim: Claim) -> Verdict | None:
        """Runs one incarnation to its end; None means that the run is finished.

        Ray Train waits in a thread of its own, so that a signal to the driver is answered at once.
        """
        import ray

        from openmoe.platform import worker, worker_group

        board = worker.start_board()
        config = {
            "spec": self._spec.model_dump_json(),
            "claim": asdict(claim),
            "manifest": self._manifest_path,
            "board": board,
        }
        name = f"{self._spec.name}-{claim.incarnation:06d}"
        ended: Future[Evidence | None] = Future()
        wait = threading.Thread(
            target=lambda: _settle(ended, worker_group.run_incarnation, worker.work, config, self._spec, name),
            daemon=True,
        )
        wait.start()
        while wait.is_alive():
            wait.join(timeout=0.5)
            self._show_newest(ray.get(board.take.remote()))
        evidence = ended.result()
        return None if evidence is None else diagnose(evidence)

    def _show_newest(self, record: dict[str, Any] | None) -> None:
        if record is not None:
            tokens = self._spec.train.batch_rows * self._spec.data.seq_len
            detail = f"loss {record['loss']:.3f}  {tokens / record['step_s']:,.0f} tokens/s"
            self._show("train", record["step"], self._spec.train.steps, "steps", detail)

    def _judge(self, claim: Claim, verdict: Verdict) -> Decision:
        """Decides what follows an incarnation, and journals why."""
        newest = self._run.newest_accepted()
        end = (verdict.trace, newest.step if newest else 0)
        decision = decide(
            verdict,
            self._spec.budgets.model_dump(),
            self._spent,
            same_trace_without_progress=bool(verdict.trace) and end == self._last_end,
        )
        self._last_end = end
        self._spent[verdict.cause] += 1
        if verdict.cause == "damaged_checkpoint":
            self._run.quarantine(claim.resumes, verdict.reason)
        journal = Journal(self._run.at("journal"), incarnation=claim.incarnation, process=DRIVER)
        journal.append({"event": "ended", "time_s": time.time(), **asdict(verdict), "decision": asdict(decision)})
        journal.flush()
        self._show.say(f"incarnation {claim.incarnation} ended, {decision.action}: {decision.reason}")
        if decision.action == "stop" and verdict.trace and verdict.cause != "bad_input":
            self._show.say(verdict.trace)
        return decision


def _settle(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)


def with_absolute_paths(spec: RunSpec) -> RunSpec:
    """Returns the spec with local paths made absolute: workers need not run in the driver's folder."""
    sources = tuple(
        replace(source, paths=tuple(_absolute(path) for path in source.paths)) for source in spec.data.sources
    )
    paths = {key: _absolute(getattr(spec, key)) for key in ("run_dir", "data_dir")}
    validate.check_tokenizer(spec)
    if spec.sample_corpus:
        paths["sample_corpus"] = _absolute(spec.sample_corpus)
    return spec.model_copy(update={**paths, "data": replace(spec.data, sources=sources)})


def _absolute(path: str) -> str:
    return path if storage.is_remote(path) else str(Path(path).absolute())


@contextlib.contextmanager
def stops_raise() -> Generator[None]:
    """Turns SIGTERM and SIGINT into `Stopped` in the main thread, as long as the block runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
