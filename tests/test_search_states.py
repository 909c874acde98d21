"""States of an index: exact answers, updates under an open index, damage, queries at once."""

import itertools
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from support.search import damage, made_up_videos, made_up_windows, write_index

from drl_jax.search import engine, open_index, session
from drl_jax.search.index_file import IndexWriter, join
from drl_jax.search.query import Query
from drl_jax.search.segments import SearchIndexError, Segment
from drl_jax.search.session import Index

WORDS = "a red blue green circle square triangle cross moves grows shrinks left right up"


def sentences(count):
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(1, 12))) for _ in range(count)]


def similarity(text, video):
    """wti in float64; padded tokens and frames have the similarity 0, and take part in maxima."""
    tokens = np.float64(text["text_unit"]) * text["text_mask"][..., None]
    frames = np.float64(video["frame_unit"]) * video["frame_mask"][..., None]
    found = []
    for words, weight in zip(tokens, np.float64(text["text_weight"]), strict=True):
        each = np.einsum("ld,vfd->vlf", words, frames)
        found.append(each.max(axis=2) @ weight + (each.max(axis=1) * video["frame_weight"]).sum(1))
    return np.array(found) / 2


def rounded(unit, storage):
    if storage == "bfloat16":
        return unit.astype(ml_dtypes.bfloat16).astype(np.float32)
    scale = np.abs(unit).max(axis=-1, keepdims=True) / 127
    return np.rint(unit / scale) * scale


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(engine, "BLOCKS", (256, 64))
    monkeypatch.setattr(open_index, "BLOCKS", (256, 64))


def ask_all(index, asked):
    """In batches: of 256 rows, the product of so small features rounds as its block has windows."""
    return [hits for n in range(0, 200, 50) for hits in index.search(asked[n : n + 50], 10)]


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_hits_scores_and_order_equal_a_product_in_numpy(
    search_model, tmp_path, small_blocks, storage
):
    """200 sentences and 600 windows, with twins; two segments are blocks of their own."""
    windows = made_up_windows(search_model, 600)
    twin = {n: 599 - n for n in range(100)}
    for array in windows.values():
        array[list(twin)] = array[list(twin.values())]
    twin |= {other: n for n, other in twin.items()}
    paths = [f"{number:03}.mp4" for number in np.random.default_rng(2).permutation(600)]
    videos = made_up_videos(search_model, paths, windows, storage)
    parts = [videos[:300], videos[300:500], videos[500:540], videos[540:]]
    one = write_index(tmp_path / "one", search_model, parts, storage=storage)
    asked, opened = sentences(200), Index(one, search_model)
    stored = opened.state().segments[0].segment.arrays["window.frame_unit"]
    assert stored.itemsize == {"bfloat16": 2, "int8": 1}[storage]
    found = ask_all(opened, asked)
    stored = {**windows, "frame_unit": rounded(windows["frame_unit"], storage)}
    for hits, row in zip(found, similarity(search_model.encode_text(asked), stored), strict=True):
        order = sorted(range(600), key=lambda n, row=row: (-row[n], paths[n]))[:10]
        got = [paths.index(hit.video.path) for hit in hits]
        np.testing.assert_allclose(row[got], row[order], atol=1e-6)
        np.testing.assert_allclose([hit.score for hit in hits], row[got], atol=1e-6)
        for place, number in enumerate(got):
            if number in twin and paths[twin[number]] < paths[number]:
                assert got[place - 1] == twin[number]
    # In segments of other sizes, of several indexes.
    shards = [tmp_path / "0", tmp_path / "1"]
    for shard, part in zip(shards, (videos[:70], videos[70:]), strict=True):
        write_index(shard, search_model, [part], storage=storage, videos=str(one))
    join(tmp_path / "joined", shards)
    joined_index = Index(tmp_path / "joined", search_model)
    joined = ask_all(joined_index, asked)
    for hits, others in zip(joined, found, strict=True):
        assert [hit.video.path for hit in hits] == [hit.video.path for hit in others]
        assert [hit.score for hit in hits] == [hit.score for hit in others]
    # A picture is compared with the same 64 of the windows.
    picture = Query(picture=np.random.default_rng(3).bytes(np.prod(search_model.frame_form.shape)))
    one, joined = (index.search(picture) for index in (opened, joined_index))
    assert [hit.moments[0].unusual for hit in one] == [hit.moments[0].unusual for hit in joined]


# ---------------------------------------------------------------------- damage


@pytest.fixture
def index(search_model, tmp_path):
    """Two segments of 20 videos."""
    paths = [f"{number:02}.mp4" for number in range(40)]
    videos = made_up_videos(search_model, paths, made_up_windows(search_model, 40))
    return write_index(tmp_path / "index", search_model, [videos[:20], videos[20:]])


def search_until_refused(opened):
    for _ in range(500):
        opened.search("a", 1)
        time.sleep(0.01)


@pytest.mark.parametrize("at_once", [0, 10_000])
def test_features_that_are_zeroed_under_an_open_index_are_noticed(
    search_model, index, monkeypatch, at_once
):
    """In a large index in the background, also if they are not shown any more."""
    monkeypatch.setattr(open_index, "_AT_ONCE", at_once)
    opened = Index(index, search_model)
    assert opened.search("a", 1)
    damage(index, "33.mp4")
    with pytest.raises(SearchIndexError, match=r"features of '33.mp4' differ from their checksum"):
        search_until_refused(opened)


