"""The search page of a real server and its JSON API, over HTTP and in a real browser."""

import contextlib
import csv
import http.client
import io
import json
import re
import shutil
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
from support.commands import error_of
from support.processes import wait_until
from support.served import Served, check_schema, join_clips, port_of, serving

from drl_jax.search import index_file, open_index
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.routes import api_routes
from drl_jax.search.session import Index
from drl_jax.search.suggestions import Suggestions
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
    content = (served.videos / "video0.mp4").read_bytes()
    assert served.get("/videos/video0.mp4") == (200, "video/mp4", content)
    # A browser's request when it starts in the middle.
    part = served.get("/videos/video0.mp4", Range="bytes=100-199")
    assert part[::2] == (206, content[100:200])
    assert served.get(f"/videos/{quote(ODD)}")[0] == 200
    found = served.json(f"/api/search{ASKED}&name=long")["hits"][0]["moments"][0]
    strip, frame, picture = (
        Image.open(io.BytesIO(served.get(found[name])[2]))
        for name in ("strip", "thumbnail", "picture")
    )
    assert strip.size == (found["strip_frames"] * frame.width, frame.height)
    # Its side is that of the file, not that of the thumbnails.
    assert picture.size == (64, 64)


def test_a_part_is_served_as_a_clip_that_browsers_play(served):
    """That has its own tests; here, that it is this part, of which a browser asks for parts."""
    status, kind, body = served.get(f"/clips/{UNPLAYABLE}?start=1&end=3")
    assert (status, kind) == (200, "video/mp4")
    with av.open(io.BytesIO(body)) as made, av.open(str(served.videos / UNPLAYABLE)) as source:
        found, expected = (
            [frame.to_ndarray(format="gray").astype(int) for frame in container.decode(video=0)]
            for container in (made, source)
        )
    assert np.abs(np.array(found) - expected[4:12]).mean() < 4
    assert served.get(f"/clips/{UNPLAYABLE}?start=1&end=3", Range="bytes=9-19")[2] == body[9:20]


def test_only_files_of_the_index_are_served(served):
    for path in (
        *("/videos/../secret.mp4", "/videos/..%2fsecret.mp4", "/videos/%2e%2e/secret.mp4"),
        *("/videos//etc/passwd", "/videos/%2fetc%2fpasswd", "/videos/no%20video.mp4", "/videos/"),
        *("/frames/../secret.mp4", "/pictures/../secret.mp4", "/clips/no%20video.mp4"),
        *("/api/video?video=../secret.mp4", "/static/../page.html"),
        "/static/%2e%2e/%2e%2e/serve.py",
    ):
        status, _, body = served.get(path)
        assert (status, b"outside" in body) == (404, False), path


