"""What machines can do, and what a name of theirs means: v4-128, v5e-256, 2xv5p-64, h100-16. Pure.

Sizes and rates are the manufacturers' for one chip: dense bfloat16, one direction of all links together. `usable` is
what a program may take of the memory as the TPU compilers of libtpu 0.0.42 state it when they refuse one; of GPUs,
what XLA's allocator takes of it by default.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from openmoe.clusters import tpu
from openmoe.platform.run_file.spec_errors import Problem, SpecError

GPUS_PER_HOST = 8


class Chip(NamedTuple):
    """One device.

    Attributes:
      usable_bytes: of its memory, for a program.
      flops_per_s: peak, bfloat16.
      hbm_bytes_per_s: to and from its memory.
      link_bytes_per_s: to its neighbours, all links together, one direction (ICI, NVLink).
      network_bytes_per_s: to devices of other slices or hosts, its share of the host's.
    """

    usable_bytes: int
    flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float


CHIPS = {
    "v4": Chip(int(30.75 * 2**30), 275e12, 1.228e12, 300e9, 6.25e9),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 0.819e12, 200e9, 6.25e9),
    "v5p": Chip(int(95.74 * 2**30), 459e12, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1.638e12, 448e9, 12.5e9),
    "h100": Chip(int(0.75 * 80e9), 989e12, 3.35e12, 450e9, 50e9),
    "a100": Chip(int(0.75 * 80e9), 312e12, 2.039e12, 300e9, 25e9),
}


class Machines(NamedTuple):
    """Chips that a run is planned for.

    Attributes:
      name: as it was asked for.
      kind: key of CHIPS.
      slices: equal parts with fast links inside; of GPUs hosts.
      chips: of all slices.
      chips_per_host: of a host, which is one worker.
      shape: of a TPU slice, such as 4x4x4; empty for GPUs.
    """

    name: str
    kind: str
    slices: int
    chips: int
    chips_per_host: int
    shape: str

    @property
    def chip(self) -> Chip:
        """What each of them can do."""
        return CHIPS[self.kind]

    @property
    def hosts(self) -> int:
        """Hosts, which are workers."""
        return self.chips // self.chips_per_host


def parse(name: str) -> Machines:
    """Returns the machines of a name.

    A TPU's number counts as its maker's names do: TensorCores on v4 and v5p (two a chip), chips on v5e and v6e. Of the
    slices with so many it is the one nearest to a cube. `2xv4-128` is two slices. A GPU's number counts GPUs.

    Raises:
      SpecError: there are no such machines; the message says which there are.
    """
    count, times, rest = name.lower().partition("x") if name[:1].isdigit() else ("1", "x", name.lower())
    kind, _, number = rest.replace("v5litepod-", "v5e-").partition("-")
    if not (times and count.isdigit() and int(count) and number.isdigit() and int(number) and kind in CHIPS):
        raise _unknown(name, f"expected such as v4-128, 2xv5p-64 or h100-16, of {', '.join(CHIPS)}")
    slices, size = int(count), int(number)
    if kind not in tpu.GENERATIONS:
        per_host = min(size, GPUS_PER_HOST)
        if size % per_host or slices > 1:
            raise _unknown(name, f"{kind} come {GPUS_PER_HOST} a host; give their number, such as {kind}-16")
        return Machines(name, kind, size // per_host, size, per_host, "")
    cores = tpu.GENERATIONS[kind].cores_per_chip
    shapes = [s for s in tpu.GENERATIONS[kind].topologies if tpu.num_chips(s) * cores == size]
    if not shapes:
        sizes = sorted({tpu.num_chips(s) * cores for s in tpu.GENERATIONS[kind].topologies})
        near = ", ".join(f"{kind}-{n}" for n in sorted(sizes, key=lambda n: abs(n - size))[:4])
        raise _unknown(name, f"no slice of {kind} has this size; near it are {near}")
    shape = min(shapes, key=lambda s: max(map(int, s.split("x"))))
    return _of_slices(name, kind, slices, shape)


def of_run(accelerator_type: str | None, shape: str | None, hosts: int) -> Machines | None:
    """Returns the TPU slices that a run file's `cluster` names; None where it names none."""
    kinds = [kind for kind in CHIPS if kind in tpu.GENERATIONS and tpu.ray_accelerator_type(kind) == accelerator_type]
    if not kinds or shape is None:
        return None
    [kind], per_slice = kinds, tpu.hosts_per_slice(kinds[0], shape)
    slices = max(hosts // per_slice, 1)
    number = tpu.num_chips(shape) * tpu.GENERATIONS[kind].cores_per_chip
    return _of_slices(f"{slices}x{kind}-{number}" if slices > 1 else f"{kind}-{number}", kind, slices, shape)


def _of_slices(name: str, kind: str, slices: int, shape: str) -> Machines:
    chips = prod(int(side) for side in shape.split("x"))
    return Machines(name, kind, slices, slices * chips, tpu.chips_per_host(kind, shape), shape)


def _unknown(name: str, why: str) -> SpecError:
    return SpecError([Problem("topology", f"{name!r}: {why}")])
