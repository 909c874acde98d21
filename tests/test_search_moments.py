"""Long videos: windows, moments, and queries that are no sentence."""

import contextlib
import datetime
import io
import os
import shutil
import sqlite3
import threading
import time

import numpy as np
import pytest
from PIL import Image
from support.videos import write_video

import drl_jax
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.long_video import SampledVideo, sample_video
from drl_jax.data.video import read_frames
from drl_jax.runtime.errors import UserError
from drl_jax.search import refine as refine_module
from drl_jax.search import session as session_module
from drl_jax.search.calibration import WEAK, gallery_scale, unusual
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.indexing import update_index
from drl_jax.search.moments import find_spans
from drl_jax.search.quantization import dequantize, quantize
from drl_jax.search.query import Query, encode_sentences, read_picture
from drl_jax.search.refine import (
    Candidate,
    Film,
    Part,
    encode,
    refine,
    score_windows,
    tighten,
)
from drl_jax.search.rows import SearchIndexError
from drl_jax.search.session import SearchSession
from drl_jax.search.windows import Window, window_at, windows_around, windows_of
from drl_jax.search.writer import IndexWriter

FPS = 5
# Seconds of the shots of the film; the third is longer than a window.
SHOTS = (4, 1, 20, 6)
FORM = FrameForm(64)


def shot(number: int, seconds: int) -> np.ndarray:
    """A square that moves slowly over a picture of its own colours."""
    rng = np.random.default_rng(number)
    ramp = np.linspace(0, 1, 64)[:, None, None]
    ramp = np.broadcast_to(ramp.swapaxes(0, 1) if number % 2 else ramp, (64, 64, 1))
    picture = (1 - ramp) * rng.integers(0, 256, 3) + ramp * rng.integers(0, 256, 3)
    frames = np.tile(picture, (seconds * FPS, 1, 1, 1)).astype(np.uint8)
    for step, frame in enumerate(frames):
        frame[20:30, step % 50 : step % 50 + 10] = rng.integers(0, 256, 3) if not step else 255
    return frames


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
    return SearchSession(shared_index, search_model)


@pytest.fixture
def videos(film, tmp_path):
    return shutil.copytree(film, tmp_path / "videos")


@pytest.fixture
def index(shared_index, videos, tmp_path):
    """A copy of the index, of the copied videos."""
    directory = shutil.copytree(shared_index, tmp_path / "index")
    with IndexWriter(directory) as store:
        store.update_header(videos=str(videos.resolve()))
    return directory


def scores(index, model):
    """Path -> score of all videos, for one query."""
    return {hit.path: hit.score for hit in SearchSession(index, model).search(["a"], 3)[0]}


def update(model, videos, index, **flags):
    return update_index(model, videos, index, storage="float32", **flags)


# ---------------------------------------------------------------- sampling and windows


def sampled(starts, duration, fps=1) -> SampledVideo:
    """A video with some frames each second, and shots."""
    times = np.arange(0, duration * fps) / fps
    shots = np.searchsorted(times, starts)
    coarse = times % 1 == 0
    return SampledVideo(times, coarse, shots, np.array(starts, float), float(duration))


@pytest.mark.parametrize(
    ("starts", "duration", "expected"),
    [
        ([0], 5, [(0, 5)]),
        ([0], 12, [(0, 12)]),
        ([0], 14, [(0, 12), (2, 14)]),
        ([0], 25, [(0, 12), (6, 18), (12, 24), (13, 25)]),
        ([0, 6], 12, [(0, 6), (6, 12)]),
        # A shot of less than half a second is joined with its neighbour.
        ([0, 6, 6.25], 14, [(0, 6.25), (6.25, 14)]),
        ([0, 6, 7], 14, [(0, 6), (6, 7), (7, 14)]),
    ],
)
def test_windows_of_shots(starts, duration, expected):
    windows = windows_of(sampled(starts, duration), max_frames=12)
    assert [(window.start, window.end) for window in windows] == expected
    for window in windows:
        times = np.array(window.frames)
        assert times.min() >= window.start
        assert times.max() < window.end
        assert len(times) >= int(window.end - np.ceil(window.start))


