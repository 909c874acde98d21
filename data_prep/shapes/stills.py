"""Stills of the `shapes_stills` dataset: two coloured shapes, each with a size and a place.

Shapes and drawing are those of `shapes`, with two colours more; nothing is said about motion.
"""

import dataclasses
import itertools
import random

from data_prep.shapes import scenes
from data_prep.shapes.scenes import SHAPE_WORDS, SHAPES, distinct

# Number of stills of train, val and test.
SIZES = {"full": (20_000, 256, 512), "smoke": (96, 32, 32)}

# A pretrained CLIP has seen more than the clips show.
COLOURS = (*scenes.COLOURS, "yellow", "white")
STILL_SIZES = ("small", "medium", "big")
# Thirds of the image, from the top and from the left.
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "big": ("big", "large")}
_TEMPLATES_WITH_PLACES = (
    "a {a} at the {at_a} and a {b} at the {at_b}",
    "the {a} is at the {at_a} and the {b} at the {at_b}",
    "there is a {a} at the {at_a} , and a {b} at the {at_b}",
    "at the {at_a} a {a} and at the {at_b} a {b}",
)
_TEMPLATES = (
    "a {a} and a {b}",
    "there is a {a} , and a {b}",
    "the {a} beside the {b}",
    "two shapes , a {a} and a {b}",
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
    """Draws the stills of each split; none occurs twice."""
    chosen = random.Random(seed).sample(all_stills(), train + val + test)
    return {
        "train": chosen[:train],
        "val": chosen[train : train + val],
        "test": chosen[train + val :],
    }


def captions(still: Still, count: int, rng: random.Random) -> list[str]:
    """Draws `count` distinct captions of a still.

    The first states colour, shape, size and place of both shapes, so it fits no other still. The
    others leave out nothing, sizes, or sizes and places: two stills of a batch rarely agree in all
    but a shape, and a model that reads only complete captions hardly learns shapes.
    """
    complete = _caption(still, rng, sizes=True, places=True)

    def draw() -> str:
        sizes, places = rng.choice(((True, True), (False, True), (False, False)))
        return _caption(still, rng, sizes=sizes, places=places)

    return distinct(draw, count, [complete])


def _caption(still: Still, rng: random.Random, *, sizes: bool, places: bool) -> str:
    a, b = rng.sample((still.first, still.second), 2)

    def look(shape: PlacedShape) -> str:
        size = [rng.choice(_SIZE_WORDS[shape.size])] if sizes else []
        return " ".join([*size, shape.colour, rng.choice(SHAPE_WORDS[shape.shape])])

    return rng.choice(_TEMPLATES_WITH_PLACES if places else _TEMPLATES).format(
        a=look(a), b=look(b), at_a=" ".join(a.place), at_b=" ".join(b.place)
    )
