"""The run directory, local or gs://: the truth about what happened.

run.json                  the resolved spec and its hash, created once
incarnations/000001.json  created if absent: who may write, and which acceptance it goes on from
accepted/000001.json      created if absent: a checkpoint that counts
quarantined/000001.json   an acceptance whose checkpoint could not be restored, and why
incidents/000001.json     rows that the incarnations after this one leave out, and why
checkpoints/000001/<step> Orbax, a folder for each incarnation
journal/  metrics/        segments (journal.py)
attempts/                 segments: what drivers did around their worker groups (attempt_log.py)
ledger/                   segments: which rows each step consumed (ledger.py)
tensorboard/              the metrics as event files (event_files.py)
compile_cache/            compiled programs, unless cluster.compile_cache names another folder (compile_cache.py)
profiles/                 what was asked of a live run, and its answers (profiling.py)
stacks/                   where the threads of a worker stood that was stuck (stacks.py)
data/                     token cache, shards, manifest (unless data_dir says otherwise)
finished.json             the end of a successful run
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from openmoe.pipelines import storage
from openmoe.platform.run import journal, lineage
from openmoe.platform.run.lineage import Acceptance, Claim, Incident
from openmoe.platform.run_file import spec as spec_file
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError, problems_of

FORMAT = 1
DEFAULT_FOLDER = "openmoe-runs"  # of the shipped run files


class RunDirError(ValueError):
    """The run directory does not fit what was asked; the message says what to do."""


@dataclass(frozen=True)
class RunDir:
    """Paths and records of one run; holds no state but its address, and records that never change, once read."""

    path: str
    _read: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, *parts: str) -> str:
        """Returns the address of something inside."""
        return storage.join(self.path, *parts)

    def exists(self) -> bool:
        """Returns whether a run lives here."""
        return storage.exists(self.at("run.json"))

    def must_exist(self) -> None:
        """Raises RunDirError if no run lives here."""
        if not self.exists():
            # The name of a shipped run file may have been given instead of its run directory.
            named = storage.join(DEFAULT_FOLDER, self.path)
            hint = f"did you mean {named}?" if RunDir(named).exists() else "`openmoe runs` lists those of a folder"
            raise RunDirError(f"{self.path}: no run is here; {hint}")

    def create(self, spec: RunSpec, **facts: str) -> None:
        """Writes run.json, or checks that the one there is of the same mathematics and data.

        Args:
          spec: of the run.
          facts: about it, kept beside the spec.

        Raises:
          RunDirError: another run lives here, or something that is no run.
        """
        mathematics = spec_file.mathematics(spec)
        record = {
            "format": FORMAT,
            "name": spec.name,
            "spec_hash": spec_file.spec_hash(spec),
            "mathematics": mathematics,
            "spec": spec.model_dump(mode="json"),
            "created_s": time.time(),
            **facts,
        }
        if storage.create_if_absent(self.at("run.json"), _encode(record)):
            return
        there = self.record()
        if there["spec_hash"] != record["spec_hash"]:
            changed = "; ".join(differences(there["mathematics"], mathematics))
            raise RunDirError(
                f"run_dir: {self.path} belongs to another run ({changed}); "
                "choose another run_dir, or restore those settings to go on with it"
            )

    def record(self) -> dict[str, Any]:
        """Returns run.json: format, name, spec, spec_hash, mathematics, created_s.

        Raises:
          RunDirError: it is of something else than a run, or of a format unknown here.
        """
        there = self.read_json("run.json")
        if there.get("format", FORMAT) != FORMAT:
            raise RunDirError(f"{self.at('run.json')}: not of format {FORMAT}, which this version reads")
        if lacking := [key for key in ("name", "spec", "spec_hash", "mathematics", "created_s") if key not in there]:
            raise RunDirError(
                f"{self.at('run.json')}: not that of a run, it has no `{lacking[0]}`; choose another run_dir"
            )
        return there

    def spec(self) -> RunSpec:
        """Returns the run file that the run was created with.

        Raises:
          RunDirError: no run is here.
          SpecError: this version cannot read it.
        """
        self.must_exist()
        try:
            return RunSpec.model_validate_json(json.dumps(self.record()["spec"]))
        except ValidationError as error:
            problems = problems_of(error, spec_file.json_schema())
            problems.append(Problem("", "another version of openmoe created the run, which alone can go on with it"))
            raise SpecError(problems, self.at("run.json")) from error

    def read_json(self, *parts: str) -> dict[str, Any]:
        """Returns a JSON object kept inside."""
        path = self.at(*parts)
        return _decode(path, storage.read_bytes(path))

    def _records(self, folder: str) -> list[dict[str, Any]]:
        """Returns the records of a folder in the order of their numbers; after months there are thousands.

        They are created and never changed, so those that were read before are not read again.
        """
        names = [name for name in storage.list_files(self.at(folder)) if re.fullmatch(r"\d{6}\.json", name)]
        paths = [self.at(folder, name) for name in names]
        new = [path for path in paths if path not in self._read]
        for path, data in zip(new, storage.read_all(new), strict=True):
            if data is not None:  # else it has been removed, as a quarantine may be
                self._read[path] = _decode(path, data)
        return [self._read[path] for path in paths if path in self._read]

    def _create(self, record: dict[str, Any], *parts: str) -> bool:
        """Creates a record that no other process would write so; returns False when the name is another's."""
        path, data = self.at(*parts), _encode(record)
        return storage.create_if_absent(path, data) or storage.read_bytes(path) == data

    def claims(self) -> list[Claim]:
        """Returns all claims, oldest first."""
        return [Claim(**record) for record in self._records("incarnations")]

    def acceptances(self) -> list[Acceptance]:
        """Returns all acceptances ever written, those that do not count included."""
        return [Acceptance(**record) for record in self._records("accepted")]

    def quarantined(self) -> dict[int, str]:
        """Returns the numbers of the acceptances that must not be restored, and why."""
        return self.tainted() | {record["number"]: record["reason"] for record in self._records("quarantined")}

    def tainted(self) -> dict[int, str]:
        """Returns those of them that are whole, and were trained on rows that are left out."""
        incidents = self.incidents()
        return lineage.tainted(self.acceptances() if incidents else (), incidents)

    def stored_checkpoints(self) -> list[str]:
        """Returns the folders that lie below checkpoints/, finished or not, relative to the run directory."""
        incarnations = [name for name in storage.list_folders(self.at("checkpoints")) if name.isdigit()]
        return [
            f"checkpoints/{n}/{name}" for n in incarnations for name in storage.list_folders(self.at("checkpoints", n))
        ]

    def incidents(self) -> list[Incident]:
        """Returns the rows that are left out, in the order of the incarnations that met them."""
        return [lineage.incident(record) for record in self._records("incidents")]

    def add_incident(self, incident: Incident) -> None:
        """Has all later incarnations leave out rows, and go on from a checkpoint that was not trained on them."""
        storage.create_if_absent(self.at("incidents", f"{incident.incarnation:06d}.json"), _encode(asdict(incident)))

    def newest_accepted(self) -> Acceptance | None:
        """Returns the acceptance a new incarnation goes on from; None means from scratch.

        Whether the newest can be restored is seen then. Of those before one that was barred, most have been removed.
        """
        quarantined = self.quarantined()
        valid = lineage.valid_acceptances(self.claims(), self.acceptances(), quarantined)
        if valid and valid[-1].number < max(quarantined, default=0):
            stored = set(self.stored_checkpoints())
            valid = [a for a in valid if a.checkpoint in stored]
        return valid[-1] if valid else None

    def step_of(self, number: int) -> int:
        """Returns the step at which acceptance `number` stands; 0 is the start."""
        return next((a.step for a in self.acceptances() if a.number == number), 0)

    def claim(self) -> Claim:
        """Claims the next incarnation, which ends the acceptances of all earlier ones.

        Raises:
          RunDirError: another driver claimed the same number at the same time; or there is nothing to go on from, and
            the run has come too far to be started over by itself.
        """
        resumes = self.newest_accepted()
        if resumes is None and (lost := lineage.valid_acceptances(self.claims(), self.acceptances(), self.tainted())):
            raise RunDirError(self._nothing_left(lost[-1]))
        number = max((c.incarnation for c in self.claims()), default=0) + 1
        claim = Claim(incarnation=number, resumes=resumes.number if resumes else 0, time_s=time.time())
        if not self._create(asdict(claim), "incarnations", f"{number:06d}.json"):
            raise RunDirError(
                f"run_dir: {self.path} has just been claimed by another driver (incarnation {number}); "
                "one driver a run directory: stop the other, or choose another run_dir"
            )
        return claim

    def _nothing_left(self, newest: Acceptance) -> str:
        reason, number = self.quarantined().get(newest.number, "removed"), newest.number
        return (
            f"run_dir: {self.path}: no checkpoint is left that can be restored (acceptance {number}, step "
            f"{newest.step:,}: {reason}); if it is whole after all, remove quarantined/{number:06d}.json; to start "
            "over, choose another run_dir"
        )

    def accept(self, acceptance: Acceptance) -> Acceptance:
        """Writes the acceptance under the first free number from its own on; returns it as written."""
        while True:
            if self._create(acceptance.to_json(), "accepted", f"{acceptance.number:06d}.json"):
                return acceptance
            acceptance = replace(acceptance, number=acceptance.number + 1)

    def quarantine(self, number: int, reason: str) -> None:
        """Bars an acceptance from being restored ever again."""
        record = {"number": number, "reason": reason, "time_s": time.time()}
        storage.create_if_absent(self.at("quarantined", f"{number:06d}.json"), _encode(record))

    def trace(self) -> list[dict[str, Any]]:
        """Returns the metric record of every step along the line of truth, in step order."""
        records: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for incarnation, _, record in journal.read(self.at("metrics")):
            records[incarnation].append(record)
        return [dict(r) for r in lineage.trace(self.claims(), self.acceptances(), records)]

    def starts(self) -> dict[int, int]:
        """Returns the step at which each incarnation starts, by its number."""
        step_of = {0: 0} | {a.number: a.step for a in self.acceptances()}
        return {claim.incarnation: step_of.get(claim.resumes, 0) for claim in self.claims()}

    def newest_steps(self) -> Iterator[dict[str, Any]]:
        """Yields what `trace` returns from its end on, and reads no more than it is asked for: runs last for months."""
        ends = lineage.ends(self.claims(), self.starts())
        for incarnation, _, record in journal.newest_first(self.at("metrics")):
            if record["step"] <= ends.get(incarnation, -1):
                yield record

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the record of every evaluation along the line of truth, in step order."""
        records: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for incarnation, _, record in journal.read(self.at("journal")):
            if record["event"] == "evaluated":
                records[incarnation].append(record)
        return [dict(r) for r in lineage.trace(self.claims(), self.acceptances(), records)]

    def events(self) -> list[dict[str, Any]]:
        """Returns the journal's records, each with its incarnation and process, in time order."""
        events = [{"incarnation": n, "process": p, **r} for n, p, r in journal.read(self.at("journal"))]
        return sorted(events, key=lambda event: event["time_s"])

    def finished(self) -> dict[str, Any] | None:
        """Returns what finished.json says, or None while the run is not finished."""
        return self.read_json("finished.json") if storage.exists(self.at("finished.json")) else None

    def finish(self, record: dict[str, Any]) -> None:
        """Marks the run as finished."""
        storage.write_durable(self.at("finished.json"), _encode(record))


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def _decode(path: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except json.JSONDecodeError as error:
        raise RunDirError(f"{path}: not readable as JSON ({error}); the run directory is damaged") from error
    if not isinstance(found, dict):
        raise RunDirError(f"{path}: holds {type(found).__name__}, not an object; the run directory is damaged")
    return found


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns dotted paths whose values differ, as "a.b: 1 there, 2 here"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {json.dumps(old)} there, {json.dumps(new)} here"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One line of `openmoe runs`; `steps` is None of a run in epochs that has not started.

    Of a damaged one `problem` says what is wrong, and the rest says nothing.
    """

    name: str
    path: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    updated_s: float
    problem: str = ""


def list_runs(folder: str) -> list[RunSummary]:
    """Returns the runs found directly in `folder`, oldest first, or the one whose run directory it is."""
    if (run := RunDir(folder)).exists():
        return [_summary(folder, run)]
    found = ((name, RunDir(storage.join(folder, name))) for name in storage.list_folders(folder))
    return sorted((_summary(name, run) for name, run in found if run.exists()), key=lambda run: run.updated_s)


def _summary(name: str, run: RunDir) -> RunSummary:
    try:
        return summarize(run)
    except (RunDirError, journal.JournalError) as error:
        broken = {"name": name, "path": run.path, "state": "damaged", "problem": str(error)}
        return RunSummary(**broken, step=0, steps=None, loss=None, updated_s=0.0)


def summarize(run: RunDir) -> RunSummary:
    """Returns the state of one run, from its files alone."""
    record = run.record()
    last, finished = next(run.newest_steps(), {}), run.finished()
    planned = [event["steps"] for event in run.events() if event["event"] == "started" and "steps" in event]
    return RunSummary(
        name=record["name"],
        path=run.path,
        state="finished" if finished else "resumable" if last else "started",
        step=last.get("step", 0),
        steps=planned[-1] if planned else record["spec"]["train"]["steps"],
        loss=last.get("loss"),
        updated_s=last.get("time_s", record["created_s"]),
    )
