"""Kernels of a compiled program, and the bytes that it moves, from its HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (?P<result>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")


class Instruction(NamedTuple):
    """A line of a computation: its result's shape, its operation, and the names of its operands."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    line: str


class Kernel(NamedTuple):
    """A program that runs on the device: its kind, the bytes it moves, and its FLOPs."""

    kind: str
    bytes: int
    flops: float
    dtype: str  # of products, a value of `ModelConfig.dtype`


_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[^ ]+) ([\w\-]+)\((.*?)\)(?:, |$)")
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("call", "conditional", "async-start", "async-done", "async-update", "partition-id"),
}


def computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of `compiled.as_text()` by name, and the name of the first one."""
    found: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name and (parts := _LINE.match(line)):
            operands = re.findall(r"%([\w.\-]+)", parts[4])
            found[name].append(Instruction(*parts.groups()[:3], operands, line))
    return found, entry


def walk(
    hlo: str,
) -> Iterator[tuple[Instruction, dict[str, str], dict[str, list[Instruction]], int]]:
    """Yields the instructions that a program runs, the shapes of its operands by name, all
    computations, and how often it runs; one in a loop runs once per iteration."""
    bodies, entry = computations(hlo)
    stack = [(entry, 1)]
    while stack:
        name, times = stack.pop()
        shapes = {instruction.name: instruction.shape for instruction in bodies[name]}
        for instruction in bodies[name]:
            yield instruction, shapes, bodies, times
            if instruction.kind in ("while", "call", "conditional", "async-start"):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.line)
                called = re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", instruction.line)
                called += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.line)
                for branches in re.findall(r"branch_computations=\{(.*?)\}", instruction.line):
                    called += re.findall(r"%?([\w.\-]+)", branches)[:1]
                stack += [(c, times * (int(trips[1]) if trips else 1)) for c in called]


def kernels(hlo: str) -> list[Kernel]:
    """The kernels of a program, in no order; of a conditional, those of both branches."""
    found = []
    for instruction, shapes, bodies, times in walk(hlo):
        if instruction.kind in _NO_KERNEL or instruction.kind.startswith(_KINDS):
            continue
        kind, size, flops = instruction.kind, _moved(instruction, shapes, bodies), 0.0
        dtype = "bfloat16"
        if target := re.search(r'custom_call_target="([^"]*)"', instruction.line):
            kind = "product" if "cublas" in target[1] else "attention"
            if kind == "product":
                flops = _product_flops(instruction, shapes)
                is_exact = '"HIGHEST"' in instruction.line
                if shapes[instruction.operands[0]].startswith("f32"):
                    dtype = "float32" if is_exact else "tf32"
        elif kind == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", instruction.line)
            kinds = {inner.kind for inner in bodies[called[1]]} if called else set()
            kind = "reduction" if "reduce" in kinds else "elementwise"
            if kinds & {"dynamic-slice", "dynamic-update-slice"}:
                kind = "stack"
        elif kind in ("copy", "transpose", "slice", "concatenate", "pad", "broadcast"):
            kind = "copy"
        found += [Kernel(kind, size, flops, dtype)] * times
    return found


def _moved(
    instruction: Instruction, shapes: dict[str, str], bodies: dict[str, list[Instruction]]
) -> int:
    """Bytes that an instruction reads and writes; of what it slices, only the slices."""
    sizes = [_array_bytes(shapes.get(name, "")) for name in instruction.operands]
    result = _array_bytes(instruction.shape)
    called = re.search(r"calls=%?([\w.\-]+)", instruction.line)
    if not called or called[1] not in bodies:
        return result + sum(sizes)
    body = bodies[called[1]]
    inner = {line.name: line for line in body}
    for line in body:
        if line.kind != "parameter":
            continue
        number = int(re.search(r"parameter\((\d+)\)", line.line)[1])
        users = [user for user in body if line.name in user.operands]
        if users and all(user.kind in ("dynamic-slice", "slice", "gather") for user in users):
            sizes[number] = sum(_array_bytes(user.shape) for user in users)
        elif any(u.kind == "dynamic-update-slice" and u.operands[0] == line.name for u in users):
            # In place: only the update is written.
            update = next(u for u in users if u.kind == "dynamic-update-slice").operands[1]
            result -= sizes[number] - _array_bytes(inner[update].shape)
            sizes[number] = 0
    return result + sum(sizes)


def _product_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """FLOPs of a matrix product of cuBLAS."""
    result = re.search(r"\[([\d,]*)\]", instruction.shape)
    left = re.search(r"\[([\d,]*)\]", shapes[instruction.operands[0]])
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.line)
    sizes = [int(size) for size in left[1].split(",")]
    contracted = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    return 2.0 * contracted * math.prod(int(size) for size in result[1].split(","))


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes of the results of the collectives on each device, by kind, e.g. {"all-reduce": 4096}.

    `hlo` is `compiled.as_text()`. A collective in a loop counts once per iteration.
    """
    total: Counter[str] = Counter()
    for instruction, _, _, times in walk(hlo):
        if found := _COLLECTIVE.search(instruction.line):
            total[found["kind"]] += times * _array_bytes(_result(found))
    return dict(total)


def collective_counts(hlo: str) -> dict[str, int]:
    """Number of collectives in the text of a program: by kind, that block the device until they
    end (the others run beside it), and that add numbers in bfloat16."""
    counts = Counter({"blocking": 0, "bfloat16_sums": 0})
    for found in _COLLECTIVE.finditer(hlo):
        counts[found["kind"]] += 1
        counts["blocking"] += not found["start"]
        adds = found["kind"] in ("all-reduce", "reduce-scatter")
        counts["bfloat16_sums"] += adds and "bf16" in found["result"]
    return dict(counts)


def _result(found: re.Match) -> str:
    """The shape of a collective's result. An asynchronous one that changes the shape has a tuple of
    operands and results."""
    shape = re.sub(r"/\*.*?\*/", "", found["result"])
    if not found["start"] or found["kind"] == "all-reduce":
        return shape
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1]


def _array_bytes(shape: str) -> int:
    """Size of an array, `f32[8,4]{1,0}`, or of a tuple of arrays."""
    return sum(
        _BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in _BYTES
    )
