"""`custom` from WebDataset shards and Parquet files: what is read, what is refused, the build."""

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
from support.datasets import captions_of, read_custom
from support.videos import numbered_frames, write_video

from data_prep import parquet_files
from data_prep.annotations import AnnotationError
from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.locations import name_below
from data_prep.parquet_files import ParquetCell
from data_prep.tar_files import TarMember, read_members
from data_prep.video_folder import make_plan
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.records import VideoDataset
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import read_frames
from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import Unavailable, UserError

STORAGE = StorageSpec(FrameForm(32, as_shown=True), 4, "raw", "time")
BUILT = Path("custom") / STORAGE.name / "1.0.0"


def flags(annotations, data_dir, *extra):
    size = ("--image_size=32", "--max_frames=4", "--storage=raw")
    return ["custom", f"--annotations={annotations}", f"--data_dir={data_dir}", *size, *extra]


def frames_or_error(location, span=None):
    try:
        return read_frames(location, STORAGE.max_frames, STORAGE.form, span)
    except VideoError as error:
        return str(error)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[bytes]:
    """The contents of four video files of 1 to 4 seconds."""
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    made = []
    for seconds in range(1, 5):
        write_video(path, numbered_frames(10 * seconds + 5)[5:], fps=10)  # Without black frames.
        made.append(path.read_bytes())
    return made


def sample(key, content, caption):
    """The members of a sample."""
    return [(f"{key}.mp4", content), (f"{key}.txt", caption)]


@pytest.fixture(scope="module")
def sources(videos, tmp_path_factory) -> Path:
    """The same videos as files, in shards, and in Parquet files."""
    root = tmp_path_factory.mktemp("sources")
    (root / "files").mkdir()
    for number, content in enumerate(videos):
        (root / "files" / f"{number}.mp4").write_bytes(content)
    second = json.dumps({"caption": "two", "start": 0.5, "end": "0:01.5"})
    members = [*sample("0001", videos[0], "one"), ("0002.json", second), ("0002.mp4", videos[1])]
    members += [("alone.mp4", videos[0]), ("gone.txt", "x"), *sample("0003", b"no video", "x")]
    write_tar(root / "shards" / "train" / "0.tar", members)
    for number, split in ((2, "val"), (3, "test")):
        write_tar(root / "shards" / split / "0.tar", sample("0001", videos[number], split))
    one = {"bytes": [videos[3], videos[0]], "caption": ["a", "b"], "split": ["test", "train"]}
    write_parquet(root / "tables" / "0.parquet", one, row_group_size=1)
    other = {"bytes": videos[1:3], "caption": ["c", "d"], "split": ["train", "val"]}
    spans = {"start": [0.5, None], "end": [1.5, None]}
    write_parquet(root / "tables" / "1.parquet", {**other, **spans}, row_group_size=1)
    return root


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    """A copy of the shards, and the dataset that their build writes."""
    root = Path(shutil.copytree(sources, tmp_path_factory.mktemp("built") / "root"))
    assert build(flags(root / "shards", root)) == 0
    return root


def test_builds_from_shards_and_parquet_files_have_the_frames_of_the_files(
    sources, built, tmp_path
):
    assert build(flags(sources / "tables", tmp_path)) == 0
    shards, tables = VideoDataset(built / BUILT), VideoDataset(tmp_path / BUILT)
    spans = {3: None, 0: None, 1: (0.5, 1.5), 2: None}
    expected = [frames_or_error(sources / "files" / f"{n}.mp4", s) for n, s in spans.items()]
    assert [len(frames) for frames in expected] == [4, 1, 2, 3]
    for dataset in (shards, tables):
        assert len(dataset) == 4
        for number, frames in enumerate(expected):
            np.testing.assert_array_equal(dataset.read_frames(number), frames)
    names = [["0.parquet/0"], ["0.parquet/1"], ["1.parquet/0", 0.5, 1.5], ["1.parquet/1"]]
    assert list(tables.sources) == names
    # What cannot be used is left out with its reason, and costs no other video.
    assert list(shards.video_ids) == ["test/0/0001", "train/0/0001", "train/0/0002", "val/0/0001"]
    assert shards.sources[2] == ["train/0.tar/0002.mp4", 0.5, 1.5]
    assert shards.manifest["left_out"] == {
        "train/0/gone": "its shard has its txt, but no video",
        "train/0/0003": "is not a video: its content is text that starts with 'no video'",
    }
    assert list(shards.manifest["annotations"]) == ["test/0.tar", "train/0.tar", "val/0.tar"]


