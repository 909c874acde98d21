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
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.metrics import metrics_of, query_ranks
from drl_jax.models.interactions import Attribution
from drl_jax.report import PAGE, write_report
from drl_jax.report import page as report_page
from drl_jax.report.collect import (
    VIDEOS_OF_DUPLICATE,
    Channels,
    ReportData,
    WordFrameMap,
    mapped_pairs,
    summary,
)
from drl_jax.report.findings import (
    confused_pairs,
    duplicate_captions,
    hubness,
    rank_shares,
    worst_queries,
)
from drl_jax.report.page import render
from drl_jax.runs.protocol_card import ProtocolCard
from drl_jax.runs.run_params import remake_initial_params
from drl_jax.runs.workdir import MANIFEST_FILE, WorkdirError, load_config
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
    assert found.k == 3
    np.testing.assert_array_equal(
        found.occurrences, [sum(video in three for three in best) for video in range(30)]
    )
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


# ---------------------------------------------------------------------- the page as text


def report_data(videos: int, *, maps: int, frames: int = 4, side: int = 16) -> ReportData:
    """A report of random similarities, with every list full; strings of the data are hostile."""
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(videos, videos)).astype(np.float32)
    ranks = query_ranks(similarity, np.arange(videos))
    captions = [f"caption {row} {SCRIPT}" for row in range(videos)]
    captions[1::7] = [PICTURE] * len(captions[1::7])
    card = ProtocolCard(
        **{field.name: PICTURE for field in dataclasses.fields(ProtocolCard)}
        | {"videos": videos, "captions": videos, "captions_per_video": (1, 1), "step": 3}
        | {"seeds": (0,)}
    )

    def noise() -> np.ndarray:
        return rng.integers(256, size=(frames, side, side, 3), dtype=np.uint8)

    worst = worst_queries(similarity, np.arange(videos), ranks.t2v, 12)
    confused = confused_pairs(similarity, np.arange(videos), 8)
    hubs = hubness(similarity, 8)
    duplicates = duplicate_captions(captions, np.arange(videos))[:8]
    shown = {
        *(video for query in worst for video in (query.video, query.returned)),
        *(video for pair in confused for video in pair.videos),
        *(video for same in duplicates for video in same.videos[:VIDEOS_OF_DUPLICATE]),
        *hubs.hubs,
    }
    words = ["[start]", SCRIPT, "$x$", "[end]"]
    attribution = Attribution(
        rng.uniform(-1, 1, (4, frames)), np.full(4, 0.25), *np.full((2, frames), 1 / frames)
    )
    return ReportData(
        run=SCRIPT,
        card=card,
        metrics=metrics_of(ranks),
        intervals=intervals(ranks, resamples=50),
        ranks=ranks,
        sim_matrix=similarity,
        captions=captions,
        videos=[f"video {number} {PICTURE}" for number in range(videos)],
        history=[{"step": step, "train/contrastive_loss": 1 / step} for step in range(1, 9)],
        worst=worst,
        confused=confused,
        hubness=hubs,
        duplicates=duplicates,
        frames={video: noise() for video in shown},
        maps=[WordFrameMap(row, row, words, attribution, noise()) for row in range(maps)],
        channels=Channels(9, 3, np.eye(4), None, missing=SCRIPT),
    )


class Parsed(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile() -> str:
    return render(report_data(40, maps=2))


def test_strings_of_the_data_are_escaped(hostile):
    page = Parsed(hostile)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "xlink:href", "href")]
    assert all(value.startswith(("data:image/", "#")) for value in sources)
    # As text, in a heading, a caption, the words of a map and the reason of what is missing.
    assert page.text.count(SCRIPT) > 6
    assert PICTURE in page.text
    assert "The state before training is not shown: <script>" in page.text


def test_parts_without_data_say_so():
    data = dataclasses.replace(
        report_data(9, maps=0), history=[], worst=[], confused=[], duplicates=[], channels=None
    )
    text = Parsed(render(data)).text
    for note in (
        "The run has no metrics.jsonl, so there are no curves.",
        "This interaction does not compare channels",
        "Every caption finds its video first.",
        "No caption prefers another video.",
        "No two videos have the same caption.",
    ):
        assert note in text
    assert "Words and frames" not in text


