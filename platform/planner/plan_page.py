"""The page docs/planning.md: every preset on the usual machines, as the estimates have it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from openmoe.model import counts
from openmoe.model.config import PRESETS, ExecutionConfig, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig, AdamWConfig, MuonConfig, OptimizerConfig
from openmoe.platform.commands.facts import listed, short
from openmoe.platform.planner import plan
from openmoe.platform.planner.plan_assumptions import Assumptions
from openmoe.platform.planner.plan_hardware import Machines, parse
from openmoe.platform.run_file import spec_checks, validate_memory
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import SpecError
from openmoe.platform.run_file.spec_sections import MeshConfig

TOPOLOGIES = ("v4-32", "v4-128", "v4-256", "v5p-64", "v5p-128", "v5e-256", "v6e-256")
COLUMNS = (
    *("preset", "slice", "chips", "mesh", "remat", "parts", "memory, GiB", "of", "fits"),
    *("ways that fit", "step, s", "tokens/s", "limit"),
)
PEAK_COLUMNS = ("preset", "slice", "mesh", "remat", "microbatches", "parts", "compiler, GiB", "estimate", "off")


class Peak(NamedTuple):
    """Memory that a device needs for a program of libtpu 0.0.42, compiled with little search for fast code."""

    preset: str
    slice_name: str
    mesh: dict[str, int]
    remat: Literal["none", "dots", "full"]
    microbatches: int
    parts: int
    gib: float

    def run(self, base: RunSpec) -> RunSpec:
        """Returns the run that was compiled, with the batch of the 8B model's."""
        train = base.train.model_copy(update={"microbatches": self.microbatches})
        execution = ExecutionConfig(scan_blocks=True, remat=self.remat, accumulation_steps=self.parts)
        changes = {"model": PRESETS[self.preset], "mesh": MeshConfig(**self.mesh), "execution": execution}
        return base.model_copy(update={**changes, "train": train})


PEAKS = (
    Peak("openmoe-8b", "v4-128", {"fsdp": 8, "expert": 8}, "full", 8, 1, 14.26),
    Peak("openmoe-8b", "v4-128", {"fsdp": 2, "expert": 32}, "full", 8, 1, 25.73),
    Peak("openmoe-8b", "v4-128", {"fsdp": 8, "expert": 8}, "dots", 8, 1, 17.99),
    Peak("openmoe-8b", "v5p-128", {"fsdp": 8, "expert": 8}, "none", 8, 1, 38.51),
    Peak("openmoe-8b", "v5p-64", {"fsdp": 4, "expert": 8}, "full", 8, 2, 19.76),
    Peak("openmoe-8b", "v5p-64", {"fsdp": 4, "expert": 8}, "full", 8, 1, 23.67),
    Peak("openmoe-34b", "v4-256", {"fsdp": 4, "expert": 8, "tensor": 4}, "full", 8, 1, 14.22),
    Peak("openmoe-34b", "v4-256", {"fsdp": 2, "expert": 16, "tensor": 4}, "dots", 8, 1, 28.19),
    Peak("openmoe-34b", "v4-256", {"fsdp": 16, "expert": 8}, "full", 2, 1, 25.13),
    Peak("openmoe-base", "v4-32", {"expert": 16}, "none", 8, 1, 21.81),
)


def peaks(spec: RunSpec) -> list[tuple[str, ...]]:
    """Returns what the compiler said of some programs beside the estimates."""
    found = []
    for peak in PEAKS:
        run = peak.run(spec)
        gib = validate_memory.estimate(run).total / 2**30
        first = (peak.preset, peak.slice_name, str(run.mesh), peak.remat, str(peak.microbatches), str(peak.parts))
        found.append((*first, f"{peak.gib:.1f}", f"{gib:.1f}", f"{gib / peak.gib - 1:+.0%}"))
    return found


def table(spec: RunSpec, assumptions: Assumptions) -> list[tuple[str, ...]]:
    """Returns a row of COLUMNS for each preset on each of TOPOLOGIES, with the batch of this run."""
    return [
        _row(name, model, machines, spec, assumptions)
        for name, model in PRESETS.items()
        for machines in map(parse, TOPOLOGIES)
    ]


def _row(name: str, model: ModelConfig, machines: Machines, spec: RunSpec, assumptions: Assumptions) -> tuple[str, ...]:
    first = (name, machines.name, str(machines.chips))
    try:
        found = plan.plan(spec.model_copy(update={"model": model}), machines, assumptions, spot=False, keep_own=False)
    except SpecError:
        return (*first, "none holds whole groups", "", "", "", "", "no", "0 of 0", "", "", "")
    execution, fitting = found.way.spec.execution, sum(way.fits for way in found.ways)
    return (
        *first,
        str(found.way.spec.mesh),
        execution.remat,
        str(execution.accumulation_steps),
        f"{found.way.memory_bytes / 2**30:.1f}",
        f"{machines.chip.usable_bytes / 2**30:.1f}",
        "yes" if found.way.fits else "no",
        f"{fitting} of {len(found.ways)}",
        f"{found.step_s:.3g}",
        short(found.tokens_per_s),
        found.way.bound.limited_by,
    )