def test_a_second_build_finds_the_frames_of_the_first_one(built, videos, capsys):
    arguments = flags(built / "shards", built)
    # The folder of files is not needed, and the command says so.
    assert build([*arguments, f"--videos={built / 'files'}", "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert f"--videos is not used: the videos are inside {built / 'shards'}" in printed
    assert "1 videos without a caption are not stored" in printed
    assert len(list((built / "cache").rglob("*.npz"))) == 4
    write_tar(built / "shards" / "val" / "0.tar", sample("0001", videos[2], "other"))
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "was built from other annotation files (val/0.tar has changed)" in line


def test_the_validator_reads_shards(sources, videos, tmp_path):
    shards = Path(shutil.copytree(sources / "shards", tmp_path / "shards"))
    write_tar(shards / "val" / "1.tar", sample("0009", videos[2], "x"))
    assert check(flags(shards, tmp_path)) == 1
    report = json.loads((tmp_path / "custom" / "check.json").read_text())
    assert report["missing"] == {"train/0/gone": "its shard has its txt, but no video"}
    assert report["unusable"].keys() == {"train/0/0003"}
    assert [group["videos"] for group in report["duplicate_videos"]] == [
        ["val/0/0001", "val/1/0009"]
    ]
    assert report["unannotated_files"] == ["train/0.tar/alone.mp4"]


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
    zero = [("0.mp4", b"0"), ("0.json", '{"caption": "zero", "split": "val"}')]
    write_tar(tmp_path / "a.tar", zero)
    with pytest.raises(AnnotationError, match="some rows have a split and others have none"):
        read_custom(tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "b.tar").rename(tmp_path / "training" / "b.tar")
    annotations = read_custom(tmp_path)
    assert captions_of(annotations) == {
        "val": {"a/0": ["zero"]},
        "train": {"training/b/x/1": ["one"], "training/b/x/2": ["two", "three"]},
        "test": {"training/b/x/5": ["five"]},
    }
    found = annotations.contained
    assert found.unannotated == ["training/b.tar/./x/3.mp4"]
    read = {clip.video_id: clip.location.open().read() for clip in found.clips}
    paths = (f"training/b/x/{number}" for number in (1, 2, 5))
    assert read == {"a/0": b"0", **dict(zip(paths, (b"11", b"2", b"5"), strict=True))}
    assert name_below(found.clips[0].location, tmp_path) == "a.tar/0.mp4"


def test_a_file_a_folder_and_a_pattern(tmp_path, monkeypatch):
    for name in ("train-0", "validation-0", "test_1"):
        write_tar(tmp_path / "all" / f"{name}.tar", sample("0", b"0", name))
        columns = {"bytes": [b"0"], "caption": [name]}
        write_parquet(tmp_path / "tables" / f"{name}.parquet", columns)
    # The log of video2dataset.
    write_parquet(tmp_path / "all" / "train-0.parquet", {"key": ["0"], "status": ["success"]})
    expected = {"train": ["train-0"], "val": ["validation-0"], "test": ["test_1"]}

    def splits(path):
        annotations = read_custom(path)
        found = annotations.contained
        assert all(clip.location.path.is_relative_to(found.folder) for clip in found.clips)
        return {name: [e.captions[0] for e in split] for name, split in annotations.splits.items()}

    assert splits(tmp_path / "all") == splits(tmp_path / "tables") == expected
    assert splits(tmp_path / "all" / "test_1.tar") == {"test": ["test_1"]}
    assert splits(tmp_path / "*" / "t*.tar") == {"test": ["test_1"], "train": ["train-0"]}
    assert splits(tmp_path / "tables" / "*.parquet") == expected
    # The split of a shard is that of its folder, however that is written.
    tar = write_tar(tmp_path / "test" / "0.tar", sample("0", b"0", "x"))
    (tar.parent / "empty").mkdir()
    monkeypatch.chdir(tar.parent)
    for written in (".", "0.tar", "./*.tar", "empty/..", "../test", tar.parent):
        assert splits(Path(written)) == {"test": ["x"]}


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
        {**large, "bytes": pa.array(videos[:2], pa.large_binary())},
        {**large, "video": struct},
        {**plain, "video": pa.array(videos[:2], pa.binary())},
        {**plain, "video": ["0.mp4", "1.mp4"], "bytes": videos[:2]},
    ):
        annotations = read_custom(write_parquet(tmp_path / "mine.parquet", columns))
        assert captions_of(annotations) == {"train": {"7": ["one", "three"], "8": ["two"]}}
        clips = annotations.contained.clips
        assert [clip.span for clip in clips] == [None, (0.5, 2.0)]
        assert [clip.location.open().read() for clip in clips] == videos[:2]
        names = [name_below(clip.location, tmp_path) for clip in clips]
        assert names == ["mine.parquet/0", "mine.parquet/1"]


def test_a_parquet_file_of_paths_is_like_a_csv(tmp_path, capsys):
    columns = {"video": ["0.mp4", "1.mp4", "0.mp4"], "caption": ["one", "two", "other"]}
    spans = {"start": [None, 0.5, None], "end": [None, 1.5, None]}
    table = write_parquet(tmp_path / "mine.parquet", {**columns, **spans})
    listing = "video,caption,start,end\n0.mp4,one,,\n1.mp4,two,0.5,1.5\n0.mp4,other,,"
    one, other = read_custom(table), read_custom(tmp_path / "mine.csv", listing)
    # As Hugging Face's datasets writes videos that are not embedded.
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    struct = pa.array([{"bytes": None, "path": name} for name in columns["video"]], kind)
    named = write_parquet(tmp_path / "named.parquet", {**columns, **spans, "video": struct})
    for annotations in (one, read_custom(named)):
        assert captions_of(annotations) == captions_of(other)
        assert annotations.sources == other.sources
    for module in ("data_prep.build", "data_prep.check"):
        line = error_of(module, *flags(table, tmp_path / "data"), capsys=capsys)
        assert f"custom needs --videos=DIR: {table} names video files" in line


def test_annotations_are_read_without_the_bytes_of_videos(tmp_path):
    """A tar file of 60 GB with holes, and a Parquet file whose videos are most of it."""
    path = write_tar(tmp_path / "big.tar", [("0.txt", "zero"), ("0.mp4", b"")])
    end = write_tar(tmp_path / "end.tar", sample("1", b"1", "one"))
    info = tarfile.TarInfo("0.mp4")
    info.size = 60 << 30
    with path.open("r+b") as file:
        file.seek(2 * tarfile.BLOCKSIZE)
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 * tarfile.BLOCKSIZE + info.size)
        file.seek(0, os.SEEK_END)
        file.write(end.read_bytes())
    columns = {"bytes": [random.Random(0).randbytes(1 << 20)] * 8, "caption": ["x"] * 8}
    table = write_parquet(tmp_path / "big.parquet", columns, use_dictionary=False)
    for path, clips in ((tmp_path / "big.tar", 2), (table, 8)):
        read = [int(Path("/proc/self/io").read_text().split()[1])]  # `rchar`
        assert len(read_custom(path).contained.clips) == clips
        read.append(int(Path("/proc/self/io").read_text().split()[1]))
        assert read[1] - read[0] < 1 << 20


