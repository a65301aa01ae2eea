"""An attempt: the driver builds the data, runs one incarnation after another, and judges how each one ended.

claim n -> worker group (worker_group.py) -> evidence -> diagnose -> decide -> claim n+1, or the end
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from types import FrameType
from typing import Any

from openmoe.clusters.provider import Instance
from openmoe.pipelines.config import DataError
from openmoe.platform.commands.progress import ProgressReport
from openmoe.platform.data import build_ahead
from openmoe.platform.run import attempt_log, ray_session, report, rewind, stragglers
from openmoe.platform.run.attempt_log import AttemptLog
from openmoe.platform.run.journal import DRIVER, Journal
from openmoe.platform.run.lineage import Claim, Incident
from openmoe.platform.run.report import RunReport
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run.verdict import (
    Decision,
    Evidence,
    Failure,
    Restart,
    Verdict,
    counting,
    decide,
    diagnose,
    same_end,
    spent,
)
from openmoe.platform.run_file import run_length, spec_paths, validate
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import cadence, init_source, memory_kills, stacks

LOOK_AT_PACES_S = 30.0


class Stopped(BaseException):
    """Somebody asked the driver to stop: Ctrl-C, or SIGTERM as `ray job stop` sends it."""


def train(
    spec: RunSpec,
    instances: Callable[[], Iterable[Instance]] = tuple,
    attempt: str = "",
    began_s: float | None = None,
) -> int:
    """Runs `spec` to its end: data, incarnations, summary.

    Args:
      spec: the run.
      instances: reads the provider's records of the machines; none where it keeps none.
      attempt: what whoever started this driver calls it; its records carry it.
      began_s: when its process began, Unix time, if it does nothing else.

    Returns:
      Exit code: 0 the run is finished, 1 it ended before, 2 its input is wrong.
    """
    run = RunDir(spec_paths.absolute(spec.run_dir))
    tokenizer = validate.check_tokenizer(spec)  # first: a run directory keeps the mathematics it was created with
    with ProgressReport() as show:
        init_source.check(spec, tokenizer, show.say)
        run.create(spec, **{init_source.TOKENIZER: tokenizer.sha256})
        spec = spec_paths.with_absolute_paths(spec)
        finished = run.finished()
        if finished and run_length.is_reached(spec.train, finished):
            show.say(f"{spec.name} is finished already ({finished['steps']} steps): {run.at('summary.html')}")
            more = run_length.longer(spec.train, finished["steps"], finished.get("epochs"))
            show.say(f"to train on: {more}, or another run_dir to start over")
            return 0
        if other := attempt_log.seems_alive(run):
            show.say(f"{other} trains this run, and ends when this one takes over; look: openmoe dashboard {run.path}")
        try:
            # The second time because Ray, when it starts, puts handlers of its own in their place.
            with (
                AttemptLog(run, attempt, began_s) as log,
                stops_raise(),
                ray_session.started(spec.cluster) as where,
                stops_raise(),
            ):
                show.say(f"Ray: {where}")
                exit_code, result = _train(spec, run, instances, show, log)
        except Stopped:
            show.say(f"stopped on request; the same command goes on from the last checkpoint in {run.path}")
            return 1
    if result is not None:
        print("\n".join([f"{spec.name} is finished", *result.lines(run.path)]))
    return exit_code


def _train(
    spec: RunSpec, run: RunDir, instances: Callable[[], Iterable[Instance]], show: ProgressReport, log: AttemptLog
) -> tuple[int, RunReport | None]:
    """Builds the data that training begins with, and the rest while it trains; returns exit code and result."""
    log.mark("build")
    write_sample_corpus(spec)
    newest = run.newest_accepted()
    manifest, known = build_ahead.build_first(spec, newest.step if newest else 0, show, show.say, run.incidents())
    attempt = Attempt(known, run, manifest.path, show, instances, log.name, log.mark)
    with build_ahead.BuildAhead(known, manifest, attempt.position_steps, show, show.say, attempt.incidents) as ahead:
        if not attempt.run(ahead.check):
            return attempt.exit_code, None
    result = report.finish(spec, run, manifest.path, attempt=log.name)
    log.outcome("finished")
    return 0, result


def write_sample_corpus(spec: RunSpec) -> None:
    """Writes the sample corpus if the run file wants one."""
    from openmoe.pipelines import stdlib_corpus

    if spec.sample_corpus:
        stdlib_corpus.write_corpus(spec.sample_corpus)


class Attempt:
    """The incarnations of one driver, each judged by its end."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunDir,
        manifest_path: str,
        show: ProgressReport,
        instances: Callable[[], Iterable[Instance]],
        name: str = "",
        mark: Callable[[str, int], None] = lambda phase, incarnation: None,
    ) -> None:
        self._spec, self._run, self._manifest_path, self._show = spec, run, manifest_path, show
        self._instances, self._name, self._mark = instances, name, mark
        self._step = self._rendered_groups = 0
        self._incidents = run.incidents()
        self._step_time_s = 0.0  # when that step ended
        self._restarts: tuple[Restart, ...] = ()  # that count
        self._last_end: tuple[str, int] | None = None
        self._next_board: Any = None
        self.exit_code = 0

    def position_steps(self) -> int:
        """Returns how many steps the run has done, as far as the driver has heard."""
        return self._step

    def incidents(self) -> list[Incident]:
        """Returns for what the run leaves rows out."""
        return self._incidents

    def run(self, check: Callable[[], None]) -> bool:
        """Runs incarnations until one finishes the run, or a verdict says stop: then `exit_code` says how.

        Args:
          check: called while workers train; raises what makes training on useless.

        Returns:
          Whether the run has all its steps.
        """
        from openmoe.platform.run import hosts, slice_watch

        slices = slice_watch.SliceWatch(self._show.say)
        while True:
            if self._spec.health.on_bad_numbers == "rewind":
                rewind.go_back(self._run, self._show.say)
            self._mark("capacity", 0)
            hosts.wait_for_slices(self._spec.cluster, self._show.say, slices.settled)
            claim = self._run.claim()
            self._mark("idle", claim.incarnation)
            journal = Journal(self._run.at("journal"), incarnation=claim.incarnation, process=DRIVER)
            self._step, self._rendered_groups = self._run.step_of(claim.resumes), 0
            self._incidents = self._run.incidents()
            steps = self._spec.train.total_steps
            self._show.say(f"incarnation {claim.incarnation} starts at step {self._step} of {steps}")
            self._show.say(f"mesh {self._spec.mesh} on {self._spec.cluster}")
            try:
                evidence = self._incarnate(claim, journal, partial(_look, check, slices.look, journal))
            except Stopped:
                self._judge(claim, journal, diagnose(Evidence(operator_stop=True)))
                raise
            except DataError as error:
                failure = Failure(rank=-1, kind="bad_input", text=str(error))
                self._judge(claim, journal, diagnose(Evidence(failures=(failure,))))
                raise
            self._mark("end", 0)
            if evidence is None:
                return True
            verdict = diagnose(evidence)
            decision = self._judge(claim, journal, verdict)
            if decision.action == "stop":
                self.exit_code = 2 if verdict.cause == "bad_input" else 1
                return False
            hosts.drain_broken_slices(evidence.hosts, self._show.say)

    def _incarnate(self, claim: Claim, journal: Journal, check: Callable[[], None]) -> Evidence | None:
        """Runs one incarnation to its end; None means that the run is finished.

        Ray Train waits in a thread of its own, so that a signal to the driver is answered at once.
        """
        from openmoe.platform.run import board as boards
        from openmoe.platform.run import frozen, hosts, worker_group
        from openmoe.platform.train import worker

        board, self._next_board = boards.living(self._next_board), None
        watch = hosts.Watch(self._spec.cluster.num_workers, self._instances)
        seen = cadence.seen_in(self._run.events())
        if self._spec.train.checkpoint_every_steps == "auto":
            self._show.say(f"saves {cadence.solve(seen, self._spec.cluster.expected_interruption_s)}")
        config = {
            "spec": self._spec.model_dump_json(),
            "claim": asdict(claim),
            "manifest": self._manifest_path,
            "board": board,
            "seen": seen,
        }
        name = f"{self._spec.name}-{claim.incarnation:06d}"
        ended: Future[Evidence | None] = Future()
        tell = partial(_tell, board)
        wait = threading.Thread(
            target=lambda: _settle(ended, worker_group.run_incarnation, worker.work, config, self._spec, name, tell),
            daemon=True,
        )
        wait.start()
        placements: dict[int, str] = {}
        paces = _Paces(journal, self._show.say)
        lives = frozen.Watch(self._spec.cluster.heartbeat_timeout_s, hosts.name, self._show.say)
        while wait.is_alive():
            wait.join(timeout=0.5)
            check()
            lives.go_on(boards.ask(board.pulses.remote(), {}))
            if paces.are_due():
                paces.look(boards.ask(board.paces.remote(), {}), hosts.names(placements))
            newest = boards.ask(board.take.remote(), None)
            self._show_newest(newest)
            if newest is not None and self._next_board is None:
                self._next_board = boards.start()  # now, not in a restart, which waits for every process that it starts
            if placements.keys() != watch.ranks:
                placements = boards.ask(board.placements.remote(), placements)
                if placements.keys() == watch.ranks:
                    journal.append({"event": "placed", "time_s": time.time(), "hosts": hosts.names(placements)})
                    journal.flush()
        evidence = ended.result()
        if evidence is None:
            return None
        placements = boards.ask(board.placements.remote(), placements)
        told = lives.failures() | boards.ask(board.failures.remote(), {})
        if dead := [f.rank for f in evidence.failures if f.kind == "process_died" and f.rank not in told]:
            before, after = (boards.ask(b.remote(), {}) for b in (board.memory_kills, board.memory_kills_here))
            after |= hosts.memory_kills(set(placements.values()) - after.keys())
            told |= memory_kills.named(dead, placements, before, after)
        return replace(evidence.with_told(told), hosts=watch.look(placements))

    def _show_newest(self, record: dict[str, Any] | None) -> None:
        if record is not None:
            self._step, self._step_time_s = record["step"], record.get("time_s", 0.0)
            if (rendered := record["rendered_groups"]) > self._rendered_groups:
                self._rendered_groups = rendered
                self._show.say(f"training got ahead of the build: {rendered} group(s) of rows rendered on read so far")
            tokens = self._spec.train.batch_rows * self._spec.data.seq_len
            detail = f"loss {record['loss']:.3f}  {tokens / max(record['step_s'], 1e-9):,.0f} tokens/s"
            self._show("train", record["step"], self._spec.train.total_steps, "steps", detail)

    def _judge(self, claim: Claim, journal: Journal, verdict: Verdict) -> Decision:
        """Decides what follows an incarnation, and journals why."""
        newest = self._run.newest_accepted()
        step, now_s = newest.step if newest else 0, time.time()
        self._restarts = counting(self._restarts, step, now_s)
        decision = decide(
            verdict,
            self._spec.budgets.model_dump(),
            spent(self._restarts),
            same_trace_without_progress=same_end(self._last_end, verdict.trace, step),
        )
        if verdict.trace:
            self._last_end = (verdict.trace, step)
        self._restarts += (Restart(verdict.cause, step, now_s),)
        self._show.say(f"incarnation {claim.incarnation} ended, {decision.action}: {decision.reason}")
        for sentence in verdict.evidence:
            self._show.say(f"  {sentence}")
        if decision.action == "stop" and verdict.trace and verdict.cause != "bad_input":
            self._show.say(verdict.trace)
        # Said first: it may be the disk that ends the run.
        if verdict.cause == "damaged_checkpoint":
            self._run.quarantine(claim.resumes, verdict.reason)
        record = {"event": "ended", "time_s": now_s, "step": self._step, "attempt": self._name}
        record["step_time_s"] = self._step_time_s
        if verdict.cause == "hang" and (found := stacks.kept(self._run, claim.incarnation)):
            record["stacks"] = found
            self._show.say(f"  where all threads stood: {', '.join(self._run.at(name) for name in found)}")
        journal.append({**record, **asdict(verdict), "decision": asdict(decision)})
        journal.flush()
        return decision


