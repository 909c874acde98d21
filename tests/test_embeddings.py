"""`python -m drl_jax.embed` and the files it writes, read without this package."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from support.commands import error_of, start_interruptible
from support.files import refused
from support.processes import killing_workers, wait_until
from support.videos import numbered_frames, write_video

import drl_jax
from drl_jax.embed.__main__ import main
from drl_jax.embed.encode import embed_captions, embed_videos
from drl_jax.embed.files import read_captions
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.runtime.errors import Notice
from drl_jax.runtime.lock import locked

CAPTIONS = ["a red circle moves left", "dogs, cats and a bird", "ein Mädchen läuft"]
# Their lengths in seconds; the last has several windows.
VIDEOS = {"a.mp4": 2, "deep/b.mp4": 1, "long.mp4": 20}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings") / "videos"
    for number, (name, seconds) in enumerate(VIDEOS.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frames = numbered_frames(2 * seconds, 64, 64) + np.uint8(50 * number)
        write_video(folder / name, frames, fps=2)
    return folder


@pytest.fixture(scope="module")
def of_videos(search_model, videos) -> Path:
    """A file of the videos. Not to be changed."""
    out = videos.with_name("videos.npz")
    embed_videos(search_model, videos, out)
    return out


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def read_rows(path: Path) -> dict[str, list]:
    """The rows of a file by name, those of an npz file without padding as in Parquet."""
    if path.suffix == ".npz":
        arrays = read(path)
        arrays.pop("drl_jax")
        return without_padding(arrays)
    table = pyarrow.parquet.read_table(path)
    return {name: table[name].to_pylist() for name in table.column_names}


def without_padding(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    mask = arrays["text_mask" if "text_mask" in arrays else "frame_mask"]
    return {
        name: [
            (
                row[valid] if name == "token" or name.startswith(("text_", "frame_")) else row
            ).tolist()
            for row, valid in zip(array, mask, strict=True)
        ]
        for name, array in arrays.items()
        if not name.endswith("_mask")
    }


def assert_rows(found: dict[str, list], expected: dict[str, list], atol: float = 0) -> None:
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        for one, other in zip(found[name], rows, strict=True):
            if np.asarray(other).dtype.kind == "f":
                np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)
            else:
                assert one == other, name


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_file_of_captions_has_the_arrays_of_the_api(suffix, search_model, tmp_path):
    out = tmp_path / f"c.{suffix}"
    embed_captions(search_model, CAPTIONS, out)
    text = search_model.encode_text(CAPTIONS)
    expected = without_padding({"pooled": search_model.pool_text(text), **text})
    expected |= {"caption": CAPTIONS, "token": search_model.token_strings(CAPTIONS)}
    assert_rows(read_rows(out), expected)
    if suffix == "npz":
        assert (read(out)["token"][~text["text_mask"]] == "").all()
        about = str(read(out)["drl_jax"])
    else:
        about = pyarrow.parquet.read_schema(out).metadata[b"drl_jax"]
    about = json.loads(about)
    assert (about["model"], about["interaction"]) == (search_model.fingerprint, "wti")


def test_captions_that_are_cut_are_counted_over_all_files(search_model, tmp_path):
    """The model reads 24 tokens."""
    captions, out = ["dog " * 22, "dog " * 23, "a dog", "cat " * 50], tmp_path / "c.npz"
    with pytest.warns(Notice, match="^2 of 4 captions cut to data.max_words=24 tokens") as said:
        embed_captions(search_model, captions, out, shard_size=1)
    assert len(said) == 1
    # Features of captions depend on it, those of videos do not.
    data = dataclasses.replace(search_model.config.data, max_words=20)
    config = dataclasses.replace(search_model.config, data=data)
    with pytest.raises(drl_jax.UserError, match="max_words"):
        embed_captions(
            dataclasses.replace(search_model, config=config), captions, out, shard_size=1
        )


def test_a_file_of_videos_has_the_arrays_of_the_api(search_model, videos, of_videos, tmp_path):
    found = read(of_videos)
    paths = found["video_id"].tolist()
    assert sorted(paths) == sorted(VIDEOS)
    video = search_model.encode_videos([videos / path for path in paths])
    expected = without_padding({"pooled": search_model.pool_videos(video), **video})
    times = [search_model.read_video(videos / path).times for path in paths]
    expected |= {"video_id": paths, "frame_time": [list(row) for row in times]}
    assert_rows(read_rows(of_videos), expected, atol=1e-6)
    np.testing.assert_array_equal(found["frame_mask"], video["frame_mask"])
    np.testing.assert_array_equal(np.isnan(found["frame_time"]), ~video["frame_mask"])

    # In half precision, and as the type that vector databases read as a multi-vector.
    half, columns = tmp_path / "half.npz", tmp_path / "half.parquet"
    for out in (half, columns):
        embed_videos(search_model, videos, out, dtype="float16")
    assert_rows(read_rows(columns), read_rows(half))
    found = read(half)
    assert (found["frame_unit"].dtype, found["frame_time"].dtype) == ("float16", "float32")
    text = search_model.encode_text(CAPTIONS)
    exact = search_model.similarity(text, video)
    np.testing.assert_allclose(search_model.similarity(text, found), exact, atol=2e-3)
    schema = pyarrow.parquet.read_schema(columns)
    vector = pyarrow.list_(pyarrow.float16(), search_model.config.model.backbone.embed_dim)
    assert schema.field("pooled").type.equals(vector)
    assert schema.field("frame_unit").type.value_type.equals(vector)
    assert schema.field("frame_time").type.value_type.equals(pyarrow.float32())


def test_features_do_not_depend_on_the_shard_size(search_model, videos, of_videos, tmp_path):
    embed_videos(search_model, videos, tmp_path / "many.npz", shard_size=2)
    parts = [tmp_path / f"many-0000{number}-of-00002.npz" for number in range(2)]
    assert sorted(tmp_path.glob("*.npz")) == parts
    one, two = map(read_rows, parts)
    assert_rows({name: one[name] + two[name] for name in one}, read_rows(of_videos), atol=1e-6)


def test_pooled_vectors():
    """Of arrays that are small enough to compute by hand."""
    frame = np.array([[[1.0, 0], [0, 1], [1, 0]]], np.float32)
    mask = np.array([[True, True, False]])
    weighted = {"frame_unit": frame, "frame_mask": mask, "frame_weight": mask * [0.6, 0.8, 0.0]}
    pooled = INTERACTIONS["wti"].pool_video(weighted)
    np.testing.assert_allclose(pooled, [[0.6, 0.8]], atol=1e-7)
    text = {name.replace("frame", "text"): array for name, array in weighted.items()}
    np.testing.assert_allclose(INTERACTIONS["wti"].pool_text(text), [[0.6, 0.8]], atol=1e-7)
    scaled = frame * np.array([5, 9, 2])[None, :, None]
    pooled = INTERACTIONS["xti"].pool_video({"frame_feat": scaled, "frame_mask": mask})
    np.testing.assert_allclose(pooled, [[0.5**0.5, 0.5**0.5]], atol=1e-7)
    pooled = INTERACTIONS["xti"].pool_text({"sentence_feat": np.array([[3.0, 4.0]])})
    np.testing.assert_allclose(pooled, [[0.6, 0.8]], atol=1e-7)


def test_windows_have_rows_of_their_own(search_model, videos, of_videos, tmp_path):
    out = embed_videos(search_model, videos, tmp_path / "w.npz", windows=True)
    found = read(tmp_path / "w.npz")
    rows = found["video_id"] == "long.mp4"
    assert out.rows == len(rows) > len(VIDEOS)
    starts, ends = found["start"][rows], found["end"][rows]
    assert starts[0] == 0
    assert ends[-1] == pytest.approx(VIDEOS["long.mp4"], abs=0.5)
    inside = (found["frame_time"] >= found["start"][:, None]) & (
        found["frame_time"] <= found["end"][:, None]
    )
    np.testing.assert_array_equal(inside, found["frame_mask"])
    # A short video is one window, as without the flag.
    whole = read(of_videos)
    one, other = (file["frame_unit"][file["video_id"] == "a.mp4"] for file in (found, whole))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_videos_that_cannot_be_read_are_listed_and_the_rest_is_written(
    search_run, tmp_path, capsys
):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "good.mp4", numbered_frames(4, 64, 64), fps=2)
    (folder / "bad.mp4").write_text("no video")
    (folder / "link.mp4").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")).write_text("no video")
    # The second shard has no video, so no rows.
    flags = [f"--workdir={search_run}", f"--videos={folder}", "--shard_size=1"]
    flags.append(f"--out={tmp_path / 'v.npz'}")
    with killing_workers():  # What a worker that died did not read is read by the next run.
        assert main(flags) == 1
    captured = capsys.readouterr()
    assert "  good.mp4: the process that worked on it died (exit code -9)" in captured.err
    expected = [
        "  \\xff.mp4: is not a video: its content is text that starts with 'no video'",
        "  bad.mp4: is not a video: its content is text that starts with 'no video'",
        "  link.mp4: it is no file, e.g. a link to nothing",
    ]
    for _ in range(2):  # What is finished is not read again, but still reported.
        assert main(flags) == 1
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert lines[-4:] == ["drl_jax.embed: 3 videos could not be read:", *expected]
        assert "1 videos, float32, 3 files" in captured.out
    empty, good = (read(tmp_path / f"v-0000{n}-of-00003.npz") for n in range(2))
    assert good["video_id"].tolist() == ["good.mp4"]
    for name in good.keys() - {"drl_jax"}:
        assert empty[name].shape == (0, *good[name].shape[1:])
    assert json.loads(str(empty["drl_jax"]))["unreadable"].keys() == {"bad.mp4"}


def test_an_output_that_was_interrupted_is_continued(
    search_run, search_model, test_videos, tmp_path
):
    out = tmp_path / "v.npz"
    flags = [f"--workdir={search_run}", f"--videos={test_videos}", f"--out={out}"]
    flags.append("--shard_size=1")

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("v-*.npz")}

    command = [sys.executable, "-m", "drl_jax.embed", *flags]
    process = start_interruptible(command, stderr=subprocess.PIPE)
    wait_until(finished)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.replace("\r", "\n").splitlines()[-1] == (
        "drl_jax.embed: interrupted; finished files are kept; rerun the command to continue"
    )
    before = finished()
    assert 0 < len(before) < 32
    # What a kill may leave.
    (tmp_path / "v-00031-of-00032.npz.123.part").write_text("half")
    (tmp_path / "other.npz.123.part").write_text("of another output")

    assert main(flags) == 0
    assert before.items() <= finished().items()
    assert [path.name for path in tmp_path.glob("*.part")] == ["other.npz.123.part"]
    files = [read(path) for path in finished()]
    paths = [file["video_id"].item() for file in files]
    assert sorted(paths) == sorted(path.name for path in test_videos.iterdir())
    found = np.concatenate([file["frame_unit"] for file in files])
    expected = search_model.encode_videos([test_videos / path for path in paths])
    np.testing.assert_allclose(found, expected["frame_unit"], atol=1e-5)


def test_a_full_disk_is_one_line(search_model, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(drl_jax.UserError, match=r"c\.npz cannot be written: No space left on"):
        embed_captions(search_model, CAPTIONS, tmp_path / "c.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["c.npz.lock"]


# ---------------------------------------------------------------- mistakes


def test_another_model_or_input_is_refused(search_model, videos, of_videos, tmp_path):
    out = tmp_path / "v.npz"
    shutil.copy(of_videos, out)
    before = out.read_bytes()
    for what, made in (
        ("list of videos", lambda: embed_videos(search_model, videos / "deep", out)),
        ("dtype", lambda: embed_videos(search_model, videos, out, dtype="float16")),
        ("windows", lambda: embed_videos(search_model, videos, out, windows=True)),
        ("shard_size", lambda: embed_videos(search_model, videos, out, shard_size=2)),
        ("list of captions", lambda: embed_captions(search_model, CAPTIONS, out)),
    ):
        with pytest.raises(drl_jax.UserError, match=f"was made with another {what}; give another"):
            made()
    for made, message in (
        (refused(out), r"npz cannot be read: .*ELOOP.*nothing was moved"),
        (locked(tmp_path / "v.npz.lock", "it"), "is in use by process"),
    ):
        with made, pytest.raises(drl_jax.UserError, match=message):
            embed_videos(search_model, videos, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": float("nan")}, {"timeout": "1"}, {"shard_size": True}, {"out": "/proc/a.npz"}],
)
def test_a_wrong_argument_is_one_line(wrong, search_model, videos, tmp_path):
    given = {"out": tmp_path / "v.npz", "videos": videos, **wrong}
    with pytest.raises(drl_jax.UserError, match=f"^{next(iter(wrong))} is|/proc/a.npz.* cannot be"):
        drl_jax.embed(search_model, **given)
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_replaced(search_model, of_videos, tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    foreign = (tmp_path / "other.npz").read_bytes()
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"c.{suffix}"
        for content in (of_videos.read_bytes()[:100], b"", b"a text", foreign):
            out.write_bytes(content)
            with pytest.raises(drl_jax.UserError, match=r"is damaged, or no file of drl_jax.embed"):
                embed_captions(search_model, CAPTIONS, out)
            assert out.read_bytes() == content


def test_mistakes_are_one_line(search_run, videos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out, run = f"--out={tmp_path / 'x.npz'}", "--workdir=nowhere"
    known = f"--workdir={search_run}"
    of_videos, of_captions = f"--videos={videos}", "--captions=none.txt"
    for flags, message in (
        ((run, out), "one of the arguments --videos --captions is required"),
        ((run, of_videos, "--out=x.csv"), "x.csv: the formats are .npz, .parquet"),
        ((run, of_videos, "--out=no/x.npz"), "no/x.npz: there is no directory no"),
        ((run, out, of_videos), "no run in nowhere"),
        ((run, "--weights=a.pt", out, of_videos), "give --workdir or --weights, not both"),
        (
            (run, "--release=openai", out, of_videos),
            "--release, --weights_key, --tokenizer describe",
        ),
        ((known, out, "--videos=nowhere"), "no directory nowhere"),
        ((known, out, f"--videos={tmp_path / 'empty'}"), f"no video in {tmp_path / 'empty'} ("),
        ((run, out, of_captions, "--windows"), "--windows is of videos; omit it"),
        ((run, out, of_captions), "none.txt cannot be read: No such file or directory"),
        ((run, out, of_videos, "--timeout=-1"), "must be a number of seconds above 0, not '-1'"),
        ((run, out, of_videos, "--timeout=nan"), "must be a number of seconds above 0, not 'nan'"),
    ):
        line = error_of("drl_jax.embed", *flags, capsys=capsys)
        assert line.startswith("drl_jax.embed: ")
        assert message in line
    assert not list(tmp_path.glob("x.npz*"))


def test_files_of_captions(tmp_path):
    for name, content in (
        ("c.txt", "a dog\r\na “cat”\n"),
        ("c.csv", '\ufeffid,caption\n1,a dog\n2,"a “cat”"\n'),
        ("c.jsonl", '"a dog"\n{"id": 2, "caption": "a “cat”"}\n'),
        ("c.json", '["a dog", {"caption": "a \\u201ccat\\u201d"}]'),
    ):
        (tmp_path / name).write_bytes(content.encode())
        assert read_captions(tmp_path / name) == ["a dog", "a “cat”"], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "a dog\n\na cat\n\n", "c.txt, line 2: the caption is blank"),
        ("c.txt", b"caf\xe9\n", "c.txt is not UTF-8 (byte 3); convert it"),
        ("c.txt", "", "c.txt has no captions"),
        ("c.md", "a dog", "c.md: a file of captions is .txt, .csv, .jsonl, .json"),
        ("c.csv", "id,text\n1,a dog\n", "c.csv has no column caption; it has id, text"),
        ("c.csv", "caption,id,caption\na,1,b\n", "c.csv has two columns caption; it has"),
        ("c.csv", "id,caption\n1,a dog\n2\n", "c.csv, line 3: the caption is blank"),
        ("c.csv", 'caption\n"a dog', "c.csv is not a csv file (unexpected end of data)"),
        ("c.jsonl", '{"caption": "a", "caption": "b"}\n', "is not a jsonl file (an object has"),
        ("c.json", "{}", "c.json is not a list of captions"),
        ("c.json", "[3]", "c.json, item 1: there is no caption"),
        ("c.json", "[" * 100_000, "c.json is not a json file ("),
        ("c.json", '["\\ud800"]', "c.json, item 1: the caption has a character that is no text"),
    ],
)
def test_files_of_captions_that_cannot_be_used(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(drl_jax.UserError) as error:
        read_captions(tmp_path / name)
    assert message in str(error.value)
