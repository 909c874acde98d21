"""Damage of bytes and of trees of plain data; every choice is made by a given `Random`."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# What a different result, read without an error, means for an input.
FAILURE, LEGITIMATE = "failed", "changed legitimately"
UNDETECTABLE = "undetectable by format"


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was done to an input."""

    what: str  # in words, for the report
    # What a different result without an error is: FAILURE; LEGITIMATE, since the damage changes the
    # content; or UNDETECTABLE, since the format has no checksum of these bytes.
    if_changed: str = FAILURE


# ---------------------------------------------------------------- bytes


def damage_file(path: Path, random: Random) -> str:
    """Damages a file in one of several ways; returns in words what was done."""
    data = path.read_bytes()
    if random.random() < 0.04:
        path.unlink()
        return f"{path.name} deleted"
    damaged, what = damage_bytes(data, random)
    path.write_bytes(damaged)
    return f"{path.name} ({len(data)} bytes): {what}"


def damage_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """Bytes that differ from `data` in one of several ways, and in words what was done."""
    if not data:
        return b"\0", "a byte written"
    while True:
        damaged, what = random.choice(_BYTE_DAMAGES)(bytearray(data), random)
        if damaged != data:
            return bytes(damaged), what


def _position(size: int, random: Random) -> int:
    """Half of the positions are near the start or the end, where most formats have their tables."""
    near = min(size, 4096)
    choice = random.random()
    if choice < 0.3:
        return random.randrange(near)
    if choice < 0.5:
        return size - 1 - random.randrange(near)
    return random.randrange(size)


def _span(size: int, random: Random) -> tuple[int, int]:
    start = _position(size, random)
    return start, min(size, start + random.choice((1, 4, 16, 64, 512, 4096, max(1, size // 10))))


def _flip_bits(data: bytearray, random: Random) -> tuple[bytearray, str]:
    positions = [_position(len(data), random) for _ in range(random.choice((1, 1, 2, 8)))]
    for position in positions:
        data[position] ^= 1 << random.randrange(8)
    return data, f"bits flipped at {positions}"


def _write_random(data: bytearray, random: Random) -> tuple[bytearray, str]:
    start, end = _span(len(data), random)
    written = random.choice((random.randbytes, bytes))(end - start)
    data[start:end] = written
    return data, f"{'random bytes' if any(written) else 'zeros'} at {start}-{end}"


def _write_number(data: bytearray, random: Random) -> tuple[bytearray, str]:
    """Sizes and counts at the limits of their types are where readers fail."""
    start, size = _position(len(data), random), random.choice((1, 2, 4, 8))
    number = random.choice(
        (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    )
    data[start : start + size] = number.to_bytes(size, random.choice(("little", "big")))
    return data, f"{number:#x} ({size} bytes) at {start}"


def _swap(data: bytearray, random: Random) -> tuple[bytearray, str]:
    first, end = _span(len(data), random)
    length = end - first
    second = random.randrange(len(data) - length + 1)
    one, other = slice(first, end), slice(second, second + length)
    data[one], data[other] = data[other], data[one]
    return data, f"{length} bytes at {first} and {second} swapped"


def _truncate(data: bytearray, random: Random) -> tuple[bytearray, str]:
    kept = random.choice((0, random.randrange(len(data)), _position(len(data), random)))
    return data[:kept], f"truncated to {kept} bytes"


def _remove(data: bytearray, random: Random) -> tuple[bytearray, str]:
    start, end = _span(len(data), random)
    del data[start:end]
    return data, f"bytes {start}-{end} removed"


def _repeat(data: bytearray, random: Random) -> tuple[bytearray, str]:
    start, end = _span(len(data), random)
    data[end:end] = data[start:end]
    return data, f"bytes {start}-{end} repeated"


_BYTE_DAMAGES: tuple[Callable[[bytearray, Random], tuple[bytearray, str]], ...] = (
    *(_flip_bits, _flip_bits, _write_random, _write_random, _write_number, _write_number),
    *(_swap, _truncate, _remove, _repeat),
)

# ---------------------------------------------------------------- text

# Characters and byte sequences that lines, CSV, JSON and UTF-8 treat specially.
_SPECIAL = {
    "U+2028": "\u2028".encode(),
    "U+0085": "\x85".encode(),
    "U+001C": b"\x1c",
    "U+FEFF": "\ufeff".encode(),
    "NUL": b"\0",
    "a quotation mark": b'"',
    "a comma": b",",
    "a tab": b"\t",
    "a carriage return": b"\r",
    "an empty line": b"\n\n",
    "a Latin-1 letter": b"\xe9",
    "a surrogate in UTF-8": b"\xed\xa0\x80",
    "an escaped surrogate": b"\\ud800",
    "100,000 brackets": b"[" * 100_000,
    "5,000 digits": b"9" * 5000,
    "NaN": b"NaN",
}


def damage_text(data: bytes, random: Random) -> tuple[bytes, str]:
    """Damages a text file at places where parsers look: its lines and special characters."""
    lines = data.splitlines(keepends=True)
    choice = random.randrange(6)
    if choice == 0 and len(lines) > 1:
        row = random.randrange(len(lines))
        return b"".join(lines[:row] + lines[row + 1 :]), f"line {row + 1} removed"
    if choice == 1:
        row = random.randrange(len(lines))
        return b"".join(lines[: row + 1] + lines[row:]), f"line {row + 1} repeated"
    if choice == 2:
        return b"\xef\xbb\xbf" + data, "byte order mark"
    if choice == 3:
        encoding = random.choice(("utf-16", "utf-32", "utf-8-sig"))
        return data.decode().encode(encoding), f"encoded as {encoding}"
    name, special = random.choice(list(_SPECIAL.items()))
    position = random.randrange(len(data) + 1)
    return data[:position] + special + data[position:], f"{name} inserted at {position}"


# ---------------------------------------------------------------- plain data

_VALUES = (
    *(None, True, False, 0, -1, 7, 10**30, 1.5, float("nan"), float("inf"), "", " ", "x"),
    *("\u2028", "\x00", "a\nb", "\ud800", [], {}, [[]], [None], {"a": 1}, ["x"], [["x"]], [1]),
)


def damage_tree(tree: Any, random: Random) -> tuple[Any, str]:
    """A copy of nested dicts and lists in which one value is replaced, removed, repeated or
    wrapped; and in words what was done."""
    root = [copy.deepcopy(tree)]
    places: list[tuple[Any, Any, str]] = []

    def walk(container: Any, path: str) -> None:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            places.append((container, key, f"{path}/{key}"))
            if isinstance(container[key], dict | list):
                walk(container[key], f"{path}/{key}")

    walk(root, "")
    container, key, path = random.choice(places)
    choice = random.randrange(6)
    if choice == 0 and container is not root:
        del container[key]
        return root[0], f"{path} removed"
    if choice == 1:
        container[key] = random.choice(([container[key]], {"a": container[key]}))
        return root[0], f"{path} wrapped"
    if choice == 2 and isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
        return root[0], f"{path} repeated"
    if choice == 3 and isinstance(container, dict):
        name = random.choice(("", "\u2028", f"{key} ", "x"))
        container[name] = container.pop(key)
        return root[0], f"{path} renamed to {name!r}"
    container[key] = copy.deepcopy(random.choice(_VALUES))
    return root[0], f"{path} = {container[key]!r}"
