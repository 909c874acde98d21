"""Clips of the `shapes_events` dataset: what happens, how often and in which order.

A clip has two shapes of different colours, and a question that single frames do not answer:

- *order*: one shape makes a gesture, then the other one does. A gesture ends where it began.
- *binding*: both move at the same time, in opposite directions.
- *count*: one makes a gesture two or three times, and the other one rests.

The *counterpart* of a clip has the other answer. Its caption has the same words but for the count,
and its video has the same frames in another order.
"""

import dataclasses
import itertools
import random

from data_prep.shapes import scenes
from data_prep.shapes.scenes import REVERSED, MovingShape, distinct

# Number of clips of train, val and test. There are few scenes, so that a training batch often has
# both of a pair; otherwise nothing makes a model look at time.
SIZES = {"full": (4000, 150, 300), "smoke": (192, 50, 50)}
# Pairs of each kind among 5. Counts are few: interactions that compare no words learn them best.
_SHARES = {"order": 3, "binding": 1, "count": 1}

_GESTURE_WORDS = {
    "hop": ("hops", "jumps"),
    "swell": ("swells", "puffs up"),
    "blink": ("blinks", "vanishes"),
}
_WORDS = {**scenes.MOTION_WORDS, **_GESTURE_WORDS}
_COUNT_WORDS = {2: ("twice", "two times"), 3: ("thrice", "three times")}
_TEMPLATES = {
    "order": (
        "a {a} {moves_a} , then a {b} {moves_b}",
        "first a {a} {moves_a} and then a {b} {moves_b}",
        "a {a} {moves_a} before a {b} {moves_b}",
        "a {a} {moves_a} , followed by a {b} that {moves_b}",
    ),
    "binding": scenes.TEMPLATES,
    "count": (
        "a {a} {moves_a} {times} and a {b} rests",
        "a {b} rests while a {a} {moves_a} {times}",
        "beside a {b} , a {a} {moves_a} {times}",
        "there is a {b} , and a {a} that {moves_a} {times}",
    ),
}


@dataclasses.dataclass(frozen=True, order=True)
class EventClip:
    """Two shapes: of order, the first one acts first; of count, it acts; binding has them sorted.

    `wording` is the seed of the captions. A clip and its counterpart have the same.
    """

    kind: str
    first: MovingShape
    second: MovingShape
    count: int = 1
    wording: int = 0

    @property
    def shapes(self) -> tuple[MovingShape, MovingShape]:
        return self.first, self.second

    def counterpart(self) -> "EventClip":
        """The clip with the other answer."""
        if self.kind == "count":
            return dataclasses.replace(self, count=5 - self.count)
        if self.kind == "order":
            first, second = self.second, self.first
        else:
            first, second = self.first.reversed(), self.second.reversed()
        return dataclasses.replace(self, first=first, second=second)


def pairs_of_clips() -> dict[str, list[tuple[EventClip, EventClip]]]:
    """All clips of each kind with their counterparts."""
    clips = []
    for one, other in itertools.permutations(itertools.product(scenes.COLOURS, scenes.SHAPES), 2):
        if one[0] == other[0]:
            continue
        for gesture in _GESTURE_WORDS:
            first = MovingShape(*one, gesture)
            clips.append(EventClip("count", first, MovingShape(*other, "still"), 2))
            clips += [EventClip("order", first, MovingShape(*other, g)) for g in _GESTURE_WORDS]
        for motion, opposite in REVERSED.items() if one < other else ():
            shapes = MovingShape(*one, motion), MovingShape(*other, opposite)
            clips.append(EventClip("binding", *shapes))
    pairs = sorted({tuple(sorted((clip, clip.counterpart()))) for clip in clips})
    return {kind: [pair for pair in pairs if pair[0].kind == kind] for kind in _TEMPLATES}


def split_clips(
    train: int, val: int, test: int, seed: int
) -> tuple[dict[str, list[EventClip]], dict[str, list[tuple[int, int]]]]:
    """Assigns clips to splits; a clip and its counterpart are in one split.

    All clips of val and test are in pairs, whose indices are returned, too. The others are drawn
    with replacement.
    """
    rng, shares = random.Random(seed), sum(_SHARES.values())
    clips: dict[str, list[EventClip]] = {"train": [], "val": [], "test": []}
    for kind, pairs in pairs_of_clips().items():
        rng.shuffle(pairs)
        for split, size in (("val", val), ("test", test)):
            number = size // 2 * _SHARES[kind] // shares
            clips[split] += itertools.chain(*pairs[:number])
            pairs = pairs[number:]
        clips["train"] += rng.choices(
            [*itertools.chain(*pairs)], k=-(-train * _SHARES[kind] // shares)
        )
    del clips["train"][train:]
    for split, pair_size in (("train", 1), ("val", 2), ("test", 2)):
        clips[split] = [
            dataclasses.replace(clip, wording=number // pair_size)
            for number, clip in enumerate(clips[split])
        ]
    evaluated = {split: range(0, len(clips[split]), 2) for split in ("val", "test")}
    return clips, {split: [(row, row + 1) for row in rows] for split, rows in evaluated.items()}


def captions(clip: EventClip, count: int) -> list[str]:
    """Draws `count` distinct captions of a clip, each of which fits no other."""
    rng = random.Random(clip.wording)
    shapes = sorted(clip.shapes, key=lambda shape: shape.colour)
    motions = sorted({shape.motion for shape in shapes} & _WORDS.keys())

    def draw() -> str:
        # The counterpart has the same colours and motions, so it draws the same words.
        nouns = {s.colour: f"{s.colour} {rng.choice(scenes.SHAPE_WORDS[s.shape])}" for s in shapes}
        verbs = {motion: rng.choice(_WORDS[motion]) for motion in motions}
        a, b = rng.sample(clip.shapes, 2) if clip.kind == "binding" else clip.shapes
        times = rng.randrange(2)
        return rng.choice(_TEMPLATES[clip.kind]).format(
            a=nouns[a.colour],
            b=nouns[b.colour],
            moves_a=verbs[a.motion],
            moves_b=verbs[b.motion],
            times=_COUNT_WORDS[clip.count][times] if clip.kind == "count" else "",
        )

    return distinct(draw, count)