def test_what_is_shown_of_a_large_index_is_checked_first(search_model, index, monkeypatch):
    monkeypatch.setattr(open_index, "_AT_ONCE", 0)
    monkeypatch.setattr(open_index.OpenIndex, "_verify", lambda *arguments: None)
    damage(index, "07.mp4")
    opened = Index(index, search_model)
    for ask in (lambda: opened.search("a", 40), lambda: opened.state().video_at("07.mp4")):
        with pytest.raises(SearchIndexError, match=r"features of '07.mp4' differ"):
            ask()


# ---------------------------------------------------------------------- updates


def test_an_old_state_is_answered_from_while_its_files_are_deleted(
    search_model, index, monkeypatch
):
    """It has read no row yet; a moment of it is still one of its own videos."""
    expected = [hit.moments for hit in Index(index, search_model).search("a", 9)]
    monkeypatch.setattr(open_index, "_AT_ONCE", 0)
    monkeypatch.setattr(open_index.OpenIndex, "_verify", lambda *arguments: None)
    opened = Index(index, search_model)
    old = opened.state()
    liked = Query(like=(old.video_at("05.mp4"), 1.0))
    others = made_up_windows(search_model, 20, seed=3)
    paths = [f"{number:02}.mp4" for number in range(20)]
    with IndexWriter(index) as writer:
        writer.put(made_up_videos(search_model, paths, others))
        writer.merge()
    assert not old.segments[0].segment.directory.exists()
    assert [hit.moments for hit in opened.answer(old, Query("a"), 9)] == expected
    assert [hit.moments for hit in opened.search("a", 9)] != expected
    before = {hit.video.path: hit.score for hit in opened.answer(old, liked, 40)}
    after = {hit.video.path: hit.score for hit in opened.search(liked, 40)}
    assert before["05.mp4"] == max(before.values()) == pytest.approx(1, abs=1e-4)
    assert after["05.mp4"] < 0.9  # The video that replaced it; the query is the old one.
    assert {path: after[path] for path in after if path > "20"} == pytest.approx(
        {path: before[path] for path in before if path > "20"}, abs=1e-6
    )


def test_an_open_index_checks_only_new_features(search_model, index, monkeypatch):
    opened, checked, verify = Index(index, search_model), set(), Segment.verify

    def watched(segment, row):
        if not segment.verified[row]:
            checked.add(segment.path(row))
        verify(segment, row)

    monkeypatch.setattr(Segment, "verify", watched)
    with IndexWriter(index) as writer:
        writer.put(made_up_videos(search_model, ["new.mp4"], made_up_windows(search_model, 1)))
        writer.listed[-1].segment.verified[:] = False
    assert len(opened.search("a", 99)) == 41
    assert checked == {"new.mp4"}


def test_a_deleted_and_recreated_index_is_opened_again(search_model, index):
    opened = Index(index, search_model)
    shutil.rmtree(index)
    with pytest.raises(SearchIndexError, match="no index in"):
        opened.search("a", 1)
    videos = made_up_videos(search_model, ["new.mp4"], made_up_windows(search_model, 1))
    write_index(index, search_model, [videos])
    assert [hit.video.path for hit in opened.search("a", 9)] == ["new.mp4"]


def test_queries_do_not_wait_for_a_new_state(search_model, index, monkeypatch):
    opened = Index(index, search_model)
    old, waits = opened.state(), threading.Event()

    class Slow(open_index.OpenIndex):
        def __init__(self, *arguments):
            waits.wait()
            super().__init__(*arguments)

    monkeypatch.setattr(session, "OpenIndex", Slow)
    with IndexWriter(index) as writer:
        writer.put([], ["00.mp4"])
    monkeypatch.setattr(session, "_PATIENCE", 0.1)
    assert all(opened.state() is old for _ in range(50))  # Otherwise it would wait for ever.
    assert [hit.path.name for hit in opened.search("a", 40)].count("00.mp4") == 1
    waits.set()
    opened._opening.join()
    assert opened.state().count == 39
    # What cannot be opened is reported, also if that takes long.
    waits.clear()
    with IndexWriter(index) as writer:
        (writer.listed[1].segment.directory / "videos.arrow").write_bytes(b"")
        writer.update_header(fps=2.0)
    assert opened.state().count == 39
    waits.set()
    opened._opening.join()
    with pytest.raises(SearchIndexError, match="is damaged"):
        opened.state()


def test_sentences_at_once_have_the_hits_of_each_alone(search_model, index):
    asked, alone = sentences(32), Index(index, search_model)
    expected = [alone.search(sentence, 5) for sentence in asked]
    opened, ready = Index(index, search_model), threading.Barrier(32)

    def search(sentence):
        ready.wait()
        return opened.search(sentence, 5)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(search, asked))
    for hit, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (hit.rank, hit.path, hit.windows) == (other.rank, other.path, other.windows)
        assert hit.score == pytest.approx(other.score, abs=1e-6)


def test_a_query_is_the_content_of_its_file(search_model, index, test_videos, tmp_path):
    one, other = sorted(test_videos.iterdir())[:2]
    opened, path, found = Index(index, search_model), tmp_path / "asked.mp4", []
    for video in (one, other):
        shutil.copy(video, path)
        found.append([hit.score for hit in opened.search(Query(video=path), 9)])
        assert found[-1] == [hit.score for hit in opened.search(Query(video=video), 9)]
    assert found[0] != found[1]