def legal(spec: RunSpec) -> list[tuple[str, ...]]:
    """Returns for each preset over how many devices its rows, experts, parameters and widths may be divided."""
    rows = spec.train.batch_rows // spec.train.microbatches
    found = []
    for name, model in PRESETS.items():
        flat = spec_checks.legal_meshes(model, rows=rows, seq_len=spec.data.seq_len)
        shares = sorted({mesh.data * mesh.expert for mesh in flat})
        experts = sorted({mesh.expert for mesh in flat})
        widths = (model.num_heads, model.d_ff, model.expert_width, model.vocab_size)
        tensor = [n for n in range(1, model.num_heads + 1) if not any(width % n for width in widths)]
        total = short(counts.parameter_counts(model).total)
        found.append((name, total, str(model.group_size), listed(shares), listed(experts), listed(tensor)))
    return found


def optimizer_states() -> list[tuple[str, ...]]:
    """Returns for each preset the memory that each optimizer's state takes on all chips together, GiB."""
    configs = (AdafactorConfig(), AdamWConfig(), MuonConfig())

    def gib(model: ModelConfig, config: OptimizerConfig) -> str:
        return f"{validate_memory.FLOAT32_BYTES * sum(validate_memory.optimizer_elements(model, config)) / 2**30:.2f}"

    return [(name, *(gib(model, config) for config in configs)) for name, model in PRESETS.items()]


def page(spec: RunSpec, assumptions: Assumptions, command: str) -> str:
    """Returns the page; `command` wrote it."""
    rows = spec.train.batch_rows // spec.train.microbatches
    batch = f"{spec.train.batch_rows} rows of {spec.data.seq_len} tokens"
    return _PAGE.format(
        command=command,
        batch=f"{batch}, {spec.train.microbatches} microbatches of {rows}",
        mfu=f"{assumptions.mfu:.0%}",
        table=_markdown(COLUMNS, table(spec, assumptions)),
        peaks=_markdown(PEAK_COLUMNS, peaks(spec)),
        optimizers=_markdown(("preset", "adafactor", "adamw", "muon"), optimizer_states()),
        legal=_markdown(("preset", "parameters", "group", "data x fsdp x expert", "expert", "tensor"), legal(spec)),
    )


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_PAGE = """<!-- Written by `{command}`; edits are lost. The text is in platform/planner/plan_page.py. -->
# Planning a run

Does a run fit on given machines, how fast is it there, how long does it take, and for how much money? `openmoe plan`
answers before anything is rented.

    openmoe plan RUN.yaml                                          on the slices that the file names
    openmoe plan RUN.yaml --topology v4-128 --topology v5p-64      on others, beside each other
    openmoe plan RUN.yaml --topology 2xv4-128                      on two slices
    openmoe plan RUN.yaml --on-demand --mfu 0.4                    assuming something else
    openmoe plan RUN.yaml --assumptions FILE --assume preemptions.hours_between=2
    openmoe plan RUN.yaml --topology v4-128 --compile              asks the TPU compiler too; needs the extra `tpu`

It says which meshes are legal, which of them fit, with what remat and how many rows at a time; what a step computes,
moves and exchanges; how long all steps take and what they cost, preemptions included. The run file's own mesh is
taken where it is for so many chips and fits, else the best one. Mesh, remat and `accumulation_steps` change no
mathematics: what is proposed can be written into the file of a run under way.

- **Names.** v4-128 and v5p-128 count TensorCores, two a chip: 64 chips. v5e-256, v6e-256 and h100-16 count chips.
- **Legal.** A device holds whole routing groups; `openmoe validate` uses the same checks. The product of data, fsdp
  and expert divides a microbatch into whole groups; expert divides the experts, fsdp d_model, tensor heads and widths.
  Between slices only the data axis may lie.
- **Memory** is an estimate of what the TPU compiler calls its peak; a test compares the two. It fits where a tenth of
  what a program may take is left.
- **Best** is the way that fits with the least time if arithmetic, memory and links ran at their peak one after the
  other.
- **Speed** is an assumption: a share (mfu) of the chips' bfloat16 peak, model FLOPs alone, or less where memory or
  links do not allow so much. No TPU has run this code, and of GPUs a single one ([speed](speed.md)). Measure
  yours and give it with `--mfu`.
- **Time and money** are drawn up to 400 times with a fixed seed: intervals between preemptions and waits for machines
  are exponential; each preemption costs a restart and what was done since the last checkpoint. Shown are the median,
  and what one in ten stays below or exceeds. Prices, rates and waits are in `platform/planner/plan_assumptions.yaml`,
  with the date of the prices. Nothing is fetched: put in your own.

## How near the memory estimate is

To the peaks that libtpu 0.0.42 states for steps on 1,024 rows of 2,048 tokens, compiled without a TPU:

{peaks}

Of the first of them, arithmetic was estimated 1 % too high, gathers along fsdp and exchanges with experts exactly, and
traffic to memory 5 % too low; the latter was off by up to 30 % in others.

## Optimizers

The [table of all presets](#every-preset-on-the-usual-slices) is with Adafactor. A plan of a run file with another
`optimizer.name` charges that one's state, to memory and to the traffic of a step; Muon's own products, some 1 % of the
8B model's, are not counted. State, GiB, on all chips together:

{optimizers}

## Legal meshes

With {batch}. What is said of data x fsdp x expert may lie on any of the three as the others' rules allow.

{legal}

## Every preset on the usual slices

{batch}; at {mfu} of the peak. "parts" is `accumulation_steps`, "limit" what a step would wait for if all else were
free. The smallest models will not reach such a share of the peak of so many chips.

{table}
"""
