"""Search that ranks without hubs: stored numbers, exact and Qdrant's ranks, banks."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from drl_jax.search.candidates import CandidateSearch
from drl_jax.search.indexing import update_index
from drl_jax.search.videos import slots_of
from support.commands import error_of
from support.search import random_model
from support.videos import numbered_frames, write_video

from drl_jax.runtime.errors import UserError
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.hubness import Correction
from drl_jax.search.session import SearchSession

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


def corrected(correction, snapshot):
    """Similarities of the windows by slot, and scores by the published formula: [Q, W] both."""
    model = snapshot.model
    by_slot = np.argsort(slots_of(snapshot.videos))
    video = {name: array[by_slot] for name, array in snapshot.stored(snapshot.videos).items()}
    scores = model.similarity(model.encode_text(QUERIES), video).astype(np.float64)
    bank = model.similarity(model.encode_text(BANK), video).astype(np.float64)
    method, *values = correction.split(":")
    if method == "is":
        beta = float(values[0])
        quotient = np.exp(beta * scores) / np.exp(beta * bank).sum(axis=0)
        return scores, np.log(len(BANK) * quotient) / beta
    largest = np.sort(bank, axis=0)[::-1][: int(values[0])]
    return scores, scores - float(values[1]) * largest.mean(axis=0)


def assert_ranked_by(snapshot, expected, slots, *among):
    """The best windows have the expected scores, and none is left out."""
    ranking = snapshot.rank(snapshot.model.encode_text(QUERIES), len(slots), *among)
    np.testing.assert_array_equal(np.sort(ranking.slots, axis=1), [np.sort(slots)] * len(QUERIES))
    found = np.take_along_axis(expected, ranking.slots, axis=1)
    np.testing.assert_allclose(ranking.scores, found, atol=1e-5)
    assert (np.diff(ranking.scores, axis=1) <= 0).all()
    return ranking.slots


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_windows_are_ranked_by_the_formula(correction, search_model, shared_index):
    session = SearchSession(shared_index, search_model, Correction.parse(correction))
    snapshot = session.snapshot()
    scores, expected = corrected(correction, snapshot)
    assert scores.shape[1] > len(snapshot.videos) == 10
    order = assert_ranked_by(snapshot, expected, range(scores.shape[1]))
    assert np.diff(np.take_along_axis(scores, order, axis=1), axis=1).max() > 1e-3
    # Among few videos, whose rows are copied, and among many.
    for among in (snapshot.videos[1:3], snapshot.videos[:8]):
        assert_ranked_by(snapshot, expected, slots_of(among), among)


def test_hits_show_similarities(search_model, shared_index):
    raw = SearchSession(shared_index, search_model).search(QUERIES, 10)
    session = SearchSession(shared_index, search_model, Correction.parse("is:100"))
    found = session.search(QUERIES, 10)
    for hits, others in zip(raw, found, strict=True):
        score_of = {hit.path: hit.score for hit in hits}
        assert [hit.score for hit in others] == [score_of[hit.path] for hit in others]
        # Alone, a sentence has the same hits.
        alone = session.search([QUERIES[0]], 10)[0]
        assert [hit.path for hit in alone] == [hit.path for hit in found[0]]
    assert [h.path for hits in raw for h in hits] != [h.path for hits in found for h in hits]
    # The page asks the same session, and queries of other kinds are ranked by similarity.
    page = SearchAPI(session, 10).search(PageQuery(QUERIES[0]))
    assert [hit["path"] for hit in page["hits"]] == [hit.video.path for hit in found[0]]
    path = raw[0][0].path
    same = [s.search_by_video(path, 10) for s in (session, SearchSession(shared_index))]
    assert [hit.path for hit in same[0]] == [hit.path for hit in same[1]]


def test_new_videos_get_their_numbers(search_model, shared_videos, videos, index):
    shutil.copy2(shared_videos / "zz_long.mp4", videos)
    update_index(search_model, videos, index, storage="float32")
    snapshot = SearchSession(index, search_model, Correction.parse("is")).snapshot()
    _, expected = corrected("is:20", snapshot)
    assert_ranked_by(snapshot, expected, range(expected.shape[1]))


def test_an_index_keeps_its_bank(search_model, shared_videos, videos, index):
    def update(**bank):
        shutil.copy2(shared_videos / "zz_long.mp4", videos)
        return update_index(search_model, videos, index, storage="float32", **bank)

    with pytest.raises(UserError, match="was made with another --bank"):
        update(bank=BANK[1:])
    for damaged, reason in ((b'["a"]', "has changed"), (b"{", "is damaged"), (None, "No such")):
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
        SearchSession(tmp_path / "index", search_model, Correction.parse("nnn"))
    with pytest.raises(UserError, match="was made with no --bank"):
        update_index(search_model, videos, tmp_path / "index", bank=BANK)


def test_qdrant_ranks_one_vector_as_exact_search(shapes_config, shared_videos, tmp_path):
    """dp: the engine's score is the whole similarity."""
    model = random_model(shapes_config, "dp")
    update_index(model, shared_videos, tmp_path / "dp", storage="float32", bank=BANK)
    session = SearchSession(tmp_path / "dp", model, Correction.parse("is:100"))
    engine = CandidateSearch(session, candidates=16)
    engine.export()
    plain = SearchSession(tmp_path / "dp", model)
    assert [h.path for hits in plain.search(QUERIES, 4) for h in hits] != [
        hit.path for hits in session.search(QUERIES, 4) for hit in hits
    ]
    snapshot = session.snapshot()
    for sentence in QUERIES:
        text = model.encode_text([sentence])
        found = engine.candidates(snapshot, text, 16)
        # Stored as float16: similar windows may change places.
        exact = snapshot.rank(text, 16)
        score_of = dict(zip(exact.slots[0], exact.scores[0], strict=True))
        np.testing.assert_allclose([score_of[slot] for slot in found], exact.scores[0], atol=1e-3)
    hits = engine.search(QUERIES, 4)
    assert [[h.path for h in found] for found in hits] == [
        [h.path for h in found] for found in session.search(QUERIES, 4)
    ]
    engine.close()