def test_a_file_that_was_replaced_or_is_missing_says_so(served):
    path = served.videos / "video1.mp4"
    kept = path.rename(served.videos / "kept")
    try:
        assert served.json("/api/video?video=video1.mp4")["state"] == "missing"
        assert served.get("/videos/video1.mp4")[0] == 410
        assert b"file missing" in served.get("/?name=video1")[2]
        path.symlink_to(served.videos.parent / "secret.mp4")
        assert served.json("/api/video?video=video1.mp4")["state"] == "changed"
        for kind in ("videos", "pictures", "clips"):
            status, _, body = served.get(f"/{kind}/video1.mp4")
            assert status == 409
            assert body.startswith(b"the file has changed since it was indexed; index")
        assert served.get("/frames/video1.mp4")[0] == 200
        page = served.get(f"/{ASKED}&video=video1.mp4")[2]
        assert b"It cannot be played: the file has changed" in page
        assert b"<video" not in page
    finally:
        path.unlink(missing_ok=True)
        kept.rename(path)


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
    """As JSON, and on the page."""
    for query, status, message in (
        ("q=%20%20", 400, "the query is blank: give a sentence, a picture or a video"),
        ("without=red", 400, "the query is blank"),
        ("q=a+dog&top=0", 400, "top must be a number from 1 to 50, not '0'"),
        ("offset=-1", 400, "offset must be a number from 0"),
        ("offset=6", 400, "offset must be below the number of videos, 6"),
        ("only=none.mp4", 404, "no video of the index has the path 'none.mp4'"),
        ("colour=red", 400, "there is no parameter 'colour'; there are q, without,"),
        ("min_length=nan", 400, "min_length takes seconds, or minutes:seconds, not 'nan'"),
        ("max_length=1:0:0:0", 400, "max_length takes seconds"),
        ("min_length=9&max_length=8", 400, "min_length is larger than max_length"),
        ("q=" + "dog+" * 25_000, 400, "q has 100,000 characters; give at most 1,000"),
        ("picture=0123", 404, "the picture is not known any more; send it again"),
        ("by_video=0123", 404, "the video is not known any more"),
        ("like=none@1", 404, "no video of the index has the path"),
        ("like=none", 400, "like takes PATH@SECONDS, not 'none'"),
        ("like=video0.mp4@99", 400, "video0.mp4 has the seconds 0 to"),
    ):
        found, _, body = served.get(f"/api/search?{query}")
        assert (found, message in json.loads(body)["error"]) == (status, True), body
        found, _, body = served.get(f"/?{query}")
        assert (found, b'role="alert" >' in body) == (status, True)
    assert b'role="alert" hidden>' in served.get("/")[2]
    for path, status, message in (
        (f"/api/video?video={LONG}&t=99", 400, b"t=99 is outside the video, which has 32.5 s"),
        (f"/pictures/{LONG}?t=99", 400, b"t=99 is outside the video"),
        (f"/clips/{LONG}?start=20&end=10", 400, b"is not in the video"),
        (f"/clips/{LONG}?start=0&end=61", 400, b"a clip has at most 60 s, not 1:01"),
        (f"/frames/{LONG}?frames=0,1000", 400, b"frame must be a number from 0 to"),
        ("/?video=none.mp4", 404, b"no video of the index has the path"),
    ):
        found, _, body = served.get(path)
        assert (found, message in body) == (status, True), body
    assert b"&lt;script&gt;" in served.get("/?q=%3Cscript%3E")[2]
    assert f'value="{SENTENCE}"'.encode() in served.get(f"/{ASKED}&min_length=long")[2]


def test_the_api_is_as_described(served):
    description = served.json("/api/openapi.json")
    components, paths = description["components"], description["paths"]
    media = types.SimpleNamespace(max_video=0)
    routes = api_routes(types.SimpleNamespace(search=None, video=None, media=media))
    assert {route.path for route in routes} == {path for path in paths if path.startswith("/api/")}
    for address in (
        *(f"/api/search{ASKED}", "/api/search?folder=sub%20folder", f"/api/search{ASKED}&name=zz"),
        f"/api/search{ASKED}&text=1",
        *(f"/api/video{ASKED}&video={LONG}&t=20", f"/api/video?video={LONG}"),
        *(f"/api/search{ASKED}&only={LONG}&only=video0.mp4", "/api/unsearchable"),
        *(f"/api/video{ASKED}&video={LONG}&moments=30", "/api/index"),
        f"/api/export?format=csv&moment={LONG}@1-2&moment=video0.mp4@0-1&q=a",
        *("/api/openapi.json", f"/videos/{LONG}", f"/frames/{LONG}?frame=1"),
        *(f"/pictures/{LONG}?t=3", f"/clips/{LONG}?start=1&end=2", "/health"),
    ):
        path, _, query = address.partition("?")
        described = (paths.get(path) or paths[f"/{path.split('/')[1]}/{{path}}"])["get"]
        names = {
            components["parameters"][one["$ref"].split("/")[-1]]["name"]
            if "$ref" in one
            else one["name"]
            for one in described.get("parameters", ())
        }
        assert {part.split("=")[0] for part in query.split("&") if part} <= names
        status, kind, body = served.get(address)
        ((expected, content),) = described["responses"]["200"]["content"].items()
        assert status == 200
        assert kind == expected or (expected == "video/*" and kind.startswith("video/"))
        if kind == "application/json":
            check_schema(json.loads(body), content["schema"], components["schemas"])
    error = json.loads(served.get("/api/search?top=0")[2])
    check_schema(error, components["schemas"]["Error"], components["schemas"])
    assert json.loads(served.get("/api/none")[2]) == {"error": "Not Found"}


