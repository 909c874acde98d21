"""Addresses of the page and of its API: what a request asks for, and links to it."""

import dataclasses
import datetime
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from drl_jax.runtime.errors import UserError
from drl_jax.search.filters import Filters, parse_day

# Maximum hits per request.
MAX_HITS = 50
# Maximum length of a parameter; a sentence has fewer tokens than this anyway.
_MAX_CHARACTERS = 1000
_FILTERS = ("folder", "name", "min_length", "max_length", "since", "until")
_NO_FILTERS = Filters()
_PARAMETERS = ("q", "without", "picture", "like", "top", "offset", *_FILTERS, "video", "t")


class BadRequest(UserError):
    """A request that cannot be answered; `http_status` says in which way."""

    def __init__(self, message: str, http_status: int = 400):
        super().__init__(message)
        self.http_status = http_status


@dataclasses.dataclass(frozen=True)
class PageQuery:
    """What a request asks for.

    Attributes:
      sentence: what is seen.
      without: what is not seen.
      picture: name of a picture that was sent to the server.
      like: PATH@SECONDS of a moment of an indexed video. Without any of these, the answer is all
        videos in the order of their paths.
      top: number of hits; None: the server's default.
      offset: hits before the first one.
      filters: which videos are searched.
      video: path of the video that is open, relative to the folder of the index.
      time: where it is open, seconds.
    """

    sentence: str | None = None
    without: str | None = None
    picture: str | None = None
    like: str | None = None
    top: int | None = None
    offset: int = 0
    filters: Filters = _NO_FILTERS
    video: str | None = None
    time: float | None = None

    @property
    def asks(self) -> bool:
        """Whether it looks for something, instead of listing the videos."""
        return any((self.sentence, self.without, self.picture, self.like))

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> "PageQuery":
        """Reads the parameters of an address; empty ones are not given.

        Raises:
          BadRequest: a parameter is unknown or has a value that it cannot have.
        """
        for name, text in parameters.items():
            if name not in _PARAMETERS:
                known = ", ".join(_PARAMETERS)
                raise BadRequest(f"there is no parameter {name[:100]!r}; there are {known}")
            if len(text) > _MAX_CHARACTERS:
                raise BadRequest(
                    f"{name} has {len(text):,} characters; give at most {_MAX_CHARACTERS:,}"
                )
        given = {name: text for name, text in parameters.items() if text}
        lengths = {name: parse_time(name, given[name]) for name in _FILTERS[2:4] if name in given}
        days = {name: parse_day(name, given[name]) for name in _FILTERS[4:] if name in given}
        filters = Filters(
            folder=given.get("folder", ""), name=given.get("name", ""), **lengths, **days
        )
        if filters.min_length > filters.max_length:
            raise BadRequest("min_length is larger than max_length; no video can have both")
        return cls(
            sentence=given.get("q"),
            without=given.get("without"),
            picture=given.get("picture"),
            like=given.get("like"),
            top=_count("top", given["top"], 1, MAX_HITS) if "top" in given else None,
            offset=_count("offset", given.get("offset", "0"), 0, 10**9),
            filters=filters,
            video=given.get("video"),
            time=parse_time("t", given["t"]) if "t" in given else None,
        )

    def address(self, page: str = "/", **changes: Any) -> str:
        """The address of a page with these parameters, after `changes` of attributes."""
        query = dataclasses.replace(self, **changes)
        filters = query.filters
        parameters = {
            "q": query.sentence,
            "without": query.without,
            "picture": query.picture,
            "like": query.like,
            "top": query.top,
            "offset": query.offset,
            "folder": filters.folder,
            "name": filters.name,
            "min_length": seconds_text(filters.min_length),
            "max_length": seconds_text(filters.max_length),
            "since": day_text(filters.since),
            "until": day_text(filters.until),
            "video": query.video,
            "t": None if query.time is None else f"{query.time:.3f}".rstrip("0").rstrip("."),
        }
        given = {name: value for name, value in parameters.items() if value}
        text = urlencode(given, quote_via=quote, safe="/", errors="surrogateescape")
        return f"{page}?{text}" if text else page


def file_address(kind: str, path: str, **parameters: Any) -> str:
    """The address of something of an indexed file: `kind` is videos, frames, pictures or clips."""
    address = f"/{kind}/{quote(path, safe='/', errors='surrogateescape')}"
    return f"{address}?{urlencode(parameters)}" if parameters else address


def parse_time(name: str, text: str) -> float:
    """Reads seconds, `minutes:seconds` or `hours:minutes:seconds`.

    Raises:
      BadRequest: it is none of these; `name` is in the message.
    """
    try:
        parts = [float(part) for part in text.split(":")]
        if len(parts) > 3 or not all(0 <= part < math.inf for part in parts):
            raise ValueError
    except ValueError:
        raise BadRequest(f"{name} takes seconds, or minutes:seconds, not {text[:100]!r}") from None
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def seconds_text(seconds: float) -> str:
    """Seconds as an address has them; empty for 0 and infinity, the values of no filter."""
    return f"{seconds:g}" if 0 < seconds < math.inf else ""


def day_text(day: datetime.date) -> str:
    """A day as an address has it; empty for the values of no filter."""
    return "" if day in (datetime.date.min, datetime.date.max) else day.isoformat()


def format_clock(seconds: float) -> str:
    """Formats seconds as players do: 1:02, or 1:00:02 with hours."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(name: str, text: str, least: int, most: int) -> int:
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
        raise BadRequest(f"{name} must be a number from {least} to {most}, not {text[:100]!r}")
    return int(text)
