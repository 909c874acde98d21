"""Scenes of the `shapes` dataset: two coloured shapes, each with its own motion.

A *scene* is the pair of moving shapes; a clip is a drawing of it with random positions and sizes. A
scene and its time reversal occur in only one of train, val and test.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

# Number of clips of train, val and test.
SIZES = {"full": (4000, 256, 512), "smoke": (192, 32, 32)}

# Shapes that a small image tower distinguishes. (It confuses a circle and a square.)
SHAPES = ("circle", "cross", "triangle")
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "cross": ("cross", "plus"),
    "triangle": ("triangle",),
}
COLOURS = ("red", "green", "blue")
# Motions with a direction, each with its time reversal.
_OPPOSITES = (("right", "left"), ("up", "down"), ("grow", "shrink"))
REVERSED = {a: b for one, other in _OPPOSITES for a, b in ((one, other), (other, one))}
# Motions that are symmetric in time.
SYMMETRIC = ("still", "swing")


@dataclasses.dataclass(frozen=True, order=True)
class MovingShape:
    colour: str
    shape: str
    motion: str

    def reversed(self) -> "MovingShape":
        return dataclasses.replace(self, motion=REVERSED.get(self.motion, self.motion))


@dataclasses.dataclass(frozen=True, order=True)
class Scene:
    """Two shapes that differ in colour or shape, in sorted order."""

    first: MovingShape
    second: MovingShape

    @classmethod
    def of(cls, one: MovingShape, other: MovingShape) -> "Scene":
        return cls(*sorted((one, other)))

    def reversed(self) -> "Scene":
        """The time reversal of this scene."""
        return Scene.of(self.first.reversed(), self.second.reversed())

    def differs_from_reverse_in_one_motion(self) -> bool:
        return (self.first.motion in REVERSED) != (self.second.motion in REVERSED)


def all_scenes() -> list[Scene]:
    """All scenes: two shapes that differ in colour or shape, which captions can distinguish."""
    looks = list(itertools.product(COLOURS, SHAPES))
    motions = (*REVERSED, *SYMMETRIC)
    return [
        Scene.of(MovingShape(*look_1, motion_1), MovingShape(*look_2, motion_2))
        for look_1, look_2 in itertools.combinations(looks, 2)
        for motion_1, motion_2 in itertools.product(motions, repeat=2)
    ]


def split_scenes(
    train: int, val: int, test: int, seed: int
) -> tuple[dict[str, list[Scene]], dict[str, list[tuple[int, int]]]]:
    """Assigns scenes to splits; half of val and of test are pairs of a scene and its reverse.

    Training scenes are drawn with replacement; the numbers of the others are multiples of 4. Also
    returns, for val and test, indices of a scene and its reverse in that split.
    """
    rng = random.Random(seed)
    # A scene and its reverse form a group, which is assigned as a whole.
    groups = sorted({tuple(sorted({scene, scene.reversed()})) for scene in all_scenes()})
    rng.shuffle(groups)
    scenes: dict[str, list[Scene]] = {}
    pairs: dict[str, list[tuple[int, int]]] = {}
    for split, count in (("test", test), ("val", val)):
        paired = [g for g in groups if g[0].differs_from_reverse_in_one_motion()][: count // 4]
        chosen = set(paired)
        rest = [group for group in groups if group not in chosen]
        single, groups = rest[: count // 2], rest[count // 2 :]
        scenes[split] = [*itertools.chain(*paired), *(rng.choice(group) for group in single)]
        pairs[split] = [(2 * number, 2 * number + 1) for number in range(len(paired))]
    scenes["train"] = rng.choices([*itertools.chain(*groups)], k=train)
    return scenes, pairs


def distinct(draw: Callable[[], str], count: int, first: Sequence[str] = ()) -> list[str]:
    """Calls `draw` until there are `count` different captions with those of `first`."""
    found = dict.fromkeys(first)
    while len(found) < count:
        found[draw()] = None
    return list(found)


MOTION_WORDS = {
    "right": ("moves right", "goes to the right", "drifts right"),
    "left": ("moves left", "goes to the left", "drifts left"),
    "up": ("moves up", "rises", "goes upward"),
    "down": ("moves down", "falls", "goes downward"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "still": ("stays still", "does not move"),
    "swing": ("swings from side to side", "sways"),
}
TEMPLATES = (
    "a {a} {moves_a} and a {b} {moves_b}",
    "the {a} {moves_a} while the {b} {moves_b}",
    "a {a} that {moves_a} and a {b} that {moves_b}",
    "there is a {a} which {moves_a} , and a {b} which {moves_b}",
    "while a {a} {moves_a} , a {b} {moves_b}",
)


def captions(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Draws `count` distinct captions of a scene.

    Each caption states colour, shape and motion of both shapes, so it fits no other scene.
    """

    def draw() -> str:
        a, b = rng.sample((scene.first, scene.second), 2)
        return rng.choice(TEMPLATES).format(
            a=f"{a.colour} {rng.choice(SHAPE_WORDS[a.shape])}",
            b=f"{b.colour} {rng.choice(SHAPE_WORDS[b.shape])}",
            moves_a=rng.choice(MOTION_WORDS[a.motion]),
            moves_b=rng.choice(MOTION_WORDS[b.motion]),
        )

    return distinct(draw, count)
