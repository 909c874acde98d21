"""The store of an index: immutable segments, and one sealed file that lists them."""

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from support.commands import ROOT, error_of

from drl_jax.runtime import files
from drl_jax.runtime.errors import Unavailable
from drl_jax.runtime.lock import LockError
from drl_jax.runtime.sharding import make_layout
from drl_jax.search import index_file
from drl_jax.search.__main__ import main
from drl_jax.search.encoding import Correction
from drl_jax.search.index_file import FORMAT, IndexPart, IndexWriter, join, read_header
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.reading import strip_arrays
from drl_jax.search.segments import SearchIndexError, Segment, VideoRecord, write_segment

ABOUT = {"videos": "/videos", "fingerprint": "f", "storage": "float32", "fps": 1.0, "bank": []}


def record(path, seed=0, windows=1):
    """A record with random arrays; one of several windows has features of its frames."""
    rng = np.random.default_rng(seed)
    features = 4 * windows if windows > 1 else 0
    arrays = {
        "window.span": rng.random((windows, 2)),
        "window.frames": rng.integers(0, 9, (windows, 4)).astype(np.int32),
        "window.frame_unit": rng.random((windows, 4, 8)).astype(np.float32),
        "frame.time": np.arange(4.0 * windows),
        "feature.image_feat": rng.integers(0, 2**16, (features, 8)).astype(np.uint16),
        **strip_arrays([b"jpeg%d" % seed]),
    }
    return VideoRecord(path, 100 + seed, seed, f"sha{seed}", "", 0.0, 9.5, arrays)


def assert_same_arrays(found, expected):
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def assert_equal(found, expected):
    assert found[:7] == expected[:7]
    assert_same_arrays(found, expected)


def contents(directory):
    """Path -> record of an index, without those that are gone."""
    part = IndexPart(directory)
    return {
        (found := one.segment.read(row)).path: found
        for one in part.listed
        for row in np.flatnonzero(~one.gone)
    }


@pytest.fixture
def index(tmp_path):
    directory = tmp_path / "index"
    with IndexWriter(directory) as writer:
        writer.update_header(**ABOUT)
        writer.put([record("b.mp4", 1), record("a/é.mp4", 2, windows=3), record("c.mp4", 3)])
        writer.put([VideoRecord("bad.mp4", 5, 6, "", "is no video", 300.0), record("d.mp4", 4)])
    return directory


def test_records_are_read_as_they_were_written(index):
    found = contents(index)
    assert_equal(found["a/é.mp4"], record("a/é.mp4", 2, windows=3))
    assert_equal(found["d.mp4"], record("d.mp4", 4))
    assert found["bad.mp4"] == ("bad.mp4", 5, 6, "", "is no video", 300.0, 0.0, {})
    first = IndexPart(index).listed[0].segment
    assert [first.path(row) for row in range(3)] == ["a/é.mp4", "b.mp4", "c.mp4"]
    assert [first.find(path) for path in ("b.mp4", "c.mp4", "d.mp4", "")] == [1, 2, None, None]
    assert first.row_of_window(np.arange(5)).tolist() == [0, 0, 0, 1, 2]
    assert first.read(0).strip(0) == b"jpeg2"


def test_records_are_replaced_removed_and_merged_under_open_readers(index):
    part = IndexPart(index)
    segments = [one.segment for one in part.listed]
    before = {s.directory: [s.read(row) for row in range(len(s))] for s in segments}
    with IndexWriter(index) as writer:
        writer.put([record("b.mp4", 9)], gone=["c.mp4"])
        (known,) = writer.files(["b.mp4", "c.mp4"])
        assert known.sha256 == "sha9"
        writer.merge()  # A third of the first segment, and half of it, are gone.
    assert contents(index).keys() == {"a/é.mp4", "b.mp4", "bad.mp4", "d.mp4"}
    assert_equal(contents(index)["b.mp4"], record("b.mp4", 9))
    assert_equal(contents(index)["a/é.mp4"], record("a/é.mp4", 2, windows=3))
    assert not segments[0].directory.exists()
    for segment in segments:  # What a reader has mapped stays.
        segment.check_files()
        for row, expected in enumerate(before[segment.directory]):
            assert_equal(segment.read(row), expected)


