"""Hashes of ids and captions as JSON, which is made in pieces: it may not fit in memory."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from drl_jax.data.splits import Split

# Entries per piece.
_PIECE = 10_000


def content_sha256(frames: str, video_ids: Sequence[str], splits: Mapping[str, Split]) -> str:
    """Hexadecimal SHA-256 of all ids and captions, and of the hash of all frames."""
    return _sha256(_content(frames, video_ids, splits))


def _content(frames: str, video_ids: Sequence[str], splits: Mapping[str, Split]) -> Iterator[str]:
    """The pieces of a JSON object with sorted names."""
    yield f'{{"frames":{_json(frames)},"splits":{{'
    for number, (name, split) in enumerate(sorted(splits.items())):
        yield f'{"," if number else ""}{_json(name)}:{{"captions":'
        yield from _array(split.captions)
        yield f',"reversed_pairs":{_json(split.reversed_pairs.tolist())},"videos":'
        yield from _array(map(int, split.videos))
        yield "}"
    yield '},"video_ids":'
    yield from _array(video_ids)
    yield "}"


def queries_sha256(video_ids: Iterable[str], captions: Sequence[Sequence[str]]) -> str:
    """Hexadecimal SHA-256 of the ids and captions of a split, in their order."""
    return _sha256(itertools.chain("[", _array(video_ids), ",", _array(captions), "]"))


def _sha256(pieces: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode())
    return digest.hexdigest()


def _array(values: Iterable[Any]) -> Iterator[str]:
    values, separator = iter(values), "["
    while piece := list(itertools.islice(values, _PIECE)):
        yield separator + _json(piece)[1:-1]
        separator = ","
    yield "]" if separator == "," else "[]"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
