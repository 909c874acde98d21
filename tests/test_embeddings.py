"""`python -m drl_jax.embed` and the files it writes, read without this package."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from support.commands import ROOT, error_of
from support.files import refused
from support.processes import killing_workers
from support.videos import numbered_frames, write_video

import drl_jax
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.embed.__main__ import main
from drl_jax.embed.encode import embed_captions, embed_videos
from drl_jax.embed.files import read_captions
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.runtime.lock import locked

CAPTIONS = ["a red circle moves left", "dogs, cats and a bird", "ein Mädchen läuft"]
SUFFIXES = ("npz", "parquet")
# Their lengths in seconds; the last has several windows.
VIDEOS = {"a.mp4": 2, "b.mp4": 7, "deep/c.mp4": 1, "d.mp4": 3, "long.mp4": 20}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings") / "videos"
    for number, (name, seconds) in enumerate(VIDEOS.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frames = numbered_frames(2 * seconds, 64, 64) + np.uint8(50 * number)
        write_video(folder / name, frames, fps=2)
    return folder


@pytest.fixture
def captions(tmp_path) -> Path:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    return tmp_path / "captions.txt"


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a file with the library of its format alone."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file}
    table = pyarrow.parquet.read_table(path)
    arrays = {name: parquet_array(table[name]) for name in table.column_names}
    return {**arrays, "drl_jax": np.array(table.schema.metadata[b"drl_jax"].decode())}


def parquet_array(column: pyarrow.ChunkedArray) -> np.ndarray:
    """A list of frames or tokens is a row of an array of objects."""
    values, shape = column.combine_chunks(), [len(column)]
    if pyarrow.types.is_list(values.type):
        rows = np.empty(len(values), object)
        rows[:] = [parquet_array(pyarrow.chunked_array([row.values])) for row in values]
        return rows
    if pyarrow.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return array.astype(str) if array.dtype == object else array


def assert_arrays(found: dict, expected: dict, suffix: str, *, atol: float = 0) -> None:
    """The arrays of a file are those of the API; Parquet has lists without padding."""
    mask = expected["text_mask" if "text_mask" in expected else "frame_mask"]
    if suffix == "parquet":
        expected = {name: a for name, a in expected.items() if not name.endswith("_mask")}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if suffix == "parquet" and name.startswith(("text_", "frame_")):
            pairs = [(row, a[m]) for row, a, m in zip(found[name], array, mask, strict=True)]
        else:
            pairs = [(found[name], array)]
        for one, other in pairs:
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


def read_all(out: Path) -> dict[str, np.ndarray]:
    """Joins the files of an output."""
    files = sorted(out.parent.glob(f"{out.stem}*{out.suffix}"))
    parts = [read(file) for file in files]
    names = parts[0].keys() - {"drl_jax"}
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_captions_has_the_arrays_of_the_api(suffix, search_model, tmp_path):
    embed_captions(search_model, CAPTIONS, tmp_path / f"c.{suffix}")
    found = read(tmp_path / f"c.{suffix}")
    text = search_model.encode_text(CAPTIONS)
    about = json.loads(str(found.pop("drl_jax")))
    assert (about["model"], about["interaction"]) == (search_model.fingerprint, "wti")
    assert found.pop("caption").tolist() == CAPTIONS
    token, mask = found.pop("token"), text["text_mask"]
    if suffix == "npz":
        assert (token[~mask] == "").all()
        token = [row[m] for row, m in zip(token, mask, strict=True)]
    assert [row.tolist() for row in token] == search_model.token_strings(CAPTIONS)
    assert_arrays(found, {"pooled": search_model.pool_text(text), **text}, suffix)


def test_captions_that_are_cut_are_counted_over_all_files(search_run, captions, capsys):
    """The run reads 24 tokens."""
    captions.write_text("\n".join(["dog " * 22, "dog " * 23, "a dog", "cat " * 50]))
    flags = (f"--workdir={search_run}", f"--captions={captions}", "--shard_size=1")
    assert main([*flags, f"--out={captions.with_name('c.npz')}"]) == 0
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    assert [line for line in lines if "cut" in line] == [
        "drl_jax.embed: 2 of 4 captions cut to data.max_words=24 tokens (start and end included):"
        " their last words are not read"
    ]
    # Features of captions depend on it, those of videos do not.
    shorter = drl_jax.load(search_run, max_words=20)
    with pytest.raises(drl_jax.UserError, match="max_words"):
        embed_captions(shorter, read_captions(captions), captions.with_name("c.npz"), shard_size=1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_videos_has_the_arrays_of_the_api(suffix, search_model, videos, tmp_path):
    embed_videos(search_model, videos, tmp_path / f"v.{suffix}")
    found = read(tmp_path / f"v.{suffix}")
    paths = found.pop("video_id").tolist()
    assert sorted(paths) == sorted(VIDEOS)
    video = search_model.encode_videos([videos / path for path in paths])
    times = [list(search_model.read_video(videos / path).times) for path in paths]
    frame_time = found.pop("frame_time")
    if suffix == "npz":
        np.testing.assert_array_equal(np.isnan(frame_time), ~video["frame_mask"])
        frame_time = [row[~np.isnan(row)] for row in frame_time]
    assert [row.tolist() for row in frame_time] == times
    found.pop("drl_jax")
    expected = {"pooled": search_model.pool_videos(video), **video}
    assert_arrays(found, expected, suffix, atol=1e-6)


def test_a_column_of_frames_is_a_list_of_vectors(search_model, videos, tmp_path):
    """The type that vector databases read as a multi-vector."""
    embed_videos(search_model, videos, tmp_path / "v.parquet", dtype="float16")
    schema = pyarrow.parquet.read_schema(tmp_path / "v.parquet")
    width = search_model.config.model.backbone.embed_dim
    vector = pyarrow.list_(pyarrow.float16(), width)
    assert schema.field("pooled").type.equals(vector)
    assert schema.field("frame_unit").type.value_type.equals(vector)
    assert schema.field("frame_time").type.value_type.equals(pyarrow.float32())


def test_features_do_not_depend_on_the_shard_size(search_model, videos, tmp_path):
    embed_videos(search_model, videos, tmp_path / "one.npz")
    embed_videos(search_model, videos, tmp_path / "many.npz", shard_size=2)
    embed_captions(search_model, CAPTIONS, tmp_path / "words.npz")
    embed_captions(search_model, CAPTIONS, tmp_path / "few.npz", shard_size=1)
    assert sorted(path.name for path in tmp_path.glob("many-*")) == [
        f"many-{number:05d}-of-00003.npz" for number in range(3)
    ]
    for one, many in (("one.npz", "many.npz"), ("words.npz", "few.npz")):
        expected, found = read_all(tmp_path / one), read_all(tmp_path / many)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(found[name], array, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_similarities_of_a_file_are_those_of_evaluation(
    search_model, shapes_config, test_videos, tmp_path
):
    dataset = VideoDataset(dataset_dir(shapes_config))
    split = load_split(dataset, "test", search_model.config.data)
    evaluator = Evaluator(search_model.config, dataset, search_model.layout)
    expected = evaluator.run(search_model.params, split).sim_matrix
    captions = split.caption_pairs()[1]
    for dtype, tolerance in (("float32", 2e-5), ("float16", 2e-3)):
        text, video = tmp_path / f"text_{dtype}.npz", tmp_path / f"video_{dtype}.npz"
        embed_captions(search_model, captions, text, dtype=dtype)
        embed_videos(search_model, test_videos, video, dtype=dtype)
        found = read(video)
        assert (found["frame_unit"].dtype, found["frame_time"].dtype) == (dtype, "float32")
        row = {path: row for row, path in enumerate(found["video_id"].tolist())}
        order = [row[f"{dataset.video_ids[video]}.mp4"] for video in split.videos]
        similarity = search_model.similarity(read(text), found)[:, order]
        np.testing.assert_allclose(similarity, expected, atol=tolerance)


def test_pooled_vectors():
    """Of arrays that are small enough to compute by hand."""
    frame = np.array([[[1.0, 0], [0, 1], [1, 0]]], np.float32)
    mask = np.array([[True, True, False]])
    weighted = {"frame_unit": frame, "frame_mask": mask, "frame_weight": mask * [0.6, 0.8, 0.0]}
    for interaction in ("ti", "wti"):
        pool = INTERACTIONS[interaction].pool_video
        np.testing.assert_allclose(pool(weighted), [[0.6, 0.8]], atol=1e-7)
        text = {name.replace("frame", "text"): array for name, array in weighted.items()}
        pooled = INTERACTIONS[interaction].pool_text(text)
        np.testing.assert_allclose(pooled, [[0.6, 0.8]], atol=1e-7)
    scaled = frame * np.array([5, 9, 2])[None, :, None]
    pooled = INTERACTIONS["xti"].pool_video({"frame_feat": scaled, "frame_mask": mask})
    np.testing.assert_allclose(pooled, [[0.5**0.5, 0.5**0.5]], atol=1e-7)
    pooled = INTERACTIONS["xti"].pool_text({"sentence_feat": np.array([[3.0, 4.0]])})
    np.testing.assert_allclose(pooled, [[0.6, 0.8]], atol=1e-7)
    unit = np.array([[0.6, 0.8]], np.float32)
    assert INTERACTIONS["dp"].pool_video({"video_unit": unit}) is unit
    assert INTERACTIONS["dp"].pool_text({"sentence_unit": unit}) is unit


def test_windows_have_rows_of_their_own(search_model, videos, tmp_path):
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
    whole = search_model.encode_videos([videos / "a.mp4"])
    row = found["video_id"].tolist().index("a.mp4")
    np.testing.assert_allclose(found["frame_unit"][row], whole["frame_unit"][0], atol=1e-6)


def test_videos_that_cannot_be_read_are_listed_and_the_rest_is_written(
    search_run, tmp_path, capsys
):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "good.mp4", numbered_frames(4, 64, 64), fps=2)
    (folder / "bad.mp4").write_text("no video")
    (folder / "link.mp4").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")).write_text("no video")
    flags = (f"--workdir={search_run}", f"--videos={folder}", f"--out={tmp_path / 'v.npz'}")
    # The second shard has no video, so no rows.
    arguments = [*flags, "--shard_size=1"]
    expected = [
        "  \\udcff.mp4: its name is not UTF-8; rename it",
        "  bad.mp4: is not a video: its content is text that starts with 'no video'",
        "  link.mp4: it is no file, e.g. a link to nothing",
    ]
    for _ in range(2):  # What is finished is not read again, but still reported.
        assert main(arguments) == 1
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert lines[-4:] == ["drl_jax.embed: 3 videos could not be read:", *expected]
        assert "1 videos, float32, 2 files" in captured.out
    empty, good = (read(tmp_path / f"v-0000{n}-of-00002.npz") for n in range(2))
    assert good["video_id"].tolist() == ["good.mp4"]
    for name in good.keys() - {"drl_jax"}:
        assert empty[name].shape == (0, *good[name].shape[1:])
    assert json.loads(str(empty["drl_jax"]))["unreadable"].keys() == {"bad.mp4"}


def test_videos_that_could_not_be_read_this_time_are_read_by_the_next_run(
    search_run, tmp_path, capsys
):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", numbered_frames(4, 64, 64), fps=2)
    flags = (f"--workdir={search_run}", f"--videos={folder}", f"--out={tmp_path / 'v.npz'}")
    with killing_workers():
        assert main(flags) == 1
    captured = capsys.readouterr()
    assert "  a.mp4: the process that worked on it died (exit code -9)" in captured.err
    assert main(flags) == 0
    assert read(tmp_path / "v.npz")["video_id"].tolist() == ["a.mp4"]


# ---------------------------------------------------------------- interruptions


def start(*flags: str) -> subprocess.Popen:
    # Where the tests run in the background, a shell has them ignore SIGINT.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "drl_jax.embed", *flags],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_an_output_that_was_interrupted_and_killed_is_continued(
    search_run, search_model, test_videos, tmp_path
):
    out = tmp_path / "v.npz"
    flags = (f"--workdir={search_run}", f"--videos={test_videos}", f"--out={out}")
    flags = (*flags, "--shard_size=1")

    def finished() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("v-*.npz")}

    process = start(*flags)
    wait_for(finished, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.replace("\r", "\n").splitlines()[-1] == (
        "drl_jax.embed: interrupted; finished files are kept; rerun the command to continue"
    )
    before = finished()
    assert 0 < len(before) < 32

    process = start(*flags)
    wait_for(lambda: len(finished()) > len(before), process)
    process.kill()
    process.communicate()
    killed = finished()
    assert len(before) < len(killed) < 32
    assert before.items() <= killed.items()
    # What the kill may leave.
    (tmp_path / "v-00031-of-00032.npz.123.part").write_text("half")
    (tmp_path / "other.npz.123.part").write_text("of another output")

    assert main(list(flags)) == 0
    assert killed.items() <= finished().items()
    assert [path.name for path in tmp_path.glob("*.part")] == ["other.npz.123.part"]
    found = read_all(out)
    assert sorted(found["video_id"]) == sorted(path.name for path in test_videos.iterdir())
    expected = search_model.encode_videos([test_videos / path for path in found["video_id"]])
    np.testing.assert_allclose(found["frame_unit"], expected["frame_unit"], atol=1e-5)


def test_a_disk_that_takes_no_more_is_one_line(search_run, captions, tmp_path, capsys):
    """With a limit of the size of files, which fails as a full disk does."""
    flags = [f"--workdir={search_run}", f"--captions={captions}"]
    # Compiled before: the cache of compiled programs is not written under the limit.
    assert main([*flags, f"--out={tmp_path / 'first.npz'}"]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for suffix in SUFFIXES:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            out = tmp_path / f"c.{suffix}"
            line = error_of("drl_jax.embed", *flags, f"--out={out}", capsys=capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert line.startswith(f"drl_jax.embed: {out} cannot be written: File too large (EFBIG);")
        assert [path.name for path in tmp_path.glob(f"c.{suffix}*")] == [f"c.{suffix}.lock"]
        # No file was finished, so flags may change.
        assert main([*flags, f"--out={out}", "--dtype=float16"]) == 0


# ---------------------------------------------------------------- mistakes


def test_another_model_or_input_is_refused(search_model, videos, tmp_path):
    out = tmp_path / "v.npz"
    embed_videos(search_model, videos, out)
    before = out.read_bytes()
    for what, made in (
        ("list of videos", lambda: embed_videos(search_model, videos / "deep", out)),
        ("--dtype", lambda: embed_videos(search_model, videos, out, dtype="float16")),
        ("--windows", lambda: embed_videos(search_model, videos, out, windows=True)),
        ("--shard_size", lambda: embed_videos(search_model, videos, out, shard_size=2)),
        ("list of captions", lambda: embed_captions(search_model, CAPTIONS, out)),
    ):
        with pytest.raises(drl_jax.UserError, match=f"was made with another {what}; give another"):
            made()
    with (
        refused(out),
        pytest.raises(drl_jax.UserError, match=r"npz cannot be read: .*ELOOP.*nothing was moved"),
    ):
        embed_videos(search_model, videos, out)
    with (
        locked(tmp_path / "v.npz.lock", "it"),
        pytest.raises(drl_jax.UserError, match="is in use by process"),
    ):
        embed_videos(search_model, videos, out)
    assert out.read_bytes() == before


def test_another_file_is_not_replaced(search_model, tmp_path):
    for suffix in SUFFIXES:
        out = tmp_path / f"c.{suffix}"
        embed_captions(search_model, CAPTIONS, out)
        for content in (out.read_bytes()[:100], b"", b"a text"):
            out.write_bytes(content)
            with pytest.raises(drl_jax.UserError, match=r"is damaged, or no file of drl_jax.embed"):
                embed_captions(search_model, CAPTIONS, out)
            assert out.read_bytes() == content
    np.savez(tmp_path / "c.npz", a=np.zeros(3))
    with pytest.raises(drl_jax.UserError, match=r"is damaged, or no file of drl_jax.embed"):
        embed_captions(search_model, CAPTIONS, tmp_path / "c.npz")


def test_mistakes_are_one_line(search_run, videos, captions, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out, run = f"--out={tmp_path / 'x.npz'}", "--workdir=nowhere"
    known = f"--workdir={search_run}"
    of_videos, of_captions = f"--videos={videos}", f"--captions={captions}"
    for flags, message in (
        ((run, out), "one of the arguments --videos --captions is required"),
        ((run, out, of_videos, of_captions), "not allowed with argument --videos"),
        ((run, of_videos, "--out=x.csv"), "--out=x.csv: the formats are .npz, .parquet"),
        ((run, of_videos, "--out=no/x.npz"), "--out=no/x.npz: there is no directory no"),
        ((run, out, of_videos), "no run in nowhere"),
        ((out, of_videos), "name the model with --workdir=RUN or --weights=FILE"),
        ((run, "--weights=a.pt", out, of_videos), "give --workdir or --weights, not both"),
        ((run, "--release=openai", out, of_videos), "--release and --tokenizer describe --weights"),
        ((known, out, "--videos=nowhere"), "no directory nowhere"),
        (
            (known, out, f"--videos={tmp_path / 'empty'}"),
            f"no video in {tmp_path / 'empty'} (looked",
        ),
        ((run, out, of_captions, "--windows"), "--windows is of videos; omit it"),
        ((run, out, "--captions=none.txt"), "none.txt cannot be read: No such file or directory"),
        ((run, out, of_videos, "--shard_size=0"), "must be a positive whole number"),
        ((run, out, of_videos, "--timeout=-1"), "must be a number of seconds above 0, not '-1'"),
        ((run, out, of_videos, "--timeout=nan"), "must be a number of seconds above 0, not 'nan'"),
    ):
        line = error_of("drl_jax.embed", *flags, capsys=capsys)
        assert line.startswith("drl_jax.embed: ")
        assert message in line
    assert not list(tmp_path.glob("x.npz*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "a dog\r\na “cat”\n"),
        ("c.csv", '\ufeffid,caption\n1,a dog\n2,"a “cat”"\n'),
        ("c.jsonl", '"a dog"\n{"id": 2, "caption": "a “cat”"}\n'),
        ("c.json", '["a dog", {"caption": "a \\u201ccat\\u201d"}]'),
    ],
)
def test_files_of_captions(name, content, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert read_captions(tmp_path / name) == ["a dog", "a “cat”"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "a dog\n\na cat\n", "c.txt, line 2: the caption is blank"),
        ("c.txt", b"caf\xe9\n", "c.txt is not UTF-8 (byte 3); convert it"),
        ("c.txt", "", "c.txt has no captions"),
        ("c.md", "a dog", "c.md: a file of captions is .txt, .csv, .jsonl, .json"),
        ("c.csv", "id,text\n1,a dog\n", "c.csv has no column caption; it has id, text"),
        ("c.csv", "id,caption\n1,a dog\n2\n", "c.csv, line 3: the caption is blank"),
        ("c.csv", "caption\na dog\n\n", "c.csv, line 3: the caption is blank"),
        ("c.csv", 'caption\n"a dog', "c.csv is not a csv file (unexpected end of data)"),
        ("c.jsonl", '"a dog"\n\n', "c.jsonl, line 2: the caption is blank"),
        ("c.jsonl", '"a dog"\n{"text": "b"}\n', "c.jsonl, line 2: there is no caption"),
        ("c.csv", "caption,id,caption\na,1,b\n", "c.csv has two columns caption; it has"),
        (
            "c.jsonl",
            '{"caption": "a", "caption": "b"}\n',
            "c.jsonl is not a jsonl file (an object has",
        ),
        ("c.jsonl", "a dog\n", "c.jsonl is not a jsonl file (Expecting value"),
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
