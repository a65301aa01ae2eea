"""A run's real step, compiled by the TPU's own compiler for chips that are not there: memory, FLOPs, exchanges.

libtpu, of the package's `tpu` extra, needs no TPU for that.
"""

from __future__ import annotations

import importlib.util
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from openmoe.clusters import tpu
from openmoe.platform.commands.facts import Fact, Section, num_bytes, short
from openmoe.platform.planner import plan_program, plan_work
from openmoe.platform.planner.plan_hardware import Machines
from openmoe.platform.planner.plan_program import Program
from openmoe.platform.run_file import validate_memory
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError

if TYPE_CHECKING:
    from jax.sharding import Mesh

# So libtpu neither asks the metadata server what machine this is, nor writes logs, nor locks the machine for itself.
# For processes that only compile: Ray takes a machine with such an environment for a TPU.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_NAMES = {"v5p": "v5"}  # libtpu's, where they differ from Google's
LITTLE_EFFORT = {"exec_time_optimization_effort": -1.0}  # of the compiler's search for fast code: a third of its time


class Compiled(NamedTuple):
    """What the compiler says of a step, of one device.

    Attributes:
      peak_bytes: of memory, the figure by which it refuses programs.
      state_bytes: of it the train state and the batch.
      program: the rest.
      compile_s: that it took.
    """

    peak_bytes: int
    state_bytes: int
    program: Program
    compile_s: float


def compiled(spec: RunSpec, machines: Machines) -> Compiled:
    """Compiles the step of a run, whose mesh is for these machines; a minute or two, and 3 GB of memory.

    Raises:
      SpecError: there is no libtpu here, no TPU is planned for, or the step does not fit.
    """
    import jax

    began_s = time.monotonic()
    step = lowered_step(spec, mesh_of(spec, machines))
    try:
        program = step.compile(LITTLE_EFFORT)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
        raise SpecError([Problem("mesh", f"{spec.mesh} on {machines.name}: {why}")]) from error
    return measured(program, compile_s=time.monotonic() - began_s)


def measured(program: Any, *, compile_s: float) -> Compiled:
    """Returns what the compiler says of a compiled step, a `jax.stages.Compiled`."""
    memory = program.memory_analysis()
    return Compiled(
        peak_bytes=memory.peak_memory_in_bytes,
        state_bytes=memory.argument_size_in_bytes,
        program=plan_program.read(program.as_text()),
        compile_s=compile_s,
    )


def mesh_of(spec: RunSpec, machines: Machines) -> Mesh:
    """Returns a run's mesh of TPU devices that are not there."""
    if machines.kind not in tpu.GENERATIONS:
        raise SpecError(
            [Problem("topology", f"{machines.name}: only what TPUs would run can be compiled without them")]
        )
    if importlib.util.find_spec("libtpu") is None:
        message = "needs libtpu, which runs on Linux; install the extra `tpu` (README), or plan without --compile"
        raise SpecError([Problem("", message)], "--compile")
    os.environ.update(LIBTPU)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from jax.experimental import topologies

    from openmoe.model import sharding

    joined = {"chip_config_name": "megacore"} if tpu.GENERATIONS[machines.kind].cores_per_chip > 1 else {}
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{_NAMES.get(machines.kind, machines.kind)}:{machines.shape}",
        num_slices=machines.slices,
        **joined,
    )
    return sharding.make_mesh(devices=described.devices, **spec.mesh.model_dump())


def lowered_step(spec: RunSpec, mesh: Mesh) -> Any:
    """Returns the step of a run on a mesh, not compiled yet, of `train_loop`'s shapes."""
    import jax
    import jax.numpy as jnp

    from openmoe.model import checksum, sharding, step

    train, plan = spec.train, (spec.model, spec.optimizer, mesh, spec.execution)
    shape = (train.microbatches, train.batch_rows // train.microbatches, spec.data.seq_len)
    batch = {
        key: jax.ShapeDtypeStruct(
            shape, jnp.float32 if key == "loss_weights" else jnp.int32, sharding=sharding.batch_sharding(mesh)
        )
        for key in checksum.KEYS
    }
    jitted: Any = step.make_train_step(*plan)
    return jitted.lower(step.state_shapes(*plan), batch)


def section(spec: RunSpec, machines: Machines, found: Compiled) -> Section:
    """Returns what the compiler says beside the estimates."""
    work, memory = plan_work.work(spec), validate_memory.estimate(spec)
    attention = plan_work.attention_flops(spec)
    products = work.device_flops - attention
    usable = f"{machines.chip.usable_bytes / 2**30:.2f} GiB"
    state = memory.parameters + memory.optimizer
    facts = (
        num_bytes("peak", found.peak_bytes, f"{_beside(memory.total, found.peak_bytes)}; {usable} usable"),
        num_bytes("state", found.state_bytes, _beside(state, found.state_bytes)),
        Fact(
            "product_flops",
            found.program.product_flops,
            f"{found.program.product_flops:.3g}",
            f"attention's kernels left out, {attention:.2g}; {_beside(products, found.program.product_flops)}",
        ),
        num_bytes("bytes_hbm", round(found.program.moved_bytes), _beside(work.hbm_bytes, found.program.moved_bytes)),
        *(
            num_bytes(kind.replace("-", "_"), size, f"{_runs(found.program, kind)} of them in a step")
            for kind, size in sorted(found.program.exchanged_bytes().items())
        ),
        *_speed(spec, machines, found, attention),
        Fact("compile_s", found.compile_s, f"{found.compile_s:.0f} s"),
    )
    return Section(f"{machines.name}: the TPU compiler", facts)


def _speed(spec: RunSpec, machines: Machines, found: Compiled, attention: float) -> tuple[Fact, ...]:
    """The step at the chip's peak, with all at the same time and with one thing after the other."""
    chip, program = machines.chip, found.program
    sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in program.exchanged_bytes().items())
    parts = (
        (program.product_flops + attention) / chip.flops_per_s,
        program.moved_bytes / chip.hbm_bytes_per_s,
        sent / chip.link_bytes_per_s,
    )
    tokens, names = spec.train.batch_rows * spec.data.seq_len, ("arithmetic", "memory", "links")
    shown = ", ".join(f"{name} {seconds:.3g}" for name, seconds in zip(names, parts, strict=True))
    return (
        Fact("step_s_at_peak", [max(parts), sum(parts)], f"{max(parts):.3g} to {sum(parts):.3g} s", shown),
        Fact(
            "tokens_per_s_at_peak",
            [tokens / sum(parts), tokens / max(parts)],
            f"{short(tokens / sum(parts))} to {short(tokens / max(parts))}",
            "nothing overlapping, and everything; no chip reaches its peak",
        ),
    )


def _beside(estimate: float, found: float) -> str:
    return f"the estimate is {estimate / found - 1:+.0%} off" if found else ""


def _runs(program: Program, kind: str) -> int:
    return sum(exchange.times for exchange in program.exchanges if exchange.kind == kind)
