"""Counts the bytes that a compiled program moves between devices, from its HLO text."""

import math
import re
from collections import Counter

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (?P<result>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes of the results of the collectives on each device, by kind, e.g. {"all-reduce": 4096}.

    `hlo` is `compiled.as_text()`. A collective in a loop counts once per iteration.
    """
    # Lines of each computation, by name.
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)

    total: Counter[str] = Counter()

    def walk(computation: str, times: int) -> None:
        for line in bodies[computation]:
            if found := _COLLECTIVE.search(line):
                total[found["kind"]] += times * _array_bytes(_result(found))
            for called in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                walk(called, times * (int(trips[1]) if " while(" in line and trips else 1))

    walk(entry, 1)
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
