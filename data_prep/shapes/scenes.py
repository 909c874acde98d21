"""What happens in a clip of `shapes`: two coloured shapes, each with its own motion.

A *scene* is the pair of moving shapes; a clip draws it once, with random positions and sizes.
Scenes are dealt to train, val and test so that none occurs in two of them, not even played
backwards.
"""

import dataclasses
import itertools
import random

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue")
# Motions with a direction, each with what it looks like played backwards.
REVERSED = {
    "right": "left",
    "left": "right",
    "up": "down",
    "down": "up",
    "grow": "shrink",
    "shrink": "grow",
}
# Motions that look the same backwards.
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
    """Two shapes of different look, in canonical (sorted) order."""

    first: MovingShape
    second: MovingShape

    @classmethod
    def of(cls, one: MovingShape, other: MovingShape) -> "Scene":
        return cls(*sorted((one, other)))

    def reversed(self) -> "Scene":
        """The scene that this one's frames show in reverse order."""
        return Scene.of(self.first.reversed(), self.second.reversed())

    def differs_from_reverse_in_one_motion(self) -> bool:
        return (self.first.motion in REVERSED) != (self.second.motion in REVERSED)


@dataclasses.dataclass(frozen=True)
class Deal:
    """Scenes of each split. `test_pairs` are positions in `test` of a scene and its reverse."""

    train: list[Scene]
    val: list[Scene]
    test: list[Scene]
    test_pairs: list[tuple[int, int]]


def all_scenes() -> list[Scene]:
    """Every scene: two shapes that differ in colour or shape, so that a caption can tell them."""
    looks = list(itertools.product(COLOURS, SHAPES))
    motions = (*REVERSED, *SYMMETRIC)
    return [
        Scene.of(MovingShape(*look_1, motion_1), MovingShape(*look_2, motion_2))
        for look_1, look_2 in itertools.combinations(looks, 2)
        for motion_1, motion_2 in itertools.product(motions, repeat=2)
    ]


def deal_scenes(train: int, val: int, test: int, seed: int) -> Deal:
    """Deals scenes to splits; half of `test` are pairs of a scene and its reverse.

    Args:
      train: number of training scenes; val, test: likewise. `test` is a multiple of 4.
      seed: fixes the deal.

    Raises:
      ValueError: more scenes are asked for than there are.
    """
    rng = random.Random(seed)
    # Scenes are dealt together with their reverse.
    groups = sorted({tuple(sorted({scene, scene.reversed()})) for scene in all_scenes()})
    rng.shuffle(groups)
    pairs = [g for g in groups if len(g) == 2 and g[0].differs_from_reverse_in_one_motion()]
    test_groups, val_groups = pairs[: test // 4], []
    chosen = set(test_groups)
    for group in groups:
        if len(test_groups) < test // 4 + test // 2 and group not in chosen:
            test_groups.append(group)
        elif len(val_groups) < val and group not in chosen:
            val_groups.append(group)
    dealt = set(test_groups) | set(val_groups)
    train_scenes = [scene for group in groups if group not in dealt for scene in group]
    if len(val_groups) < val or not train_scenes:
        raise ValueError(f"there are too few scenes for {val} in val and {test} in test")
    train_scenes = rng.choices(train_scenes, k=train)
    test_scenes: list[Scene] = []
    test_pairs = []
    for number, group in enumerate(test_groups):
        if number < test // 4:
            test_pairs.append((len(test_scenes), len(test_scenes) + 1))
            test_scenes += group
        else:
            test_scenes.append(rng.choice(group))
    return Deal(train_scenes, [rng.choice(group) for group in val_groups], test_scenes, test_pairs)


_SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_MOTION_WORDS = {
    "right": ("moves right", "goes to the right", "drifts right"),
    "left": ("moves left", "goes to the left", "drifts left"),
    "up": ("moves up", "rises", "goes upward"),
    "down": ("moves down", "falls", "goes downward"),
    "clockwise": ("circles clockwise", "goes around clockwise"),
    "counterclockwise": ("circles counterclockwise", "goes around counterclockwise"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "still": ("stays still", "does not move"),
    "swing": ("swings from side to side", "sways"),
    "bounce": ("bounces", "hops up and down"),
}
_TEMPLATES = (
    "a {a} {moves_a} and a {b} {moves_b}",
    "the {a} {moves_a} while the {b} {moves_b}",
    "a {a} that {moves_a} and a {b} that {moves_b}",
    "there is a {a} which {moves_a} , and a {b} which {moves_b}",
    "while a {a} {moves_a} , a {b} {moves_b}",
)


def captions(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """`count` different sentences that say the same: everything about both shapes.

    A caption names colour, shape and motion of both, so that it fits no other scene.
    """
    found: dict[str, None] = {}
    while len(found) < count:
        a, b = rng.sample((scene.first, scene.second), 2)
        found[
            rng.choice(_TEMPLATES).format(
                a=f"{a.colour} {rng.choice(_SHAPE_WORDS[a.shape])}",
                b=f"{b.colour} {rng.choice(_SHAPE_WORDS[b.shape])}",
                moves_a=rng.choice(_MOTION_WORDS[a.motion]),
                moves_b=rng.choice(_MOTION_WORDS[b.motion]),
            )
        ] = None
    return list(found)