# ---------------------------------------------------------------- what is left out


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
    "bytes": (member("bytes.txt", content=b"caf\xe9"), "caption is not text in UTF-8 (byte 0xe9);"),
    "hard": (member("hard.mp4", tarfile.LNKTYPE, link="0.mp4"), "its .mp4 is a link, not a file;"),
    "soft": (member("soft.txt", tarfile.SYMTYPE, link="0.txt"), "its .txt is a link, not a file;"),
    "pipe": (member("pipe.mp4", tarfile.FIFOTYPE), "its .mp4 is a device or a pipe, not a file"),
    "sparse": (member("sparse.mp4", tarfile.GNUTYPE_SPARSE, b"0"), "its .mp4 is stored as a spars"),
    "a\\nb": (member("a\nb.mp4"), "its .mp4 has a line end or a tab in its name"),
    "a\\nb/c": (member("a\nb/c.txt", content=b"x"), "its .txt has a line end or a tab in its na"),
    "/abs": (member("/abs.mp4"), "its .mp4 leads out of the folder by its name, /abs.mp4"),
    "../up": (member("../up.mp4"), "its .mp4 leads out of the folder by its name, ../up.mp4"),
    "caf\\udce9": (member("caf\udce9.mp4"), "its .mp4 is not text in UTF-8 (byte 0xe9); save"),
    "json": (member("json.json", content=b"[1]"), 'its .json is not an object: {"caption": ..}'),
    "blank": (member("blank.mp4") + member("blank.txt", content=b" \n"), "its .txt is empty"),
    "fields": (member("fields.json", content=b'{"captions": "a"}'), "captions must be a list"),
}


