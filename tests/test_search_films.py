"""Long videos in an index: windows, moments, queries that are no sentence, updates, accidents."""

import datetime
import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.films import FORM, FPS, SHOTS, shot
from support.search import copy_index
from support.videos import write_video

import drl_jax
from drl_jax.data.long_video import sample_video
from drl_jax.data.video import read_frames
from drl_jax.data.video_file import open_video
from drl_jax.runtime.errors import UserError
from drl_jax.search.encoding import dequantize, unusual
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.open_index import stored_windows
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.segments import SearchIndexError
from drl_jax.search.session import Index
from drl_jax.search.update import update_index


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of four shots, in a folder with a file for each shot."""
    folder = tmp_path_factory.mktemp("film") / "videos"
    folder.mkdir()
    shots = [shot(number, seconds) for number, seconds in enumerate(SHOTS)]
    write_video(folder / "film.mp4", np.concatenate(shots), fps=FPS)
    for number in (0, 3):
        write_video(folder / f"shot{number}.mp4", shots[number], fps=FPS)
    return folder


@pytest.fixture(scope="module")
def shared_index(search_model, film):
    directory = film.parent / "index"
    report = update_index(search_model, film, directory, storage="float32")
    assert (report.added, report.bad) == (3, {})
    return directory


@pytest.fixture(scope="module")
def session(search_model, shared_index):
    return Index(shared_index, search_model)


@pytest.fixture
def videos(film, tmp_path):
    return shutil.copytree(film, tmp_path / "videos")


@pytest.fixture
def index(shared_index, videos, tmp_path):
    """A copy of the index, of the copied videos."""
    return copy_index(shared_index, videos, tmp_path / "index")


def scores(index, model):
    """Path -> score of all videos, for one query."""
    return {hit.path: hit.score for hit in Index(index, model).search(["a"], 3)[0]}


def update(model, videos, index, **flags):
    return update_index(model, videos, index, storage="float32", **flags)


# ---------------------------------------------------------------- index and hits


def test_a_film_is_indexed_as_windows(session, shared_index):
    (video,) = (video for video in session.videos if video.path == "film.mp4")
    spans = [(round(window.start), round(window.end)) for window in video.windows]
    # The model has four frames.
    within = [(start, start + 4) for start in range(5, 22, 2)]
    assert spans == [(0, 4), (4, 5), *within, (25, 29), (27, 31)]
    assert video.duration == pytest.approx(31)
    assert not (shared_index / "spool").exists()
    with Image.open(io.BytesIO(session.state().frames_of(video, video.windows[4].frames))) as strip:
        assert strip.size == (4 * 64, 64)  # max_frames is 4.


def test_a_shot_finds_its_moment_in_the_film(session, film):
    hits = {hit.path.name: hit for hit in session.search(Query(video=film / "shot3.mp4"), top=3)}
    moment = hits["film.mp4"].moments[0]
    assert moment.number in (11, 12)
    assert 25 <= round(moment.peak) <= 31
    assert hits["film.mp4"].score == pytest.approx(1, abs=0.02)
    assert len(hits["film.mp4"].scores) == 13


def test_a_hit_is_a_file_with_the_score_of_its_best_window(session, search_model):
    (hits,) = session.search(["a red circle"], top=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert len({hit.path for hit in hits}) == 3
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    film = next(hit for hit in hits if hit.path.name == "film.mp4")
    assert film.score == pytest.approx(film.scores.max(), abs=1e-6)
    for moment in film.moments:
        assert moment.explanation.times.min() >= moment.start
        of_frames = moment.explanation.attribution.frame_contribution
        assert of_frames.sum() == pytest.approx(moment.score, abs=1e-4)
    # Windows that were encoded once each, from frames that were encoded once.
    frames = []
    with open_video(film.path) as video:
        sample_video(video, search_model.frame_form, frames.append)
    window = film.moments[0].window
    alone = search_model.encode_videos([np.stack([frames[n] for n in window.frames])])
    text = search_model.encode_text(["a red circle"])
    assert search_model.similarity(text, alone)[0, 0] == pytest.approx(film.score, abs=2e-3)
    # Exactly, from the features that are stored.
    (stored,) = dequantize({"feat": film.video.record.arrays["feature.image_feat"]}).values()
    refined = search_model.encode_frame_windows(np.asarray(stored), [window.frames])
    assert search_model.similarity(text, refined)[0, 0] == pytest.approx(film.score, abs=1e-6)


def test_calibration_is_that_of_the_bank(session, search_model):
    (hits,) = session.search(["a red circle"], top=1)
    hit, moment = hits[0], hits[0].moments[0]
    bank = session.state().header["bank"]
    assert len(bank) == 64
    video = search_model.encode_videos([read_frames(hit.path, 4, FORM)])
    if len(hit.video.windows) == 1:
        similarity = search_model.similarity(search_model.encode_text(bank), video)[:, 0]
        expected = unusual(hit.score, np.array([similarity.mean(), similarity.std()]))
        assert moment.unusual == pytest.approx(expected, abs=1e-2)
    assert hit.is_weak == (moment.unusual < 2.5)
    # The bank has sentences: to a video, other windows are compared.
    (alike,) = session.search(Query(video=hit.path), top=1)
    assert alike.moments[0].unusual < 2.5


# ---------------------------------------------------------------- queries


def picture_of(session, number: int) -> bytes:
    """The first frame of a shot, as `open_picture` gives it."""
    return shot(number, 1)[0].tobytes()


def test_a_picture_finds_its_shot(session):
    hits = session.search(Query(picture=picture_of(session, 0)), top=3)
    assert {hits[0].path.name, hits[1].path.name} == {"shot0.mp4", "film.mp4"}
    moment = next(hit for hit in hits if hit.path.name == "film.mp4").moments[0]
    assert set(moment.explanation.tokens) == {"[picture]"}


def test_a_picture_is_compared_as_a_shot_in_which_nothing_moves(search_model, tmp_path):
    picture = shot(0, 1)[:1]
    write_video(tmp_path / "still.mp4", np.repeat(picture, 4 * FPS, axis=0), fps=FPS)
    write_video(tmp_path / "frame.mp4", shot(5, 1)[:1], fps=FPS)
    update_index(search_model, tmp_path, tmp_path / "index", storage="float32")
    session = Index(tmp_path / "index", search_model)
    best, _ = session.search(Query(picture=picture_of(session, 0)), top=2)
    assert best.path.name == "still.mp4"
    assert best.score == pytest.approx(1, abs=0.03)


def test_more_like_a_moment(session):
    film = session.state().video_at("film.mp4")
    hits = session.search(Query(like=(film, 28.0)), top=2)
    assert {hit.path.name for hit in hits} == {"film.mp4", "shot3.mp4"}
    windows = {hit.path.name: hit.moments[0].number for hit in hits}
    assert windows == {"film.mp4": 11, "shot3.mp4": 0}


def test_scores_of_combined_queries_are_sums(session, film):
    """Of the windows that are stored: each query refines others."""
    session = Index(session.directory, session.model, SearchOptions(refine=0))

    def found(query):
        return {hit.path.name: hit.scores for hit in session.search(query, top=3)}

    sentence, picture = "a red circle moves", picture_of(session, 0)
    one, other = found(Query(sentence=sentence)), found(Query(picture=picture))
    without = found(Query(sentence="two words"))
    both = found(Query(sentence=sentence, picture=picture, without="two words"))
    for name in both:
        expected = one[name] + other[name] - 0.5 * without[name]
        np.testing.assert_allclose(both[name], expected, atol=1e-5)
    # A short video is one window, also beside a sentence.
    shot = film / "shot0.mp4"
    other, both = found(Query(video=shot)), found(Query(sentence=sentence, video=shot))
    for name in both:
        np.testing.assert_allclose(both[name], one[name] + other[name], atol=1e-5)
    # Of a long one, frames that are spread over it count.
    (hit,) = session.search(Query(sentence=sentence, video=film / "film.mp4"), top=1)
    assert hit.moments[0].explanation.tokens[1:-1] == sentence.split()


def test_queries_that_ask_for_nothing_or_too_much_are_one_line(session):
    with pytest.raises(UserError, match="the query is blank"):
        session.search(Query(without="a dog"), top=1)
    with pytest.raises(UserError, match="has 100,000 characters; at most 10,000"):
        session.search(["a" * 100_000], top=1)


def test_a_video_is_found_by_each_of_its_windows(session, film):
    """A query of many windows: the best one counts."""
    shot = film / "film.mp4"
    hits = session.search(Query(video=shot), top=3)
    found = {hit.path.name: hit.score for hit in hits}
    assert found == pytest.approx({"film.mp4": 1, "shot0.mp4": 1, "shot3.mp4": 1}, abs=0.03)
    film = next(hit for hit in hits if hit.path.name == "film.mp4")
    np.testing.assert_allclose(film.scores, 1, atol=1e-4)
    # Each moment is explained by the window of the query that it is like.
    for moment in film.moments:
        assert moment.explanation.attribution.similarity.diagonal() == pytest.approx(1, abs=1e-4)
    more = session.search(Query(video=shot), top=1, moments=9)[0].moments
    assert len(more) > len(film.moments) == 3


def test_filters_by_day(session):
    today = datetime.date.today()
    day = datetime.timedelta(days=1)
    for filters, count in (
        (Filters(since=today - day), 3),
        (Filters(until=today - day), 0),
        (Filters(since=today - day, until=today + day), 3),
    ):
        assert len(session.state().filtered(filters)) == count
    assert parse_day("since", "2026-01-31") == datetime.date(2026, 1, 31)
    with pytest.raises(UserError, match="since takes a day as 2026-01-31, not 'monday'"):
        parse_day("since", "monday")


# ---------------------------------------------------------------- updates and accidents


def test_a_renamed_file_keeps_its_features(search_model, videos, index, monkeypatch):
    before = Index(index, search_model).state()
    expected = stored_windows(before.video_at("film.mp4"))
    (videos / "sub").mkdir()
    (videos / "film.mp4").rename(videos / "sub" / "other name.mp4")
    monkeypatch.setattr(type(search_model), "encode_frames", None)  # Nothing is encoded.
    report = update(search_model, videos, index)
    assert (report.moved, report.added, report.removed, report.unchanged) == (1, 0, 0, 2)
    after = Index(index, search_model).state()
    video = after.video_at("sub/other name.mp4")
    for name, array in stored_windows(video).items():
        np.testing.assert_array_equal(array, expected[name])
    assert after.frames_of(video, (2, 3))[:2] == b"\xff\xd8"


def test_a_renamed_file_does_not_keep_damaged_features(search_model, videos, index):
    (path,) = index.glob("segments/*/window.frame_unit.bin")
    path.write_bytes(bytes(path.stat().st_size))
    (videos / "film.mp4").rename(videos / "other name.mp4")
    report = update(search_model, videos, index)
    assert (report.moved, report.added, report.changed, report.removed) == (0, 1, 2, 1)
    assert len(Index(index, search_model).videos) == 3


def test_a_renamed_file_may_replace_another(search_model, videos, index, monkeypatch):
    monkeypatch.setattr(type(search_model), "encode_frames", None)  # Nothing is encoded.
    (videos / "film.mp4").rename(videos / "shot0.mp4")
    report = update(search_model, videos, index)
    assert (report.moved, report.changed, report.removed, report.unchanged) == (1, 0, 0, 1)
    after = Index(index, search_model).state()
    assert sorted(video.path for video in after.videos) == ["shot0.mp4", "shot3.mp4"]
    assert len(after.video_at("shot0.mp4").windows) > 1
    assert update(search_model, videos, index).unchanged == 2


def test_names_that_are_no_files_are_reported(search_model, videos, index):
    os.mkfifo(videos / "pipe.mp4")
    (videos / "link.mp4").symlink_to("nowhere.mp4")
    report = update(search_model, videos, index)
    assert (report.unchanged, sorted(report.bad)) == (3, ["link.mp4", "pipe.mp4"])


def test_an_index_opens_from_another_directory(search_run, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(search_run.parent)
    update(drl_jax.load(search_run.name), videos, tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    assert len(Index(tmp_path / "index").videos) == 3


def test_a_library_that_was_moved_is_not_decoded_again(search_model, videos, index, tmp_path):
    videos.rename(tmp_path / "moved")
    report = update(search_model, tmp_path / "moved", index)
    assert (report.unchanged, report.added) == (3, 0)
    (hits,) = Index(index, search_model).search(["a"], top=1)
    assert hits[0].path.parent == tmp_path / "moved"


def test_most_files_gone_is_refused(search_model, videos, index):
    for name in ("film.mp4", "shot0.mp4"):
        (videos / name).unlink()
    with pytest.raises(
        UserError, match=r"2 of the 3 videos .* is it the right folder, and mounted"
    ):
        update(search_model, videos, index)
    assert len(Index(index, search_model).videos) == 3
    assert update(search_model, videos, index, prune=True).removed == 2


def test_a_video_that_took_too_long_is_tried_again_with_more_time(search_model, videos, index):
    write_video(videos / "late.mp4", np.concatenate([shot(7, 20)] * 30), fps=FPS)
    first = update(search_model, videos, index, timeout=1e-4)
    assert "took longer than" in first.bad["late.mp4"]
    assert update(search_model, videos, index, timeout=1e-4).unchanged == 4
    second = update(search_model, videos, index)
    assert (second.changed, second.bad) == (1, {})


@pytest.mark.parametrize("damage", ["zeroed", "cut", "missing"])
def test_damaged_features_are_refused_and_made_again(search_model, videos, index, damage):
    expected = {hit.path: hit.score for hit in Index(index, search_model).search(["a"], 3)[0]}
    (path,) = index.glob("segments/*/window.frame_unit.bin")
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        used = 7 * len(content) // 256
        path.write_bytes(
            bytes(used) + content[used:] if damage == "zeroed" else content[: used // 3]
        )
    with pytest.raises(SearchIndexError, match=r"is damaged .*; index the videos again, and only"):
        Index(index, search_model)
    report = update(search_model, videos, index)
    assert report.changed + report.unchanged + report.added == 3
    assert report.changed + report.added >= 1
    assert scores(index, search_model) == pytest.approx(expected, abs=1e-6)


def test_a_full_disk_while_a_film_is_decoded_is_no_property_of_the_film(
    search_model, videos, index, tmp_path, monkeypatch
):
    """The frames of a film wait in a file, here of a folder that is not there."""
    write_video(videos / "new.mp4", np.concatenate([shot(8, 8), shot(9, 8)]), fps=FPS)
    with monkeypatch.context() as patch:
        patch.setattr(IndexWriter, "spool_file", lambda writer, number: tmp_path / "none" / "0")
        report = update(search_model, videos, index)
    assert (report.added, report.bad) == (0, {})
    reason = f"{tmp_path / 'none' / '0'} cannot be written: No such file or directory (ENOENT)"
    assert report.unavailable == {"new.mp4": reason}
    assert update(search_model, videos, index).added == 1
