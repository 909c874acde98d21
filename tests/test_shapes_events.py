"""`shapes_events`: pairs that neither single frames nor bags of words can tell apart."""

from collections import Counter

import numpy as np
import pytest

from data_prep.shapes.draw import EVENT_SECONDS, FPS, draw_event_clip
from data_prep.shapes.events import SIZES, captions, pairs_of_clips, split_clips
from data_prep.shapes.scenes import REVERSED


@pytest.fixture(scope="module")
def splits():
    return split_clips(*SIZES["full"], seed=0)


def events(clip):
    return clip.kind, clip.first, clip.second, clip.count


def test_no_clip_or_its_counterpart_is_in_two_splits(splits):
    clips, pairs = splits
    assert {name: len(members) for name, members in clips.items()} == dict(
        zip(("train", "val", "test"), SIZES["full"], strict=True)
    )
    found = [
        {events(c) for clip in members for c in (clip, clip.counterpart())}
        for members in clips.values()
    ]
    assert sum(map(len, found)) == len(set.union(*found))
    for split in ("val", "test"):
        assert len({events(clip) for clip in clips[split]}) == len(clips[split])
        assert len(pairs[split]) == len(clips[split]) // 2
        for one, other in pairs[split]:
            assert clips[split][one].counterpart() == clips[split][other]
    kinds = Counter(clips["test"][one].kind for one, _ in pairs["test"])
    assert kinds == {"order": 90, "binding": 30, "count": 30}


def test_a_pair_has_the_same_words_but_for_the_count(splits):
    clips, pairs = splits
    for one, other in pairs["test"]:
        clip = clips["test"][one]
        for caption, of_other in zip(
            captions(clip, 8), captions(clips["test"][other], 8), strict=True
        ):
            assert caption != of_other
            words, others = Counter(caption.split()), Counter(of_other.split())
            differ = {*(words - others), *(others - words)}
            assert (
                differ == set()
                if clip.kind != "count"
                else differ <= {*("twice", "thrice", "two", "three")}
            )


def test_captions_are_distinct_and_fit_no_other_clip():
    clip_of = {}
    for pairs in pairs_of_clips().values():
        for clip in (clip for pair in pairs for clip in pair):
            found = captions(clip, 8)
            assert len(set(found)) == 8
            for caption in found:
                assert clip_of.setdefault(caption, clip) == clip


@pytest.mark.parametrize("kind", ["order", "binding", "count"])
def test_a_pair_has_the_same_frames_in_another_order(kind):
    for seed, (clip, other) in enumerate(pairs_of_clips()[kind][::37]):
        one, two = ([frame.tobytes() for frame in draw_event_clip(c, seed)] for c in (clip, other))
        assert len(one) == EVENT_SECONDS * FPS
        # A picture a second, which is what sampling at 1 frame per second takes.
        assert one == [frame for frame in one[::FPS] for _ in range(FPS)]
        assert one != two
        assert sorted(one) == sorted(two)


def changed(frames, colour):
    """Whether the pixels of a colour, blue or red, are not those of most frames."""
    channel, rest = (2, 0) if colour == "blue" else (0, 2)
    shapes = [(f[..., channel].astype(int) - f[..., rest] > 100).tobytes() for f in frames[::FPS]]
    (usual, _), *_ = Counter(shapes).most_common(1)
    return [shape != usual for shape in shapes]


def clips_of(kind, *colours):
    """Clips in which shapes of the first and the second colour are the first and the second."""
    every = (clip for pair in pairs_of_clips()[kind] for clip in pair)
    return [clip for clip in every if (clip.first.colour, clip.second.colour) == colours]


def test_events_happen_in_the_order_and_as_often_as_the_caption_says():
    for seed, clip in enumerate(clips_of("order", "red", "blue")[::31]):
        frames = draw_event_clip(clip, seed)
        red, blue = (np.flatnonzero(changed(frames, colour)) for colour in ("red", "blue"))
        assert 1 <= len(red) <= 3
        assert 1 <= len(blue) <= 3
        assert red.max() < blue.min(), clip
    for seed, clip in enumerate(clips_of("count", "red", "blue")[::13]):
        frames = draw_event_clip(clip, seed)
        red = changed(frames, "red")
        assert not any(changed(frames, "blue"))
        assert sum(red) == 3
        assert sum(now and not before for before, now in zip([0, *red], red, strict=False)) == (
            clip.count
        )


def test_the_shape_that_the_caption_names_moves_in_its_direction():
    def centre(frame):
        return np.argwhere(frame[..., 0].astype(int) - frame[..., 2] > 100).mean(0)

    signs = {"right": (1, 1), "left": (1, -1), "down": (0, 1), "up": (0, -1)}
    found = [c for c in clips_of("binding", "blue", "red") if c.second.motion in signs]
    for seed, clip in enumerate(found[::5]):
        assert clip.first.motion == REVERSED[clip.second.motion]
        frames = draw_event_clip(clip, seed)
        axis, sign = signs[clip.second.motion]
        assert (centre(frames[-1]) - centre(frames[0]))[axis] * sign > 15, clip
