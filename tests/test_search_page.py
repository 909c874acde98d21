"""The search page of a real server, over HTTP and in a real browser."""

import dataclasses
import http.client
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from support.commands import ROOT, error_of

from drl_jax.search.indexing import update_index

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
SENTENCE = "a red circle moves to the left"


@dataclasses.dataclass
class Served:
    """A running server on the index of a folder."""

    process: subprocess.Popen
    port: int
    videos: Path
    index: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str, **headers: str) -> tuple[int, str, bytes]:
        """Status, content type and body; the path is sent unchanged."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read()


@pytest.fixture(scope="module")
def served(search_model, test_videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    videos, index = folder / "videos", folder / "index"
    (videos / "sub folder").mkdir(parents=True)
    for number, path in enumerate(sorted(test_videos.iterdir())[:6]):
        shutil.copy2(path, videos / f"sub folder/5's #{number}%.mp4" if number == 5 else videos)
    (videos / "no video.mp4").write_text("text")
    (folder / "secret.mp4").write_text("outside the folder")
    update_index(search_model, videos, index)
    command = [sys.executable, "-m", "drl_jax.search", "serve", f"--index={index}", "--port=0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("6 videos on http://127.0.0.1:"), process.communicate()
    yield Served(process, int(line.split(":")[2].split("/")[0]), videos, index)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


# ---------------------------------------------------------------------- files


def test_videos_and_thumbnails_are_served(served):
    name = next(path.name for path in sorted(served.videos.glob("video*.mp4")))
    content = (served.videos / name).read_bytes()
    assert served.get(f"/videos/{name}") == (200, "video/mp4", content)
    # A browser's request when it starts in the middle.
    assert served.get(f"/videos/{name}", Range="bytes=100-199")[::2] == (206, content[100:200])
    status, kind, strip = served.get(f"/frames/{name}")
    assert (status, kind, strip[:2]) == (200, "image/jpeg", b"\xff\xd8")
    assert served.get("/videos/sub%20folder/5%27s%20%235%25.mp4")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/videos/../secret.mp4",
        "/videos/..%2fsecret.mp4",
        "/videos/%2e%2e/secret.mp4",
        "/videos//etc/passwd",
        "/videos/%2fetc%2fpasswd",
        "/videos/no%20video.mp4",
        "/videos/",
        "/frames/../secret.mp4",
        "/frames/no%20video.mp4",
        "/static/../page.html",
        "/static/%2e%2e/%2e%2e/serve.py",
    ],
)
def test_only_files_of_the_index_are_served(served, path):
    status, _, body = served.get(path)
    assert status == 404
    assert b"outside" not in body


def test_a_file_replaced_by_a_link_is_refused(served):
    name = sorted(path.name for path in served.videos.glob("video*.mp4"))[1]
    path = served.videos / name
    kept = path.rename(served.videos / "kept")
    path.symlink_to(served.videos.parent / "secret.mp4")
    try:
        status, _, body = served.get(f"/videos/{name}")
        assert (status, body) == (409, b"the file has changed since it was indexed")
    finally:
        path.unlink()
        kept.rename(path)
    assert served.get(f"/videos/{name}")[0] == 200


def test_other_host_names_are_refused(served):
    assert served.get("/", Host="evil.example")[0] == 400
    assert served.get("/", Host=f"localhost:{served.port}")[0] == 200


def test_errors_of_a_request_are_shown_on_the_page(served):
    for query, message in (
        ("?q=%20%20", b"a query is blank; write a sentence"),
        ("?q=a+dog&top=0", b"must be 1 to 50, not &#39;0&#39;"),
        ("?q=a+dog&top=many", b"must be 1 to 50"),
    ):
        status, _, body = served.get(f"/{query}")
        assert status == 400
        assert message in body
    assert b"&lt;script&gt;" in served.get("/?q=%3Cscript%3E")[2]
    assert b"only its first 22 tokens are used" in served.get("/?q=" + "dog+" * 40)[2]


def test_an_updated_index_is_searched(served, search_model):
    assert b"6 videos in" in served.get("/")[2]
    added = served.videos / "another.mp4"
    shutil.copy2(sorted(served.videos.glob("video*.mp4"))[0], added)
    update_index(search_model, served.videos, served.index)
    assert b"7 videos in" in served.get("/")[2]
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
    assert b"6 videos in" in served.get("/")[2]


def test_too_many_videos_per_page_is_one_line(served, capsys):
    flags = (f"--index={served.index}", "--top=51")
    error = error_of("drl_jax.search", "serve", *flags, capsys=capsys)
    assert "must be 1 to 50, not '51'" in error


def test_a_port_in_use_is_one_line(served, capsys):
    flags = (f"--index={served.index}", f"--port={served.port}")
    error = error_of("drl_jax.search", "serve", *flags, capsys=capsys)
    assert "Address already in use); --port=0 chooses a free one" in error


# ---------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    """The page in a new window; console messages of the browser fail the test."""
    context = browser.new_context()
    page, messages = context.new_page(), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(served.url)
    yield page
    context.close()
    assert [line for line in messages if "400 (Bad Request)" not in line] == []


def test_the_page_without_a_query_explains_itself(page: Page):
    expect(page.locator("#empty")).to_contain_text("6 videos in")
    expect(page.locator("#q")).to_be_focused()


def test_hits_play_from_their_best_moment(page: Page, served):
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    expect(page.locator(".hit")).to_have_count(5)
    expect(page.locator("#status")).to_have_text("5 videos, most similar first")
    expect(page.locator("#q")).to_have_value(SENTENCE)
    scores = [float(text.split()[1]) for text in page.locator(".facts").all_text_contents()]
    assert scores == sorted(scores, reverse=True)

    first = page.locator(".hit").first
    moment = float(first.locator("video").get_attribute("data-moment"))
    page.wait_for_function(
        "moment => { const v = document.querySelector('video');"
        " return v.readyState >= 2 && v.currentTime >= moment && v.currentTime > 0; }",
        arg=moment,
    )
    # The heat map: 9 tokens with start and end, 4 frames; weights add up to 1.
    assert first.locator("tbody tr").count() == 9
    assert first.locator("tbody tr").first.locator(".cell").count() == 4
    assert first.locator("thead button.best").count() == 1
    for weights in (first.locator("td.bar"), first.locator("td.column")):
        assert sum(map(float, weights.all_text_contents())) == pytest.approx(1, abs=0.01)
    colors = first.locator(".cell").evaluate_all(
        "cells => new Set(cells.map(c => getComputedStyle(c).backgroundColor)).size"
    )
    assert colors > 5


def test_the_page_works_with_the_keyboard(page: Page):
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type("two words")
    page.keyboard.press("Tab")
    expect(page.locator("#top")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # The button.
    expect(page.locator(".hit")).to_have_count(5)
    last = page.locator(".hit").first.locator("thead button").last
    for _ in range(40):
        if last.evaluate("button => button === document.activeElement"):
            break
        page.keyboard.press("Tab")
    expect(last).to_be_focused()
    assert last.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
    page.evaluate(
        "document.querySelector('video').addEventListener('seeking',"
        " (event) => { window.sought = event.target.currentTime; }, { once: true })"
    )
    page.keyboard.press("Enter")
    page.wait_for_function(
        "time => Math.abs(window.sought - time) < 0.1", arg=float(last.get_attribute("data-time"))
    )
    page.keyboard.press("/")
    expect(page.locator("#q")).to_be_focused()


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
    expect(page.locator(".hit")).to_have_count(5)
    expect(page.locator("#search button")).to_be_enabled()
    page.go_back()
    expect(page.locator("#search button")).to_be_enabled()
    assert page.locator("#search").get_attribute("aria-busy") is None


def test_an_error_is_announced(page: Page, served):
    page.goto(f"{served.url}?q=%20")
    expect(page.get_by_role("alert")).to_have_text("a query is blank; write a sentence")
    page.fill("#q", SENTENCE)
    page.keyboard.press("Enter")
    expect(page.locator(".hit")).to_have_count(5)


def test_a_video_that_the_browser_cannot_play_is_reported(page: Page, served):
    page.route("**/videos/**", lambda route: route.fulfill(body=b"no video", status=200))
    page.goto(f"{served.url}?q=two+words&top=1")
    expect(page.locator(".unplayable").first).to_be_visible()
    expect(page.locator("video").first).to_be_hidden()


def test_light_and_dark_are_readable(browser, served):
    """Text has a contrast of at least 4.5 (WCAG AA), also in the heat map."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{served.url}?q={SENTENCE.replace(' ', '+')}")
        expect(page.locator(".hit")).to_have_count(5)
        pairs = page.evaluate(
            """() => {
              const canvas = document.createElement('canvas').getContext('2d');
              const rgb = (color) => {
                canvas.fillStyle = color;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
              };
              const background = (e) => {
                const own = getComputedStyle(e).backgroundColor;
                return own === 'rgba(0, 0, 0, 0)' ? background(e.parentElement) : own;
              };
              const shown = 'h1, h2, label, .facts, #status, #search button, th, td, th button';
              return [...document.querySelectorAll(shown)]
                .filter((e) => e.textContent.trim())
                .map((e) => [rgb(getComputedStyle(e).color), rgb(background(e)), e.className]);
            }"""
        )
        assert len(pairs) > 100
        low = [pair for pair in pairs if contrast(*pair[:2]) < 4.5]
        assert low == []
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(backgrounds) == 2


def contrast(one: list[int], other: list[int]) -> float:
    """Contrast of two sRGB colors, as WCAG defines it."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(luminance([c / 255 for c in color]) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_the_server_listens_on_this_machine_only(served):
    listening = Path(f"/proc/{served.process.pid}/net/tcp").read_text().splitlines()[1:]
    addresses = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{served.port:04X}" in addresses  # 127.0.0.1
    assert f"00000000:{served.port:04X}" not in addresses