def test_qdrant_subtracts_the_number_once(search_model, shared_index, tmp_path):
    """wti: the engine ranks by the mean similarity of tokens and frames, minus the number."""
    directory = shutil.copytree(shared_index, tmp_path / "index")
    session = SearchSession(directory, search_model, Correction.parse("nnn:16:1"))
    engine = CandidateSearch(session)
    engine.export()
    snapshot = session.snapshot()
    windows = [(v, w) for v in snapshot.videos for w in range(len(v.windows))]
    text = search_model.encode_text(QUERIES[:1])
    found = engine.candidates(snapshot, text, 99)
    engine.close()
    stored = snapshot.stored(snapshot.videos)
    sim = np.einsum("ld,vfd->vlf", text["text_unit"][0], stored["frame_unit"])
    mean = np.einsum("vlf,l,vf->v", sim, text["text_weight"][0], stored["frame_weight"])
    score_of = dict(
        zip(slots_of(snapshot.videos), mean - snapshot.biases_of_windows(windows), strict=True)
    )
    expected = sorted(score_of.values(), reverse=True)
    assert np.ptp(mean) > 0.01
    np.testing.assert_allclose([score_of[slot] for slot in found], expected, atol=1e-3)


def test_a_collection_belongs_to_its_correction(search_model, shared_index, tmp_path):
    directory, names = shutil.copytree(shared_index, tmp_path / "index"), set()
    for correction in (None, *map(Correction.parse, CORRECTIONS)):
        engine = CandidateSearch(SearchSession(directory, search_model, correction))
        names.add(engine.collection)
        engine.close()
    assert len(names) == 5


def test_the_commands(search_run, videos, tmp_path, capsys):
    for path in sorted(videos.iterdir())[3:-1]:
        path.unlink()
    index = f"--index={tmp_path / 'index'}"
    (tmp_path / "bank.txt").write_text("\n".join(BANK))
    make = ("index", index, f"--workdir={search_run}", f"--videos={videos}")
    assert main([*make, "--bank=train"]) == 0
    header = SearchSession(tmp_path / "index").snapshot().header
    assert header["hubness"]["captions"] > 100
    line = error_of("drl_jax.search", *make, f"--bank={tmp_path / 'bank.txt'}", capsys=capsys)
    assert "was made with another --bank" in line
    capsys.readouterr()
    assert main(["query", index, "--hubness=is:50", "--json", QUERIES[0]]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    session = SearchSession(tmp_path / "index", correction=Correction("is", 50))
    assert [hit["path"] for hit in hits] == [str(h.path) for h in session.search(QUERIES, 5)[0]]
    for flags, message in (
        (["--hubness=csls", "a"], "--hubness=csls: write is, is:BETA, nnn, nnn:K or nnn:K:W"),
        (["--hubness=nnn:9", "a"], "has nnn for 16, 128 only"),
        (["--hubness=is", f"--video={videos / 'zz_long.mp4'}"], "--hubness ranks sentences"),
    ):
        assert message in error_of("drl_jax.search", "query", index, *flags, capsys=capsys)


def test_training_captions_that_are_not_here(search_model, tmp_path, videos):
    from drl_jax.search.index_commands import _bank_captions

    data = dataclasses.replace(search_model.config.data, data_dir=str(tmp_path))
    config = dataclasses.replace(search_model.config, data=data)
    model = dataclasses.replace(search_model, config=config)
    with pytest.raises(UserError, match=r"--bank=train: .*; or give --bank=FILE"):
        _bank_captions("train", model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is", ("is", 20, 1.0)),
        ("is:5", ("is", 5, 1.0)),
        ("nnn", ("nnn", 128, 0.75)),
        ("nnn:16", ("nnn", 16, 0.75)),
        ("nnn:16:0.5", ("nnn", 16, 0.5)),
    ],
)
def test_corrections_are_parsed(text, expected):
    assert dataclasses.astuple(Correction.parse(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "dsl", "is:", "is:x", "is:5:1", "nnn:a", "nnn:1:b", "nnn:1:nan", "nnn:1:-1", "nnn:1:1:1"],
)
def test_other_corrections_are_refused(text):
    with pytest.raises(UserError, match="write is, is:BETA"):
        Correction.parse(text)