def test_a_merge_stores_thumbnails_with_the_checksums_that_they_had(index):
    segment = IndexPart(index).listed[0].segment
    row = segment.find("b.mp4")
    strips = segment.directory / "byte.strip.bin"
    damaged = strips.read_bytes().replace(segment.read(row).strip(0), b"jpegX")
    strips.write_bytes(damaged)
    with IndexWriter(index) as writer:
        writer.put([], gone=["c.mp4"])
        writer.merge()
    segments = [one.segment for one in IndexPart(index).listed]
    (merged,) = (s for s in segments if s.find("b.mp4") is not None)
    assert merged.directory != segment.directory
    with pytest.raises(ValueError, match=r"thumbnails of 'b\.mp4'"):
        merged.read(merged.find("b.mp4")).strip(0)


def test_segments_of_one_size_are_merged(tmp_path):
    with IndexWriter(tmp_path) as writer:
        writer.update_header(**ABOUT)
        for number in range(40):
            writer.put([record(f"{number}.mp4", number)])
            writer.merge(light=True)
            assert len(writer.listed) <= 16
    assert contents(tmp_path).keys() == {f"{number}.mp4" for number in range(40)}
    assert len(list((tmp_path / "segments").iterdir())) == len(read_header(tmp_path)["segments"])


def test_each_flipped_bit_is_noticed(tmp_path):
    """Of any file of a segment; where a bit is flipped, the features of one video are refused."""
    rng = random.Random(0)
    entry = write_segment(tmp_path, [record("a.mp4", 1), record("b.mp4", 2, windows=3)])
    paths = sorted(path for path in (tmp_path / entry["name"]).iterdir() if path.stat().st_size)
    for _ in range(100):
        path = rng.choice(paths)
        content = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        healthy = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"differ|bytes, not"):
            _ = [Segment(tmp_path, entry).read(row).strip(0) for row in range(2)]
        path.write_bytes(healthy)


def test_files_that_change_under_a_reader_are_noticed(index):
    segment = IndexPart(index).listed[0].segment
    segment.read(0)
    path = segment.directory / "window.frame_unit.bin"
    with path.open("r+b") as file:  # In place, as a failing disk or another program would.
        file.write(bytes(64))
    segment.check_files()
    with pytest.raises(ValueError, match=r"features of 'a/é.mp4' differ from their checksum"):
        segment.read(0)
    os.truncate(path, 10)
    with pytest.raises(ValueError, match="was cut"):
        segment.check_files()


def test_damage_of_the_list_and_of_a_segment(index, capsys):
    first = IndexPart(index).listed[0].segment.directory
    (first / "videos.arrow").write_bytes(b"x" * 100)
    with pytest.raises(SearchIndexError, match=r"is damaged .* only the damaged ones are decoded"):
        IndexPart(index)
    with IndexWriter(index) as writer:  # Its videos are unknown now, and are indexed again.
        assert {file.path for file in writer.files(None)} == {"bad.mp4", "d.mp4"}
    assert "3 videos are indexed again: a segment is damaged" in capsys.readouterr().out
    assert (index / "damaged_segments" / first.name / "videos.arrow").exists()
    text = (index / "index.json").read_text()
    for damaged in (text[:-40], text.replace('"fps": 1.0', '"fps": 2.0'), "[]", ""):
        (index / "index.json").write_text(damaged)
        with pytest.raises(SearchIndexError, match=r"is damaged .* another directory, or restore"):
            read_header(index)
        with pytest.raises(SearchIndexError, match="is damaged"):
            IndexWriter(index)


def test_indexes_of_other_versions_are_one_line(tmp_path):
    with pytest.raises(SearchIndexError, match=r"no index in .* make it with .*python -m drl_jax"):
        read_header(tmp_path)
    (tmp_path / "index.sqlite").touch()  # What versions 2 to 6 wrote.
    for opens in (read_header, IndexWriter):
        with pytest.raises(SearchIndexError, match=r"was made by an earlier version; make it anew"):
            opens(tmp_path)
    for version in (FORMAT - 1, FORMAT + 1):
        files.write_json(tmp_path / "index.json", files.seal({"format": version, "other": 1}))
        for opens in (read_header, IndexWriter):
            line = rf"has format {version}, and this version reads {FORMAT}; .* make it anew with"
            with pytest.raises(SearchIndexError, match=line):
                opens(tmp_path)


