"""Search indexes, opened and queried; damaged in their database and their arrays."""

import contextlib
import functools
import hashlib
import json
import shutil
import sqlite3
from pathlib import Path
from random import Random

import numpy as np
from drl_jax.search.array_files import GROWTH
from drl_jax.search.indexing import update_index
from drl_jax.search.rows import ADDED_COLUMNS

import drl_jax
from benchmarks.fuzz.damage import FAILURE, UNDETECTABLE, Damage, damage_bytes, damage_file
from benchmarks.fuzz.small_run import write_run
from benchmarks.fuzz.videos import write_video
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import BANK_ARRAY
from drl_jax.search.session import SearchSession

_VIDEOS = 4
_STORAGES = ("bfloat16", "int8")
_WITHOUT_CHECKSUMS = "format_3"
_QUERIES = ["a red square moves", "nothing"]


def prepare(root: Path) -> None:
    """Indexes five videos, one of which cannot be read, in each storage."""
    write_run(root / "run")
    videos = root / "videos"
    for number in range(_VIDEOS):
        write_video(videos / f"{number}.mp4", "libx264", "yuv420p", seed=number)
    (videos / "bad.mp4").write_bytes(b"no video")
    for storage in _STORAGES:
        update_index(_model(root), videos, root / "subjects" / storage, storage=storage)
    shutil.copytree(root / "subjects" / _STORAGES[0], root / "subjects" / _WITHOUT_CHECKSUMS)
    remove_checksums(root / "subjects" / _WITHOUT_CHECKSUMS)


def remove_checksums(directory: Path) -> None:
    """Makes an index of format 3: videos with one window, and neither checksums nor a bank."""
    with contextlib.closing(sqlite3.connect(directory / "index.sqlite")) as database, database:
        header = json.loads(database.execute("SELECT value FROM header").fetchone()[0])
        for name in ("crc32", "rows", "bank"):
            del header[name]
        (directory / header["arrays"].pop(BANK_ARRAY)["file"]).unlink()
        database.execute("UPDATE header SET value = ?", (json.dumps({**header, "format": 3}),))
        database.execute(
            "UPDATE videos SET thumbnails ="
            " (SELECT jpeg FROM strips WHERE strips.path = videos.path AND number = 0)"
        )
        database.execute("DROP TABLE strips")
        database.execute("DROP TABLE removed_videos")
        database.execute("DROP INDEX video_slots")
        for column in (*ADDED_COLUMNS, "window_count"):
            database.execute(f"ALTER TABLE videos DROP COLUMN {column}")


@functools.cache
def _model(root: Path) -> RetrievalModel:
    return drl_jax.load(root / "run")


def damage(root: Path, name: str, directory: Path, random: Random) -> Damage:
    """Damages one file."""
    del root
    detectable = UNDETECTABLE if name == _WITHOUT_CHECKSUMS else FAILURE
    arrays = sorted(directory.glob("*.bin"))
    choice = random.random()
    if choice < 0.5:
        return Damage(damage_file(directory / "index.sqlite", random), detectable)
    path = random.choice(arrays)
    if choice < 0.75:
        return Damage(damage_file(path, random), detectable)
    # Most of a file is space for more videos, which nobody reads.
    data = path.read_bytes()
    used = len(data) * _VIDEOS // GROWTH
    start, what = damage_bytes(data[:used], random)
    path.write_bytes(start + data[used:])
    return Damage(f"{path.name}, rows in use: {what}", detectable)


def read(root: Path, name: str, directory: Path) -> str:
    """Hits of two queries with their explanations, the listed files, and the thumbnails."""
    del name
    session = SearchSession(directory, _model(root))
    hits = [[hit.to_json() for hit in found] for found in session.search(_QUERIES, top=4)]
    snapshot = session.snapshot()
    stored = snapshot.stored(snapshot.videos)
    thumbnails = b"".join(snapshot.thumbnails(video) for video in snapshot.videos)
    digest = hashlib.sha256(thumbnails)
    for array_name in sorted(stored):
        digest.update(np.ascontiguousarray(stored[array_name]).tobytes())
    header = {key: value for key, value in snapshot.header.items() if key != "obsolete_files"}
    return json.dumps([hits, repr(list(snapshot.videos)), header, digest.hexdigest()])
