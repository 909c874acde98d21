"""Long videos: windows, moments, and queries that are no sentence."""

import itertools
from unittest import mock

import numpy as np
import pytest
from support.films import shot
from support.search import random_model

from drl_jax.data.long_video import SampledVideo
from drl_jax.search.encoding import WEAK, dequantize, gallery_scale, quantize, unusual
from drl_jax.search.engine import Part
from drl_jax.search.refine import Candidate, Film, encode, refine, score_windows, tighten
from drl_jax.search.windows import Window, find_spans, window_at, windows_around, windows_of

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
    """Neither a stored one nor one around it."""
    rng = np.random.default_rng(0)
    for trial in range(100):
        lengths = rng.choice([0.1, 0.4, 1, 3, 4.1, 8, 30], 20)
        starts, most = np.concatenate([[0], np.cumsum(lengths)]), (4, 12)[trial % 2]
        video = sampled(starts[:-1], starts[-1], 4 if trial % 4 == 0 else 1)
        windows = windows_of(video, most)
        around = [windows_around(video.times, windows, n, most) for n in range(len(windows))]
        for window in itertools.chain(windows, *around):
            assert window.end - window.start <= most + 1e-9
            inside = starts[(starts > window.start) & (starts < window.end)]
            assert all(min(cut - window.start, window.end - cut) <= 0.5 for cut in inside)


@pytest.mark.parametrize("fps", [1, 4])
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


# ---------------------------------------------------------------- refinement


@pytest.fixture(scope="module")
def features(search_model):
    return film_of(search_model)


def film_of(model) -> Film:
    """A film of 40 s without cuts, two frames a second, as an index stores it."""
    frames = np.stack([shot(n // 10, 1)[n % 5] for n in range(80)])
    feat = quantize({"image_feat": model.encode_frames(frames)}, "bfloat16")["image_feat"]
    video = sampled([0], 40, fps=2)
    return Film(video.times, windows_of(video, 4), feat)


def parts_of(model, *sentences: str) -> list[Part]:
    return [Part(model.encode_text([sentence]), 1.0) for sentence in sentences]


def candidates_of(model, parts, film: Film) -> list[Candidate]:
    """All stored windows, the best first."""
    scores = score_windows(model, parts, encode(model, [(film, w) for w in film.windows]))
    order = np.argsort(-scores, kind="stable")
    return [Candidate(film, int(number), float(scores[number])) for number in order]


@pytest.mark.parametrize("interaction", ["wti", "xti"])
def test_a_refined_window_has_the_score_of_its_frames(shapes_config, interaction):
    model = random_model(shapes_config, interaction)
    film, parts = film_of(model), parts_of(model, "a red circle moves")
    candidates = candidates_of(model, parts, film)
    found = refine(model, parts, candidates)
    stored = np.asarray(dequantize({"image_feat": film.image_feat})["image_feat"])
    for candidate, (window, score) in zip(candidates, found, strict=True):
        near = windows_around(film.times, film.windows, candidate.window, 4)
        alone = model.encode_frame_windows(stored, [near.frames for near in near])
        similarity = model.similarity(parts[0].text, alone)[0]
        assert score == pytest.approx(similarity.max(), abs=1e-6)
        assert score == pytest.approx(similarity[near.index(window)], abs=1e-6)
    assert any(new[1] > old.score for new, old in zip(found, candidates, strict=True))


def test_a_fixed_number_of_windows_is_refined(search_model, features):
    parts = parts_of(search_model, "a red circle moves")
    candidates = candidates_of(search_model, parts, features)
    of_model = type(search_model).encode_frame_windows
    with mock.patch.object(type(search_model), of_model.__name__, autospec=True) as encoding:
        encoding.side_effect = of_model
        found = refine(search_model, parts, candidates, most=10)
    assert sum(len(call.args[2]) for call in encoding.call_args_list) <= 10
    assert found[10:] == [(features.windows[one.window], one.score) for one in candidates[10:]]


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
    # Neighbours that share the best part do not make a moment longer.
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


def test_the_window_at_a_time():
    assert [window_at(WINDOWS, time) for time in (0, 11, 13, 100)] == [0, 1, 1, 5]
    # Nearer to the middle of a short shot is no part of it.
    shots = [Window(0, 10, (0,)), Window(10, 11, (1,))]
    assert [window_at(shots, time) for time in (9.9, 10, 11, 12)] == [0, 1, 1, 1]
