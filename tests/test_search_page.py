"""The search page of a real server and its JSON API, over HTTP and in a real browser."""

import contextlib
import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import av
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from support.browser import text_contrasts
from support.commands import error_of, start_interruptible
from support.served import Served, check_schema, join_clips, port_of, serving

from drl_jax.search import index_file
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.routes import api_routes
from drl_jax.search.update import update_index

SENTENCE = "a green triangle shrinks"
ASKED = f"?q={quote(SENTENCE)}"
# The heading of hits; those of a random model are weak.
FOUND = re.compile("^(Best matches|No clear match)$")
ODD = 'sub folder/5\'s #5% "<b>"\nä.mp4'
LONG, UNPLAYABLE = "long.mp4", "unplayable.avi"


@pytest.fixture(scope="module")
def served(search_model, test_videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    videos, index = folder / "videos", folder / "index"
    (videos / "sub folder").mkdir(parents=True)
    clips = sorted(test_videos.iterdir())
    for number, path in enumerate(clips[:4]):
        shutil.copy2(path, videos / ODD if number == 3 else videos)
    join_clips(clips[4:14], videos / LONG, "libx264")
    join_clips(clips[14:16], videos / UNPLAYABLE, "mpeg4")
    (videos / "no video.mp4").write_text("text")
    (folder / "secret.mp4").write_text("outside the folder")
    update_index(search_model, videos, index)
    (folder / "temporary").mkdir()
    with serving(index, folder / "temporary", "--top=4", "--max_upload=2") as (process, url):
        assert url.startswith("http://127.0.0.1:")
        yield Served(process, port_of(url), videos, index, folder / "temporary")


# ---------------------------------------------------------------------- files


def test_videos_and_their_pictures_are_served(served):
    name = next(path.name for path in sorted(served.videos.glob("video*.mp4")))
    content = (served.videos / name).read_bytes()
    assert served.get(f"/videos/{name}") == (200, "video/mp4", content)
    # A browser's request when it starts in the middle.
    assert served.get(f"/videos/{name}", Range="bytes=100-199")[::2] == (206, content[100:200])
    assert served.get(f"/videos/{quote(ODD)}")[0] == 200
    found = served.json(f"/api/search{ASKED}&name=long")["hits"][0]["moments"][0]
    strip, frame = (
        Image.open(io.BytesIO(served.get(found[name])[2])) for name in ("strip", "thumbnail")
    )
    assert strip.size == (found["strip_frames"] * frame.width, frame.height)
    # Its side is that of the file, not that of the thumbnails.
    assert Image.open(io.BytesIO(served.get(found["picture"])[2])).size == (64, 64)


def test_a_part_is_served_as_a_clip_that_browsers_play(served, tmp_path):
    clip = tmp_path / "clip.mp4"
    status, kind, body = served.get(f"/clips/{UNPLAYABLE}?start=1&end=3")
    assert (status, kind) == (200, "video/mp4")
    clip.write_bytes(body)
    with av.open(str(clip)) as made, av.open(str(served.videos / UNPLAYABLE)) as source:
        assert made.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="gray") for frame in made.decode(video=0)]
        expected = [frame.to_ndarray(format="gray") for frame in source.decode(video=0)][4:12]
    assert len(frames) == 8
    for found, frame in zip(frames, expected, strict=True):
        assert np.abs(found.astype(int) - frame).mean() < 4
    # A browser asks for it in parts.
    assert served.get(f"/clips/{UNPLAYABLE}?start=1&end=3", Range="bytes=9-19")[2] == body[9:20]


def test_only_files_of_the_index_are_served(served):
    for path in (
        "/videos/../secret.mp4",
        "/videos/..%2fsecret.mp4",
        "/videos/%2e%2e/secret.mp4",
        "/videos//etc/passwd",
        "/videos/%2fetc%2fpasswd",
        "/videos/no%20video.mp4",
        "/videos/",
        "/frames/../secret.mp4",
        "/pictures/../secret.mp4",
        "/clips/no%20video.mp4",
        "/api/video?video=../secret.mp4",
        "/static/../page.html",
        "/static/%2e%2e/%2e%2e/serve.py",
    ):
        status, _, body = served.get(path)
        assert status == 404, path
        assert b"outside" not in body


def test_a_file_that_was_replaced_or_is_missing_says_so(served):
    name = sorted(path.name for path in served.videos.glob("video*.mp4"))[1]
    path = served.videos / name
    kept = path.rename(served.videos / "kept")
    try:
        assert served.json(f"/api/video?video={name}")["state"] == "missing"
        assert served.get(f"/videos/{name}")[0] == 410
        assert b"file missing" in served.get(f"/?name={name}")[2]
        path.symlink_to(served.videos.parent / "secret.mp4")
        assert served.json(f"/api/video?video={name}")["state"] == "changed"
        for kind in ("videos", "pictures", "clips"):
            status, _, body = served.get(f"/{kind}/{name}")
            assert status == 409
            assert body.startswith(b"the file has changed since it was indexed; index")
        assert served.get(f"/frames/{name}")[0] == 200
        page = served.get(f"/{ASKED}&video={name}")[2]
        assert b"It cannot be played: the file has changed" in page
        assert b"<video" not in page
    finally:
        path.unlink(missing_ok=True)
        kept.rename(path)
    assert served.get(f"/videos/{name}")[0] == 200


