"""`custom` from WebDataset shards and Parquet files: what is read, what is refused, the build."""

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.commands import error_of
from support.containers import write_parquet, write_tar
from support.files import contents
from support.videos import SHARED, numbered_frames, write_video

from data_prep import parquet_files
from data_prep.annotations import AnnotationError
from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.datasets import builder_class
from data_prep.decode import FrameCache
from data_prep.locations import Clip, name_below
from data_prep.parquet_files import ParquetCell, ParquetTable
from data_prep.tar_files import TarMember, read_members
from data_prep.video_folder import make_plan
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.records import VideoDataset
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import inspect_video, read_frames
from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import Unavailable, UserError

STORAGE = StorageSpec(FrameForm(32), 4, "raw")
BUILT = Path("custom") / STORAGE.name / "1.0.0"
SIZE = ("--image_size=32", "--max_frames=4", "--storage=raw")


def read(path):
    return builder_class("custom").read_annotations(path)


def frames_or_error(location, span=None):
    try:
        return read_frames(location, STORAGE.max_frames, STORAGE.form, span)
    except VideoError as error:
        return str(error)


def captions_of(annotations):
    return {
        name: {entry.video_id: entry.captions for entry in split}
        for name, split in annotations.splits.items()
    }


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[bytes]:
    """The contents of four video files of 1 to 4 seconds."""
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    contents = []
    for seconds in range(1, 5):
        write_video(path, numbered_frames(10 * seconds + 5)[5:], fps=10)  # Without black frames.
        contents.append(path.read_bytes())
    return contents


@pytest.fixture(scope="module")
def sources(videos, tmp_path_factory) -> Path:
    """The same videos as files, in shards, and in Parquet files."""
    root = tmp_path_factory.mktemp("sources")
    (root / "files").mkdir()
    for number, content in enumerate(videos):
        (root / "files" / f"{number}.mp4").write_bytes(content)
    write_tar(
        root / "shards" / "train" / "0.tar",
        [
            ("0001.mp4", videos[0]),
            ("0001.txt", "one"),
            ("0002.json", json.dumps({"caption": "two", "start": 0.5, "end": "0:01.5"})),
            ("0002.mp4", videos[1]),
            ("alone.mp4", videos[0]),
            ("gone.txt", "no video"),
            ("0003.mp4", b"no video"),
            ("0003.txt", "text"),
        ],
    )
    write_tar(root / "shards" / "val" / "0.tar", [("0001.mp4", videos[2]), ("0001.txt", "three")])
    write_tar(root / "shards" / "test" / "0.tar", [("0001.mp4", videos[3]), ("0001.txt", "four")])
    table = {
        "bytes": [videos[3], *videos[:3]],
        "caption": ["four", "one", "two", "three"],
        "start": [None, None, 0.5, None],
        "end": [None, None, 1.5, None],
        "split": ["test", "train", "train", "val"],
    }
    for number in range(2):
        part = {name: column[2 * number :][:2] for name, column in table.items()}
        write_parquet(root / "tables" / f"{number}.parquet", part, row_group_size=1)
    return root


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    """A copy of the shards, and the dataset that their build writes."""
    root = Path(shutil.copytree(sources, tmp_path_factory.mktemp("built") / "root"))
    assert build(["custom", f"--annotations={root / 'shards'}", f"--data_dir={root}", *SIZE]) == 0
    return root


def test_builds_from_shards_and_parquet_files_have_the_frames_of_the_files(
    sources, built, tmp_path
):
    flags = [f"--annotations={sources / 'tables'}", f"--data_dir={tmp_path}"]
    assert build(["custom", *flags, *SIZE]) == 0
    shards, tables = VideoDataset(built / BUILT), VideoDataset(tmp_path / BUILT)
    expected = {number: sources / "files" / f"{number}.mp4" for number in range(4)}
    expected = [
        frames_or_error(expected[number], (0.5, 1.5) if number == 1 else None)
        for number in (3, 0, 1, 2)
    ]
    assert [len(frames) for frames in expected] == [4, 1, 2, 3]
    for dataset in (shards, tables):
        assert len(dataset) == 4
        for number, frames in enumerate(expected):
            np.testing.assert_array_equal(dataset.read_frames(number), frames)
    assert list(tables.sources) == [
        ["0.parquet/0"],
        ["0.parquet/1"],
        ["1.parquet/0", 0.5, 1.5],
        ["1.parquet/1"],
    ]
    # What cannot be used is left out with its reason, and costs no other video.
    assert list(shards.video_ids) == ["test/0/0001", "train/0/0001", "train/0/0002", "val/0/0001"]
    assert shards.sources[2] == ["train/0.tar/0002.mp4", 0.5, 1.5]
    assert shards.manifest["left_out"] == {
        "train/0/gone": "its shard has its txt, but no video",
        "train/0/0003": "is not a video: its content is text that starts with 'no video'",
    }
    assert list(shards.manifest["annotations"]) == ["test/0.tar", "train/0.tar", "val/0.tar"]


