"""What a run would take on given machines, before any is rented: memory, arithmetic, time, money.

Estimates from the settings alone; plan_compile.py asks the compiler. What cannot be known is in plan_assumptions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from openmoe.platform.commands.facts import Fact, Section, count, num_bytes, short
from openmoe.platform.planner import plan_choice, plan_hardware, plan_time
from openmoe.platform.planner.plan_assumptions import Assumptions, Preemptions
from openmoe.platform.planner.plan_choice import Way
from openmoe.platform.planner.plan_hardware import Machines
from openmoe.platform.planner.plan_time import Outlook, Quantiles
from openmoe.platform.run_file import validate_memory
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError
from openmoe.platform.train import cadence

DAY_S = 24 * 3600.0
MOST_LISTED = 12
COLUMNS = ("", "mesh", "remat", "parts", "memory", "fits", "step", "tokens/s", "days", "cost")


class Plan(NamedTuple):
    """A run on given machines.

    Attributes:
      machines: it is planned for.
      ways: every legal one, the best first.
      own: the run file's, where its mesh is for so many chips.
      way: the run file's own, if there is one and it fits; else the best.
      step_s: at the assumed share of the peak, or slower where the machines cannot reach it.
      outlook: on its time; None where its length is not known yet or it would never end.
    """

    machines: Machines
    ways: list[Way]
    own: Way | None
    way: Way
    step_s: float
    outlook: Outlook | None

    @property
    def tokens_per_s(self) -> float:
        """Padding included."""
        return self.way.spec.train.batch_rows * self.way.spec.data.seq_len / self.step_s

    def cost(self, assumptions: Assumptions, *, spot: bool) -> Quantiles | None:
        """Returns what the machines cost while they are held; None without a price."""
        price = assumptions.prices.get(self.machines.kind)
        if price is None or self.outlook is None:
            return None
        per_s = self.machines.chips * (price.spot if spot else price.on_demand) / 3600
        return Quantiles(*(per_s * held_s for held_s in self.outlook.held_s))


def machines_of(spec: RunSpec, names: Sequence[str]) -> list[Machines]:
    """Returns the machines that were asked for, or those of the run file.

    Raises:
      SpecError: a name is none, or the run file names no TPU slices.
    """
    if names:
        return [plan_hardware.parse(name) for name in names]
    cluster = spec.cluster
    own = plan_hardware.of_run(cluster.accelerator_type, cluster.topology, cluster.num_workers)
    if own is None:
        message = f"{cluster.accelerator} is planned for by name: give --topology, such as v4-128 or h100-16"
        raise SpecError([Problem("cluster.accelerator", message)])
    return [own]


def plan(spec: RunSpec, machines: Machines, assumptions: Assumptions, *, spot: bool, keep_own: bool = True) -> Plan:
    """Plans a run.

    Args:
      spec: the run.
      machines: for which.
      assumptions: what cannot be known.
      spot: whether the machines may be taken back.
      keep_own: take the run file's own mesh and execution where they are for so many chips and fit.

    Raises:
      SpecError: no mesh of the machines holds whole routing groups of this run.
    """
    ways = plan_choice.ways(spec, machines)
    if not ways:
        raise SpecError([Problem("mesh", _no_mesh(spec, machines))])
    own = plan_choice.as_written(spec, machines) if keep_own else None
    way = own if own is not None and own.fits else ways[0]
    step_s = max(way.work.model_flops / (assumptions.mfu * machines.chip.flops_per_s), way.bound.step_s)
    outlook = None
    if spec.train.steps is not None:
        outlook = plan_time.outlook(
            work_s=spec.train.steps * step_s,
            cadence_s=_cadence_s(spec, step_s, assumptions),
            preemptions=assumptions.preemptions,
            spot=spot,
        )
    return Plan(machines, ways, own, way, step_s, outlook)


def _cadence_s(spec: RunSpec, step_s: float, assumptions: Assumptions) -> float:
    """Work between two checkpoints: as many steps as the run file says, or what loses least if it leaves that open."""
    every = spec.train.checkpoint_every_steps
    return every * step_s if isinstance(every, int) else _best_cadence_s(assumptions.preemptions)


def _best_cadence_s(taken: Preemptions) -> float:
    return cadence.daly_interval_s(taken.save_s, 3600 * taken.hours_between)


def _no_mesh(spec: RunSpec, machines: Machines) -> str:
    rows = spec.train.batch_rows // spec.train.microbatches
    slices = f" in {machines.slices} slices, between which only the data axis may lie" if machines.slices > 1 else ""
    return (
        f"no mesh of {machines.chips} devices{slices} holds whole routing groups (model.group_size="
        f"{spec.model.group_size}) of a microbatch of {rows} rows; take another number of chips, or fewer "
        "train.microbatches, which changes the mathematics"
    )


def sections(found: Plan, assumptions: Assumptions, *, spot: bool) -> list[Section]:
    """Returns a plan as facts."""
    name = found.machines.name
    return [
        Section(name, (*_machines(found), *_way(found), *_fits(found))),
        Section(f"{name}: memory per device", validate_memory.per_device(found.way.spec)),
        Section(f"{name}: a step of a device", _work(found)),
        Section(f"{name}: speed", _speed(found, assumptions)),
        Section(f"{name}: to the last step", _length(found, assumptions, spot=spot)),
        Section(f"{name}: ways that fit, by the seconds of a step if nothing overlapped", _ways(found)),
    ]


def row(found: Plan, assumptions: Assumptions, *, spot: bool) -> tuple[str, ...]:
    """Returns a plan as a row of COLUMNS."""
    spec, cost = found.way.spec, found.cost(assumptions, spot=spot)
    return (
        found.machines.name,
        str(spec.mesh),
        spec.execution.remat,
        str(spec.execution.accumulation_steps),
        f"{found.way.memory_bytes / 2**30:.1f} GiB",
        "yes" if found.way.fits else "NO",
        f"{found.step_s:.3g} s",
        short(found.tokens_per_s),
        "" if found.outlook is None else f"{found.outlook.wall_s.median / DAY_S:.1f}",
        "" if cost is None else f"{cost.median:,.0f} {assumptions.currency}",
    )


def _machines(found: Plan) -> tuple[Fact, ...]:
    m = found.machines
    slices = f"{m.slices} slice(s) of {m.shape}" if m.shape else f"{m.slices} host(s)"
    return (count("chips", m.chips, f"{m.kind}, {slices}, {m.hosts} workers with {m.chips_per_host} each"),)


def _way(found: Plan) -> tuple[Fact, ...]:
    spec, execution = found.way.spec, found.way.spec.execution
    rows = spec.train.batch_rows // spec.train.microbatches // spec.mesh.num_batch_shares
    parts = execution.accumulation_steps
    whose = "as the run file says" if found.way is found.own else f"the best of {len(found.ways)} legal ways"
    if found.own is not None and found.way is not found.own:
        whose += f"; the run file's own takes {found.own.memory_bytes / 2**30:.1f} GiB and does not fit"
    return (
        Fact("mesh", spec.mesh.model_dump(), str(spec.mesh), whose),
        Fact("remat", execution.remat, execution.remat, "scanned blocks" if execution.scan_blocks else ""),
        count("accumulation_steps", parts, f"{rows // parts} of the {rows} rows of a microbatch at a time"),
    )


def _fits(found: Plan) -> tuple[Fact, ...]:
    usable, takes = found.machines.chip.usable_bytes, found.way.memory_bytes
    note = f"estimate {takes / 2**30:.1f} GiB; a program may take {usable / 2**30:.1f}, a tenth of it left for errors"
    return (Fact("fits", found.way.fits, "yes" if found.way.fits else "NO", note),)


def _work(found: Plan) -> tuple[Fact, ...]:
    work, bound = found.way.work, found.way.bound
    flops = (
        Fact("model_flops", work.model_flops, f"{work.model_flops:.3g}", "what the mathematics asks for"),
        Fact(
            "device_flops", work.device_flops, f"{work.device_flops:.3g}", "experts' places and recomputation included"
        ),
    )
    exchanges = [
        num_bytes(f"bytes_{kind.replace(' ', '_').replace('-', '_')}", round(size), "")
        for kind, size in work.exchanged_bytes.items()
        if size
    ]
    times = (("arithmetic", bound.compute_s), ("memory", bound.memory_s), ("links", bound.links_s))
    return (
        *flops,
        num_bytes("bytes_hbm", round(work.hbm_bytes), "to and from its memory, a rough count"),
        *exchanges,
        *(Fact(f"least_{what}_s", seconds, f"{seconds:.3g} s", "at the chip's peak") for what, seconds in times),
    )


def _speed(found: Plan, assumptions: Assumptions) -> tuple[Fact, ...]:
    bound, step_s = found.way.bound, found.step_s
    reached = found.way.work.model_flops / (step_s * found.machines.chip.flops_per_s)
    most = found.way.work.model_flops / (bound.step_s * found.machines.chip.flops_per_s)
    what = "assumed" if reached >= assumptions.mfu * 0.999 else f"the most that {bound.limited_by} allows"
    return (
        Fact("mfu", reached, f"{reached:.1%}", f"{what}; {bound.limited_by} allows {most:.0%} at most"),
        Fact("step_s", step_s, f"{step_s:.3g} s"),
        Fact("tokens_per_s", found.tokens_per_s, short(found.tokens_per_s), "padding included"),
        Fact(
            "tokens_per_chip_s",
            found.tokens_per_s / found.machines.chips,
            f"{found.tokens_per_s / found.machines.chips:,.0f}",
        ),
    )


def _length(found: Plan, assumptions: Assumptions, *, spot: bool) -> tuple[Fact, ...]:
    train, taken = found.way.spec.train, assumptions.preemptions
    if train.steps is None:
        return (Fact("steps", None, "not known", "a run of epochs has them once its data is built"),)
    cadence_s, best = _cadence_s(found.way.spec, found.step_s, assumptions), _best_cadence_s(taken)
    fewest = max(round(best / found.step_s), 1)
    advice = f"; {fewest:,} steps would lose least" if spot else ""
    fixed = isinstance(train.checkpoint_every_steps, int)
    facts = [
        count("steps", train.steps),
        Fact(
            "checkpoint_every_s",
            cadence_s,
            f"{cadence_s / 60:.1f} min",
            f"{train.checkpoint_every_steps} steps{advice}" if fixed else f"auto: {fewest:,} steps, what loses least",
        ),
    ]
    if found.outlook is None:
        note = "machines are taken back before they reach a checkpoint; save more often"
        return (*facts, Fact("days", None, "never", note))
    return (*facts, *_outlook(found, found.outlook, assumptions, spot=spot))


def _outlook(found: Plan, outlook: Outlook, assumptions: Assumptions, *, spot: bool) -> tuple[Fact, ...]:
    taken = assumptions.preemptions
    how = (
        f"one preemption in {taken.hours_between:g} h, then {taken.wait_s / 60:g} min without machines" if spot else ""
    )
    facts = [
        _spread("days", outlook.wall_s, 1 / DAY_S, how),
        _spread("chip_hours", outlook.held_s, found.machines.chips / 3600, "paid"),
        _spread("preemptions", outlook.preemptions, 1, ""),
        _spread("useful_share", outlook.useful_share, 1, "of the time paid"),
    ]
    cost = found.cost(assumptions, spot=spot)
    if cost is not None:
        price = assumptions.prices[found.machines.kind]
        each = price.spot if spot else price.on_demand
        note = f"{assumptions.currency}, {each:g} a chip-hour as of {assumptions.as_of}: put in your own price"
        facts.append(_spread("cost", cost, 1, note))
    return tuple(facts)


def _spread(key: str, values: Quantiles, unit: float, note: str) -> Fact:
    low, median, high = (value * unit for value in values)
    show = (lambda x: f"{x:,.0f}") if median >= 100 else (lambda x: f"{x:.3g}")
    text = show(median) if low == high else f"{show(median)}  (10 % {show(low)}, 90 % {show(high)})"
    return Fact(key, [low, median, high], text, note)


def _ways(found: Plan) -> tuple[Fact, ...]:
    best: dict[str, Way] = {}
    for way in found.ways:
        if way.fits:
            best.setdefault(str(way.spec.mesh), way)
    if not best:
        least = min(found.ways, key=lambda way: way.memory_bytes)
        return (num_bytes("none", least.memory_bytes, f"the smallest way: {_shown(least)}"),)
    shown = list(best.items())[:MOST_LISTED]
    facts = [num_bytes(mesh, way.memory_bytes, f"{_shown(way)}; {sum(way.bound):.3g} s") for mesh, way in shown]
    return (*facts, count("more", len(best) - len(shown)))


def _shown(way: Way) -> str:
    execution = way.spec.execution
    return f"remat {execution.remat}, accumulation_steps {execution.accumulation_steps}"