def test_suggestions_are_what_the_index_answers(served, search_model, monkeypatch):
    index = Index(served.index, search_model)

    def suggested(least: float) -> list[str]:
        monkeypatch.setattr("drl_jax.search.suggestions.WEAK", least)
        suggestions = Suggestions(search_model)
        wait_until(lambda: suggestions.of(index.state()) is not None)
        suggestions.close()
        return suggestions.of(index.state())

    # A random model finds weak matches.
    sentences = suggested(-np.inf)
    assert len(sentences) == 4
    assert suggested(np.inf) == []
    # The first has the most unusual score of all.
    scenes = json.loads((Path(open_index.__file__).parent / "page/scenes.json").read_text())
    text, best = search_model.encode_text(scenes["shapes"]), []
    for video in index.videos:
        scores = search_model.similarity(text, open_index.stored_windows(video))
        mean, deviation = video.record.arrays["window.bank_similarity"].T
        best.append(((scores - mean) / deviation).max(axis=1))
    assert scenes["shapes"][np.max(best, axis=0).argmax()] == sentences[0]


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
    for status, content, *kind in (
        (415, picture, "image/jpeg"),
        (400, b"no picture"),
        (400, picture[: len(picture) // 2]),
    ):
        assert served.post("/api/pictures", content, *kind) == (status, {"error": mock.ANY})
    # The server answers before it has read all, and may close the connection.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert served.post("/api/pictures", bytes(21_000_000))[0] == 413


def test_pictures_cost_the_server_no_memory(served):
    file = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(file, "PNG", compress_level=1)
    process = Path(f"/proc/{served.process.pid}")

    def megabytes(name: str) -> int:
        text = (process / "status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) // 1024

    (process / "clear_refs").write_text("5")  # The peak starts again.
    before = megabytes("VmRSS")
    with ThreadPoolExecutor(3) as senders:
        answers = [*senders.map(lambda _: served.post("/api/pictures", file.getvalue()), range(3))]
    message = "the picture has 10000 x 10000 pixels; at most 50,000,000 are decoded"
    assert answers == [(400, {"error": message})] * 3
    assert megabytes("VmHWM") - before < 64


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
    both = served.json(f"/api/search{ASKED}&by_video={sent['by_video']}")
    assert both["hits"][0]["score"] != hit["score"]
    for body, kind, expected, message in (
        (b"text", "application/octet-stream", 400, "the video is not a video: its content is"),
        (b"", "application/octet-stream", 400, "the video cannot be read as a video (Inv"),
        (film, "video/mp4", 415, "send it as application/octet-stream"),
    ):
        status, answer = served.post("/api/videos", body, kind)
        assert (status, message in answer["error"]) == (expected, True)
    assert sent_files(served) == []


def test_a_video_that_is_too_large_or_ends_in_the_middle_leaves_nothing(served):
    headers = {"Content_Type": "application/octet-stream"}
    response = served.start("POST", "/api/videos", **headers, Content_Length="9" * 12).getresponse()
    assert response.status == 413  # Before it is sent.
    assert json.loads(response.read()) == {"error": "a video has at most 2 MB"}
    # Without a length, it is refused when it is too long.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        parts, kind = (bytes(100_000) for _ in range(30)), {"Content-Type": headers["Content_Type"]}
        connection.request("POST", "/api/videos", parts, kind, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert sent_files(served) == []
    connection = served.start("POST", "/api/videos", **headers, Content_Length="1000000")
    connection.send(bytes(500_000))
    wait_until(lambda: sent_files(served))
    connection.close()
    wait_until(lambda: not sent_files(served))


def test_only_some_videos_are_searched(served):
    names = ("video0.mp4", ODD)
    only = "".join(f"&only={quote(name)}" for name in names)
    found = served.json(f"/api/search{ASKED}{only}")
    assert {hit["path"] for hit in found["hits"]} == set(names)
    assert found["total"] == 2
    assert all("only=video0.mp4&only=sub%20folder/" in hit["page"] for hit in found["hits"])
    # Forms of browsers send a newline as CR LF.
    sent = served.json(f"/api/search?only={quote(ODD).replace('%0A', '%0D%0A')}")
    assert [hit["path"] for hit in sent["hits"]] == [ODD]
    found = served.json(f"/api/search{ASKED}&folder=sub%20folder&max_length=0:05")
    assert [hit["path"] for hit in found["hits"]] == [ODD]


def test_hits_are_loaded_in_parts(served):
    whole = served.json(f"/api/search{ASKED}&top=6")["hits"]
    first, rest = (served.json(f"/api/search{ASKED}{offset}") for offset in ("", "&offset=4"))
    assert (first["next"], rest["next"]) == (f"/{ASKED}&offset=4", None)
    parts = [(hit["rank"], hit["path"]) for hit in first["hits"] + rest["hits"]]
    assert parts == [(rank, hit["path"]) for rank, hit in enumerate(whole, start=1)]


def test_a_sentence_may_have_more_words_than_the_model_reads(served):
    """24 tokens, with the start and the end."""
    for words, used in ((22, None), (23, 22)):
        assert served.json("/api/search?q=" + "dog+" * words)["tokens_used"] == used


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
    assert len(video["moments"]) == 3
    last = video["moments"][-1]
    other = served.json(f"/api/video{ASKED}&video={LONG}&t={last['start'] + 0.1:.3f}")
    assert other["moments"][other["moment"]] == last
    assert other["explanation"] != why
    # There are more moments.
    assert video["more"] == f"/{ASKED}&video={LONG}&moments=30"
    more = served.json(f"/api/video{video['more'][1:]}")
    assert [m["start"] for m in more["moments"][:3]] == [m["start"] for m in video["moments"]]
    assert more["more"] is None
    assert len(more["moments"]) > 3
    # The hits beside it have as many moments as ever.
    assert b"2 more moments" in served.get(f"/{video['more'][1:]}")[2]


def test_files_that_cannot_be_searched_are_listed(served):
    assert served.json("/api/index")["unsearchable"] == 1
    (file,) = served.json("/api/unsearchable")["files"]
    assert file["path"] == "no video.mp4"
    assert file["reason"].startswith("is not a video: its content is text")
    assert b'<a href="/unsearchable">1 file cannot be searched</a>' in served.get("/")[2]
    assert b"is not a video: its content is text" in served.get("/unsearchable")[2]


def test_the_progress_of_indexing_is_shown(served, monkeypatch):
    monkeypatch.setattr(index_file, "_INTERVAL", 0.0)
    with IndexWriter(served.index) as writer:
        writer.show_progress(120, 340)
        assert served.json("/api/index")["indexing"] == {"done": 120, "total": 340}
        assert b"Indexing: 120 of 340 files" in served.get("/")[2]
        left = (served.index / "indexing.json").read_text()
    # What a process leaves that was killed is no progress.
    (served.index / "indexing.json").write_text(left)
    assert served.json("/api/index")["indexing"] is None
    assert b"Indexing:" not in served.get("/")[2]
    (served.index / "indexing.json").unlink()


# ---------------------------------------------------------------------- the server


def test_an_updated_index_is_searched(served):
    with IndexWriter(served.index) as writer:
        (video,) = (v for one in writer.listed if (v := read(one.segment, "video0.mp4")))
        writer.put([], gone=["video0.mp4"])
        assert served.json("/api/index")["videos"] == 5
        assert served.get("/videos/video0.mp4")[0] == 404
        writer.put([video])
    assert served.json("/api/index")["videos"] == 6
    assert served.get("/videos/video0.mp4")[0] == 200


def read(segment, path):
    row = segment.find(path)
    return None if row is None else segment.read(row)


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


@pytest.fixture(scope="module")
def context(browser):
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context


@pytest.fixture
def page(context):
    """A new tab; console messages of the browser fail the test."""
    page, messages = context.new_page(), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(error.stack))
    yield page
    page.close()
    assert [line for line in messages if "(Bad Request)" not in line] == []


def playing_from(page: Page, time: float) -> None:
    """Waits until the player shows a frame at a time or soon after it."""
    page.wait_for_function(
        "time => { const v = document.querySelector('#viewer video');"
        " return v && v.readyState >= 2 && v.currentTime >= time - 0.1"
        " && v.currentTime < time + 4; }",
        arg=time,
    )


def test_the_page_without_a_query_has_examples_and_recent_queries(page: Page, served):
    page.goto(served.url)
    expect(page.locator("#q")).to_be_focused()
    expect(page.locator("#status")).to_contain_text("6 videos in")
    expect(page.locator("#model")).to_contain_text("knows drawn shapes · English · clip, wti, 64")
    # What is found while the page is open already.
    facts = served.json("/api/index") | {"suggestions": [SENTENCE, "<b>"]}
    page.route("**/api/index", lambda route: route.fulfill(json=facts))
    chips = page.locator("#suggestions .chip")
    expect(chips).to_have_text([SENTENCE, "<b>"], timeout=20_000)
    chips.first.click()
    expect(page.locator(".above h2")).to_have_text(FOUND)
    query = page.locator("#q").input_value()
    assert query == SENTENCE
    page.wait_for_function("() => localStorage.getItem('drl_jax.recent')")
    page.goto(page.url.split("?")[0])
    expect(page.locator("#recent .chip")).to_have_text([query])
    page.locator("#forget").click()
    page.reload()
    expect(page.locator("#recent")).to_be_hidden()


def test_a_search_shows_moments_and_loads_more(page: Page, served):
    page.goto(served.url)
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
    paths = [tile.get_attribute("data-video") for tile in (first, second)]
    viewer, shown = page.locator("#viewer"), page.locator(".viewer")
    first.click()
    expect(page.locator("#viewer-title")).to_be_focused()
    assert f"video={quote(paths[0])}" in page.url
    playing_from(page, float(first.get_attribute("data-start")))
    page.keyboard.press("ArrowRight")
    expect(shown).to_have_attribute("data-video", paths[1])
    page.keyboard.press("ArrowLeft")
    expect(shown).to_have_attribute("data-video", paths[0])
    # The address opens the same.
    page.reload()
    expect(shown).to_have_attribute("data-video", paths[0])
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(first).to_be_focused()
    page.wait_for_url(lambda url: "video=" not in url)
    page.go_forward()
    expect(viewer).to_be_visible()
    page.go_back()
    expect(viewer).to_be_hidden()
    expect(page.locator(".tile")).to_have_count(4)
    second.click()
    expect(viewer).to_be_visible()
    page.keyboard.press("/")
    expect(viewer).to_be_hidden()
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


def test_the_viewer_shows_a_timeline_and_why(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}&t=2")
    playing_from(page, 2)
    box = page.locator(".timeline").bounding_box()
    middle = box["x"] + box["width"] / 2
    page.mouse.move(middle, box["y"] + 20)
    page.mouse.move(middle + 1, box["y"] + 20)
    expect(page.locator(".hover span")).to_have_text("0:16")
    page.wait_for_function("() => document.querySelector('.hover img').naturalWidth > 0")
    number = int(page.locator(".hover img").get_attribute("src").split("frame=")[1])
    assert abs(served.json(f"/api/video?video={LONG}")["frames"][number] - 16.25) <= 1.01
    page.mouse.click(middle, box["y"] + 20)
    playing_from(page, 16.25)
    expect(page.locator(".why table")).to_be_hidden()
    page.locator(".why summary").click()
    expect(page.locator(".why tbody th")).to_have_text(SENTENCE.split())
    assert page.locator(".why tbody tr").first.locator(".cell").count() == 4
    assert page.locator(".why thead button.best").count() == 1
    last = page.locator(".why thead button").last
    last.click()
    playing_from(page, float(last.get_attribute("data-seek")))


def test_a_moment_stops_at_its_end_and_plays_on(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    moments = page.locator(".more-moments li a")
    moments.last.click()
    expect(moments.last).to_have_attribute("aria-current", "true")
    page.wait_for_url("**&t=*")
    video = served.json(f"/api/video?{page.url.partition('?')[2]}")
    moment = video["moments"][video["moment"]]
    assert moment["end"] < video["duration"] - 1
    paused = "() => { const v = document.querySelector('#viewer video'); return v.paused"
    paused += " && v.currentTime"
    page.wait_for_function(f"{paused} >= {moment['end'] - 0.01} }}")
    now = page.evaluate("document.querySelector('#viewer video').currentTime")
    assert now < moment["end"] + 0.25
    page.locator("#viewer-title").click()
    page.keyboard.press("Space")
    plays = "time => { const v = document.querySelector('#viewer video');"
    plays += " return !v.paused && v.currentTime > time; }"
    page.wait_for_function(plays, arg=now + 1)
    # Nothing stops where somebody goes on from beyond the end.
    moments.last.click()
    page.wait_for_function(f"() => document.querySelector('#viewer video').currentTime < {now}")
    box = page.locator(".timeline").bounding_box()
    beyond = (moment["end"] + 2) / video["duration"]
    page.mouse.click(box["x"] + box["width"] * beyond, box["y"] + 20)
    page.wait_for_function(plays, arg=moment["end"] + 2.5)


def test_a_video_that_the_browser_cannot_play_is_shown_and_converted(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={UNPLAYABLE}")
    expect(page.locator(".unplayable")).to_be_visible()
    expect(page.locator("#viewer video")).to_be_hidden()
    assert page.locator(".frames .frame").count() == 4
    page.get_by_role("button", name="Convert this moment").click()
    expect(page.locator("#viewer video")).to_be_visible()
    page.wait_for_function("() => document.querySelector('#viewer video').videoWidth === 64")
    expect(page.locator(".unplayable")).to_be_hidden()


def test_the_viewer_shows_more_moments_and_searches_its_video(page: Page, served):
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    moments, marks = page.locator(".more-moments li"), page.locator(".timeline .mark")
    expect(moments).to_have_count(3)
    page.evaluate("window.player = document.querySelector('#viewer video')")
    page.get_by_role("link", name="More moments in this video").click()
    page.wait_for_url("**moments=30**")
    expect(moments.nth(3).locator("a")).to_be_focused()
    expect(marks).to_have_count(moments.count())
    expect(page.locator("[data-do=more]")).to_have_count(0)
    # The same player goes on.
    assert page.evaluate("window.player === document.querySelector('#viewer video')")
    page.get_by_role("searchbox", name="Search in this video").fill("a blue square")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=a+blue+square**")
    expect(page.locator(".viewer")).to_have_attribute("data-video", LONG)
    expect(moments).to_have_count(3)
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: not re.search("video=|moments=", url))
    expect(page.locator(".tile .name")).to_have_text([LONG])
    page.locator("#only .chip").click()
    expect(page.locator(".tile")).to_have_count(4)


def test_hits_are_selected_to_be_searched(page: Page, served):
    page.goto(f"{served.url}?top=6")
    expect(page.locator("#picked")).to_be_hidden()
    for name in (ODD.rpartition("/")[2], LONG):
        page.get_by_role("checkbox", name=f"Select {' '.join(name.split())}").check()
    expect(page.locator("#picked p")).to_have_text("2 videos selected")
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    assert download.value.suggested_filename == "moments.csv"
    with Path(download.value.path()).open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["path"], row["end"]) for row in rows] == [(LONG, "32.500"), (ODD, "3.250")]
    # A list of whole videos, of which one is too long for a clip.
    page.get_by_role("button", name="Clips (zip)").click()
    expect(page.locator("#picked p")).to_have_text("Exported.")
    page.fill("#q", SENTENCE)
    page.get_by_role("button", name="Search only in these").click()
    expect(page.locator("#status")).to_have_text("2 videos of 6")
    # Another search stays in these; leaving one out is a link.
    page.fill("#q", "a blue square")
    page.keyboard.press("Enter")
    expect(page.locator(".tile")).to_have_count(2)
    page.locator("#only .chip").first.click()
    expect(page.locator(".tile")).to_have_count(1)


def test_a_video_is_sent_as_a_query(page: Page, served):
    page.goto(served.url)
    page.set_input_files("#file", served.videos / LONG)
    page.wait_for_url("**by_video=**")
    address, names = page.url, page.locator(".tile .name")
    page.reload()
    expect(names.first).to_have_text(LONG)
    expect(page.locator("#parts .chip")).to_contain_text("a video")
    # Dropped, as a picture is.
    page.evaluate(
        """() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(['text'], 'notes.mkv'));
          document.dispatchEvent(new DragEvent('drop', { dataTransfer }));
        }"""
    )
    problem = page.get_by_role("alert")
    expect(problem).to_have_text(
        re.compile("^notes.mkv is not used: the video is not a video: its content is text")
    )
    expect(page.locator("#status")).to_contain_text("6 videos searched")
    large = {"name": "large.mp4", "mimeType": "video/mp4", "buffer": bytes(2_000_001)}
    page.set_input_files("#file", large)
    expect(problem).to_have_text("large.mp4 is not used: a video has at most 2 MB")
    assert page.url == address


@pytest.mark.parametrize(("width", "columns"), [(390, 2), (2560, 4)])
def test_the_page_fits_every_width(page: Page, served, width, columns):
    page.set_viewport_size({"width": width, "height": 800})
    for address in (f"{ASKED}&video={LONG}", ASKED):
        page.goto(f"{served.url}{address}")
        for element in ("document.documentElement", "document.getElementById('viewer')"):
            assert page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth")
    tiles = [tile.bounding_box()["x"] for tile in page.locator(".tile").all()]
    assert len(set(map(round, tiles))) == columns


def test_everything_has_a_name(page: Page, served):
    """What a screen reader needs; beside an occasional run of axe-core by hand."""
    page.goto(f"{served.url}{ASKED}&video={LONG}")
    page.locator(".why summary").click()
    problems = page.evaluate(
        """() => {
          const all = (selector) => [...document.querySelectorAll(selector)];
          const ids = all('[id]').map((e) => e.id);
          const unnamed = (e) => !(e.textContent.trim() || e.getAttribute('aria-label')
            || e.labels?.length);
          const controls = 'a, button, input:not([type=hidden]), summary, [role=slider], video';
          const label = (e) => document.getElementById(e.getAttribute('aria-labelledby'));
          return [
            ...ids.filter((id, n) => ids.indexOf(id) !== n),
            ...[...all('img:not([alt])'), ...all(controls).filter(unnamed),
              ...all('[aria-labelledby]').filter((e) => !label(e)),
              ...all('[tabindex]').filter((e) => e.tabIndex > 0)].map((e) => e.outerHTML),
          ];
        }"""
    )
    assert problems == []
    assert page.evaluate("document.documentElement.lang") == "en"
    # The rest of the page cannot be reached while the dialog is open.
    for _ in range(30):
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