def test_a_refusal_of_the_system_is_no_damage(index, monkeypatch):
    def refused(*arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a file")

    before, listed = contents(index).keys(), sorted(index.rglob("*"))
    for module, name in ((index_file, "Segment"), (index_file, "write_segment")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refused)
            with pytest.raises(Unavailable, match="EIO"), IndexWriter(index) as writer:
                writer.put([record("new.mp4")])
    assert contents(index).keys() == before
    assert sorted(index.rglob("*")) == listed


def test_one_process_writes(index):
    with IndexWriter(index), pytest.raises(LockError, match=r"is in use by process"):
        IndexWriter(index)


def write_for_ever(directory, written):
    with IndexWriter(directory) as writer:
        if not writer.header:
            writer.update_header(**ABOUT)
        for number in range(len(list(writer.files(None))), 100_000):
            writer.put([record(f"{number:06}.mp4", number)])
            writer.merge()
            written.send(number)


def test_a_killed_writer_loses_nothing(tmp_path, monkeypatch):
    """Killed at random moments, among them between a segment and its commit, and while merging."""
    # The processes are forks of one that has imported this module.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    rng, stored, index = random.Random(0), 0, tmp_path / "index"
    for _ in range(6):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=write_for_ever, args=(index, sender))
        process.start()
        sender.close()
        last = [receiver.recv() for _ in range(rng.randrange(1, 25))][-1]
        time.sleep(rng.random() / 50)
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                last = receiver.recv()
        found = contents(index)
        assert sorted(found) == [f"{number:06}.mp4" for number in range(len(found))]
        assert len(found) >= last + 1 > stored
        stored = len(found)
        for number in (0, stored // 2, stored - 1):
            assert_equal(found[f"{number:06}.mp4"], record(f"{number:06}.mp4", number))
    with IndexWriter(index) as writer:
        listed = {entry["name"] for entry in writer.header["segments"]}
        assert {path.name for path in (index / "segments").iterdir()} == listed


def test_indexes_that_cannot_be_joined(index, tmp_path, capsys):
    other, joined = shutil.copytree(index, tmp_path / "other"), tmp_path / "joined"
    command = ["join", f"--index={joined}", str(index)]
    line = error_of("drl_jax.search", *command, str(other), capsys=capsys)
    assert "is in two shards" in line
    with IndexWriter(other) as writer:
        writer.update_header(videos="/elsewhere", shard="1/3")
    assert main([*command, str(other)]) == 0
    printed = capsys.readouterr().out
    assert "2 shards, 10 files and 12 windows, open as one" in printed
    assert "shards that were not given: 0/3 2/3" in printed
    # Each once, also if a shard is named twice, or joins others.
    assert len(join(tmp_path / "again", [index, index, joined])) == 2
    for name, value, what in (
        ("storage", "int8", "storage"),
        ("fingerprint", "other", "model"),
        ("bank", ["a"], "captions of weak matches"),
        ("hubness", {}, "bank"),
        ("fps", 2.0, "fps"),
    ):
        with IndexWriter(other) as writer:
            writer.update_header(**{**ABOUT, "hubness": None, "videos": "/elsewhere", name: value})
        with pytest.raises(SearchIndexError, match=f"they differ in their {what}"):
            join(tmp_path / "none", [index, other])
    with pytest.raises(SearchIndexError, match="no index in"):
        join(tmp_path / "none", [index, tmp_path / "away"])
    assert not (tmp_path / "none").exists()
    with pytest.raises(SearchIndexError, match="is an index with videos"):
        join(index, [other])


def test_biases_of_hubs_are_read_beside_files_that_cannot_be_searched(tmp_path):
    model = SimpleNamespace(fingerprint="f", source={}, layout=make_layout())
    numbers = {"window.hubness": np.array([[3.0, 4.0], [5.0, 6.0]], np.float32)}
    good = record("good.mp4", windows=2)
    with IndexWriter(tmp_path / "index") as writer:
        writer.update_header(**ABOUT, hubness={"columns": ["is:2", "nnn:16"]})
        writer.put([VideoRecord("bad.mp4", 1, 1, error="is not a video")])
        writer.put([good._replace(arrays={**good.arrays, **numbers})])
    index = OpenIndex(tmp_path / "index", model)
    assert index.biases(Correction("is:2")).tolist() == [3, 5]
    assert index.biases(Correction("nnn:16", 0.5)).tolist() == [2, 3]


def test_a_merge_does_not_hold_all_thumbnails_in_memory(tmp_path):
    size, count = 2**20, 16
    with IndexWriter(tmp_path / "index") as writer:
        writer.update_header(**ABOUT)
        for number in range(count):
            video = record(f"{number}.mp4")
            strips = strip_arrays([bytes([number]) * size])
            writer.put([video._replace(arrays={**video.arrays, **strips})])
        tracemalloc.start()
        writer.merge()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        segment = writer.listed[0].segment
        assert len(writer.listed) == 1
        assert peak < count * size / 4
        assert segment.read(segment.find("3.mp4")).strip(0) == bytes([3]) * size
