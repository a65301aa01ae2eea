"""What a compiled program computes and exchanges, read from XLA's text of it. Pure.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs, which its condition
tells. Products are the program's convolutions and dots; kernels of others' making (attention on TPUs) are not seen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
EXCHANGES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "ragged-all-to-all")
_SLICES = ("dynamic-slice", "gather", "slice")
_MOVES_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier"),
)
_HEAD = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(calls|body|condition|to_apply)=%([^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


class Exchange(NamedTuple):
    """One collective of a program."""

    kind: str
    size_bytes: int  # of its result on a device
    times: int  # it runs in a step
    where: str  # in the model


class Program(NamedTuple):
    """What one device does in one run of a program."""

    product_flops: float
    moved_bytes: float  # to and from the chip's main memory
    exchanges: list[Exchange]

    def exchanged_bytes(self) -> dict[str, int]:
        """Bytes that a device gets, by kind."""
        found: Counter[str] = Counter()
        for exchange in self.exchanges:
            found[exchange.kind] += exchange.size_bytes * exchange.times
        return dict(found)


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([^\s,)]+)", _split(f"({self.rest} ")[0])


_Computation = dict[str, _Instruction]


def read(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    fused = {
        called
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for called, _ in _called(instruction, computations)
    }
    flops, moved, exchanges = 0.0, 0.0, []
    for name, computation in computations.items():
        for instruction in computation.values() if times[name] else ():
            opcode = instruction.opcode.removesuffix("-start")
            if name not in fused:
                moved += times[name] * _moved_bytes(instruction, computation, computations)
            if opcode in ("convolution", "dot"):
                flops += times[name] * _product_flops(instruction, computation)
            elif opcode in EXCHANGES:
                size, where = _size_bytes(instruction.shape), re.search(r'op_name="([^"]*)"', instruction.rest)
                exchanges.append(Exchange(opcode, size, times[name], where[1] if where else ""))
    return Program(flops, moved, exchanges)


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    found: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            shape, rest = _split(match[2])
            if opcode := _OPCODE.match(rest):
                current[match[1]] = _Instruction(match[1], opcode[1], shape, opcode[2])
    return found, entry


def _split(text: str) -> tuple[str, str]:
    """Cuts a shape, which may be a tuple with brackets of its own, from what follows."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and depth == 0:
            return text[:index], text[index:]
    return text, ""


def _times(computations: Mapping[str, _Computation], entry: str) -> Counter[str]:
    """Returns how often each computation runs in a step."""
    times: Counter[str] = Counter()
    waiting = [(entry, 1)]
    while waiting:
        name, runs = waiting.pop()
        times[name] += runs
        for instruction in computations.get(name, {}).values():
            waiting += ((called, runs * n) for called, n in _called(instruction, computations))
    return times


def _called(instruction: _Instruction, computations: Mapping[str, _Computation]) -> Iterator[tuple[str, int]]:
    called = dict(_CALLED.findall(instruction.rest))
    if instruction.opcode == "while":
        yield called["body"], _trips(computations[called["condition"]])
    elif instruction.opcode in ("fusion", "call", "async-start"):
        yield from ((name, 1) for role, name in called.items() if role in ("calls", "to_apply"))
    elif branches := _BRANCHES.search(instruction.rest):
        yield from ((name.strip().lstrip("%"), 1) for name in branches[1].split(","))


def _trips(condition: _Computation) -> int:
    """The bound of a counted loop, the largest number in its condition; 1 if it has none."""
    numbers = [
        int(match[1])
        for instruction in condition.values()
        if instruction.opcode == "constant" and (match := re.match(r"(\d+)\)", instruction.rest))
    ]
    return max(numbers, default=1)


def _moved_bytes(
    instruction: _Instruction, computation: _Computation, computations: Mapping[str, _Computation]
) -> float:
    """What an instruction reads and writes. Of an array of which it takes or changes a slice, only that counts."""
    if instruction.opcode in _MOVES_NOTHING or instruction.opcode.endswith("-done"):
        return 0.0
    sizes = [_hbm_bytes(computation[name].shape) if name in computation else 0 for name in instruction.operands]
    output = _hbm_bytes(instruction.shape)
    if instruction.opcode in _SLICES:
        return 2.0 * output
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * sizes[1]
    if instruction.opcode == "fusion":
        [body] = [computations[called] for called, _ in _called(instruction, computations)]
        return _moved_by_fusion(body, sizes, output)
    return float(output + sum(sizes))


def _moved_by_fusion(body: _Computation, sizes: list[int], output: int) -> float:
    moved = float(output)
    for parameter in (each for each in body.values() if each.opcode == "parameter"):
        readers = [each for each in body.values() if parameter.name in each.operands]
        index = int(parameter.rest.partition(")")[0])
        first = [each for each in readers if each.operands[0] == parameter.name]
        if readers and len(first) == len(readers) and all(each.opcode in _SLICES for each in readers):
            moved += min(sizes[index], sum(_hbm_bytes(each.shape) for each in readers))
        elif len(first) == 1 == len(readers) and first[0].opcode == "dynamic-update-slice":
            moved += 2 * _hbm_bytes(body[first[0].operands[1]].shape) - _hbm_bytes(first[0].shape)  # in place
        else:
            moved += sizes[index]
    return max(moved, 0.0)


def _product_flops(instruction: _Instruction, computation: _Computation) -> float:
    left, right = instruction.operands
    output, left_sizes = _sizes(instruction.shape), _sizes(computation[left].shape)
    if instruction.opcode == "dot":
        contracted = _CONTRACTED.search(instruction.rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(output) * math.prod(left_sizes[axis] for axis in axes)
    labels = _DIM_LABELS.search(instruction.rest)
    assert labels is not None, f"a convolution without dim_labels: {instruction.name}"
    of_left, of_kernel, of_output = labels.groups()
    kernel = _sizes(computation[right].shape)
    flops = 2.0 * output[of_output.index("b")] * output[of_output.index("f")] * kernel[of_kernel.index("i")]
    window = _WINDOW.search(instruction.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in range(len(of_output) - 2):
        setting = {key: value.split("x")[axis] for key, value in settings.items()}
        digit = str(axis)
        flops *= _pairs(left_sizes[of_left.index(digit)], output[of_output.index(digit)], setting)
    return flops


def _pairs(left: int, output: int, setting: Mapping[str, str]) -> int:
    """Pairs of an output position and a window position that meet an input, not its padding or a hole in it."""
    low = int(setting.get("pad", "0_0").split("_")[0])
    stride, hole = int(setting.get("stride", 1)), int(setting.get("lhs_dilate", 1))
    spread, window = int(setting.get("rhs_dilate", 1)), int(setting.get("size", 1))
    reach = [out * stride + k * spread - low for out in range(output) for k in range(window)]
    return sum(0 <= at <= (left - 1) * hole and at % hole == 0 for at in reach)


def _sizes(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(size) for size in match[2].split(",") if size] if match else []


def _hbm_bytes(shape: str) -> int:
    """`_size_bytes` of what lies in main memory, not in a memory of the core, which layouts call S(1) and so on."""
    return _size_bytes(re.sub(r"[a-z0-9]+\[[\d,]*\]\{[^}]*S\([1-9]\)[^}]*\}", "", shape))


def _size_bytes(shape: str) -> int:
    """Bytes of a shape, or of a tuple of them."""
    return sum(
        BYTES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _SHAPE.findall(shape)
    )
