"""Search that ranks without hubs: stored numbers, exact and Qdrant's ranks, banks."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.commands import error_of
from support.videos import numbered_frames, write_video

from drl_jax.runtime.errors import UserError
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.commands import _bank_captions
from drl_jax.search.encoding import Correction, dequantize
from drl_jax.search.filters import Filters
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.query import Query, encode_sentences
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.session import Index
from drl_jax.search.update import update_index

QUERIES = ["a red circle moves to the left", "a green cross grows", "two words"]
BANK = [f"a {color} {shape} waits" for color in ("red", "green", "blue") for shape in "abcdefgh"]
# With the number of largest similarities, 128, that of a bank of 24 captions: all of them.
CORRECTIONS = ("is:20", "is:100", "nnn:128:0.75", "nnn:16:1")


@pytest.fixture(scope="module")
def shared_videos(test_videos, tmp_path_factory):
    """Some test videos, and one of several windows; not to be changed."""
    folder = tmp_path_factory.mktemp("hubness") / "videos"
    folder.mkdir()
    for path in sorted(test_videos.iterdir())[:9]:
        shutil.copy2(path, folder)
    write_video(folder / "zz_long.mp4", numbered_frames(140, 64, 64), fps=10)
    return folder


@pytest.fixture(scope="module")
def shared_index(search_model, shared_videos):
    """An index of these videos with a bank; not to be changed."""
    directory = shared_videos.parent / "index"
    update_index(search_model, shared_videos, directory, storage="float32", bank=BANK)
    return directory


@pytest.fixture
def videos(shared_videos, tmp_path):
    return shutil.copytree(shared_videos, tmp_path / "videos")


@pytest.fixture
def index(search_model, videos, tmp_path):
    """An index of two videos with a bank."""
    for path in sorted(videos.iterdir())[2:]:
        path.unlink()
    update_index(search_model, videos, tmp_path / "index", storage="float32", bank=BANK)
    return tmp_path / "index"


def opened(directory, model, correction=None) -> Index:
    correction = correction and Correction.parse(correction)
    return Index(directory, model, SearchOptions(refine=0, correction=correction))


def corrected(correction, state: OpenIndex, model):
    """Similarities of the windows by slot, and scores by the published formula: [Q, W] both."""
    video = dequantize(state.gallery.take(np.arange(len(state.gallery))))
    scores = model.similarity(model.encode_text(QUERIES), video).astype(np.float64)
    bank = model.similarity(model.encode_text(BANK), video).astype(np.float64)
    method, *values = correction.split(":")
    if method == "is":
        beta = float(values[0])
        quotient = np.exp(beta * scores) / np.exp(beta * bank).sum(axis=0)
        return scores, np.log(len(BANK) * quotient) / beta
    largest = np.sort(bank, axis=0)[::-1][: int(values[0])]
    return scores, scores - float(values[1]) * largest.mean(axis=0)


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
def test_windows_are_ranked_by_the_formula(correction, search_model, shared_index):
    index = opened(shared_index, search_model, correction)
    state = index.state()
    scores, expected = corrected(correction, state, search_model)
    assert scores.shape[1] > len(state.videos) == 10
    assert_ranked_by(index, expected, range(scores.shape[1]))
    assert (np.argsort(scores) != np.argsort(expected)).any()
    among = state.filtered(Filters(only=tuple(video.path for video in state.videos[1:4])))
    slots = np.sort(np.concatenate([video.slots for video in among]))
    assert_ranked_by(index, expected, slots, among)


def test_hits_show_similarities(search_model, shared_index):
    plain = opened(shared_index, search_model)
    index = opened(shared_index, search_model, "is:100")
    raw, found = plain.search(QUERIES, 10), index.search(QUERIES, 10)
    for hits, others in zip(raw, found, strict=True):
        score_of = {hit.path: hit.score for hit in hits}
        assert [hit.score for hit in others] == [score_of[hit.path] for hit in others]
    # Alone, a sentence has the same hits.
    assert [hit.path for hit in index.search(QUERIES[0], 10)] == [hit.path for hit in found[0]]
    assert [h.path for hits in raw for h in hits] != [h.path for hits in found for h in hits]
    # The page asks the same session, and queries of other kinds are ranked by similarity.
    page = SearchAPI(index, 10, 0).search(PageQuery(QUERIES[0]))
    assert [hit["path"] for hit in page["hits"]] == [hit.video.path for hit in found[0]]
    by_video = [one.search(Query(video=raw[0][0].path), 10) for one in (index, plain)]
    assert [hit.path for hit in by_video[0]] == [hit.path for hit in by_video[1]]


def test_new_videos_get_their_numbers(search_model, shared_videos, videos, index):
    shutil.copy2(shared_videos / "zz_long.mp4", videos)
    update_index(search_model, videos, index, storage="float32")
    index = opened(index, search_model, "is:20")
    _, expected = corrected("is:20", index.state(), search_model)
    assert_ranked_by(index, expected, range(expected.shape[1]))


def test_an_index_keeps_its_bank(search_model, shared_videos, videos, index):
    def update(**bank):
        shutil.copy2(shared_videos / "zz_long.mp4", videos)
        return update_index(search_model, videos, index, storage="float32", **bank)

    with pytest.raises(UserError, match="was made with another --bank"):
        update(bank=BANK[1:])
    for damaged, reason in (
        (b'["a"]', "has changed"),
        (b"{", "JSONDecodeError"),
        (None, "No such"),
    ):
        path = index / "hubness_bank.json"
        path.unlink()
        if damaged:
            path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{reason}.*; give the captions .* with --bank"):
            update()
        assert update(bank=BANK).added == 1
        (videos / "zz_long.mp4").unlink()
        update_index(search_model, videos, index, storage="float32")


def test_an_index_without_a_bank_is_one_line(search_model, videos, tmp_path):
    update_index(search_model, videos, tmp_path / "index")
    with pytest.raises(UserError, match=r"has no bank of captions, which --hubness needs"):
        opened(tmp_path / "index", search_model, "nnn").search("a dog")
    with pytest.raises(UserError, match="was made with no --bank"):
        update_index(search_model, videos, tmp_path / "index", bank=BANK)


def test_the_commands(search_run, videos, tmp_path, capsys):
    for path in sorted(videos.iterdir())[3:-1]:
        path.unlink()
    index = f"--index={tmp_path / 'index'}"
    (tmp_path / "bank.txt").write_text("\n".join(BANK))
    make = ("index", index, f"--workdir={search_run}", f"--videos={videos}")
    assert main([*make, "--bank=train"]) == 0
    header = Index(tmp_path / "index").state().header
    assert header["hubness"]["captions"] > 100
    line = error_of("drl_jax.search", *make, f"--bank={tmp_path / 'bank.txt'}", capsys=capsys)
    assert "was made with another --bank" in line
    capsys.readouterr()
    assert main(["query", index, "--hubness=is:50", "--json", QUERIES[0]]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    other = Index.open(tmp_path / "index", correction=Correction("is:50"))
    assert [hit["path"] for hit in hits] == [str(h.path) for h in other.search(QUERIES[0], 5)]
    for flags, message in (
        (["--hubness=csls", "a"], "--hubness=csls: write is, is:BETA, nnn, nnn:K or nnn:K:W"),
        (["--hubness=nnn:9", "a"], "nnn:128, nnn:16 only"),
        (["--hubness=is", f"--video={videos / 'zz_long.mp4'}"], "--hubness ranks sentences"),
    ):
        assert message in error_of("drl_jax.search", "query", index, *flags, capsys=capsys)


def test_training_captions_that_are_not_here(search_model, tmp_path, videos):
    data = dataclasses.replace(search_model.config.data, data_dir=str(tmp_path))
    config = dataclasses.replace(search_model.config, data=data)
    model = dataclasses.replace(search_model, config=config)
    with pytest.raises(UserError, match=r"--bank=train: .*; --bank=FILE reads one"):
        _bank_captions("train", model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is", ("is:20", 1.0)),
        ("is:05", ("is:5", 1.0)),
        ("nnn", ("nnn:128", 0.75)),
        ("nnn:16", ("nnn:16", 0.75)),
        ("nnn:16:0.5", ("nnn:16", 0.5)),
    ],
)
def test_corrections_are_parsed(text, expected):
    assert Correction.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "dsl", "is:", "is:x", "is:5:1", "nnn:a", "nnn:1:b", "nnn:1:nan", "nnn:1:-1", "nnn:1:1:1"],
)
def test_other_corrections_are_refused(text):
    with pytest.raises(UserError, match="write is, is:BETA"):
        Correction.parse(text)
