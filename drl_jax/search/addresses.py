"""Addresses of the page and of its API: what a request asks for, and links to it."""

import dataclasses
import datetime
import math
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlencode

from drl_jax.runtime.errors import UserError
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.segments import SearchIndexError

# Maximum hits per request, and moments of the video that is open.
MAX_HITS, MAX_MOMENTS = 50, 30
# Maximum length of a parameter; a sentence has fewer tokens than this anyway.
MAX_CHARACTERS = 1000
_FILTERS = ("folder", "name", "min_length", "max_length", "since", "until")
_NO_FILTERS = Filters()
_QUERY = ("q", "without", "picture", "by_video", "like")
_PARAMETERS = (*_QUERY, "top", "offset", *_FILTERS, "only", "video", "t", "moments")


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
      by_video: name of a video that was sent to the server.
      like: PATH@SECONDS of a moment of an indexed video. Without any of these, the answer is all
        videos in the order of their paths.
      top: number of hits; None: the server's default.
      offset: hits before the first one.
      filters: which videos are searched.
      video: path of the video that is open, relative to the folder of the index.
      time: where it is open, seconds.
      moments: number of its moments, at most; None: as many as a hit has.
    """

    sentence: str | None = None
    without: str | None = None
    picture: str | None = None
    by_video: str | None = None
    like: str | None = None
    top: int | None = None
    offset: int = 0
    filters: Filters = _NO_FILTERS
    video: str | None = None
    time: float | None = None
    moments: int | None = None

    @property
    def asks(self) -> bool:
        """Whether it looks for something, instead of listing the videos."""
        return any((self.sentence, self.without, self.picture, self.by_video, self.like))

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, str]]) -> "PageQuery":
        """Reads the names and values of an address; empty ones are not given.

        `only` may be there several times; of another parameter, the last one counts.

        Raises:
          BadRequest: a parameter is unknown or has a value that it cannot have.
        """
        parameters = list(parameters)
        for name, text in parameters:
            if name not in _PARAMETERS:
                known = ", ".join(_PARAMETERS)
                raise BadRequest(f"there is no parameter {name[:100]!r}; there are {known}")
            if len(text) > MAX_CHARACTERS:
                raise BadRequest(
                    f"{name} has {len(text):,} characters; give at most {MAX_CHARACTERS:,}"
                )
        given = {name: text for name, text in parameters if text}
        only = dict.fromkeys(text for name, text in parameters if name == "only" and text)
        lengths = {name: parse_time(name, given[name]) for name in _FILTERS[2:4] if name in given}
        days = {name: parse_day(name, given[name]) for name in _FILTERS[4:] if name in given}
        filters = Filters(
            folder=given.get("folder", ""),
            name=given.get("name", ""),
            only=tuple(only),
            **lengths,
            **days,
        )
        if filters.min_length > filters.max_length:
            raise BadRequest("min_length is larger than max_length; no video can have both")
        return cls(
            sentence=given.get("q"),
            without=given.get("without"),
            picture=given.get("picture"),
            by_video=given.get("by_video"),
            like=given.get("like"),
            top=_count("top", given["top"], 1, MAX_HITS) if "top" in given else None,
            offset=_count("offset", given.get("offset", "0"), 0, 10**9),
            filters=filters,
            video=given.get("video"),
            time=parse_time("t", given["t"]) if "t" in given else None,
            moments=(
                _count("moments", given["moments"], 1, MAX_MOMENTS) if "moments" in given else None
            ),
        )

    def address(self, page: str = "/", **changes: Any) -> str:
        """The address of a page with these parameters, after `changes` of attributes."""
        query = dataclasses.replace(self, **changes)
        filters = query.filters
        parameters = {
            "q": query.sentence,
            "without": query.without,
            "picture": query.picture,
            "by_video": query.by_video,
            "like": query.like,
            "top": query.top,
            "offset": query.offset,
            "folder": filters.folder,
            "name": filters.name,
            "min_length": seconds_text(filters.min_length),
            "max_length": seconds_text(filters.max_length),
            "since": day_text(filters.since),
            "until": day_text(filters.until),
            "only": list(filters.only),
            "video": query.video,
            "t": None if query.time is None else f"{query.time:.3f}".rstrip("0").rstrip("."),
            "moments": query.moments,
        }
        given = {name: value for name, value in parameters.items() if value}
        text = urlencode(given, doseq=True, quote_via=quote, safe="/", errors="surrogateescape")
        return f"{page}?{text}" if text else page

    def closed(self, **changes: Any) -> "PageQuery":
        """The first hits and no open video, after `changes` of attributes."""
        no_video = {"offset": 0, "video": None, "time": None, "moments": None}
        return dataclasses.replace(self, **no_video, **changes)


def status_of(error: UserError) -> int:
    """The status of the answer to a request that is wrong: 4xx; 503 if the index cannot be read."""
    if isinstance(error, BadRequest):
        return error.http_status
    return 503 if isinstance(error, SearchIndexError) else 400


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
