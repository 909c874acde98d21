"""What the captions of clips and of stills have in common."""

from collections.abc import Callable

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "cross": ("cross", "plus"),
    "triangle": ("triangle",),
}


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Calls `draw` until it has returned `count` different captions."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
