"""Executes recorded steps again, and compares bits: the cheap check for silent corruption.

A step is a pure function of the state, its rows and how it is carried out. So from the checkpoint before it every
metric must come out as it was recorded, to the last bit, and so must the state at the next checkpoint. Where jaxlib,
the devices or the number of processes are others than then, losses are compared within a tolerance instead.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from openmoe.platform.run import journal, lineage
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file.spec import RunSpec

TOLERANCE = 1e-3  # relative, of losses; between numbers of processes they agree to 1e-4 (docs/resize.md)
TOLERANT_METRICS = ("loss", "text_loss", "z_loss", "total_loss")
_FINGERPRINT = ("jax", "jaxlib", "device", "processes", "devices", "xla_flags")


class Recorded(NamedTuple):
    """A step of the line, as it is on record."""

    incarnation: int
    metrics: Mapping[str, Any]
    checksum: list[int] | None  # in the ledger; None if it has no entry


class Difference(NamedTuple):
    """The first thing that came out otherwise."""

    step: int
    incarnation: int
    what: str
    recorded: Any
    computed: Any

    def __str__(self) -> str:
        where = f"step {self.step} of incarnation {self.incarnation}"
        return f"{where}: {self.what}: recorded {self.recorded}, computed {self.computed}"


class Replayed(NamedTuple):
    """What a replay found.

    Attributes:
      start: step of the checkpoint that it began with; 0: from scratch.
      step: the last one that was executed.
      changed: what is different from then, so that bits need not be equal.
      metrics: names of those that were compared at each step.
      acceptance: number of the acceptance whose digest the final state has; None if none was compared.
      difference: None if all is equal.
    """

    start: int
    step: int
    changed: list[str]
    metrics: list[str]
    acceptance: int | None
    difference: Difference | None

    @property
    def compared(self) -> str:
        """What of each step: every bit, if it is carried out as it was then."""
        return f"rows, and losses within {TOLERANCE:g}" if self.changed else "bits"


def recorded_steps(run: RunDir) -> dict[int, Recorded]:
    """Returns all steps along the line that leads to the newest incarnation, those not accepted yet included."""
    records: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for n, _, record in journal.read(run.at("metrics")):
        records[n].append({**record, "incarnation": n})
    entries = ((n, entry) for n, _, entry in journal.read(run.at("ledger")))
    checksums = {(n, entry["step"]): entry["checksum"] for n, entry in entries if "checksum" in entry}
    line = [dict(record) for record in lineage.trace(run.claims(), run.acceptances(), records) if "rows" in record]
    found = {}
    for record in line:
        n = record.pop("incarnation")
        found[record["step"]] = Recorded(n, record, checksums.get((n, record["step"])))
    return found


def circumstances(run: RunDir) -> dict[int, dict[str, Any]]:
    """Returns, by incarnation, how its steps were carried out: mesh, execution, versions, devices, data."""
    return {
        event["incarnation"]: event for event in run.events() if event["event"] == "started" and event["process"] == 0
    }


def start_of(run: RunDir, step_number: int) -> Acceptance | None:
    """Returns the newest checkpoint on the line before a step that is there; None: from scratch."""
    valid = lineage.valid_acceptances(run.claims(), run.acceptances(), run.quarantined())
    stored = set(run.stored_checkpoints())
    return next((a for a in reversed(valid) if a.step < step_number and a.checkpoint in stored), None)


def difference(computed: Mapping[str, Any], recorded: Recorded, *, exact: bool) -> tuple[str, Any, Any] | None:
    """Returns (name, recorded, computed) of the first figure of a step that came out otherwise; pure.

    The rows' checksum does not depend on how a step is carried out; of the rest only losses are compared if not exact.
    """
    checksum = computed["batch_checksum"]
    if recorded.checksum is not None and recorded.checksum != checksum:
        return "checksum of its rows in the ledger", recorded.checksum, checksum
    for name in compared_metrics(computed, recorded.metrics, exact=exact):
        ours, theirs = computed[name], recorded.metrics[name]
        if exact or name == "batch_checksum":
            same = json.dumps(ours) == json.dumps(theirs)  # as it is kept: every bit, and NaN is NaN
        else:
            same = math.isclose(ours, theirs, rel_tol=TOLERANCE)
        if not same:
            return name, theirs, ours
    return None


def compared_metrics(computed: Mapping[str, Any], recorded: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Returns the metrics that both have and that can be compared, the rows' checksum and the losses first."""
    names = [name for name in ("batch_checksum", *TOLERANT_METRICS, *sorted(computed)) if name in computed]
    names = [name for name in dict.fromkeys(names) if name in recorded]
    return names if exact else [name for name in names if name in ("batch_checksum", *TOLERANT_METRICS)]


