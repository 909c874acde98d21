"""Search indexes, opened and queried; damaged in their list and in the files of their segments."""

import functools
import hashlib
import json
from pathlib import Path
from random import Random

import drl_jax
from benchmarks.fuzz.damage import FAILURE, Damage, damage_file
from benchmarks.fuzz.small_run import write_run
from benchmarks.fuzz.videos import write_video
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.search.session import Index
from drl_jax.search.update import update_index

_VIDEOS = 4
_STORAGES = ("bfloat16", "int8")
_QUERIES = ["a red square moves", "nothing"]


def prepare(root: Path) -> None:
    """Indexes a film, other videos, and one that cannot be read, in each storage."""
    write_run(root / "run")
    videos = root / "videos"
    for number in range(_VIDEOS):
        rate = 10 if number else 1
        write_video(videos / f"{number}.mp4", "libx264", "yuv420p", number, rate)
    (videos / "bad.mp4").write_bytes(b"no video")
    for storage in _STORAGES:
        update_index(_model(root), videos, root / "subjects" / storage, storage=storage)


@functools.cache
def _model(root: Path) -> RetrievalModel:
    return drl_jax.load(root / "run")


def damage(root: Path, name: str, directory: Path, random: Random) -> Damage:
    """Damages one file: a third of the time the list, else one of a segment."""
    del root, name
    files = sorted(path for path in directory.glob("segments/*/*") if path.stat().st_size)
    path = directory / "index.json" if random.random() < 1 / 3 else random.choice(files)
    return Damage(damage_file(path, random), FAILURE)


def read(root: Path, name: str, directory: Path) -> str:
    """Hits of two queries with their explanations, what is stored, and the thumbnails."""
    del name
    index = Index(directory, _model(root))
    hits = [[hit.to_json() for hit in found] for found in index.search(_QUERIES, top=_VIDEOS)]
    state, digest = index.state(), hashlib.sha256()
    for video in state.videos:
        digest.update(repr(video.record[:7]).encode())  # All but its arrays and thumbnails.
        digest.update(video.thumbnails(range(len(video.times))))
        for array in sorted(video.record.arrays):
            digest.update(video.record.arrays[array].tobytes())
    return json.dumps([hits, state.unsearchable(), state.header, digest.hexdigest()])
