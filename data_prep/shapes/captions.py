"""What the captions of clips and of stills have in common."""

from collections.abc import Callable, Sequence

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "cross": ("cross", "plus"),
    "triangle": ("triangle",),
}


def distinct(draw: Callable[[], str], count: int, first: Sequence[str] = ()) -> list[str]:
    """Calls `draw` until there are `count` different captions with those of `first`."""
    found = dict.fromkeys(first)
    while len(found) < count:
        found[draw()] = None
    return list(found)
