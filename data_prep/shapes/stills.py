"""Stills of the `shapes_stills` dataset: two coloured shapes, each with a size and a place.

Shapes, colours and drawing are those of `shapes`; nothing is said about motion.
"""

import dataclasses
import itertools
import random

from data_prep.shapes.captions import SHAPE_WORDS, distinct
from data_prep.shapes.scenes import COLOURS, SHAPES

# Number of stills of train, val and test.
SIZES = {"full": (20_000, 256, 512), "smoke": (96, 32, 32)}

STILL_SIZES = ("small", "medium", "big")
# Thirds of the image, from the top and from the left.
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "big": ("big", "large")}
_TEMPLATES = (
    "a {a} at the {at_a} and a {b} at the {at_b}",
    "the {a} is at the {at_a} and the {b} at the {at_b}",
    "there is a {a} at the {at_a} , and a {b} at the {at_b}",
    "at the {at_a} a {a} and at the {at_b} a {b}",
)


@dataclasses.dataclass(frozen=True, order=True)
class PlacedShape:
    """A shape in one of 3 x 3 places."""

    colour: str
    shape: str
    size: str
    row: str
    column: str

    @property
    def place(self) -> tuple[str, str]:
        return self.row, self.column


@dataclasses.dataclass(frozen=True, order=True)
class Still:
    """Two shapes that differ in colour or shape and are in different places, in sorted order."""

    first: PlacedShape
    second: PlacedShape


def all_stills() -> list[Still]:
    """All stills."""
    looks = list(itertools.product(COLOURS, SHAPES))
    places = list(itertools.product(STILL_SIZES, ROWS, COLUMNS))
    return [
        Still(one, other)
        for look_1, look_2 in itertools.combinations(sorted(looks), 2)
        for place_1, place_2 in itertools.product(places, repeat=2)
        if (one := PlacedShape(*look_1, *place_1)).place
        != (other := PlacedShape(*look_2, *place_2)).place
    ]


def split_stills(train: int, val: int, test: int, seed: int) -> dict[str, list[Still]]:
    """Draws the stills of each split; none occurs twice.

    Raises:
      ValueError: there are fewer stills.
    """
    chosen = random.Random(seed).sample(all_stills(), train + val + test)
    return {
        "train": chosen[:train],
        "val": chosen[train : train + val],
        "test": chosen[train + val :],
    }


def captions(still: Still, count: int, rng: random.Random) -> list[str]:
    """Draws `count` distinct captions of a still.

    Each caption states colour, shape, size and place of both shapes, so it fits no other still.
    """

    def draw() -> str:
        a, b = rng.sample((still.first, still.second), 2)
        return rng.choice(_TEMPLATES).format(
            a=_look(a, rng), b=_look(b, rng), at_a=" ".join(a.place), at_b=" ".join(b.place)
        )

    return distinct(draw, count)


def _look(shape: PlacedShape, rng: random.Random) -> str:
    size, noun = rng.choice(_SIZE_WORDS[shape.size]), rng.choice(SHAPE_WORDS[shape.shape])
    return f"{size} {shape.colour} {noun}"
