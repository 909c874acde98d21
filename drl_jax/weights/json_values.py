"""Values in JSON files of others, which are checked when they are read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from drl_jax.weights.errors import WeightsError


class Kind(NamedTuple):
    """What a field may hold, in code and in words, and what becomes of it."""

    accepts: Callable[[Any], bool]
    expected: str
    convert: Callable[[Any], Any] = lambda value: value


def whole(least: int) -> Kind:
    expected = f"a whole number of at least {least}"
    return Kind(lambda value: type(value) is int and least <= value < 2**31, expected)


def one_of(choices: tuple[str, ...]) -> Kind:
    return Kind(lambda value: value in choices, f"one of {', '.join(choices)}")


def _is_rgb(value: Any) -> bool:
    numbers = value if isinstance(value, list) else []
    return len(numbers) == 3 and all(type(v) in (int, float) and abs(v) <= 1 for v in numbers)


COUNT = whole(1)
FRACTION = Kind(lambda value: type(value) is float and 0 < value < 1, "a number between 0 and 1")
FLAG = Kind(lambda value: type(value) is bool, "true or false")
TEXT = Kind(lambda value: type(value) is str, "a text")
GROUP = Kind(lambda value: isinstance(value, dict), "a group of fields")
RGB = Kind(_is_rgb, "three numbers between -1 and 1", lambda value: tuple(map(float, value)))


class JSONValues:
    """A JSON object of a file, or one inside it; null is the same as an absent field.

    Names may have dots, for fields of objects inside this one.
    """

    def __init__(self, content: Mapping[str, Any], prefix: str = ""):
        self.content, self._prefix = content, prefix

    def group(self, name: str) -> "JSONValues":
        """An object inside this one; an empty one if it is absent."""
        return JSONValues(self.get(name, GROUP, {}), f"{self._prefix}{name}.")

    def raw(self, name: str) -> Any:
        """A value of any type; None if it is absent."""
        group, dot, rest = name.partition(".")
        return self.group(group).raw(rest) if dot else self.content.get(name)

    def get(self, name: str, kind: Kind, default: Any = None) -> Any:
        """A value of a kind; WeightsError: it is of another one, or absent and has no default."""
        value = self.raw(name)
        value = default if value is None else value
        if not kind.accepts(value):
            raise WeightsError(f"{self._prefix}{name} is {value!r}, not {kind.expected}")
        return kind.convert(value)

    def check(self, name: str, supported: Any) -> None:
        """Raises WeightsError unless a value is absent or the one that is supported."""
        if self.raw(name) not in (None, supported):
            raise self.unsupported(name)

    def unsupported(self, name: str) -> WeightsError:
        return WeightsError(f"{self._prefix}{name}={self.raw(name)!r} is not supported")
