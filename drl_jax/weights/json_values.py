"""Reads JSON files of others; every value is checked, and the message names file and field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drl_jax.runtime.errors import Unavailable, one_line
from drl_jax.runtime.files import parse_json
from drl_jax.weights.families import WeightsError


class JSONValues:
    """The content of a JSON file, or a group of it, whose types are checked when it is read."""

    def __init__(self, path: Path, content: Mapping[str, Any], prefix: str = ""):
        self.path, self.content, self._prefix = path, content, prefix

    @classmethod
    def read(cls, path: Path) -> "JSONValues | None":
        """The content of a file; None if there is no such file."""
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(path, error) from error
        except (ValueError, RecursionError) as error:
            raise WeightsError(
                f"{path} is damaged: it is not JSON ({one_line(error)}); get it again"
            ) from error
        if not isinstance(content, dict):
            raise WeightsError(f"{path} describes no model: it is not a JSON object")
        return cls(path, content)

    def error(self, name: str, expected: str) -> WeightsError:
        value = self.content.get(name)
        return WeightsError(f"{self.path}: {self._prefix}{name} is {value!r}, not {expected}")

    def unsupported(self, name: str) -> WeightsError:
        value = self.content.get(name)
        return WeightsError(f"{self.path}: {self._prefix}{name}={value!r} is not supported")

    def has(self, name: str) -> bool:
        return self.content.get(name) is not None

    def group(self, name: str) -> "JSONValues":
        """A group of fields; an empty one if it is absent."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "a group of fields")
        return JSONValues(self.path, value or {}, f"{self._prefix}{name}.")

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.content.get(name, default)
        if type(value) is not int or not least <= value < 2**31:
            raise self.error(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.content.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1:
            raise self.error(name, "a number between 0 and 1")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.content.get(name, default)
        if type(value) is not str:
            raise self.error(name, "a text")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.content.get(name)
        if value not in choices:
            raise self.error(name, f"one of {', '.join(choices)}")
        return value

    def pixel(self, name: str) -> tuple[float, ...]:
        """Three numbers, of red, green and blue."""
        value = self.content.get(name)
        numbers = value if isinstance(value, list) else []
        if len(numbers) != 3 or any(type(v) not in (int, float) or abs(v) > 1 for v in numbers):
            raise self.error(name, "three numbers between -1 and 1")
        return tuple(map(float, numbers))
