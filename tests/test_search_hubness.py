"""Search that ranks without hubs: stored numbers, exact and Qdrant's ranks, banks."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.commands import error_of
from support.search import made_up_videos, made_up_windows, write_index
from support.videos import numbered_frames, write_video

from drl_jax.evaluation.hubness import inverted_softmax, nnn
from drl_jax.runtime.errors import UserError
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.commands import _bank_captions
from drl_jax.search.encoding import Correction, dequantize
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import IndexWriter, read_header
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.query import Query, encode_sentences
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.session import Index
from drl_jax.search.update import update_index

QUERIES = ["a red circle moves to the left", "a green cross grows", "two words"]
BANK = [f"a {color} {shape} waits" for color in ("red", "green", "blue") for shape in "abcdefgh"]
# With the number of largest similarities, 128, that of a bank of 24 captions: all of them.
CORRECTIONS = ("is:100", "nnn:128:0.75", "nnn:16:1")


@pytest.fixture(scope="module")
def videos(test_videos, tmp_path_factory):
    """Some test videos, and one of several windows; not to be changed."""
    folder = tmp_path_factory.mktemp("hubness") / "videos"
    folder.mkdir()
    for path in sorted(test_videos.iterdir())[:9]:
        shutil.copy2(path, folder)
    return folder


@pytest.fixture(scope="module")
def index(search_model, videos):
    """An index of them with a bank, which was updated; not to be changed."""
    directory = videos.parent / "index"
    update_index(search_model, videos, directory, storage="float32", bank=BANK)
    write_video(videos / "zz_long.mp4", numbered_frames(140, 64, 64), fps=10)
    report = update_index(search_model, videos, directory, storage="float32")
    assert (report.added, report.unchanged) == (1, 9)
    return directory


def opened(directory, model, correction=None) -> Index:
    correction = correction and Correction.parse(correction)
    return Index(directory, model, SearchOptions(refine=0, correction=correction))


def corrected(correction, state: OpenIndex, model):
    """Similarities of the windows by slot, and scores by the formula: [Q, W] both."""
    video = dequantize(state.gallery.take(np.arange(len(state.gallery))))
    scores, bank = (
        model.similarity(model.encode_text(texts), video).astype(np.float64)
        for texts in (QUERIES, BANK)
    )
    method, *values = correction.split(":")
    apply, types = {"is": (inverted_softmax, [float]), "nnn": (nnn, [int, float])}[method]
    return scores, apply(scores, bank, *(t(v) for t, v in zip(types, values, strict=True)))


def assert_ranked_by(index: Index, expected, slots, among=None):
    """The best windows have the expected scores, and none is left out."""
    state, queries = index.state(), encode_sentences(index.model, QUERIES)
    videos = len(state.videos if among is None else among)
    for found, row in zip(index.ranker.rank(state, queries, 99, among), expected, strict=True):
        assert set(found.slots) <= set(slots)
        assert len(found.places()) == videos
        best = np.sort(row[slots])[::-1][: len(found.slots)]
        np.testing.assert_allclose(found.scores, best, atol=1e-5)
        np.testing.assert_allclose(found.scores, row[found.slots], atol=1e-5)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_windows_are_ranked_by_the_formula(correction, search_model, index):
    session = opened(index, search_model, correction)
    state = session.state()
    scores, expected = corrected(correction, state, search_model)
    assert scores.shape[1] > len(state.videos) == 10
    assert_ranked_by(session, expected, range(scores.shape[1]))
    assert (np.argsort(scores) != np.argsort(expected)).any()
    among = state.filtered(Filters(only=tuple(video.path for video in state.videos[1:4])))
    slots = np.sort(np.concatenate([video.slots for video in among]))
    assert_ranked_by(session, expected, slots, among)


def test_hits_show_similarities(search_model, index):
    plain, session = opened(index, search_model), opened(index, search_model, "is:100")
    raw, found = plain.search(QUERIES, 10), session.search(QUERIES, 10)
    for hits, others in zip(raw, found, strict=True):
        score_of = {hit.path: hit.score for hit in hits}
        assert [hit.score for hit in others] == [score_of[hit.path] for hit in others]
    # Alone, a sentence has the same hits.
    assert [hit.path for hit in session.search(QUERIES[0], 10)] == [hit.path for hit in found[0]]
    assert [h.path for hits in raw for h in hits] != [h.path for hits in found for h in hits]
    # The page asks the same session, and queries of other kinds are ranked by similarity.
    page = SearchAPI(session, 10, 0).search(PageQuery(QUERIES[0]))
    assert [hit["path"] for hit in page["hits"]] == [hit.video.path for hit in found[0]]
    by_video = [one.search(Query(video=raw[0][0].path), 10) for one in (session, plain)]
    assert [hit.path for hit in by_video[0]] == [hit.path for hit in by_video[1]]


def test_an_index_keeps_its_bank(search_model, videos, index, tmp_path):
    for number, (damaged, reason) in enumerate(
        ((b'["a"]', "has changed"), (b"{", "JSONDecodeError"), (None, "No such"))
    ):
        copy = shutil.copytree(index, tmp_path / f"index{number}")
        with IndexWriter(copy) as writer:
            writer.put([], gone=["zz_long.mp4"])
        (copy / "hubness_bank.json").unlink()
        if damaged:
            (copy / "hubness_bank.json").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{reason}.*; give the captions .* with --bank"):
            update_index(search_model, videos, copy, storage="float32")
    report = update_index(search_model, videos, copy, storage="float32", bank=BANK)
    assert (report.added, report.unchanged) == (1, 9)


def test_an_index_without_a_bank_is_one_line(search_model, tmp_path):
    videos = made_up_videos(search_model, ["a.mp4"], made_up_windows(search_model, 1))
    write_index(tmp_path / "index", search_model, [videos])
    with pytest.raises(UserError, match=r"has no bank of captions, which --hubness needs"):
        opened(tmp_path / "index", search_model, "nnn")


def test_the_commands(search_run, search_model, test_videos, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in sorted(test_videos.iterdir())[:3]:
        shutil.copy(path, videos)
    index = f"--index={tmp_path / 'index'}"
    make = ("index", index, f"--workdir={search_run}", f"--videos={videos}")
    assert main([*make, "--bank=train"]) == 0
    assert read_header(tmp_path / "index")["hubness"]["captions"] > 100
    capsys.readouterr()
    assert main(["query", index, "--hubness=is:50", "--json", QUERIES[0]]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    other = opened(tmp_path / "index", search_model, "is:50").search(QUERIES[0], 5)
    assert [hit["path"] for hit in hits] == [str(hit.path) for hit in other]
    for flags, message in (
        (["--hubness=csls", "a"], "--hubness=csls: write is, is:BETA, nnn, nnn:K or nnn:K:W"),
        (["--hubness=nnn:9", "a"], "nnn:128, nnn:16 only"),
        (["--hubness=is", f"--video={videos / 'video0.mp4'}"], "--hubness ranks sentences"),
    ):
        assert message in error_of("drl_jax.search", "query", index, *flags, capsys=capsys)


def test_captions_of_a_bank_are_read(search_model, tmp_path):
    (tmp_path / "bank.txt").write_text("\n\n ".join(BANK))
    assert _bank_captions(str(tmp_path / "bank.txt"), search_model) == BANK
    data = dataclasses.replace(search_model.config.data, data_dir=str(tmp_path))
    config = dataclasses.replace(search_model.config, data=data)
    model = dataclasses.replace(search_model, config=config)
    with pytest.raises(UserError, match=r"--bank=train: .*; --bank=FILE reads one"):
        _bank_captions("train", model)


def test_corrections_are_parsed():
    for text, expected in (
        ("is", ("is:20", 1.0)),
        ("is:05", ("is:5", 1.0)),
        ("nnn", ("nnn:128", 0.75)),
        ("nnn:16", ("nnn:16", 0.75)),
        ("nnn:16:0.5", ("nnn:16", 0.5)),
    ):
        assert Correction.parse(text) == expected
    for text in ("", "dsl", "is:", "is:x", "is:5:1", "nnn:a", "nnn:1:nan", "nnn:1:-1", "nnn:1:1:1"):
        with pytest.raises(UserError, match="write is, is:BETA"):
            Correction.parse(text)
