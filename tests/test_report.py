"""The report of an evaluation: its findings, its page as text and in a real browser."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from playwright.sync_api import expect
from support.browser import text_contrasts
from support.commands import error_of
from support.runs import tiny_shapes_config

from drl_jax.evaluate import main as evaluate
from drl_jax.evaluation.metrics import query_ranks
from drl_jax.report import PAGE, write_report
from drl_jax.report import page as report_page
from drl_jax.report.collect import mapped_pairs, summary
from drl_jax.report.findings import (
    Duplicate,
    confused_pairs,
    duplicate_captions,
    hubness,
    rank_shares,
    worst_queries,
)
from drl_jax.report.page import render
from drl_jax.runs.run_params import remake_initial_params
from drl_jax.runs.workdir import MANIFEST_FILE, WorkdirError
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import seal, sha256, write_json
from drl_jax.runtime.sharding import make_layout
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

# Four captions and three videos; the first two captions are of video 0.
OWNER = np.array([0, 0, 1, 2])
SIMILARITY = np.array(
    [
        [0.9, 0.1, 0.2],  # Finds its video.
        [0.3, 0.5, 0.4],  # Its video is third, video 1 is first.
        [0.6, 0.5, 0.1],  # Video 0 is first.
        [0.2, 0.8, 0.8],  # A tie.
    ]
)
SCRIPT = "<script>alert(1)</script>"
PICTURE = '"><img src=x onerror=alert(1)> & $x_1$ {{ 7 * 7 }}'

# ---------------------------------------------------------------------- findings


def test_worst_queries_say_what_was_returned_instead():
    ranks = query_ranks(SIMILARITY, OWNER).t2v
    found = worst_queries(SIMILARITY, OWNER, ranks, 9)
    assert [tuple(query) for query in found] == [
        (1, 0, 3.0, 0.3, 1, 0.5),
        (2, 1, 2.0, 0.5, 0, 0.6),
        (3, 2, 1.5, 0.8, 1, 0.8),
    ]
    assert worst_queries(SIMILARITY, OWNER, ranks, 1) == found[:1]
    assert worst_queries(np.eye(3), np.arange(3), np.ones(3), 9) == []


def test_confused_pairs_count_the_captions_of_both_videos():
    first, second, third = confused_pairs(SIMILARITY, OWNER, 9)
    assert (first.videos, first.captions, first.of) == ((0, 1), [1, 2], 3)
    assert first.margin == pytest.approx(0.2)
    assert (second.videos, second.captions, second.of, second.margin) == ((1, 2), [3], 2, 0.0)
    assert (third.videos, third.captions, third.of) == ((0, 2), [1], 3)
    assert confused_pairs(np.eye(3), np.arange(3), 9) == []


def test_hubs_are_returned_for_many_captions():
    similarity = np.random.default_rng(0).normal(size=(60, 30))
    similarity[:, 7] += 2
    found = hubness(similarity, 4)
    best = [set(np.argsort(-row)[:3].tolist()) for row in similarity]
    times = [sum(video in three for three in best) for video in range(30)]
    assert (found.k, found.occurrences.tolist()) == (3, times)
    assert found.hubs[0] == 7
    assert found.first[7] == (similarity.argmax(axis=1) == 7).sum()
    assert found.expected == 60 * 3 / 30
    assert found.skewness > 1
    assert hubness(np.eye(4), 1).skewness == 0


def test_duplicate_captions_are_of_several_videos():
    captions = ["A dog  runs", "a dog runs", "a cat", "a cat", "a DOG runs"]
    (found,) = duplicate_captions(captions, np.array([0, 1, 2, 2, 3]))
    assert found == ("A dog  runs", [0, 1, 4], [0, 1, 3])


def test_rank_shares_have_every_rank_once():
    names, shares = rank_shares(np.array([1, 1, 1.5, 2, 3, 5, 10, 11, 101, 999]))
    assert names == ["1", "2", "3-5", "6-10", "11-20", "21-50", "51-100", ">100"]
    np.testing.assert_allclose(shares, [20, 20, 20, 10, 10, 0, 0, 20])


def test_chosen_captions_are_spaced_and_the_worst():
    ranks = query_ranks(SIMILARITY, OWNER)
    # The own video first; the last caption has a tie, of which the other one is listed first.
    of_each = {0: [0], 1: [0, 1], 2: [1, 0], 3: [2, 1]}
    pairs = [(caption, video) for caption, videos in of_each.items() for video in videos]
    assert mapped_pairs(SIMILARITY, ranks, [1]) == pairs
    identity = query_ranks(np.eye(99), np.arange(99))
    spaced = [caption for caption, _ in mapped_pairs(np.eye(99), identity, [98])]
    assert spaced == [0, 12, 24, 37, 49, 61, 74, 86, 98]


def test_the_summary_of_a_correlation():
    assert summary(np.array([[1.0, -0.5], [0.1, 0.5]])) == pytest.approx((0.75, 0.3))


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(search_run, tmp_path_factory):
    """A run of random parameters with a log that a crash has cut."""
    run = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(search_run, run)
    lines = [{"step": step, "train/contrastive_loss": 2 / step} for step in (1, 2, 3)]
    lines.append({"step": 3, "eval/t2v_R1": 12.5, "eval/v2t_R1": 10.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(f'{text}{{"step": 4, "tr')
    return run


@pytest.fixture(scope="module")
def reported(run):
    """The page that the command writes, and what it shows."""
    directory, shown = run.parent / "new" / "report", []
    with pytest.MonkeyPatch.context() as patch:
        # It takes half a second to draw a map.
        patch.setattr("drl_jax.report.collect._SPACED_QUERIES", 2)
        patch.setattr("drl_jax.report.collect._WORST_QUERIES", 1)
        patch.setattr(report_page, "render", lambda data: shown.append(data) or render(data))
        assert evaluate([f"--workdir={run}", f"--report={directory}"]) == 0
    assert [path.name for path in directory.iterdir()] == [PAGE]
    return directory / PAGE, shown[0]


class Parsed(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_has_the_parts_of_which_there_is_data(reported):
    path, data = reported
    text = Parsed(path.read_text()).text
    for part in ("Contrastive loss", "Recall on val", "Before training", "After training"):
        assert part in text
    assert "Gradient norm" not in text

    nothing = {"history": [], "worst": [], "confused": [], "duplicates": [], "maps": []}
    text = Parsed(render(dataclasses.replace(data, channels=None, **nothing))).text
    for note in (
        "The run has no metrics.jsonl, so there are no curves.",
        "This interaction does not compare channels",
        "Every caption finds its video first.",
        "No caption prefers another video.",
        "No two videos have the same caption.",
    ):
        assert note in text
    assert "Words and frames" not in text


@pytest.fixture(scope="module")
def hostile(reported) -> str:
    """A page with every list full, of strings that are no text."""
    data, replace = reported[1], dataclasses.replace
    text = [name for name, value in vars(data.card).items() if isinstance(value, str)]
    data = replace(
        data,
        run=SCRIPT,
        card=replace(data.card, **dict.fromkeys(text, PICTURE)),
        captions=[f"{caption} {SCRIPT}" for caption in data.captions],
        videos=[f"{video} {PICTURE}" for video in data.videos],
        duplicates=[Duplicate(SCRIPT, [0, 1], list(data.frames)[:2])],
        maps=[shown._replace(words=[SCRIPT, *shown.words[1:]]) for shown in data.maps[:2]],
        channels=replace(data.channels, before=None, missing=SCRIPT),
    )
    return render(data)


def test_strings_of_the_data_are_escaped(hostile):
    page = Parsed(hostile)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on")]
        for name in attributes.keys() & {"src", "xlink:href", "href"}:
            assert attributes[name].startswith(("data:image/", "#"))
    # As text, in a heading, a caption, the words of a map and the reason of what is missing.
    assert page.text.count(SCRIPT) > 6
    assert PICTURE in page.text
    assert "The state before training is not shown: <script>" in page.text


def test_everything_has_a_name_for_screen_readers_and_scrolls_by_keys(hostile):
    elements = Parsed(hostile).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in elements:
        if tag == "img":
            assert attributes["alt"]
        if tag == "nav" or "role" in attributes:
            assert attributes["aria-label"]
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
        if tag == "a":
            assert attributes["href"][1:] in ids
        if attributes.get("class", "").startswith("scroll"):
            assert (attributes["role"], attributes["tabindex"]) == ("region", "0")


def test_a_thousand_queries_are_below_20_mb(reported, monkeypatch):
    """With the least compressible frames; the maps have a limit of their own, of half of it."""
    data, rng = reported[1], np.random.default_rng(0)
    frames = rng.integers(256, size=(12, 96, 96, 3), dtype=np.uint8)
    full = dataclasses.replace(
        data,
        sim_matrix=rng.normal(size=(1000, 1000)),
        frames=dict.fromkeys(data.frames, frames),
        duplicates=[Duplicate("a", [0, 1, 2], list(data.frames)[:3])] * 8,
    )
    assert (len(data.worst), len(data.confused), len(data.hubness.hubs)) == (12, 8, 8)
    assert report_page._MAP_BYTES == 10_000_000
    monkeypatch.setattr(report_page, "_MAP_BYTES", 1)
    page = render(full)
    assert len(page.encode()) < 10_000_000
    assert f"{len(data.maps)} more pictures are left out" in page


def test_initial_parameters_of_another_file_are_refused(tiny_weights, tmp_path):
    config = tiny_shapes_config()
    model = dataclasses.replace(config.model, init=str(tiny_weights))
    config = dataclasses.replace(config, model=model)
    manifest = {"format": 2, "config": dataclasses.asdict(config), "starts": [{}]}
    write_json(tmp_path / MANIFEST_FILE, seal({**manifest, "weights_sha256": sha256(tiny_weights)}))
    params = remake_initial_params(tmp_path, config, make_layout())
    read = initial_params(config.model, read_weights(tiny_weights), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, read)
    write_json(tmp_path / MANIFEST_FILE, seal({**manifest, "weights_sha256": "0" * 64}))
    with pytest.raises(WorkdirError, match=r"is another file than the run in .* started from"):
        remake_initial_params(tmp_path, config, make_layout())


def test_a_directory_that_cannot_be_written_is_one_line(run, capsys):
    path = run / "config.json" / "report"
    line = error_of("drl_jax.evaluate", f"--workdir={run}", f"--report={path}", capsys=capsys)
    assert line == f"drl_jax.evaluate: {path} cannot be written: Not a directory (ENOTDIR)"


def test_a_full_disk_is_one_line_and_keeps_the_page(tmp_path, monkeypatch):
    def full(path, text, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    page = tmp_path / PAGE
    page.write_text("the report before")
    monkeypatch.setattr("drl_jax.report.collect.collect", lambda workdir, evaluated: None)
    monkeypatch.setattr(report_page, "render", lambda data: "a new one")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"complete, but .*index.html .*: No space left on"):
        write_report(tmp_path, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]
    assert page.read_bytes() == b"the report before"


# ---------------------------------------------------------------------- browser


@pytest.fixture
def opened(browser):
    """Opens a file; a message, a dialog or a request of anything else fails the test."""
    with contextlib.ExitStack() as stack:
        unwanted = []

        def open_file(path, **options):
            page = browser.new_page(**options)
            stack.callback(page.close)
            page.on("console", lambda message: unwanted.append(message.text))
            page.on("pageerror", lambda error: unwanted.append(error.stack))
            page.on("dialog", lambda dialog: unwanted.append(dialog.message))
            page.on("request", lambda request: unwanted.append(request.url))
            page.goto(path.as_uri())
            return page

        yield open_file
        others = [line for line in unwanted if not line.startswith(("data:image/", "file://"))]
        assert others == []
        assert len({line for line in unwanted if line.startswith("file://")}) <= 1


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
def test_the_page_is_readable_on_every_screen(opened, reported, scheme, width):
    page = opened(reported[0], viewport={"width": width, "height": 800}, color_scheme=scheme)
    expect(page.locator("h1")).to_have_text("run")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    shown = "h1, h2, h3, p, a, li span, th, td, small, dt, dd, summary, figcaption, b, q"
    contrasts = text_contrasts(page, f"{shown}, .grid svg text, .badge")
    assert len(contrasts) > 150
    assert [found for found in contrasts if found[0] < 4.5] == []
    # A chart is not smaller than its letters need.
    sizes = page.locator("#result svg text").evaluate_all(
        "texts => texts.map(t => t.getBoundingClientRect().height)"
    )
    assert min(sizes) > 7