def test_a_second_build_finds_the_first_one_and_its_frames(built, videos, capsys):
    shards = built / "shards"
    flags = ["custom", f"--annotations={shards}", f"--data_dir={built}", *SIZE]
    before = contents(built / BUILT)
    cached = {path: path.stat().st_mtime_ns for path in (built / "cache").rglob("*.npz")}
    assert len(cached) == 4
    assert build(flags) == 0
    assert "is already built" in capsys.readouterr().out
    # The folder of files is not needed, and the command says so.
    assert build([*flags, f"--videos={built / 'files'}", "--overwrite"]) == 0
    assert f"--videos is not used: the videos are inside {shards}" in capsys.readouterr().out
    assert contents(built / BUILT) == before
    assert {path: path.stat().st_mtime_ns for path in (built / "cache").rglob("*.npz")} == cached
    write_tar(shards / "val" / "0.tar", [("0001.mp4", videos[2]), ("0001.txt", "other")])
    line = error_of("data_prep.build", *flags, capsys=capsys)
    assert "was built from other annotation files (val/0.tar has changed)" in line


def test_the_validator_reads_shards(sources, videos, tmp_path, capsys):
    shards = Path(shutil.copytree(sources / "shards", tmp_path / "shards"))
    write_tar(shards / "val" / "1.tar", [("0009.mp4", videos[2]), ("0009.txt", "Three")])
    write_tar(
        shards / "val" / "2.tar", [("0.mp4", videos[0][:900]), ("0.json", '{"captions":["x"]}')]
    )
    assert check(["custom", f"--annotations={shards}", f"--data_dir={tmp_path}", *SIZE]) == 1
    report = json.loads((tmp_path / "custom" / "check.json").read_text())
    assert report["missing"] == {"train/0/gone": "its shard has its txt, but no video"}
    assert report["unusable"].keys() == {"train/0/0003", "val/2/0"}
    assert report["duplicate_videos"] == [
        {"videos": ["val/0/0001", "val/1/0009"], "splits": ["val"]}
    ]
    assert report["unannotated_files"] == ["train/0.tar/alone.mp4"]
    assert "1 video files have no annotation" in capsys.readouterr().out


# ---------------------------------------------------------------- what is read


def test_keys_captions_and_splits_of_shards(tmp_path):
    write_tar(
        tmp_path / "b.tar",
        [
            # Members of a sample need not follow each other. Other members are not read.
            ("./x/1.txt", " one \n"),
            ("./x/2.webm", b"2"),
            ("x/.hidden.mp4", b""),
            ("x/._1.mp4", b"AppleDouble"),
            ("./x/2.JSON", '{"caption": "two", "captions": ["three", "two"], "url": "https://a"}'),
            ("./x/2.txt", "two"),
            ("./x/1.cam.MKV", b"11"),
            ("./x/1.jpg", b"picture"),
            ("./x/3.mp4", b"3"),
            ("./x/3.json", '{"caption": null, "clips": [[1, 2]]}'),
            ("./x/4.mp4", b"4"),
            ("./x/4.txt", " \n"),
            ("./x/5.mp4", b"5"),
            ("./x/5.json", '{"caption": "", "captions": ["five"], "split": "test"}'),
            ("__meta__", b"x"),
        ],
    )
    write_tar(
        tmp_path / "a.tar", [("0.mp4", b"0"), ("0.json", '{"caption": "zero", "split": "val"}')]
    )
    with pytest.raises(AnnotationError, match="some rows have a split and others have none"):
        read(tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "b.tar").rename(tmp_path / "training" / "b.tar")
    annotations = read(tmp_path)
    assert captions_of(annotations) == {
        "val": {"a/0": ["zero"]},
        "train": {"training/b/x/1": ["one"], "training/b/x/2": ["two", "three"]},
        "test": {"training/b/x/5": ["five"]},
    }
    found = annotations.contained
    assert found.unannotated == ["training/b.tar/./x/3.mp4"]
    contents = {clip.video_id: clip.location.open().read() for clip in found.clips}
    assert contents == {
        "a/0": b"0", "training/b/x/1": b"11", "training/b/x/2": b"2", "training/b/x/5": b"5"
    }  # fmt: skip
    assert name_below(found.clips[0].location, tmp_path) == "a.tar/0.mp4"