def test_a_thousand_queries_are_below_20_mb(monkeypatch):
    """With the least compressible frames; the maps have a limit of their own, of half of it."""
    data = report_data(1000, maps=2, frames=12, side=96)
    monkeypatch.setattr(report_page, "_MAP_BYTES", 1)
    page = render(data)
    assert len(page.encode()) < 10_000_000
    assert "2 more pictures are left out" in page
    monkeypatch.undo()
    assert report_page._MAP_BYTES == 10_000_000


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
def written(run):
    directory = run.parent / "new" / "report"
    with pytest.MonkeyPatch.context() as patch:
        # It takes half a second to draw a map.
        patch.setattr("drl_jax.report.collect._SPACED_QUERIES", 2)
        patch.setattr("drl_jax.report.collect._WORST_QUERIES", 1)
        assert evaluate([f"--workdir={run}", f"--report={directory}"]) == 0
    return directory / PAGE


def test_the_command_writes_one_file(written):
    assert [path.name for path in written.parent.iterdir()] == [PAGE]
    text = Parsed(written.read_text()).text
    for part in ("Contrastive loss", "Recall on val", "Before training", "After training"):
        assert part in text
    assert "Gradient norm" not in text


def test_initial_parameters_are_those_of_the_first_step(run):
    config = load_config(run)
    params = remake_initial_params(run, config, make_layout())
    kernel = params["interaction"]["text_weight_fc"]["fc"][0]["kernel"]
    assert kernel.std() == pytest.approx(0.02, rel=0.1)
    again = remake_initial_params(run, config, make_layout())
    np.testing.assert_array_equal(again["interaction"]["text_weight_fc"]["fc"][0]["kernel"], kernel)


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
    file = run / "config.json"
    for path, reason in (
        (file, "File exists (EEXIST)"),
        (file / "report", "Not a directory (ENOTDIR)"),
    ):
        line = error_of("drl_jax.evaluate", f"--workdir={run}", f"--report={path}", capsys=capsys)
        assert line == f"drl_jax.evaluate: {path} cannot be written: {reason}"


def test_a_full_disk_is_one_line_and_keeps_the_page(tmp_path, monkeypatch):
    def full(path, text, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    page = tmp_path / PAGE
    page.write_text("the report before")
    monkeypatch.setattr("drl_jax.report.collect.collect", lambda workdir, evaluated: None)
    monkeypatch.setattr("drl_jax.report.page.render", lambda data: "a new one")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"complete, but .*index.html .*: No space left on"):
        write_report(tmp_path, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]
    assert page.read_bytes() == b"the report before"


def test_a_run_without_checkpoints_is_one_line(run, tmp_path, capsys):
    shutil.copy(run / "config.json", tmp_path)
    flags = (f"--workdir={tmp_path}", f"--report={tmp_path / 'report'}")
    line = error_of("drl_jax.evaluate", *flags, capsys=capsys)
    assert line.startswith(f"drl_jax.evaluate: no checkpoints in {tmp_path}; training writes one")


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_every_screen(opened, written, scheme):
    for width in (390, 1280):
        page = opened(written, viewport={"width": width, "height": 800}, color_scheme=scheme)
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


def test_the_page_works_with_the_keyboard(opened, written):
    page = opened(written, viewport={"width": 390, "height": 800})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#result"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#words")).to_be_in_viewport()
    opened_query = page.locator("details[open]")
    first = opened_query.inner_text()
    summaries = page.locator("summary")
    summaries.nth(1).focus()
    page.keyboard.press("Enter")
    expect(opened_query).to_have_count(1)
    assert opened_query.inner_text() != first
    # A map that is wider than a phone scrolls by itself.
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 0")
    assert page.evaluate("document.activeElement.className") == "scroll map"


def test_everything_has_a_name(opened, hostile, tmp_path):
    """What a screen reader needs; beside an occasional run of axe-core by hand."""
    path = tmp_path / PAGE
    path.write_text(hostile)
    page = opened(path)
    page.locator("summary").last.click()
    problems = page.evaluate(
        """() => {
          const all = (selector) => [...document.querySelectorAll(selector)];
          const ids = all('[id]').map((e) => e.id);
          return [
            ...ids.filter((id, n) => ids.indexOf(id) !== n).map((id) => `${id} twice`),
            ...all('img:not([alt])').map((e) => `${e.src} without alt`),
            ...all('svg.chart, [role=region], nav')
              .filter((e) => !e.getAttribute('aria-label'))
              .map((e) => `${e.outerHTML.slice(0, 99)} without a name`),
            ...all('[aria-labelledby], nav a').map((e) => e.hash?.slice(1)
              ?? e.getAttribute('aria-labelledby')).filter((id) => !ids.includes(id)),
            ...all('img').filter((e) => e.checkVisibility() && e.loading !== 'lazy'
              && !e.naturalWidth).map((e) => `${e.alt} is broken`),
          ];
        }"""
    )
    assert problems == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").inner_text() == SCRIPT