def test_other_sites_learn_nothing(served):
    assert served.get("/", Host="evil.example")[0] == 400
    # A browser keeps these answers from a page of another site, whether the file exists or not.
    for path, status in (
        *(("/", 200), ("/?top=0", 400), (f"/videos/{LONG}", 200), ("/videos/none", 404)),
        *((f"/frames/{LONG}", 200), ("/static/page.js", 200), ("/none", 404), ("/api/index", 200)),
    ):
        response, _ = served.respond(path)
        assert response.status == status
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin", path
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


# ---------------------------------------------------------------------- the API


def test_bad_requests_are_one_line(served):
    for query, message in (
        ("q=%20%20", "the query is blank: give a sentence, a picture or a video"),
        ("q=a+dog&top=0", "top must be a number from 1 to 50, not '0'"),
        ("q=a+dog&top=many", "top must be a number from 1 to 50"),
        ("offset=-1", "offset must be a number from 0"),
        ("offset=6", "offset must be below the number of videos, 6"),
        ("moments=31", "moments must be a number from 1 to 30, not '31'"),
        ("only=none.mp4", "no video of the index has the path 'none.mp4'"),
        ("colour=red", "there is no parameter 'colour'; there are q, without,"),
        ("min_length=long", "min_length takes seconds, or minutes:seconds, not 'long'"),
        ("min_length=nan", "min_length takes seconds"),
        ("min_length=9&max_length=1:0:0:0", "max_length takes seconds"),
        ("min_length=9&max_length=8", "min_length is larger than max_length"),
        ("q=" + "dog+" * 25_000, "q has 100,000 characters; give at most 1,000"),
    ):
        expected = 404 if query.startswith("only") else 400
        status, _, body = served.get(f"/api/search?{query}")
        assert status == expected, body
        assert message in json.loads(body)["error"]
        status, _, body = served.get(f"/?{query}")
        assert status == expected
        assert b'role="alert"' in body
    for path, expected, message in (
        (f"/api/video?video={LONG}&t=99", 400, b"t=99 is outside the video, which has 32.5 s"),
        (f"/pictures/{LONG}?t=99", 400, b"t=99 is outside the video"),
        (f"/clips/{LONG}?start=20&end=10", 400, b"is not in the video"),
        (f"/clips/{LONG}?start=0&end=61", 400, b"a clip has at most 60 s, not 1:01"),
        (f"/frames/{LONG}?frames=0,1000", 400, b"frame must be a number from 0 to"),
        (f"/frames/{LONG}?frame=x", 400, b"frame must be a number from 0 to"),
        ("/?video=none.mp4", 404, b"no video of the index has the path"),
    ):
        status, _, body = served.get(path)
        assert (status, message in body) == (expected, True), body
    assert b"&lt;script&gt;" in served.get("/?q=%3Cscript%3E")[2]
    assert f'value="{SENTENCE}"'.encode() in served.get(f"/{ASKED}&min_length=long")[2]
    # The model reads 24 tokens, with the start and the end.
    for words, used in ((22, None), (23, 22), (40, 22)):
        assert served.json("/api/search?q=" + "dog+" * words)["tokens_used"] == used


def test_the_api_is_as_described(served):
    description = served.json("/api/openapi.json")
    schemas = description["components"]["schemas"]
    media = types.SimpleNamespace(max_video=0)
    answers = types.SimpleNamespace(search=None, video=None, media=media)
    routes = {route.path for route in api_routes(answers)}
    assert routes == {path for path in description["paths"] if path.startswith("/api/")}
    for address in (
        *(f"/api/search{ASKED}", "/api/search?folder=sub%20folder", f"/api/search{ASKED}&name=zz"),
        *(f"/api/video{ASKED}&video={LONG}&t=20", f"/api/video?video={LONG}"),
        *(f"/api/search{ASKED}&only={LONG}&only=video0.mp4", "/api/unsearchable"),
        *(f"/api/video{ASKED}&video={LONG}&moments=30", "/api/index"),
        *("/api/openapi.json", f"/videos/{LONG}", f"/frames/{LONG}?frame=1"),
        *(f"/pictures/{LONG}?t=3", f"/clips/{LONG}?start=1&end=2"),
    ):
        path, _, query = address.partition("?")
        described = (
            description["paths"].get(path)
            or description["paths"][f"/{path.split('/')[1]}/{{path}}"]
        )
        names = set()
        for parameter in described["get"].get("parameters", ()):
            if "$ref" in parameter:
                name = parameter["$ref"].split("/")[-1]
                parameter = description["components"]["parameters"][name]
            names.add(parameter["name"])
        assert {part.split("=")[0] for part in query.split("&") if part} <= names
        status, kind, body = served.get(address)
        ((expected, content),) = described["get"]["responses"]["200"]["content"].items()
        assert status == 200
        assert kind == expected or (expected == "video/*" and kind.startswith("video/"))
        if kind == "application/json":
            check_schema(json.loads(body), content["schema"], schemas)
    for path in ("/api/search?top=0", "/api/video?video=none"):
        check_schema(json.loads(served.get(path)[2]), schemas["Error"], schemas)