def test_a_window_has_evenly_spaced_frames_if_there_are_too_many():
    video = sampled([0], 4)._replace(times=np.arange(0, 4, 0.5), coarse=np.ones(8, bool))
    (window,) = windows_of(video, max_frames=4)
    assert window.frames == (0, 2, 4, 7)


def test_no_window_crosses_a_cut_by_more_than_half_a_second():
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = np.concatenate([[0], np.cumsum(rng.choice([0.1, 0.4, 1, 3, 8, 30], 20))])
        video = sampled(starts[:-1], starts[-1])
        for window in windows_of(video, 12):
            assert window.end - window.start <= 12 + 1e-9
            inside = starts[(starts > window.start) & (starts < window.end)]
            for cut in inside:
                assert min(cut - window.start, window.end - cut) <= 0.5


@pytest.mark.parametrize("fps", [1, 2, 4])
def test_every_frame_starts_a_window_around_a_stored_one(fps):
    video = sampled([0, 9], 40, fps)
    windows = windows_of(video, 4)
    around = [windows_around(video.times, windows, n, 4) for n in range(len(windows))]
    found = sorted(window for near in around for window in near)
    starts = [time for time in video.times if time + 3 < (9 if time < 9 else 40)]
    assert [window.start for window in found] == starts
    for window in found:
        assert video.times[list(window.frames)].tolist() == [window.start + n for n in range(4)]
        assert window.end == window.start + 3.25
    for stored, near in zip(windows, around, strict=True):
        assert stored.frames in [window.frames for window in near]
        assert all(abs(window.start - stored.start) <= 2 for window in near)


def test_no_window_around_a_stored_one_crosses_a_cut():
    rng = np.random.default_rng(1)
    for _ in range(50):
        starts = np.concatenate([[0], np.cumsum(rng.choice([0.4, 1, 3, 4.1, 8, 30], 12))])
        video = sampled(starts[:-1], starts[-1], 4)
        windows = windows_of(video, 4)
        for number in range(len(windows)):
            for window in windows_around(video.times, windows, number, 4):
                cuts = starts[(starts > window.start) & (starts < window.end)]
                assert all(min(c - window.start, window.end - c) <= 0.5 for c in cuts)


# ---------------------------------------------------------------- refinement