def test_one_bad_member_costs_its_sample_only(videos, tmp_path, capsys):
    """The members of `LEFT_OUT`, twice as many good ones, and samples without a video or bytes."""
    path, bad = tmp_path / "mine.tar", b"".join(blocks for blocks, _ in LEFT_OUT.values())

    def write(members):
        end = write_tar(path, members).read_bytes().rstrip(b"\0")
        path.write_bytes(end + bytes(-len(end) % 512) + bad + bytes(1024))

    good = [member for n in range(24) for member in sample(n, videos[0], "x")]
    write([*good, *sample("empty", b"", "y"), ("alone.txt", "y")])
    assert build(flags(path, tmp_path)) == 0
    left_out = VideoDataset(tmp_path / BUILT).manifest["left_out"]
    assert left_out.pop("mine/alone") == "its shard has its txt, but no video"
    assert left_out.pop("mine/empty") == "has no bytes in mine.tar"
    assert left_out.keys() == {f"mine/{key}" for key in LEFT_OUT}
    for key, (_, reason) in LEFT_OUT.items():
        assert left_out[f"mine/{key}"].startswith(reason)
    assert "13 rows are left out (the first: mine/bytes: caption is not" in capsys.readouterr().out
    write(good[:22])
    line = error_of("data_prep.build", *flags(path, tmp_path, "--overwrite"), capsys=capsys)
    assert "13 of the 24 videos of" in line
    assert "cannot be used, and a build may lose at most 50%" in line
    assert len(VideoDataset(tmp_path / BUILT)) == 24


def test_wrong_rows_of_parquet_files_are_left_out(tmp_path):
    # Writers in C++ do not check that a string is UTF-8.
    cells = pa.array([b"one", b"caf\xe9", b"two", b" ", b"three", b"four", b"five"])
    texts = pa.Array.from_buffers(pa.string(), len(cells), cells.buffers())
    not_text = "caption is not text in UTF-8 (byte 0xe9); save the file as UTF-8"
    table = {"video": ["a", "b", "c", "d", None, "e", "f"], "caption": texts}
    annotations = read_custom(write_parquet(tmp_path / "train-0.parquet", table))
    expected = {"a": ["one"], "c": ["two"], "e": ["four"], "f": ["five"]}
    assert captions_of(annotations) == {"train": expected}
    reasons = {1: not_text, 3: "caption is empty", 4: "video is empty"}
    places = {f"train-0.parquet, row {row} (from 0)": why for row, why in reasons.items()}
    assert annotations.left_out == places
    lists = pa.ListArray.from_arrays(pa.array(range(8)), texts)
    ids = ["a", "b", "c", "d\td", "e", "f", "g"]
    table = {
        "bytes": [b"0"] * 7,
        "id": ids,
        "captions": lists,
        "end": [*[None] * 4, -1.0, None, 9.0],
    }
    annotations = read_custom(write_parquet(tmp_path / "train-1.parquet", table))
    assert captions_of(annotations) == {
        "train": {"a": ["one"], "c": ["two"], "f": ["four"], "g": ["five"]}
    }
    ends = "end must be after start, and start 0 or more; got 0.0 to -1.0"
    reasons = {1: not_text, 3: "id has a line end or a tab in its name", 4: ends}
    places = {f"train-1.parquet, row {row} (from 0)": why for row, why in reasons.items()}
    assert annotations.left_out == places