class _Paces:
    """Looks now and then for a worker that holds the others up; says so once, and again when it is another."""

    def __init__(self, journal: Journal, say: Callable[[str], None]) -> None:
        self._journal, self._say = journal, say
        self._looked_s, self._known = time.monotonic(), -1

    def are_due(self) -> bool:
        """Returns whether it is time to look."""
        return time.monotonic() - self._looked_s >= LOOK_AT_PACES_S

    def look(self, paces: dict[int, stragglers.Pace], names: list[str]) -> None:
        """Takes the newest pace of each rank, and the host of each."""
        self._looked_s = time.monotonic()
        found = stragglers.find(paces)
        rank = found.rank if found else -1
        if found and rank != self._known:
            host = names[rank] if rank < len(names) else "an unknown host"
            text = stragglers.words(found, host)
            self._say(text)
            facts = {"rank": rank, "host": host, "text": text, **found.pace._asdict(), "others_s": found.others_s}
            self._journal.append({"event": "straggler", "time_s": time.time(), **facts})
            self._journal.flush()
        self._known = rank


def _look(check: Callable[[], None], at_slices: Callable[[Journal], None], journal: Journal) -> None:
    check()
    at_slices(journal)


def _tell(board: Any, failure: Failure) -> None:
    board.fail.remote(failure)


def _settle(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)


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