def test_a_file_a_folder_and_a_pattern(tmp_path):
    for name in ("train-0", "validation-0", "test_1"):
        write_tar(tmp_path / "all" / f"{name}.tar", [("0.mp4", b"0"), ("0.txt", name)])
        columns = {"bytes": [b"0"], "caption": [name]}
        write_parquet(tmp_path / "tables" / f"{name}.parquet", columns)
    # The log of video2dataset.
    write_parquet(tmp_path / "all" / "train-0.parquet", {"key": ["0"], "status": ["success"]})
    expected = {"train": ["train-0"], "val": ["validation-0"], "test": ["test_1"]}

    def splits(path):
        annotations = read(path)
        folder = annotations.contained.folder
        assert all(
            clip.location.path.is_relative_to(folder) for clip in annotations.contained.clips
        )
        return {name: [e.captions[0] for e in split] for name, split in annotations.splits.items()}

    assert splits(tmp_path / "all") == splits(tmp_path / "tables") == expected
    assert splits(tmp_path / "all" / "test_1.tar") == {"test": ["test_1"]}
    assert splits(tmp_path / "*" / "t*.tar") == {"test": ["test_1"], "train": ["train-0"]}
    assert splits(tmp_path / "tables" / "*.parquet") == expected


def test_columns_of_parquet_files(tmp_path, videos):
    """The same rows in the types that pandas, polars and Hugging Face's datasets write."""
    nan = float("nan")
    plain = {
        "ID": [7, 8],
        "Caption": ["one", "two"],
        "captions": [["three"], None],
        "start": [nan, 0.5],
        "end": [nan, 2.0],
        "url": ["https://a", None],
    }
    struct = [{"bytes": content, "path": None} for content in videos[:2]]
    large = {
        "key": pa.array(["7", "8"], pa.large_string()),
        "caption": pa.array(["one", "two"]).dictionary_encode(),
        "captions": pa.array([["three"], []], pa.large_list(pa.large_string())),
        "start": [None, "0:00.5"],
        "end": [None, "0:02"],
    }
    for columns in (
        {**plain, "bytes": videos[:2]},
        {**large, "bytes": pa.array(videos[:2], pa.large_binary())},
        {**large, "video": struct},
        {**plain, "video": pa.array(videos[:2], pa.binary())},
        {**plain, "video": ["0.mp4", "1.mp4"], "bytes": videos[:2]},
    ):
        annotations = read(write_parquet(tmp_path / "mine.parquet", columns))
        assert captions_of(annotations) == {"train": {"7": ["one", "three"], "8": ["two"]}}
        clips = annotations.contained.clips
        assert [clip.span for clip in clips] == [None, (0.5, 2.0)]
        assert [clip.location.open().read() for clip in clips] == videos[:2]
        names = [name_below(clip.location, tmp_path) for clip in clips]
        assert names == ["mine.parquet/0", "mine.parquet/1"]


def test_a_parquet_file_of_paths_is_like_a_csv(sources, tmp_path, capsys):
    columns = {
        "video": ["0.mp4", "1.mp4", "0.mp4", "2.mp4"],
        "caption": ["one", "two", "other", "three"],
        "start": [None, 0.5, None, None],
        "end": [None, 1.5, None, None],
    }
    table = write_parquet(tmp_path / "mine.parquet", columns)
    rows = zip(*[["" if v is None else str(v) for v in c] for c in columns.values()], strict=True)
    listing = tmp_path / "mine.csv"
    listing.write_text("\n".join([",".join(columns), *map(",".join, rows)]))
    one, other = read(table), read(listing)
    assert captions_of(one) == captions_of(other)
    assert one.sources == other.sources
    plans = [make_plan(annotations, sources / "files", {}) for annotations in (one, other)]
    assert plans[0].clips == plans[1].clips
    assert len(plans[0].clips) == 3
    flags = ("custom", f"--annotations={table}", f"--data_dir={tmp_path / 'data'}")
    for module in ("data_prep.build", "data_prep.check"):
        line = error_of(module, *flags, capsys=capsys)
        assert f"custom needs --videos=DIR: {table} names video files" in line