def replay(
    run: RunDir,
    spec: RunSpec,
    step_number: int,
    *,
    data_dir: str | None = None,
    start: Acceptance | None = None,
    report: Callable[[int, int], None] = lambda *progress: None,
) -> Replayed:
    """Executes the steps from the checkpoint before it up to `step_number`, and compares each with its record.

    Args:
      run: live or finished; nothing in it is changed.
      spec: of the run.
      step_number: the last step to execute.
      data_dir: where the data is now; None: as in the run file.
      start: the checkpoint to begin with; None: the newest one before the step.
      report: told after each step how many of how many are done.

    Raises:
      RunDirError: the step is not on record.
      DataError: the rows are not there.
      DamagedCheckpoint: the checkpoint to start from.
    """
    import jax

    from openmoe.model import checkpoint, step
    from openmoe.pipelines.loader import Loader
    from openmoe.platform.run import ledger_data
    from openmoe.platform.train import train_loop

    steps, how = recorded_steps(run), circumstances(run)
    start = start or start_of(run, step_number)
    wanted = range(start.step + 1 if start else 1, step_number + 1)
    if missing := [n for n in wanted if n not in steps]:
        raise RunDirError(f"--step {step_number}: step {missing[0]} is not on record; the run has {_span(steps)}")
    state: Any = None
    changed: dict[str, None] = {}
    names: list[str] = []
    for n, group in groupby(wanted, key=lambda number: steps[number].incarnation):
        plan, differs = _plan(spec, how.get(n, {}))
        changed |= dict.fromkeys(differs)
        loader = Loader(ledger_data.manifest_of(run, _data_id(run, how.get(n, {})), data_dir))
        state, numbers = step.arranged(*plan, _placed(run, spec, start, plan[2], state)), list(group)
        train_step = step.make_train_step(*plan, skip_bad_numbers="update_skipped" in steps[numbers[0]].metrics)
        for number in numbers:
            batch = train_loop.global_batch(spec, plan[2], loader, first_row=steps[number].metrics["rows"][0])
            state, metrics = train_step(state, batch)
            computed = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
            names = compared_metrics(computed, steps[number].metrics, exact=not changed)
            if found := difference(computed, steps[number], exact=not changed):
                return Replayed(wanted[0] - 1, number, list(changed), names, None, Difference(number, n, *found))
            report(number - wanted[0] + 1, len(wanted))
        state = step.plain(*plan, state)
    accepted = None if changed else _accepted_at(run, step_number)
    off = None
    if accepted and (digest := checkpoint.checksum(state)) != accepted.digest:
        off = Difference(step_number, accepted.incarnation, "digest of the checkpoint", accepted.digest, digest)
    return Replayed(wanted[0] - 1, step_number, list(changed), names, accepted.number if accepted else None, off)


def _span(steps: Mapping[int, Recorded]) -> str:
    return f"steps {min(steps)} to {max(steps)}" if steps else "no steps"


def _data_id(run: RunDir, how: Mapping[str, Any]) -> str:
    """Returns which rows an incarnation was trained on; a run has the same ones in all of them."""
    return how["data_id"] if "data_id" in how else next(a.data_id for a in reversed(run.acceptances()))


def _accepted_at(run: RunDir, step_number: int) -> Acceptance | None:
    valid = lineage.valid_acceptances(run.claims(), run.acceptances(), run.quarantined())
    return next((a for a in reversed(valid) if a.step == step_number), None)


def _plan(spec: RunSpec, how: Mapping[str, Any]) -> tuple[tuple[Any, Any, Any, Any], list[str]]:
    """Returns what a step is built from, as an incarnation built it, and what about it is different here."""
    import jax

    from openmoe.model import sharding
    from openmoe.model.config import ExecutionConfig
    from openmoe.platform.train import train_loop

    axes = how.get("mesh", spec.mesh.model_dump())
    size = math.prod(axes.values())
    if size <= jax.device_count():
        mesh = sharding.make_mesh(**axes, devices=jax.devices()[:size])
    else:  # one device holds all routing groups, whatever the model
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    execution = ExecutionConfig(**how["execution"]) if "execution" in how else spec.execution
    here = train_loop.fingerprint() | {"devices": mesh.size}
    return (spec.model, spec.optimizer, mesh, execution), list(_changes(how, here))


def _changes(how: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    if not how:
        yield "how it was carried out is not on record"
    for name in _FINGERPRINT:
        if name in how and how[name] != here[name]:
            yield f"{name}: {how[name]} then, {here[name]} here"


def _placed(run: RunDir, spec: RunSpec, start: Acceptance | None, mesh: Any, state: Any) -> Any:
    """Returns the state in its plain form on a mesh: the one given, else that of the checkpoint, else a fresh one."""
    import jax

    from openmoe.model import step
    from openmoe.platform.train import init_from, restore

    template = step.state_shapes(spec.model, spec.optimizer, mesh)
    if state is not None:
        return jax.device_put(state, jax.tree.map(lambda like: like.sharding, template))
    if start is not None:
        return restore.restored(run, start, template)[0]
    return init_from.initial_state(spec, mesh)