@pytest.fixture(scope="module")
def features(search_model):
    """A film of 40 s without cuts, two frames a second, as an index stores it."""
    frames = np.stack([shot(n // 10, 1)[n % 5] for n in range(80)])
    feat = quantize({"image_feat": search_model.encode_frames(frames)}, "bfloat16")["image_feat"]
    video = sampled([0], 40, fps=2)
    return Film(video.times, windows_of(video, 4), feat)


def parts_of(model, *sentences: str) -> list[Part]:
    return [Part(model.encode_text([sentence]), 1.0) for sentence in sentences]


def candidates_of(model, parts, film: Film) -> list[Candidate]:
    """All stored windows, the best first."""
    scores = score_windows(model, parts, encode(model, [(film, w) for w in film.windows]))
    order = np.argsort(-scores, kind="stable")
    return [Candidate(film, int(number), float(scores[number])) for number in order]


def test_a_refined_window_has_the_score_of_its_frames(search_model, features):
    parts = parts_of(search_model, "a red circle moves")
    candidates = candidates_of(search_model, parts, features)
    found = refine(search_model, parts, candidates)
    stored = np.asarray(dequantize({"image_feat": features.image_feat})["image_feat"])
    for candidate, (window, score) in zip(candidates, found, strict=True):
        near = windows_around(features.times, features.windows, candidate.window, 4)
        alone = search_model.encode_frame_windows(stored, [near.frames for near in near])
        similarity = search_model.similarity(parts[0].text, alone)[0]
        assert score == pytest.approx(similarity.max(), abs=1e-6)
        assert window == near[similarity.argmax()]
    assert any(new.score > old.score for new, old in zip(found, candidates, strict=True))


def test_what_a_candidate_becomes_depends_on_its_film_alone(search_model, features):
    parts = parts_of(search_model, "a red circle moves")
    candidates = candidates_of(search_model, parts, features)
    together = refine(search_model, parts, candidates)
    for number in (0, 7):
        (alone,) = refine(search_model, parts, [candidates[number]])
        assert alone.window == together[number].window
        assert alone.score == pytest.approx(together[number].score, abs=1e-6)


def test_a_fixed_number_of_windows_is_refined(search_model, features, monkeypatch):
    parts = parts_of(search_model, "a red circle moves")
    candidates = candidates_of(search_model, parts, features)
    encoded = []
    of_model = type(search_model).encode_frame_windows
    monkeypatch.setattr(
        type(search_model),
        "encode_frame_windows",
        lambda self, feat, windows: encoded.append(len(windows)) or of_model(self, feat, windows),
    )
    short = Candidate(None, 0, 0.5)
    found = refine(search_model, parts, [short, *candidates], most=10)
    assert found[0] == (None, 0.5)
    assert sum(encoded) <= 10
    unchanged = [
        (features.windows[candidate.window], candidate.score) for candidate in candidates[10:]
    ]
    assert found[11:] == unchanged
    # A correction for hubs is that of the stored window.
    biased = [candidate._replace(score=candidate.score - 0.5, bias=0.5) for candidate in candidates]
    plain = refine(search_model, parts, candidates, 10)
    for one, other in zip(refine(search_model, parts, biased, 10), plain, strict=True):
        assert one.score == pytest.approx(other.score - 0.5, abs=1e-6)


def test_scores_of_parts_are_sums(search_model, features):
    """Also of parts of different lengths: none is padded to the other's."""
    windows = encode(search_model, [(features, window) for window in features.windows])
    video = search_model.interaction.video_as_text({n: a[:3] for n, a in windows.items()})
    sentence, similar = Part(search_model.encode_text(["a"]), 1.0), Part(video, -0.5)
    one, other = (score_windows(search_model, [part], windows) for part in (sentence, similar))
    both = score_windows(search_model, [sentence, similar], windows)
    np.testing.assert_allclose(both, one + other, atol=1e-7)
    # Of the windows of a video, the most similar one counts.
    assert (other <= -0.5 * 0.99).sum() >= 3
    np.testing.assert_allclose(
        other, -0.5 * search_model.similarity(video, windows).max(axis=0), atol=1e-6
    )


@pytest.mark.parametrize("has_vectors", [True, False])
def test_few_of_many_windows_are_proposed(search_model, features, monkeypatch, has_vectors):
    monkeypatch.setattr(search_model.interaction, "HAS_VECTORS", has_vectors)
    parts = parts_of(search_model, "a red circle moves")
    windows = [Window(n, n + 3.25, (n, n + 2, n + 4, n + 6)) for n in range(40)]
    found = refine_module._promising(search_model.interaction, parts, features, windows)
    assert len(found) == 4
    if not has_vectors:
        assert [window.start for window in found] == [0, 13, 26, 39]


def test_a_moment_is_tightened_inside_its_window(search_model, features):
    parts = parts_of(search_model, "a red circle moves")
    bank = search_model.encode_text(["a dog", "two cats", "some birds in the sky"])
    for number in range(0, 18, 3):
        for window in windows_around(features.times, features.windows, number, 4):
            tight = tighten(search_model, parts, bank, features, window)
            assert window.start <= tight.start < tight.end <= window.end
            assert set(tight.frames) <= set(range(window.frames[0], window.frames[-1] + 1))
    whole = Film(features.times, [Window(0.0, 3.5, (0, 2, 4, 6))], features.image_feat)
    assert tighten(search_model, parts, bank, whole, whole.windows[0]) == whole.windows[0]


# ---------------------------------------------------------------- moments


WINDOWS = [Window(6.0 * n, 6.0 * n + 12, (n,)) for n in range(6)]


def test_windows_that_touch_and_score_alike_are_one_moment():
    found = find_spans(WINDOWS, np.array([0.1, 0.99, 0.98, 1.0, 0.2, 0.1]), most=2)
    assert found[0] == (6.0, 30.0, 1.0, 3)
    assert [span.window for span in found] == [3, 4]


def test_neighbours_that_share_the_best_part_do_not_make_a_moment_longer():
    found = find_spans(WINDOWS, np.array([0.1, 0.99, 1.0, 0.98, 0.2, 0.1]), most=2)
    assert found[0] == (12.0, 24.0, 1.0, 2)
    assert [span.window for span in found] == [2, 4]


def test_moments_do_not_depend_on_the_scale_of_scores():
    """They may all be negative."""
    rng = np.random.default_rng(0)
    windows = [Window(6.0 * n, 6.0 * n + 12, (n,)) for n in range(60)]
    scores = rng.normal(0.25, 0.01, 60)
    scores[20:23] = 0.31, 0.309, 0.308
    expected = [span[:2] for span in find_spans(windows, scores, most=3)]
    assert expected[0] == (120, 144)
    for changed in (scores - 1, 50 * scores - 40, 1e-3 * scores):
        assert [span[:2] for span in find_spans(windows, changed, most=3)] == expected


def test_a_weak_event_is_no_long_moment():
    """Cosines as CLIP gives them: neighbours are alike, and the event is little above them."""
    rng = np.random.default_rng(0)
    windows = [Window(6.0 * n, 6.0 * n + 12, (n,)) for n in range(599)]
    lengths, hits = [], 0
    for _ in range(50):
        noise = rng.normal(0, 1, 599)
        for n in range(1, 599):
            noise[n] = 0.8 * noise[n - 1] + 0.6 * noise[n]
        scores, event = 0.25 + 0.008 * noise, int(rng.integers(5, 594))
        scores[event] = max(scores[event], 0.275)
        best = find_spans(windows, scores, 1, deviation=0.025)[0]
        lengths.append(best.end - best.start)
        shared = min(best.end, windows[event].end) - max(best.start, windows[event].start)
        hits += shared / (lengths[-1] + 12 - shared) >= 0.5
    assert np.median(lengths) <= 24
    assert hits >= 30


def test_a_short_film_may_be_one_moment():
    """All windows answer the query, and none stands out of the others."""
    scores = np.array([0.30, 0.305, 0.302, 0.304, 0.301, 0.303])
    assert find_spans(WINDOWS, scores, 1, deviation=0.06)[0][:2] == (0, 42)


def test_the_scale_of_a_query_that_is_no_sentence():
    scores = np.random.default_rng(0).normal(0.3, 0.02, 64)
    scores[:6] = 0.9  # It may be among those that it is compared with.
    scale = gallery_scale(scores)
    np.testing.assert_allclose(scale, [0.3, 0.02], atol=0.01)
    assert unusual(0.9, scale) > WEAK > unusual(0.32, scale)
    assert gallery_scale(scores[:7]) is None


def test_windows_that_overlap_a_better_moment_are_left_out():
    """Each window shares two thirds of its time with a neighbour, a third with the next."""
    windows = [Window(4.0 * n, 4.0 * n + 12, (n,)) for n in range(6)]
    scores = np.array([0.1, 0.5, 1.0, 0.6, 0.2, 0.8])
    assert [span.window for span in find_spans(windows, scores, most=9)] == [2, 5, 0]


def test_a_window_across_a_gap_does_not_join():
    windows = [Window(0, 5, (0,)), Window(7, 12, (1,))]
    assert len(find_spans(windows, np.array([1.0, 1.0]), most=3)) == 2


# ---------------------------------------------------------------- index and hits


def test_a_film_is_indexed_as_windows(session, shared_index):
    (video,) = (video for video in session.videos if video.path == "film.mp4")
    spans = [(round(window.start), round(window.end)) for window in video.windows]
    # The model has four frames.
    within = [(start, start + 4) for start in range(5, 22, 2)]
    assert spans == [(0, 4), (4, 5), *within, (25, 29), (27, 31)]
    assert video.duration == pytest.approx(31)
    assert not (shared_index / "spool").exists()
    with Image.open(io.BytesIO(session.snapshot().thumbnails(video, 4))) as strip:
        assert strip.size == (4 * 64, 64)  # max_frames is 4.


def test_a_shot_finds_its_moment_in_the_film(session, film):
    hits = {hit.path.name: hit for hit in session.search_by_video(film / "shot3.mp4", top=3)}
    moment = hits["film.mp4"].moments[0]
    assert moment.window in (11, 12)
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
    # Windows that were encoded once each, from frames that were encoded once.
    frames = []
    sample_video(film.path, search_model.frame_form, frames.append)
    window = film.video.windows[film.moments[0].window]
    alone = search_model.encode_videos([np.stack([frames[n] for n in window.frames])])
    text = search_model.encode_text(["a red circle"])
    assert search_model.similarity(text, alone)[0, 0] == pytest.approx(film.score, abs=1e-5)


def test_calibration_is_that_of_the_bank(session, search_model):
    (hits,) = session.search(["a red circle"], top=1)
    hit, moment = hits[0], hits[0].moments[0]
    bank = session.snapshot().header["bank"]
    assert len(bank) == 64
    video = search_model.encode_videos([read_frames(hit.path, 4, FORM)])
    if len(hit.video.windows) == 1:
        similarity = search_model.similarity(search_model.encode_text(bank), video)[:, 0]
        expected = unusual(hit.score, np.array([similarity.mean(), similarity.std()]))
        assert moment.unusual == pytest.approx(expected, abs=1e-2)
    assert hit.is_weak == (moment.unusual < 2.5)
    assert session.search_by_video(hit.path, top=1)[0].moments[0].unusual is None


# ---------------------------------------------------------------- queries


def picture_of(session, number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(shot(number, 1)[0]).save(file, "PNG")
    return file.getvalue()


def test_a_picture_finds_its_shot(session):
    hits = session.answer(Query(picture=picture_of(session, 0)), top=3)
    assert {hits[0].path.name, hits[1].path.name} == {"shot0.mp4", "film.mp4"}
    moment = next(hit for hit in hits if hit.path.name == "film.mp4").moments[0]
    assert set(moment.explanation.words) == {"[picture]"}


def test_a_picture_is_compared_as_a_shot_in_which_nothing_moves(search_model, tmp_path):
    picture = shot(0, 1)[:1]
    write_video(tmp_path / "still.mp4", np.repeat(picture, 4 * FPS, axis=0), fps=FPS)
    write_video(tmp_path / "frame.mp4", shot(5, 1)[:1], fps=FPS)
    update_index(search_model, tmp_path, tmp_path / "index", storage="float32")
    session = SearchSession(tmp_path / "index", search_model)
    best, _ = session.answer(Query(picture=picture_of(session, 0)), top=2)
    assert best.path.name == "still.mp4"
    assert best.score == pytest.approx(1, abs=0.03)


def test_more_like_a_moment(session):
    film = session.snapshot().video_at("film.mp4")
    hits = session.answer(Query(like=(film, 28.0)), top=2)
    assert {hit.path.name for hit in hits} == {"film.mp4", "shot3.mp4"}
    windows = {hit.path.name: hit.moments[0].window for hit in hits}
    assert windows == {"film.mp4": 11, "shot3.mp4": 0}


def test_scores_of_combined_queries_are_sums(session, film):
    def found(query):
        return {hit.path.name: hit.scores for hit in session.answer(query, top=3)}

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
    (hit,) = session.answer(Query(sentence=sentence, video=film / "film.mp4"), top=1)
    assert hit.moments[0].explanation.words[1:-1] == sentence.split()


def test_pictures_that_cannot_be_read_are_one_line(search_model, session):
    damaged = picture_of(session, 0)[:200]
    for content, message in ((b"no picture", "not an image file"), (damaged, "is damaged")):
        with pytest.raises(UserError, match=message):
            read_picture(search_model, content)
    large = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(large, "PNG")
    with pytest.raises(UserError, match="20000 x 6000 pixels; at most 100,000,000"):
        read_picture(search_model, large.getvalue())
    with pytest.raises(UserError, match="the query is empty"):
        session.answer(Query(without="a dog"), top=1)
    with pytest.raises(UserError, match="has 100,000 characters; at most 10,000"):
        session.search(["a" * 100_000], top=1)


def test_a_video_is_found_by_each_of_its_windows(session, film):
    """A query of many windows: the best one counts."""
    shot = film / "film.mp4"
    hits = session.search_by_video(shot, top=3)
    found = {hit.path.name: hit.score for hit in hits}
    assert found == pytest.approx({"film.mp4": 1, "shot0.mp4": 1, "shot3.mp4": 1}, abs=0.03)
    film = next(hit for hit in hits if hit.path.name == "film.mp4")
    np.testing.assert_allclose(film.scores, 1, atol=1e-4)
    # Each moment is explained by the window of the query that it is like.
    for moment in film.moments:
        assert moment.explanation.attribution.similarity.diagonal() == pytest.approx(1, abs=1e-4)
    more = session.snapshot().answer(Query(video=shot), top=1, moments=9)[0].moments
    assert len(more) > len(film.moments) == 3


def test_filters_by_day(session):
    today = datetime.date.today()
    day = datetime.timedelta(days=1)
    for filters, count in (
        (Filters(since=today - day), 3),
        (Filters(until=today - day), 0),
        (Filters(since=today - day, until=today + day), 3),
    ):
        assert len(session.snapshot().filtered(filters)) == count
    assert parse_day("since", "2026-01-31") == datetime.date(2026, 1, 31)
    with pytest.raises(UserError, match="since takes a day as 2026-01-31, not 'monday'"):
        parse_day("since", "monday")


def test_the_window_at_a_time():
    assert [window_at(WINDOWS, time) for time in (0, 11, 13, 100)] == [0, 1, 1, 5]
    # Nearer to the middle of a short shot is no part of it.
    shots = [Window(0, 10, (0,)), Window(10, 11, (1,))]
    assert [window_at(shots, time) for time in (9.9, 10, 11, 12)] == [0, 1, 1, 1]


# ---------------------------------------------------------------- updates and accidents


def test_a_renamed_file_keeps_its_features(search_model, videos, index, monkeypatch):
    before = SearchSession(index, search_model).snapshot()
    expected = before.stored([before.video_at("film.mp4")])
    (videos / "sub").mkdir()
    (videos / "film.mp4").rename(videos / "sub" / "other name.mp4")
    monkeypatch.setattr(type(search_model), "encode_windows", None)  # Nothing is encoded.
    report = update(search_model, videos, index)
    assert (report.moved, report.added, report.removed, report.unchanged) == (1, 0, 0, 2)
    after = SearchSession(index, search_model).snapshot()
    video = after.video_at("sub/other name.mp4")
    for name, array in after.stored([video]).items():
        np.testing.assert_array_equal(array, expected[name])
    assert after.thumbnails(video, 12)[:2] == b"\xff\xd8"


def test_a_renamed_file_does_not_keep_damaged_features(search_model, videos, index):
    (path,) = index.glob("frame_unit*.bin")
    path.write_bytes(bytes(path.stat().st_size))
    (videos / "film.mp4").rename(videos / "other name.mp4")
    report = update(search_model, videos, index)
    assert (report.moved, report.added, report.changed, report.removed) == (0, 1, 2, 1)
    assert len(SearchSession(index, search_model).videos) == 3


def test_a_renamed_file_may_replace_another(search_model, videos, index, monkeypatch):
    monkeypatch.setattr(type(search_model), "encode_windows", None)  # Nothing is encoded.
    (videos / "film.mp4").rename(videos / "shot0.mp4")
    report = update(search_model, videos, index)
    assert (report.moved, report.changed, report.removed, report.unchanged) == (1, 0, 0, 1)
    after = SearchSession(index, search_model).snapshot()
    assert sorted(video.path for video in after.videos) == ["shot0.mp4", "shot3.mp4"]
    assert len(after.video_at("shot0.mp4").windows) > 1
    assert update(search_model, videos, index).unchanged == 2


def test_names_that_are_no_files_are_reported(search_model, videos, index):
    os.mkfifo(videos / "pipe.mp4")
    (videos / "link.mp4").symlink_to("nowhere.mp4")
    report = update(search_model, videos, index)
    assert (report.unchanged, report.skipped) == (3, ["link.mp4", "pipe.mp4"])


def test_a_state_that_takes_long_to_open_stalls_no_query(search_model, videos, index, monkeypatch):
    session = SearchSession(index, search_model)
    opened = session_module.IndexSnapshot
    may_open = threading.Event()

    def slow(*arguments):
        assert may_open.wait(60)
        return opened(*arguments)

    write_video(videos / "new.mp4", shot(8, 4), fps=FPS)
    update(search_model, videos, index)
    monkeypatch.setattr(session_module, "IndexSnapshot", slow)
    session._seconds = 1.0  # As if the last one had taken long.
    assert len(session.search(["a"], top=9)[0]) == len(session.videos) == 3
    may_open.set()
    deadline = time.monotonic() + 60
    while len(session.videos) == 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(session.search(["a"], top=9)[0]) == 4


def test_an_index_opens_from_another_directory(search_run, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(search_run.parent)
    update(drl_jax.load(search_run.name), videos, tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    assert len(SearchSession(tmp_path / "index").videos) == 3


def test_a_library_that_was_moved_is_not_decoded_again(search_model, videos, index, tmp_path):
    videos.rename(tmp_path / "moved")
    report = update(search_model, tmp_path / "moved", index)
    assert (report.unchanged, report.added) == (3, 0)
    (hits,) = SearchSession(index, search_model).search(["a"], top=1)
    assert hits[0].path.parent == tmp_path / "moved"


def test_most_files_gone_is_refused(search_model, videos, index):
    for name in ("film.mp4", "shot0.mp4"):
        (videos / name).unlink()
    with pytest.raises(
        UserError, match=r"2 of the 3 videos .* is it the right folder, and mounted"
    ):
        update(search_model, videos, index)
    assert len(SearchSession(index, search_model).videos) == 3
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
    expected = {
        hit.path: hit.score for hit in SearchSession(index, search_model).search(["a"], 3)[0]
    }
    (path,) = index.glob("frame_unit*.bin")
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        used = 7 * len(content) // 256
        path.write_bytes(
            bytes(used) + content[used:] if damage == "zeroed" else content[: used // 3]
        )
    with pytest.raises(SearchIndexError, match=r"is damaged .*; index the videos again, and only"):
        SearchSession(index, search_model)
    report = update(search_model, videos, index)
    assert report.changed + report.unchanged == 3
    assert report.changed >= 1
    assert scores(index, search_model) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("table", ["video_slots", "strips"])
def test_an_update_refuses_a_database_that_queries_refuse(search_model, videos, index, table):
    """Also damage of pages that an update without changes does not read."""
    with contextlib.closing(sqlite3.connect(index / "index.sqlite")) as database:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (page,) = database.execute(query, (table,)).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    with (index / "index.sqlite").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))
    with pytest.raises(SearchIndexError, match=r"is damaged .*; delete it and index"):
        update(search_model, videos, index)


def test_a_file_that_is_cut_while_a_session_is_open_is_one_line(search_model, index):
    session = SearchSession(index, search_model)
    session.search(["a"], top=1)
    (path,) = index.glob("frame_unit*.bin")
    snapshot = session.snapshot()
    (query,) = encode_sentences(search_model, ["a"])
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(SearchIndexError, match="is damaged"):
        session.search(["a"], top=1)
    with pytest.raises(SearchIndexError, match="is damaged"):
        snapshot.hits(query, snapshot.videos)


def test_a_full_disk_while_a_film_is_decoded_is_no_property_of_the_film(
    search_model, videos, index, tmp_path
):
    """The spool is a folder that cannot be written."""
    write_video(videos / "new.mp4", np.concatenate([shot(8, 8), shot(9, 8)]), fps=FPS)
    (index / "spool").write_text("not a folder")
    with pytest.raises(SearchIndexError, match="cannot write to the index"):
        update(search_model, videos, index)
    (index / "spool").unlink()
    assert update(search_model, videos, index).added == 1