def test_pictures_and_moments_are_queries(served):
    status, kind, picture = served.get("/pictures/video0.mp4?t=1")
    assert (status, kind) == (200, "image/jpeg")
    status, answer = served.post("/api/pictures", picture)
    assert status == 200
    found = served.json(f"/api/search?picture={answer['picture']}")
    (hit,) = (hit for hit in found["hits"] if hit["path"] == "video0.mp4")
    assert hit["score"] > 0.5  # Of unit vectors, of which one is the same frame.
    assert hit["same_picture"]
    assert b"has this picture" in served.get(f"/?picture={answer['picture']}")[2]
    assert hit["moments"][0]["unusual"] > 0  # Among other windows.
    like = hit["moments"][0]["like"]
    assert like.startswith("/?like=video0.mp4%40")
    assert served.json(f"/api/search{like[1:]}")["hits"][0]["path"] == "video0.mp4"
    # Beside a sentence, both count.
    both = served.json(f"/api/search{ASKED}&picture={answer['picture']}&without=red")
    assert both["hits"][0]["score"] != found["hits"][0]["score"]
    for status, answer in (
        served.post("/api/pictures", picture, "image/jpeg"),
        served.post("/api/pictures", b"no picture"),
        served.post("/api/pictures", picture[: len(picture) // 2]),
    ):
        assert status in (400, 415)
        assert answer["error"]
    # The server answers before it has read all, and may close the connection.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert served.post("/api/pictures", bytes(21_000_000))[0] == 413
    for query, message in (
        ("picture=0123", "the picture is not known any more"),
        ("like=none@1", "no video of the index has the path"),
        ("like=none", "like takes PATH@SECONDS, not 'none'"),
        ("like=video0.mp4@99", "video0.mp4 has the seconds 0 to"),
        ("without=red", "the query is blank"),
    ):
        status, _, body = served.get(f"/api/search?{query}")
        assert status in (400, 404)
        assert message in json.loads(body)["error"]


def test_pictures_cost_the_server_no_memory(served):
    file = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(file, "PNG", compress_level=1)
    memory = Path(f"/proc/{served.process.pid}")

    def used(name: str) -> int:
        lines = (memory / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024

    (memory / "clear_refs").write_text("5")  # The peak starts again.
    before = used("VmRSS")
    with ThreadPoolExecutor(5) as senders:
        answers = [*senders.map(lambda _: served.post("/api/pictures", file.getvalue()), range(5))]
    message = "the picture has 10000 x 10000 pixels; at most 50,000,000 are decoded"
    assert answers == [(400, {"error": message})] * 5
    assert used("VmHWM") - before < 64  # MB


def sent_files(served: Served) -> list[str]:
    """What is kept of files that were sent to the server."""
    return [path.name for path in served.temporary.glob("*/video")]


def test_a_video_that_is_sent_is_a_query(served):
    film = (served.videos / LONG).read_bytes()
    status, sent = served.post("/api/videos", film)
    assert status == 200
    (hit,) = served.json(f"/api/search?by_video={sent['by_video']}&top=1")["hits"]
    assert hit["path"] == LONG
    assert hit["score"] == pytest.approx(1, abs=0.01)
    # Each moment is explained by the part of the query that it is like.
    assert hit["moments"][0]["start"] <= hit["moments"][0]["peak"] <= hit["moments"][0]["end"]
    both = served.json(f"/api/search{ASKED}&by_video={sent['by_video']}")
    assert both["hits"][0]["score"] != hit["score"]
    status, _, body = served.get("/api/search?by_video=0123")
    assert (status, b"the video is not known any more; send it again" in body) == (404, True)
    for body, kind, expected, message in (
        (b"text", "application/octet-stream", 400, "the video is not a video: its content is"),
        (b"", "application/octet-stream", 400, "the video cannot be read as a video (Inv"),
        (film, "video/mp4", 415, "send it as application/octet-stream"),
    ):
        assert served.post("/api/videos", body, kind) == (expected, {"error": mock.ANY})
        assert message in served.post("/api/videos", body, kind)[1]["error"]
    assert sent_files(served) == []


def test_a_video_that_is_too_large_is_refused_before_it_is_sent(served):
    kind = "application/octet-stream"
    headers = {"Content_Type": kind, "Content_Length": str(10**12)}
    response = served.start("POST", "/api/videos", **headers).getresponse()
    assert response.status == 413
    assert json.loads(response.read()) == {"error": "a video has at most 2 MB"}
    # Without a length, it is refused when it is too long.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        parts = (bytes(100_000) for _ in range(30))
        headers = {"Content-Type": kind}
        connection.request("POST", "/api/videos", parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert sent_files(served) == []


def test_a_video_that_ends_in_the_middle_leaves_nothing(served):
    headers = {"Content_Type": "application/octet-stream", "Content_Length": "1000000"}
    connection = served.start("POST", "/api/videos", **headers)
    connection.send(bytes(500_000))
    while not sent_files(served):
        time.sleep(0.01)
    connection.close()
    for _ in range(500):
        if not sent_files(served):
            break
        time.sleep(0.01)
    assert sent_files(served) == []


def test_only_some_videos_are_searched(served):
    names = ("video0.mp4", ODD)
    only = "".join(f"&only={quote(name)}" for name in names)
    found = served.json(f"/api/search{ASKED}{only}")
    assert {hit["path"] for hit in found["hits"]} == set(names)
    assert found["total"] == 2
    assert all("only=video0.mp4&only=sub%20folder/" in hit["page"] for hit in found["hits"])
    listed = served.json(f"/api/search?only={LONG}")
    assert [hit["path"] for hit in listed["hits"]] == [LONG]
    # Forms of browsers send a newline as CR LF.
    sent = served.json(f"/api/search?only={quote(ODD).replace('%0A', '%0D%0A')}")
    assert [hit["path"] for hit in sent["hits"]] == [ODD]


def test_all_moments_of_a_video(served):
    few = served.json(f"/api/video{ASKED}&video={LONG}")
    assert len(few["moments"]) == 3
    assert few["more"] == f"/{ASKED}&video={LONG}&moments=30"
    all_moments = served.json(f"/api/video{few['more'][1:]}")
    assert len(all_moments["moments"]) > 3
    assert [m["start"] for m in all_moments["moments"][:3]] == [m["start"] for m in few["moments"]]
    assert all_moments["more"] is None
    # The hits beside it have as many moments as ever.
    assert served.get(f"/{few['more'][1:]}")[2].count(b"2 more moments") >= 1


def test_files_that_cannot_be_searched_are_listed(served):
    assert served.json("/api/index")["unsearchable"] == 1
    (file,) = served.json("/api/unsearchable")["files"]
    assert file["path"] == "no video.mp4"
    assert file["reason"].startswith("is not a video: its content is text")
    assert b'<a href="/unsearchable">1 file cannot be searched</a>' in served.get("/")[2]
    assert b"is not a video: its content is text" in served.get("/unsearchable")[2]


def test_the_progress_of_indexing_is_shown(served, monkeypatch):
    monkeypatch.setattr(index_file, "_INTERVAL", 0.0)
    assert served.json("/api/index")["indexing"] is None
    with IndexWriter(served.index) as writer:
        writer.show_progress(120, 340)
        assert served.json("/api/index")["indexing"] == {"done": 120, "total": 340}
        assert b"Indexing: 120 of 340 files" in served.get("/")[2]
        assert served.get(f"/api/search{ASKED}")[0] == 200
        left = (served.index / "indexing.json").read_text()
    assert not (served.index / "indexing.json").exists()
    # What a process leaves that was killed is no progress.
    (served.index / "indexing.json").write_text(left)
    assert served.json("/api/index")["indexing"] is None
    assert b"Indexing:" not in served.get("/")[2]
    (served.index / "indexing.json").unlink()


def test_hits_are_loaded_in_parts(served):
    whole = served.json(f"/api/search{ASKED}&top=6")["hits"]
    first = served.json(f"/api/search{ASKED}")
    assert first["next"] == f"/{ASKED}&offset=4"
    rest = served.json(f"/api/search{ASKED}&offset=4")
    assert rest["next"] is None
    assert [(hit["rank"], hit["path"]) for hit in first["hits"] + rest["hits"]] == [
        (hit["rank"], hit["path"]) for hit in whole
    ]
    assert [hit["rank"] for hit in whole] == [1, 2, 3, 4, 5, 6]
    found = served.json(f"/api/search{ASKED}&folder=sub%20folder&max_length=0:05")
    assert [hit["path"] for hit in found["hits"]] == [ODD]


def test_a_video_is_explained_at_a_time(served):
    video = served.json(f"/api/video{ASKED}&video={LONG}")
    best = max(video["heat"], key=lambda window: window["score"])
    moment = video["moments"][video["moment"]]
    assert moment["score"] == best["score"] == video["score"]
    assert best["start"] <= moment["start"] <= moment["peak"] <= moment["end"] <= best["end"]
    why = video["explanation"]
    assert [row["word"] for row in why["words"]] == SENTENCE.split()
    shares = sum(row["weight"] for row in why["words"]) + why["marks_share"]
    assert shares == pytest.approx(1, abs=0.001)
    last = video["moments"][-1]
    assert len(video["moments"]) > 1
    other = served.json(f"/api/video{ASKED}&video={LONG}&t={last['start'] + 0.1:.3f}")
    assert other["moments"][other["moment"]] == last
    assert other["explanation"] != why


# ---------------------------------------------------------------------- the server


def test_an_updated_index_is_searched(served, search_model):
    assert served.json("/api/index")["videos"] == 6
    added = served.videos / "another.mp4"
    shutil.copy2(sorted(served.videos.glob("video*.mp4"))[0], added)
    update_index(search_model, served.videos, served.index)
    assert served.json("/api/index")["videos"] == 7
    assert served.get("/videos/another.mp4")[0] == 200
    # One video is deleted and another one added between two queries.
    assert b"another.mp4" in served.get("/?q=two+words&top=50")[2]
    added.rename(served.videos / "renamed.mp4")
    update_index(search_model, served.videos, served.index)
    found = served.get("/?q=two+words&top=50")[2]
    assert b"renamed.mp4" in found
    assert b"another.mp4" not in found
    (served.videos / "renamed.mp4").unlink()
    update_index(search_model, served.videos, served.index)
    assert served.get("/videos/another.mp4")[0] == 404
    assert served.json("/api/index")["videos"] == 6


def test_a_server_that_cannot_start_says_why(served, capsys):
    for flags, message in (
        (("--top=51", "--port=0"), "must be a number from 1 to 50, not '51'"),
        ((f"--port={served.port}",), "Address already in use); --port=0 chooses a free one"),
    ):
        flags = (f"--index={served.index}", *flags)
        assert message in error_of("drl_jax.search", "serve", *flags, capsys=capsys)


def test_the_server_listens_on_this_machine_only(served):
    listening = Path(f"/proc/{served.process.pid}/net/tcp").read_text().splitlines()[1:]
    addresses = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{served.port:04X}" in addresses  # 127.0.0.1
    assert f"00000000:{served.port:04X}" not in addresses


def test_what_a_killed_server_left_is_deleted(served, tmp_path):
    flags = [sys.executable, "-m", "drl_jax.search", "serve", f"--index={served.index}", "--port=0"]
    options = {"env": {**os.environ, "TMPDIR": str(tmp_path)}, "stdout": subprocess.PIPE}
    with start_interruptible(flags, **options) as killed:
        own = dataclasses.replace(served, port=port_of(killed.stdout.readline().split()[3]))
        assert own.get(f"/clips/{LONG}?start=0&end=1")[0] == 200
        killed.kill()
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".mp4"]
    with serving(served.index, tmp_path) as (_, url):
        assert not [*tmp_path.glob("*/*")]
        assert dataclasses.replace(served, port=port_of(url)).get("/")[0] == 200


# ---------------------------------------------------------------------- browser


def test_a_browser_visits_a_server_with_a_token(browser, served, tmp_path):
    with serving(served.index, tmp_path, "--host=0.0.0.0") as (_, url):
        port, token = port_of(url), url.partition("?token=")[2]
        context = browser.new_context()
        page, failed = context.new_page(), []
        page.on("response", lambda response: response.status < 400 or failed.append(response.url))
        here = f"http://127.0.0.1:{port}/"
        page.goto(here)
        expect(page.locator("body")).to_contain_text("this server requires its token")
        assert failed.pop() == here
        page.goto(f"{here}{ASKED}&video={LONG}&t=1&token={token}")
        assert page.url == f"{here}{ASKED}&video={LONG}&t=1"
        playing_from(page, 1)
        expect(page.get_by_role("heading", name=FOUND)).to_be_visible()
        assert [name for name in failed if not name.endswith("/favicon.ico")] == []
        assert [cookie["name"] for cookie in context.cookies()] == [f"drl_jax_token_{port}"]
        assert page.evaluate("document.cookie") == ""
        context.close()


@pytest.fixture
def page(browser, served):
    """The page in a new window; console messages of the browser fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, messages = context.new_page(), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(error.stack))
    page.goto(served.url)
    yield page
    context.close()
    assert [line for line in messages if "(Bad Request)" not in line] == []


def playing_from(page: Page, time: float) -> None:
    """Waits until the player shows a frame at a time or soon after it."""
    page.wait_for_function(
        "time => { const v = document.querySelector('#viewer video');"
        " return v && v.readyState >= 2 && v.currentTime >= time - 0.1"
        " && v.currentTime < time + 4; }",
        arg=time,
    )


def test_the_page_without_a_query_explains_itself(page: Page):
    expect(page.locator("#q")).to_be_focused()
    expect(page.locator("#empty .chip")).to_have_count(3)
    expect(page.locator("#status")).to_contain_text("6 videos in")
    page.locator("#empty .chip").first.click()
    expect(page.locator(".above h2")).to_have_text(FOUND)
    query = page.locator("#q").input_value()
    page.goto(page.url.split("?")[0])
    expect(page.locator("#recent .chip")).to_have_text([query])
    page.locator("#forget").click()
    page.reload()
    expect(page.locator("#recent")).to_be_hidden()


def test_a_search_shows_moments_and_loads_more(page: Page):
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(4)
    # What was not asked for is not in the address.
    assert page.url.endswith(f"?q={SENTENCE.replace(' ', '+')}")
    expect(page.locator("#q")).to_have_value(SENTENCE)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.tile .picture')].every("
        "p => [...p.querySelectorAll('img')].some(i => i.naturalWidth))"
    )
    page.locator("#more").click()
    expect(page.locator(".tile")).to_have_count(6)
    expect(page.locator("#more")).to_have_count(0)
    expect(page.locator(".tile a").nth(4)).to_be_focused()
    odd = page.locator(".tile a[data-video*='sub folder']")
    assert odd.get_attribute("data-video") == ODD
    assert odd.locator(".name").inner_text() == '5\'s #5% "<b>" ä.mp4'
    page.locator("#filters summary").click()
    page.fill("#min_length", "0:30")
    page.keyboard.press("Enter")
    expect(page.locator(".tile .name")).to_have_text([LONG])
    expect(page.locator("#status")).to_have_text("1 video of 6")
    badge = page.locator(".tile .badge").inner_text()
    assert badge.split(" to ")[0] < badge.split(" to ")[1]


def test_a_hit_opens_and_closes(page: Page, served):
    page.goto(f"{served.url}{ASKED}")
    first, second = (page.locator(".tile a").nth(number) for number in range(2))
    first.click()
    expect(page.locator("#viewer")).to_be_visible()
    expect(page.locator("#viewer-title")).to_be_focused()
    path = first.get_attribute("data-video")
    assert f"video={quote(path)}" in page.url
    playing_from(page, float(first.get_attribute("data-start")))
    page.keyboard.press("ArrowRight")
    expect(page.locator(".viewer")).to_have_attribute(
        "data-video", second.get_attribute("data-video")
    )
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".viewer")).to_have_attribute("data-video", path)
    # The address opens the same.
    page.reload()
    expect(page.locator(".viewer")).to_have_attribute("data-video", path)
    expect(page.locator("#viewer-title")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(first).to_be_focused()
    page.wait_for_url(lambda url: "video=" not in url)
    page.go_forward()
    expect(page.locator("#viewer")).to_be_visible()
    page.go_back()
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator(".tile")).to_have_count(4)
    second.click()
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#q")).to_be_focused()


def test_the_viewer_works_with_the_keyboard(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}&t=2")
    playing_from(page, 2)
    # Without a click before it, the browser does not start a video with sound by itself.
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelector('#viewer video').currentTime > 2.2")
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelector('#viewer video').paused")
    now = page.evaluate("document.querySelector('#viewer video').currentTime")
    page.locator(".slider").focus()
    page.keyboard.press("ArrowRight")
    playing_from(page, now + 5)
    expect(page.locator(".viewer")).to_have_attribute("data-video", LONG)
    page.keyboard.press("m")
    expect(page.locator("#said")).to_have_text("Link copied.")
    link = page.evaluate("navigator.clipboard.readText()")
    assert float(link.split("t=")[1]) == pytest.approx(now + 5, abs=0.3)
    with page.expect_download() as download:
        page.keyboard.press("e")
    assert download.value.suggested_filename.startswith("long.mp4 0.")
    moments = page.locator(".more-moments li a")
    assert moments.count() > 1
    start = float(moments.last.get_attribute("data-start"))
    moments.last.focus()
    page.keyboard.press("Enter")
    expect(moments.last).to_have_attribute("aria-current", "true")
    playing_from(page, start)
    assert f"t={start:g}" in page.url


def test_the_timeline_shows_frames_and_seeks(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}&t=2")
    playing_from(page, 2)
    box = page.locator(".timeline").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + 20)
    expect(page.locator(".hover span")).to_have_text("0:16")
    page.wait_for_function("() => document.querySelector('.hover img').naturalWidth > 0")
    number = int(page.locator(".hover img").get_attribute("src").split("frame=")[1])
    times = served.json(f"/api/video?video={LONG}")["frames"]
    assert abs(times[number] - 16.25) <= 1.01
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    playing_from(page, 16.25)


def test_why_shows_words_and_frames(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    expect(page.locator(".why table")).to_be_hidden()
    page.locator(".why summary").click()
    expect(page.locator(".why tbody th")).to_have_text(SENTENCE.split())
    assert page.locator(".why tbody tr").first.locator(".cell").count() == 4
    assert page.locator(".why thead button.best").count() == 1
    last = page.locator(".why thead button").last
    last.click()
    playing_from(page, float(last.get_attribute("data-seek")))


def test_a_video_that_the_browser_cannot_play_is_shown_and_converted(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={UNPLAYABLE}")
    expect(page.locator(".unplayable")).to_be_visible()
    expect(page.locator("#viewer video")).to_be_hidden()
    assert page.locator(".frames .frame").count() == 4
    page.get_by_role("button", name="Convert this moment").click()
    expect(page.locator("#viewer video")).to_be_visible()
    page.wait_for_function("() => document.querySelector('#viewer video').videoWidth === 64")
    expect(page.locator(".unplayable")).to_be_hidden()


def test_the_viewer_shows_more_moments(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    playing_from(page, float(page.locator(".viewer").get_attribute("data-time")))
    moments, marks = page.locator(".more-moments li"), page.locator(".timeline .mark")
    expect(moments).to_have_count(3)
    page.evaluate("window.player = document.querySelector('#viewer video')")
    page.get_by_role("link", name="More moments in this video").click()
    page.wait_for_url("**moments=30**")
    count = moments.count()
    assert count > 3
    expect(marks).to_have_count(count)
    expect(moments.nth(3).locator("a")).to_be_focused()
    expect(page.locator("[data-do=more]")).to_have_count(0)
    # The same player goes on, and the timeline follows it.
    assert page.evaluate("window.player === document.querySelector('#viewer video')")
    page.reload()
    expect(moments).to_have_count(count)
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    page.wait_for_url(lambda url: not re.search("video=|moments=", url))


def test_a_video_is_searched_in_the_viewer(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    page.get_by_role("searchbox", name="Search in this video").fill("a blue square")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=a+blue+square**")
    expect(page.locator(".viewer")).to_have_attribute("data-video", LONG)
    expect(page.locator(".more-moments li")).to_have_count(3)
    page.keyboard.press("Escape")
    expect(page.locator(".tile .name")).to_have_text([LONG])
    expect(page.locator("#q")).to_have_value("a blue square")
    page.locator("#only .chip").click()
    expect(page.locator(".tile")).to_have_count(4)


def test_hits_are_selected_to_be_searched(page: Page, served):
    page.goto(f"{served.url}?top=6")
    expect(page.locator("#picked")).to_be_hidden()
    for name in (ODD.rpartition("/")[2], LONG):
        page.get_by_role("checkbox", name=f"Search only in {' '.join(name.split())}").check()
    expect(page.locator("#picked p")).to_have_text("2 videos selected")
    page.locator("#unpick").click()
    expect(page.locator("#picked")).to_be_hidden()
    page.locator(".pick input").first.check()
    page.get_by_role("checkbox", name="Search only in 5's").check()
    page.fill("#q", SENTENCE)
    page.get_by_role("button", name="Search only in these").click()
    expect(page.locator("#only .chip")).to_have_count(2)
    expect(page.locator(".tile")).to_have_count(2)
    expect(page.locator(".pick")).to_have_count(0)
    expect(page.locator("#status")).to_have_text("2 videos of 6")
    # Another search stays in these; leaving one out is a link.
    page.fill("#q", "a blue square")
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(2)
    page.locator("#only .chip").first.click()
    expect(page.locator(".tile")).to_have_count(1)
    page.go_back()
    expect(page.locator(".tile")).to_have_count(2)


def test_a_video_is_sent_as_a_query(page: Page, served):
    page.set_input_files("#file", served.videos / LONG)
    page.wait_for_url("**by_video=**")
    expect(page.locator(".tile .name").first).to_have_text(LONG)
    expect(page.locator("#parts .chip")).to_contain_text("a video")
    address = page.url
    page.reload()
    expect(page.locator(".tile .name").first).to_have_text(LONG)
    page.locator("#parts .chip").click()
    expect(page.locator("#parts")).to_have_count(0)
    page.go_back()
    assert page.url == address
    expect(page.locator(".tile .name").first).to_have_text(LONG)
    # Dropped, as a picture is.
    page.evaluate(
        """() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(['text'], 'notes.mkv'));
          document.dispatchEvent(new DragEvent('drop', { dataTransfer }));
        }"""
    )
    expect(page.locator("#status")).to_contain_text("the video is not a video: its content is text")
    large = {"name": "large.mp4", "mimeType": "video/mp4", "buffer": bytes(2_000_001)}
    page.set_input_files("#file", large)
    expect(page.locator("#status")).to_have_text("a video has at most 2 MB")
    assert page.url == address


def test_tiles_are_previewed_unless_motion_is_unwanted(page: Page, served):
    page.goto(f"{served.url}{ASKED}&top=6")
    page.locator(".tile a[data-video='long.mp4']").hover()
    expect(page.locator(".tile video.playing")).to_have_count(1)
    page.locator(f".tile a[data-video='{UNPLAYABLE}']").hover()
    expect(page.locator(".tile video.playing")).to_have_count(0)
    expect(page.locator(".tile .picture .frame")).to_have_count(1)
    page.emulate_media(reduced_motion="reduce")
    page.locator(".tile a[data-video='long.mp4']").hover()
    page.wait_for_timeout(400)
    expect(page.locator(".tile :is(video, .frame)")).to_have_count(0)


def test_a_running_search_is_shown(page: Page):
    # The browser keeps the page when the response has no content (204).
    page.route("**/?q=*", lambda route: route.fulfill(status=204))
    page.fill("#q", SENTENCE)
    page.keyboard.press("Enter")
    expect(page.locator("#search")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#search button")).to_be_disabled()
    expect(page.locator("#status")).to_have_text("Searching …")
    page.unroute("**/?q=*")
    page.reload()
    page.fill("#q", SENTENCE)
    page.keyboard.press("Enter")
    expect(page.locator(".above h2")).to_have_text(FOUND)
    page.go_back()
    expect(page.locator("#search button")).to_be_enabled()
    assert page.locator("#search").get_attribute("aria-busy") is None


def test_a_growing_index_is_announced(page: Page, served):
    facts = {"videos": 99, "indexing": {"done": 120, "total": 340}}
    page.route("**/api/index", lambda route: route.fulfill(json=facts))
    page.clock.install()
    page.goto(f"{served.url}{ASKED}")
    expect(page.locator("#indexing")).to_be_hidden()
    page.clock.fast_forward(21_000)
    expect(page.locator("#status")).to_have_text("The index now has 99 videos; search again")
    expect(page.get_by_label("Indexing: 120 of 340 files")).to_have_js_property("value", 120)
    facts["indexing"] = None
    page.clock.fast_forward(3_100)
    expect(page.locator("#indexing")).to_be_hidden()
    page.get_by_role("link", name="search again").click()
    expect(page.locator("#status")).to_have_text("6 videos searched, most similar first")


def test_weak_matches_stay_together_when_more_are_loaded(page: Page, served):
    def tile(name: str) -> str:
        return f'<li class="tile"><a href="/">{name}</a></li>'

    line = '<li class="apart">Weak matches</li>'
    parts = iter((line + tile("c"), tile("d") + line + tile("e"), tile("f")))
    more = '<li class="more"><a id="more" href="/?offset=9">more</a></li>'
    page.route("**/tiles?**", lambda route: route.fulfill(body=next(parts) + more))
    page.goto(f"{served.url}{ASKED}")
    page.evaluate("for (const tile of document.querySelectorAll('.tile, .apart')) tile.remove()")
    expected = (["c"], ["d", "c", "e"], ["d", "f", "c", "e"])
    for names in expected:
        page.locator("#more").click()
        expect(page.locator(".tile")).to_have_text(names)
        expect(page.locator(".apart")).to_have_count(1)
    expect(page.locator("#hits > *")).to_have_text(["d", "f", "Weak matches", "c", "e", "more"])


def test_the_page_fits_every_width(page: Page, served):
    for width, columns in ((390, 2), (800, 3), (1280, 4), (2560, 4)):
        page.set_viewport_size({"width": width, "height": 800})
        for address in ("", ASKED, f"{ASKED}&video={LONG}"):
            page.goto(f"{served.url}{address}")
            for element in ("document.documentElement", "document.getElementById('viewer')"):
                assert page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth"), width
        lefts = page.locator(".tile").evaluate_all(
            "tiles => new Set(tiles.map(t => Math.round(t.getBoundingClientRect().left))).size"
        )
        assert lefts == columns


def test_everything_has_a_name(page: Page, served):
    """What a screen reader needs; beside an occasional run of axe-core by hand."""
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    page.locator(".why summary").click()
    problems = page.evaluate(
        """() => {
          const all = (selector) => [...document.querySelectorAll(selector)];
          const ids = all('[id]').map((e) => e.id);
          const named = (e) => e.textContent.trim() || e.getAttribute('aria-label')
            || e.labels?.length;
          return [
            ...ids.filter((id, n) => ids.indexOf(id) !== n).map((id) => `${id} twice`),
            ...all('img:not([alt])').map((e) => `${e.src} without alt`),
            ...all('a, button, input:not([type=hidden]), summary, [role=slider], video')
              .filter((e) => !named(e)).map((e) => `${e.outerHTML} without a name`),
            ...all('[aria-labelledby]')
              .filter((e) => !document.getElementById(e.getAttribute('aria-labelledby')))
              .map((e) => `${e.id} is labelled by nothing`),
            ...all('[tabindex]').filter((e) => e.tabIndex > 0).map(() => 'an order of its own'),
          ];
        }"""
    )
    assert problems == []
    assert page.evaluate("document.documentElement.lang") == "en"
    # The rest of the page cannot be reached while the dialog is open.
    for _ in range(40):
        page.keyboard.press("Tab")
        assert page.evaluate(
            "document.activeElement === document.body"
            " || document.getElementById('viewer').contains(document.activeElement)"
        )


def test_light_and_dark_are_readable(browser, served):
    """Text has a contrast of at least 4.5 (WCAG AA), also in the heat map."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{served.url}{ASKED}&video={LONG}")
        page.locator(".why summary").click()
        shown = (
            "h1 a, h2, h3, label, summary, p, th, td, a, button, .name, .facts, .badge, kbd,"
            " .scale span"
        )
        contrasts = text_contrasts(page, shown)
        assert len(contrasts) > 80
        assert [found for found in contrasts if found[0] < 4.5] == []
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(backgrounds) == 2