def test_annotations_are_read_without_the_bytes_of_videos(tmp_path):
    """A tar file of 60 GB with holes, and a Parquet file whose videos are most of it."""
    path = write_tar(tmp_path / "big.tar", [("0.txt", "zero"), ("0.mp4", b"")])
    member = tarfile.TarInfo("0.mp4")
    member.size = 60 << 30
    with path.open("r+b") as file:
        file.seek(2 * tarfile.BLOCKSIZE)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 * tarfile.BLOCKSIZE + member.size)
        file.seek(0, os.SEEK_END)
        file.write(
            write_tar(tmp_path / "end.tar", [("1.mp4", b"1"), ("1.txt", "one")]).read_bytes()
        )
    content = random.Random(0).randbytes(1 << 20)
    columns = {"bytes": [content] * 8, "caption": ["x"] * 8}
    table = write_parquet(tmp_path / "big.parquet", columns, use_dictionary=False)
    assert table.stat().st_size > 8 << 20
    for path, clips in ((tmp_path / "big.tar", 2), (table, 8)):
        before = _bytes_read()
        assert len(read(path).contained.clips) == clips
        assert _bytes_read() - before < 1 << 20


def _bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


# ---------------------------------------------------------------- what is refused

MP4 = ("0.mp4", b"0")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([MP4, ("0.json", "{")], r"mine/0: its .json is not JSON \(Expecting"),
        ([MP4, ("0.json", "[1]")], r'mine/0: its .json is not an object: {"caption": ..}'),
        ([MP4, ("0.txt", b"Caf\xe9")], r"caption is not text in UTF-8 \(byte 0xe9\); save"),
        ([MP4, ("0.json", '{"caption": 7}')], "mine/0: caption must be a text, not 7"),
        ([MP4, ("0.json", '{"captions": "a"}')], "mine/0: captions must be a list"),
        ([MP4, ("0.json", '{"captions": ["a", ""]}')], "mine/0: caption is empty"),
        ([MP4, ("0.json", '{"caption": "a", "end": -1}')], "mine/0: end must be after start"),
        ([MP4, ("0.json", '{"caption": "a", "split": "Test"}')], "0: 'Test' is not a split"),
        (
            [MP4, ("0.left.avi", b"")],
            "tar: 0.mp4 at byte 0 and 0.left.avi at byte 1024 have the key '0'",
        ),
        ([MP4, ("0.txt", "a"), ("0.TXT", "b")], "a key has one of the members .txt"),
        ([MP4, ("1.txt", "a")], "mine.tar has no video with a caption: each needs members of one"),
        ([("0.jpg", b""), ("0.cls", "1")], "mine.tar has no video with a caption"),
        ([], "mine.tar has no video with a caption"),
    ],
)
def test_a_wrong_member_is_named(members, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read(write_tar(tmp_path / "mine.tar", members))


def changed(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def member(name, kind=tarfile.REGTYPE, content=b"", link=""):
    """Blocks of a member of any kind; tarfile writes no sparse files."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
    if kind == tarfile.GNUTYPE_SPARSE:  # One piece of data at 0, and a size of 1,000.
        numbers = [f"{number:011o}\0".encode() for number in (0, len(content), 1000)]
        block[386:410], block[483:495] = b"".join(numbers[:2]), numbers[2]
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    return bytes(block) + content + bytes(-len(content) % 512)


LEFT_OUT = {
    "bytes": (
        [member("bytes.txt", content=b"caf\xe9")],
        "caption is not text in UTF-8 (byte 0xe9); ",
    ),
    "hard": (
        [member("hard.mp4", tarfile.LNKTYPE, link="0.mp4")],
        "its .mp4 is a link, not a file;",
    ),
    "soft": (
        [member("soft.txt", tarfile.SYMTYPE, link="0.txt")],
        "its .txt is a link, not a file;",
    ),
    "pipe": ([member("pipe.mp4", tarfile.FIFOTYPE)], "its .mp4 is a device or a pipe, not a file"),
    "sparse": (
        [member("sparse.mp4", tarfile.GNUTYPE_SPARSE, b"0")],
        "its .mp4 is stored as a spars",
    ),
    "a\\nb": ([member("a\nb.mp4"), member("a\nb.txt", content=b"x")], "its .mp4 has a line end or"),
    "a\\nb/c": ([member("a\nb/c.txt", content=b"x")], "its .txt has a line end or a tab in its na"),
    "/abs": (
        [member("/abs.mp4"), member("/abs.txt", content=b"x")],
        "its .mp4 leads out of the fol",
    ),
    "../up": ([member("../up.mp4")], "its .mp4 leads out of the folder by its name, ../up.mp4"),
    "caf\\udce9": ([member("caf\udce9.mp4")], "its .mp4 is not text in UTF-8 (byte 0xe9); save"),
    "json": (
        [member("json.json", content=b'{"caption": "a", "caption": "b"}')],
        "its .json is not",
    ),
    "blank": ([member("blank.mp4"), member("blank.txt", content=b" \n")], "its .txt is empty"),
    "fields": ([member("fields.json", content=b'{"captions": "a"}')], "captions must be a list"),
}


def test_one_bad_member_costs_its_sample_only(videos, tmp_path, capsys):
    """The members of `LEFT_OUT`, twice as many good ones, and one caption without a video."""
    path = tmp_path / "mine.tar"
    good = [
        (f"{n}.{suffix}", text)
        for n in range(24)
        for suffix, text in (("mp4", videos[0]), ("txt", "x"))
    ]
    write_tar(path, [*good, ("alone.txt", "y")])
    end = path.read_bytes().rstrip(b"\0")
    end += bytes(-len(end) % 512)
    bad = b"".join(block for blocks, _ in LEFT_OUT.values() for block in blocks)
    path.write_bytes(end + bad + bytes(1024))
    flags = ["custom", f"--annotations={path}", f"--data_dir={tmp_path}", *SIZE]
    assert build(flags) == 0
    left_out = VideoDataset(tmp_path / BUILT).manifest["left_out"]
    assert left_out.pop("mine/alone") == "its shard has its txt, but no video"
    assert left_out.keys() == {f"mine/{key}" for key in LEFT_OUT}
    for key, (_, reason) in LEFT_OUT.items():
        assert left_out[f"mine/{key}"].startswith(reason)
    assert "13 rows are left out (the first: mine/bytes: caption is not" in capsys.readouterr().out
    # More than half are lost.
    write_tar(path, good[:22])
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end + bytes(-len(end) % 512) + bad + bytes(1024))
    line = error_of("data_prep.build", *flags, "--overwrite", capsys=capsys)
    assert "13 of the 24 videos of" in line
    assert "cannot be used, and a build may lose at most 50%" in line
    assert len(VideoDataset(tmp_path / BUILT)) == 24


def test_wrong_rows_of_parquet_files_are_left_out(tmp_path):
    # Writers in C++ do not check that a string is UTF-8.
    cells = pa.array([b"one", b"caf\xe9", b"two", b" ", b"three", b"four", b"five"])
    texts = pa.Array.from_buffers(pa.string(), len(cells), cells.buffers())
    table = {"video": ["a", "b", "c", "d", None, "e", "f"], "caption": texts}
    annotations = read(write_parquet(tmp_path / "train-paths.parquet", table))
    expected = {"a": ["one"], "c": ["two"], "e": ["four"], "f": ["five"]}
    assert captions_of(annotations) == {"train": expected}
    not_text = "caption is not text in UTF-8 (byte 0xe9); save the file as UTF-8"
    assert annotations.left_out == {
        "train-paths.parquet, row 1 (from 0)": not_text,
        "train-paths.parquet, row 3 (from 0)": "caption is empty",
        "train-paths.parquet, row 4 (from 0)": "video is empty",
    }
    lists = pa.ListArray.from_arrays(pa.array(range(8)), texts)
    ends = [None, None, None, None, -1.0, None, None]
    table = {"id": ["a", "b", "c", "d\td", "e", "f", "g"], "captions": lists, "end": ends}
    table = {"bytes": [b"0"] * 7, **table}
    annotations = read(write_parquet(tmp_path / "train-inside.parquet", table))
    expected = {"a": ["one"], "c": ["two"], "f": ["four"], "g": ["five"]}
    assert captions_of(annotations) == {"train": expected}
    assert [clip.video_id for clip in annotations.contained.clips] == list(expected)
    assert annotations.left_out == {
        "train-inside.parquet, row 1 (from 0)": not_text,
        "train-inside.parquet, row 3 (from 0)": "id has a line end or a tab in its name",
        "train-inside.parquet, row 4 (from 0)": "end must be after start, and start 0"
        " or more; got 0.0 to -1.0",
    }


def test_a_linked_tar_file_is_one_file(tmp_path):
    members = [("0.mp4", b"0"), ("0.txt", "x"), ("1.mp4", b"1"), ("1.txt", "y")]
    tar = write_tar(tmp_path / "all" / "train" / "0.tar", members)
    (tar.parent / "1.tar").symlink_to("0.tar")
    plan = make_plan(read(tmp_path / "all"), None, {})
    assert captions_of(plan.annotations) == {"train": {"train/0/0": ["x"], "train/0/1": ["y"]}}
    assert plan.merged == {"train/1/0": "train/0/0", "train/1/1": "train/0/1"}
    (tmp_path / "all" / "test").mkdir()
    (tmp_path / "all" / "test" / "5.tar").hardlink_to(tar)
    with pytest.raises(
        AnnotationError, match=r"'test/5/0' of test and 'train/0/0' of train are the"
    ):
        make_plan(read(tmp_path / "all"), None, {})


def test_files_that_give_the_same_ids_are_refused(tmp_path):
    for name in ("a.tar", "a.TAR"):
        write_tar(tmp_path / name, [("0.mp4", b"0"), ("0.txt", name)])
    with pytest.raises(
        AnnotationError, match=r"a.TAR and .*a.tar would give their videos the same"
    ):
        read(tmp_path)


def test_the_split_of_a_shard_does_not_depend_on_how_its_folder_is_written(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "test" / "0.tar", [("0.mp4", b"0"), ("0.txt", "x")])
    (tar.parent / "empty").mkdir()
    monkeypatch.chdir(tar.parent)
    for written in (".", "0.tar", "./*.tar", "empty/..", "../test", tar.parent):
        assert captions_of(read(Path(written))) == {"test": {"0/0": ["x"]}}


# A tar file of two samples: the video has 5,000 bytes, and each member a header of 512.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(lambda b: b[:3000]), r"damaged or truncated \(.*unexpected end of data"),
        (changed(lambda b: b[: 512 + 5120]), r"it ends at byte 5632 without the mark of its end"),
        (changed(lambda b: b[: 512 + 5120 + 100]), "it ends at byte 5732 without the mark"),
        (changed(lambda b: b[: 512 + 5120 + 514]), r"damaged or truncated \(it ends inside 0.txt"),
        (changed(lambda b: b[:5632] + b"x" * 512 + b[6144:]), "no header of a member at byte 5632"),
        (changed(lambda b: b"x" * 512 + b[512:]), "damaged or truncated"),
        (changed(lambda b: b"text"), r"damaged or truncated \(ReadError"),
        (changed(lambda b: b""), "mine.tar is empty; it must be a tar file"),
        (changed(lambda b: b + b), "has data after its end at byte 6656: it is"),
        (changed(lambda b: b"\x1f\x8b" + b), "mine.tar is compressed, .* file with gunzip"),
        (changed(lambda b: b"\x28\xb5\x2f\xfd" + b), "compressed, .* file with unzstd"),
        (Path.unlink, "no .tar file and no .parquet file in "),
    ],
)  # fmt: skip
def test_a_damaged_tar_file_is_one_line(damage, message, tmp_path, capsys):
    path = write_tar(tmp_path / "shards" / "mine.tar", [("0.mp4", b"0" * 5000), ("0.txt", "zero")])
    damage(path)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "shards")
    flags = (f"--annotations={tmp_path / 'shards'}", f"--data_dir={tmp_path / 'data'}")
    assert "shards" in error_of("data_prep.build", "custom", *flags, capsys=capsys)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a"], "file": ["b"]}, "mine.parquet has no video; it has caption, file"),
        ({"video": ["a"]}, "mine.parquet has no caption; it has video"),
        ({"bytes": [b"0"]}, "mine.parquet has no caption; it has bytes"),
        ({"bytes": ["https://a"], "caption": ["b"]}, "column bytes has the type string, but"),
        ({"video": ["http://a"], "caption": ["b"]}, r"row 0 .*: video is a URL \(http://a\)"),
        ({"video": [7], "caption": ["b"]}, "the column video has the type int64, but"),
        ({"bytes": [b"0"], "caption": [7.5]}, "the column caption has the type double, but"),
        ({"video": [None], "caption": ["c"]}, r"parquet, row 0 \(from 0\): video is empty"),
        ({"bytes": [b"0"], "caption": [None]}, "mine.parquet has no video with a caption"),
        ({"bytes": [b"0"], "captions": ["a"]}, r"row 0 \(from 0\): captions must be a list"),
        ({"bytes": [b"0"], "captions": [[None]]}, "row 0 .*: caption must be a text, not None"),
        ({"bytes": [b"0"], "caption": ["a"], "start": [1.0]}, "start is set but end is not"),
        ({"bytes": [b"0"], "caption": ["a"], "end": [True]}, "start and end must be seconds"),
        ({"bytes": [b"0"], "caption": ["a"], "split": ["dev"]}, "did you mean val"),
        ({"bytes": [b"0"] * 2, "caption": ["a"] * 2, "id": [1, 1]},
         r"row 1 \(from 0\) has the id '1' of an earlier row; a video with several"),
        ({"bytes": [b"0"], "caption": ["a"], "id": [1.5]}, "id must be a text or a whole number"),
        ({"bytes": [], "caption": []}, "mine.parquet has no video with a caption"),
        ({"bytes": [b"0"] * 2, "caption": ["a"] * 2, "split": ["val", None]},
         "some rows have a split"),
        ({"caption": ["a"], "Caption ": ["b"]}, "mine.parquet has two columns 'caption'"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named(columns, message, tmp_path):
    if not columns.get("bytes", [1]):
        columns = {"bytes": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}
    with pytest.raises(UserError, match=message):
        read(write_parquet(tmp_path / "mine.parquet", columns))


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-20],
        lambda b: b"text",
        lambda b: b"",
        lambda b: b[:4] + b"\xff" * 200 + b[204:],
    ],
)
def test_a_damaged_parquet_file_is_one_line(damage, tmp_path, capsys):
    columns = {"caption": ["a" * 50] * 9, "bytes": [b"0"] * 9}
    path = write_parquet(tmp_path / "mine.parquet", columns, compression="none")
    path.write_bytes(damage(path.read_bytes()))
    flags = (f"--annotations={path}", f"--data_dir={tmp_path / 'data'}")
    line = error_of("data_prep.build", "custom", *flags, capsys=capsys)
    assert "mine.parquet is damaged or no Parquet file (" in line


def test_tables_with_and_without_videos_are_built_apart(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"video": ["a"], "caption": ["b"]})
    write_parquet(tmp_path / "b.parquet", {"bytes": [b"0"], "caption": ["b"]})
    with pytest.raises(AnnotationError, match=r"b.parquet contains videos, and other files of its"):
        read(tmp_path)
    (tmp_path / "b.parquet").rename(tmp_path / "0.parquet")
    with pytest.raises(AnnotationError, match=r"a.parquet names files, and other files of its"):
        read(tmp_path)


def test_row_groups_that_do_not_fit_in_memory_are_refused(tmp_path, monkeypatch):
    columns = {"bytes": [bytes([n]) * 1000 for n in range(4)], "caption": ["a"] * 4}
    monkeypatch.setattr(parquet_files, "MAX_ROW_GROUP", 5000)
    with pytest.raises(UserError, match=r"row group 0 \(4 rows\) has .* row_group_size=10"):
        read(write_parquet(tmp_path / "mine.parquet", columns))
    read(write_parquet(tmp_path / "mine.parquet", columns, row_group_size=2))


def test_a_cell_without_a_video_costs_that_video_only(videos, tmp_path):
    cells = [videos[1], None, b"", b"https://a.b/c.mp4", b"text", videos[2]]
    columns = {"bytes": cells, "caption": ["a"] * 6}
    options = {"row_group_size": 5, "use_dictionary": False, "compression": "none"}
    path = write_parquet(tmp_path / "mine.parquet", columns, **options)
    path.write_bytes(path.read_bytes().replace(b"text", b"TEXT"))
    found = [frames_or_error(clip.location) for clip in read(path).contained.clips]
    assert [len(found[0]), len(found[5])] == [2, 3]
    assert found[1:5] == [
        "has no bytes in mine.parquet, row 1 (from 0)",
        "has no bytes in mine.parquet, row 2 (from 0)",
        "is a URL in mine.parquet, row 3 (from 0): https://a.b/c.mp4; the cell must have the"
        " content of the file",
        "is not a video: its content is text that starts with 'TEXT'",
    ]
    # A page whose header is damaged, after the file was planned.
    cell = ParquetCell(path, "bytes", 5, 1, 0)
    with path.open("r+b") as file:
        file.seek(parquet.read_metadata(path).row_group(1).column(0).data_page_offset)
        file.write(b"\xff" * 20)
    os.utime(path)
    with pytest.raises(VideoError, match=r"its row cannot be read from mine.parquet"):
        cell.open()
    path.unlink()
    with pytest.raises(Unavailable, match="No such file"):
        frames_or_error(cell)


def test_a_row_without_a_caption_and_an_empty_member_cost_that_video_only(videos, tmp_path, capsys):
    columns = {"bytes": [videos[1]] * 4, "caption": ["a", None, " ", "d"]}
    path = write_parquet(tmp_path / "mine.parquet", columns)
    flags = (f"--annotations={path}", f"--data_dir={tmp_path / 'data'}", *SIZE)
    assert build(["custom", *flags]) == 0
    out = capsys.readouterr().out
    assert "custom: found 2 of 2 annotated videos" in out
    assert "2 videos without a caption are not stored" in out
    tar = write_tar(tmp_path / "mine.tar", [("0.mp4", b""), ("0.txt", "zero")])
    (clip,) = read(tar).contained.clips
    assert frames_or_error(clip.location) == "has no bytes in mine.tar"


# ---------------------------------------------------------------- places of bytes


def test_a_member_reads_like_a_file_of_its_bytes(tmp_path):
    content = random.Random(0).randbytes(100_000)
    members = [("a.bin", b"a" * 700), ("b.bin", content), ("c.bin", b"c" * 700)]
    path = write_tar(tmp_path / "a.tar", members)
    found = {m.name: TarMember(path, m.name, m.offset_data, m.size) for m, _ in read_members(path)}
    choose = random.Random(1)
    with found["b.bin"].open() as window, io.BytesIO(content) as expected:
        assert (
            hashlib.file_digest(found["b.bin"].open(), "md5").digest()
            == hashlib.md5(content).digest()
        )
        for _ in range(300):
            whence = choose.randrange(3)
            offset = choose.randrange(-50_000, 120_000)
            if whence == 0 or expected.tell() + offset < 0:
                offset = abs(offset)
            if whence == 2:
                offset = max(offset, -100_000)
            assert window.seek(offset, whence) == expected.seek(offset, whence)
            count = choose.choice([0, 1, 100, 40_000, 200_000])
            assert window.read(count) == expected.read(count)
            assert window.tell() == expected.tell()
    with pytest.raises(OSError, match="Invalid argument"):
        found["a.bin"].open().seek(-1)


def test_keys_of_the_frame_cache(sources, tmp_path):
    cache = FrameCache(tmp_path, STORAGE)
    path = sources / "files" / "0.mp4"
    status = path.stat()
    # Caches of earlier versions have this key of a file.
    identity = (str(path.resolve()), status.st_size, status.st_mtime_ns, (0.0, 1.0))
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    assert (
        cache.entry(Clip("any", path, (0.0, 1.0))) == cache.directory / key[:2] / f"{key[2:34]}.npz"
    )
    clips = [c for name in ("shards", "tables") for c in read(sources / name).contained.clips]
    entries = {cache.entry(clip) for clip in clips}
    assert len(entries) == len(clips) == 9
    assert {FrameCache(tmp_path, STORAGE).entry(clip) for clip in reversed(clips)} == entries
    tar = clips[0].location.path
    copy = Path(shutil.copy2(tar, tmp_path / "0.tar"))
    moved = TarMember(copy, *clips[0].location.place)
    before = cache.entry(Clip("a", moved, None))
    os.utime(copy, ns=(1, 1))
    assert FrameCache(tmp_path, STORAGE).entry(Clip("a", moved, None)) != before


# Damaged, without an index at the start or at all, with a matrix in the header.
HARD_INSIDE = (
    *("truncated_60pct.mp4", "missing_moov.mp4", "rotated_90.mp4", "vfr.mp4"),
    *("odd_h91_420.avi", "anim.gif"),
)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared clips")
def test_hard_clips_decode_the_same_inside_a_tar_and_a_parquet_file(tmp_path):
    files = [SHARED / "hard_clips" / name for name in HARD_INSIDE]
    tar = write_tar(tmp_path / "a.tar", [(path.name, path.read_bytes()) for path in files])
    columns = {"bytes": [path.read_bytes() for path in files], "caption": ["a"] * len(files)}
    table = write_parquet(tmp_path / "a.parquet", columns, row_group_size=5)
    members = [TarMember(tar, m.name, m.offset_data, m.size) for m, _ in read_members(tar)]
    for path, member, cell in zip(files, members, ParquetTable(table).cells(), strict=True):
        expected = _decoded(path)
        assert _decoded(member) == _decoded(cell) == expected, path


def _decoded(location):
    frames = frames_or_error(location)
    try:
        facts = inspect_video(location, 4, STORAGE.form)
    except VideoError as error:
        facts = str(error)
    return frames if isinstance(frames, str) else frames.tobytes(), facts
