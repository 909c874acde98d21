"""Moments as lists for editing programs, and as zip files of clips."""

import csv
import io
import types
import zipfile
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import av
import numpy as np
import opentimelineio as otio
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from drl_jax.runtime.errors import UserError
from drl_jax.search import exports
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.clips import read_timing
from drl_jax.search.exports import Cut, cut_list
from drl_jax.search.routes import api_routes
from drl_jax.search.serve import _error
from drl_jax.search.session import Index
from drl_jax.search.update import update_index

FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
ODD = '5\'s #5% "<b>"\n\x01ä=&.mp4'


def write_numbered(path: Path, times: list[Fraction], rate: Fraction, **options: str) -> Path:
    """A video whose frames show their number as grey, at given times."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "12"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 120_000)
        for number, time in enumerate(times):
            level = np.full((32, 32, 3), 10 + 3 * (number % 80), np.uint8)
            frame = av.VideoFrame.from_ndarray(level)
            frame.time_base = Fraction(1, 120_000)
            frame.pts = round(time / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_of(path: Path, times: list[Fraction], start: float, end: float) -> Cut:
    duration = float(times[-1] + times[1])
    sampled = [float(time) for time in times[:: max(1, len(times) // 8)]]
    video = types.SimpleNamespace(path=path.name, times=sampled, duration=duration)
    return Cut(video, path, start, end, 0.25, read_timing(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", [FILM, NTSC, *map(Fraction, (25, 60, 15, 4))])
def test_cuts_are_exact_at_constant_rates(tmp_path, rate, suffix):
    times = [Fraction(number) / rate for number in range(200)]
    path = write_numbered(tmp_path / f"video.{suffix}", times, rate)
    shift = 1 / rate / 3
    for first, stop in ((0, 1), (1, 7), (59, 121), (199, 200)):
        # On frames and rounded to milliseconds, as pages do; and between frames.
        for start, end in (
            (times[first], Fraction(stop) / rate),
            (max(0, times[first] - shift), (Fraction(stop) - 1) / rate + shift),
        ):
            cut = cut_of(path, times, round(float(start), 3), round(float(end), 3))
            step = cut.rate / rate
            assert cut.frames[:2] == (first * step, stop * step), (first, stop)
            inside = [n for n, time in enumerate(times) if start <= time < end]
            assert inside == list(range(first, stop))
    # A program that reads a list back has the same frames.
    cuts = [cut_of(path, times, *map(float, (times[a], times[b]))) for a, b in ((3, 9), (50, 170))]
    expected = [(cut.frames[0], cut.frames[1] - cut.frames[0]) for cut in cuts]
    for kind, adapter, options in (
        ("otio", "otio_json", {}),
        ("edl", "cmx_3600", {"rate": float(cut.rate)}),
    ):
        text = cut_list(kind, cuts, "a dog & a cat").decode()
        timeline = otio.adapters.read_from_string(text, adapter, **options)
        clips = timeline.find_clips()
        ranges = [clip.source_range for clip in clips]
        assert [(r.start_time.to_frames(), r.duration.to_frames()) for r in ranges] == expected
        assert {r.start_time.rate for r in ranges} == {float(cut.rate)}
        assert clips[0].media_reference.target_url == f"file://{path}"
    root = ElementTree.fromstring(cut_list("fcpxml", cuts, "").decode())
    (form,) = root.iter("format")
    assert seconds(form.get("frameDuration")) == 1 / cut.rate
    found = [
        (one.get("start", "0s"), one.get("duration")) for one in root.find("project/sequence/spine")
    ]
    assert [tuple(seconds(text) * cut.rate for text in pair) for pair in found] == expected


def seconds(text: str) -> Fraction:
    return Fraction(text.removesuffix("s"))


def test_the_timecode_of_a_camera_counts(tmp_path, monkeypatch):
    times = [number / NTSC for number in range(100)]
    path = write_numbered(tmp_path / "video.mov", times, NTSC)
    timing = read_timing(path)
    assert timing.timecode == ""
    video = types.SimpleNamespace(path="v", times=[0.0], duration=float(100 / NTSC))
    for code, codes in (
        ("01:00:59;20", ("01:00:59;25", "01:00:59;29")),
        ("01:00:59;25", ("01:01:00;02", "01:01:00;06")),
        ("late", ("00:00:00;05", "00:00:00;09")),
    ):
        stated = timing._replace(timecode=code)
        cut = Cut(video, path, float(times[5]), float(times[9]), None, stated)
        (row,) = csv.DictReader(io.StringIO(cut_list("csv", [cut], "").decode()))
        assert (row["start_timecode"], row["end_timecode"]) == codes
        assert row["score"] == ""
    # Without the package, a CSV has none.
    monkeypatch.setattr(exports, "_opentimelineio", lambda: None)
    assert cut_list("csv", [cut], "").decode().splitlines()[1] == "v,0.167,0.300,,,29.97,"


def test_a_varying_rate_has_the_nearest_frames(tmp_path):
    rng = np.random.default_rng(0)
    gaps = [Fraction(int(gap), 1000) for gap in rng.integers(20, 47, 200)]
    times = [sum(gaps[:number], Fraction()) for number in range(200)]
    path = write_numbered(tmp_path / "video.mp4", times, Fraction(30))
    cut = cut_of(path, times, 1.237, 3.018)
    assert 28 < cut.timing.rate < 32
    assert cut.frames[:2] == (round(1.237 * cut.rate), round(3.018 * cut.rate))
    # Few sampled frames may be on those of a constant rate, but the file says that it has none.
    assert cut.timing.may_vary
    cut.video.times = [0.0]
    assert cut.frames[:2] == (round(1.237 * cut.rate), round(3.018 * cut.rate))


# ---------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def client(search_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    (folder / "videos").mkdir()
    for name, rate in (("clip2.mp4", FILM), ("clip10.mp4", FILM), (ODD, NTSC)):
        times = [Fraction(number) / rate for number in range(100)]
        write_numbered(folder / "videos" / name, times, rate)
    update_index(search_model, folder / "videos", folder / "index")
    api = SearchAPI(Index(folder / "index"), 4, 1_000_000)
    app = Starlette(routes=api_routes(api), exception_handlers={UserError: _error})
    with TestClient(app) as client:
        client.folder, client.api = folder, api
        yield client
    api.close()


def exported(client, kind: str, *moments: str, **parameters: str):
    given = [("format", kind), *(("moment", one) for one in moments), *parameters.items()]
    return client.get("/api/export", params=given)


def test_exports_have_names_of_every_kind_and_scores(client):
    query = {"q": "a red circle"}
    hits = {h["path"]: h for h in client.get("/api/search", params=query).json()["hits"]}
    moments = [f"{path}@1-3" for path in ("clip2.mp4", ODD)]
    text = io.StringIO(exported(client, "csv", *moments, **query).text, newline="")
    rows = [*csv.DictReader(text)]
    assert [row["path"] for row in rows] == ["clip2.mp4", ODD]
    for row in rows:
        assert float(row["score"]) == hits[row["path"]]["score"]
    assert rows[1]["start_timecode"] == "00:00:01;00"
    assert rows[0]["frames_per_second"] == "23.976"
    answer = exported(client, "fcpxml", *moments, **query)
    assert answer.headers["content-disposition"] == 'attachment; filename="moments.fcpxml"'
    root = ElementTree.fromstring(answer.text)
    paths = [client.folder / "videos" / name for name in ("clip2.mp4", ODD)]
    assert [one.get("src") for one in root.iter("asset")] == [
        f"file://{quote(str(p))}" for p in paths
    ]
    durations = [one.get("frameDuration") for one in root.iter("format")]
    assert durations == ["1001/24000s", "1001/30000s"]
    timeline = otio.adapters.read_from_string(exported(client, "otio", *moments).text, "otio_json")
    assert [clip.source_range.start_time.rate for clip in timeline.find_clips()] == [
        *map(float, (FILM, NTSC))
    ]
    text = exported(client, "edl", moments[1]).text
    assert text.startswith("TITLE: Moments\nFCM: DROP FRAME\n")
    assert "* FROM CLIP NAME:  5_s #5% __b____ä=&.mp4\n" in text
    assert "FCM: NON-DROP FRAME" in exported(client, "edl", moments[0]).text
    # In the order of numbers in names.
    listed = [hit["path"] for hit in client.get("/api/search").json()["hits"]]
    assert listed == [ODD, "clip2.mp4", "clip10.mp4"]


def test_a_zip_file_has_the_frames_of_the_moments(client):
    answer = exported(client, "zip", "clip2.mp4@1.001-2.002", f"{ODD}@0-0.5")
    assert answer.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.testzip() is None
    assert archive.namelist() == ["01 clip2 1.0-2.0.mp4", "02 5_s #5% __b____ä=& 0.0-0.5.mp4"]
    parts = zip(archive.namelist(), ("clip2.mp4", ODD), ((24, 48), (0, 15)), strict=True)
    for name, path, (first, stop) in parts:
        made = levels(io.BytesIO(archive.read(name)))
        expected = levels(str(client.folder / "videos" / path))[first:stop]
        assert len(made) == stop - first
        assert np.abs(made - expected).max() < 1.5, name


def levels(file: str | io.BytesIO) -> np.ndarray:
    """The mean of each frame, which grows by 2.6 or more from one to the next."""
    with av.open(file) as container:
        return np.array([f.to_ndarray(format="gray").mean() for f in container.decode(video=0)])


def test_requests_that_cannot_be_exported_are_one_line(client, monkeypatch):
    one = "clip2.mp4@1-2"
    for moments, kind, status, message in (
        ([one], "avi", 400, "format is one of csv, otio, edl, fcpxml, zip, not 'avi'"),
        ([], "csv", 400, "name 1 to 50 moments with moment=PATH@START-END, not 0"),
        ([one] * 51, "csv", 400, "not 51"),
        (["clip2.mp4"], "csv", 400, "moment takes PATH@START-END, not 'clip2.mp4'"),
        (["clip2.mp4@1"], "csv", 400, "moment takes seconds"),
        (["clip2.mp4@2-1"], "csv", 400, "moment: clip2.mp4 has the seconds 0 to 4.171, not 2-1"),
        (["clip2.mp4@1-9"], "csv", 400, "not 1-9"),
        (["../secret.mp4@1-2"], "zip", 404, "no video of the index has the path"),
        ([one, f"{ODD}@1-2"], "edl", 400, "one frame rate, and these videos have 23.976, 29.97;"),
    ):
        answer = exported(client, kind, *moments)
        found = answer.status_code, message in answer.json()["error"]
        assert found == (status, True), answer.text
    assert "no parameter 'x'" in exported(client, "csv", one, x="1").json()["error"]
    monkeypatch.setattr("drl_jax.search.media.MAX_SECONDS", 1.5)
    answer = exported(client, "zip", one, one)
    assert answer.json()["error"] == "a zip file has at most 1.5 s of clips; choose fewer"
    monkeypatch.setattr("drl_jax.search.media.MAX_CLIP", 0.5)
    answer = exported(client, "zip", one)
    assert answer.json()["error"].startswith("clip2.mp4: a clip has at most 0.5 s, not 0:01;")
    path = client.folder / "videos" / "clip10.mp4"
    kept = path.rename(client.folder / "kept")
    answer = exported(client, "csv", "clip10.mp4@1-2")
    assert answer.status_code == 410
    assert answer.json()["error"].startswith("clip10.mp4: the file is missing")
    kept.rename(path)
    monkeypatch.setattr(otio.adapters, "available_adapter_names", lambda: ["otio_json"])
    answer = exported(client, "otio", one)
    assert (answer.status_code, "pip install 'drl_jax[editing]'" in answer.text) == (501, True)
    assert client.api.export("csv", [one], PageQuery()).startswith(b"path,start,end,")