def test_a_linked_tar_file_is_one_file(tmp_path):
    members = [*sample("0", b"0", "x"), *sample("1", b"1", "y")]
    tar = write_tar(tmp_path / "train" / "0.tar", members)
    (tar.parent / "1.tar").symlink_to("0.tar")
    plan = make_plan(read_custom(tmp_path), None, {})
    assert captions_of(plan.annotations) == {"train": {"train/0/0": ["x"], "train/0/1": ["y"]}}
    assert plan.merged == {"train/1/0": "train/0/0", "train/1/1": "train/0/1"}


def test_a_cell_without_a_video_costs_that_video_only(videos, tmp_path):
    cells = [videos[1], None, b"", b"https://a.b/c.mp4", b"text", videos[2]]
    columns = {"bytes": cells, "caption": ["a"] * 6}
    options = {"row_group_size": 5, "use_dictionary": False, "compression": "none"}
    path = write_parquet(tmp_path / "mine.parquet", columns, **options)
    found = [frames_or_error(clip.location) for clip in read_custom(path).contained.clips]
    assert [len(found[0]), len(found[5])] == [2, 3]
    assert found[1:5] == [
        "has no bytes in mine.parquet, row 1 (from 0)",
        "has no bytes in mine.parquet, row 2 (from 0)",
        "is a URL in mine.parquet, row 3 (from 0): https://a.b/c.mp4; the cell must have the"
        " content of the file",
        "is not a video: its content is text that starts with 'text'",
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


# ---------------------------------------------------------------- what is refused

MP4 = ("0.mp4", b"0")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([MP4, ("0.json", "{")], r"mine/0: its .json is not JSON \(Expecting"),
        ([MP4, ("0.json", '{"caption": "a", "split": "Test"}')], "0: 'Test' is not a split"),
        ([MP4, ("0.left.avi", b"")],
         "tar: 0.mp4 at byte 0 and 0.left.avi at byte 1024 have the key '0'"),
        ([MP4, ("0.txt", "a"), ("0.TXT", "b")], "a key has one of the members .txt"),
        ([MP4, ("1.txt", "a")], "mine.tar has no video with a caption: each needs members of one"),
        ([], "mine.tar has no video with a caption"),
    ],
)  # fmt: skip
def test_a_wrong_member_is_named(members, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read_custom(write_tar(tmp_path / "mine.tar", members))


# A tar file of two samples: the video has 5,000 bytes, and each member a header of 512.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:3000], r"damaged or truncated \(.*unexpected end of data"),
        (lambda b: b[: 512 + 5120], r"it ends at byte 5632 without the mark of its end"),
        (lambda b: b[: 512 + 5120 + 100], "it ends at byte 5732 without the mark"),
        (lambda b: b[: 512 + 5120 + 514], r"damaged or truncated \(it ends inside 0.txt"),
        (lambda b: b[:5632] + b"x" * 512 + b[6144:], "no header of a member at byte 5632"),
        (lambda b: b"x" * 512 + b[512:], "damaged or truncated"),
        (lambda b: b"", "mine.tar is empty; it must be a tar file"),
        (lambda b: b + b, "has data after its end at byte 6656: it is"),
        (lambda b: b"\x1f\x8b" + b, "mine.tar is compressed, .* file with gunzip"),
        (lambda b: b"\x28\xb5\x2f\xfd" + b, "compressed, .* file with unzstd"),
    ],
)
def test_a_damaged_tar_file_is_named(damage, message, tmp_path):
    path = write_tar(tmp_path / "shards" / "mine.tar", sample("0", b"0" * 5000, "zero"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        read_custom(tmp_path / "shards")
    assert "\n" not in str(error.value)


def test_files_that_do_not_go_together_are_refused(tmp_path):
    for name in ("a.tar", "a.TAR"):
        write_tar(tmp_path / "tars" / name, sample("0", b"0", name))
    with pytest.raises(AnnotationError, match=r"a.TAR and .*a.tar would give their videos the sam"):
        read_custom(tmp_path / "tars")
    tables = tmp_path / "tables"
    write_parquet(tables / "a.parquet", {"video": ["a"], "caption": ["b"]})
    write_parquet(tables / "b.parquet", {"bytes": [b"0"], "caption": ["b"]})
    with pytest.raises(AnnotationError, match=r"b.parquet contains videos, and other files of its"):
        read_custom(tables)
    (tables / "b.parquet").rename(tables / "0.parquet")
    with pytest.raises(AnnotationError, match=r"a.parquet names files, and other files of its"):
        read_custom(tables)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match=r"no .tar file and no .parquet file in .*empty;"):
        read_custom(tmp_path / "empty")
    with pytest.raises(AnnotationError, match=r"no file .*absent.csv; --annotations must be a"):
        read_custom(tmp_path / "absent.csv")


CELL = {"bytes": [b"0"], "caption": ["a"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a"], "file": ["b"]}, "mine.parquet has no video; it has caption, file"),
        ({"bytes": [b"0"]}, "mine.parquet has no caption; it has bytes"),
        ({"bytes": ["https://a"], "caption": ["b"]}, "column bytes has the type string, but"),
        ({"video": ["http://a"], "caption": ["b"]}, r"row 0 .*: video is a URL \(http://a\)"),
        ({"video": [7], "caption": ["b"]}, "the column video has the type int64, but"),
        ({"bytes": [b"0"], "caption": [7.5]}, "the column caption has the type double, but"),
        ({"bytes": [b"0"], "caption": [None]}, "mine.parquet has no video with a caption"),
        ({"bytes": pa.array([], pa.binary()), "caption": pa.array([], pa.string())},
         "mine.parquet has no video with a caption"),
        ({"bytes": [b"0"], "captions": [[None]]}, "row 0 .*: caption must be a text, not None"),
        ({**CELL, "split": ["dev"]}, "did you mean val"),
        ({"bytes": [b"0"] * 2, "caption": ["a"] * 2, "id": [1, 1]},
         r"row 1 \(from 0\) has the id '1' of an earlier row; a video with several"),
        ({**CELL, "id": [1.5]}, "id must be a text or a whole number"),
        ({"caption": ["a"], "Caption ": ["b"]}, "mine.parquet has two columns 'caption'"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named(columns, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_custom(write_parquet(tmp_path / "mine.parquet", columns))


def test_a_damaged_parquet_file_is_named(tmp_path):
    columns = {"caption": ["a" * 50] * 9, "bytes": [b"0"] * 9}
    path = write_parquet(tmp_path / "mine.parquet", columns, compression="none")
    whole = path.read_bytes()
    for content in (whole[:-20], b"text", b"", whole[:4] + b"\xff" * 200 + whole[204:]):
        with pytest.raises(UserError, match=r"mine.parquet is damaged or no Parquet file \("):
            read_custom(path, content)


def test_row_groups_that_do_not_fit_in_memory_are_refused(tmp_path, monkeypatch):
    columns = {"bytes": [bytes([n]) * 1000 for n in range(4)], "caption": ["a"] * 4}
    monkeypatch.setattr(parquet_files, "MAX_ROW_GROUP", 5000)
    with pytest.raises(UserError, match=r"row group 0 \(4 rows\) has .* row_group_size=10"):
        read_custom(write_parquet(tmp_path / "mine.parquet", columns))
    read_custom(write_parquet(tmp_path / "mine.parquet", columns, row_group_size=2))


# ---------------------------------------------------------------- places of bytes


def members_of(tar):
    members = (member for member, _ in read_members(tar))
    return [TarMember(tar, m.name, m.offset_data, m.size) for m in members]


def test_a_member_reads_like_a_file_of_its_bytes(tmp_path):
    content, choose = random.Random(0).randbytes(100_000), random.Random(1)
    members = [("a.bin", b"a" * 700), ("b.bin", content), ("c.bin", b"c" * 700)]
    _, middle, _ = members_of(write_tar(tmp_path / "a.tar", members))
    with middle.open() as window, io.BytesIO(content) as expected:
        for _ in range(300):
            whence = choose.randrange(3)
            start = (0, expected.tell(), len(content))[whence]
            offset = choose.randrange(-start, 120_000)
            assert window.seek(offset, whence) == expected.seek(offset, whence)
            count = choose.choice([0, 1, 100, 40_000, 200_000])
            assert window.read(count) == expected.read(count)
            assert window.tell() == expected.tell()
        with pytest.raises(OSError, match="Invalid argument"):
            window.seek(-1)
