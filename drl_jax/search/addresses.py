"""Addresses of the page and of its API: what a request asks for, and links to it."""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlencode

from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.open_index import IndexedVideo, OpenIndex
from drl_jax.search.segments import SearchIndexError

# Path before all addresses of the server that answers, e.g. /videos behind a proxy; "" is none.
ROOT = contextvars.ContextVar("root", default="")
# Maximum hits per request, and moments of the video that is open.
MAX_HITS, MAX_MOMENTS = 50, 30
# Maximum length of a parameter; a sentence has fewer tokens than this anyway.
MAX_CHARACTERS = 1000


class BadRequest(UserError):
    """A request that cannot be answered; `http_status` says in which way."""

    def __init__(self, message: str, http_status: int = 400):
        super().__init__(message)
        self.http_status = http_status


def status_of(error: UserError) -> int:
    """The status of the answer to a request that is wrong: 4xx; 503 if the index cannot be read."""
    return getattr(
        error, "http_status", 503 if isinstance(error, SearchIndexError | Unavailable) else 400
    )


@dataclasses.dataclass(frozen=True)
class PageQuery:
    """What a request asks for; without any of the first five fields, videos by their paths."""

    sentence: str | None = None
    without: str | None = None
    picture: str | None = None  # Names of what was sent to the server.
    by_video: str | None = None
    like: str | None = None  # PATH@SECONDS of an indexed video.
    text: int = 0  # 1: the words of the sentence are looked for in transcripts, too.
    rerank: int | None = None  # Videos that a reranker orders anew; None: those of the server.
    top: int | None = None  # Number of hits, and of those before the first one.
    offset: int = 0
    filters: Filters = dataclasses.field(default=Filters())
    video: str | None = None  # The video that is open, and where it is, seconds.
    time: float | None = None
    moments: int | None = None  # Of this video, at most; None: as many as a hit has.

    @property
    def asks(self) -> bool:
        """Whether it looks for something, instead of listing the videos."""
        return any((self.sentence, self.without, self.picture, self.by_video, self.like))

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, str]]) -> "PageQuery":
        """Reads an address, or raises BadRequest; only `only` may be there several times."""
        parameters, values = list(parameters), {}
        for name, text in parameters:
            if name not in _FIELDS:
                known = ", ".join(_FIELDS)
                raise BadRequest(f"there is no parameter {name[:100]!r}; there are {known}")
            if len(text) > MAX_CHARACTERS:
                line = f"{name} has {len(text):,} characters; give at most {MAX_CHARACTERS:,}"
                raise BadRequest(line)
            if text:
                values[_FIELDS[name]] = _READERS[name](name, text) if name in _READERS else text
        values["only"] = tuple(dict.fromkeys(t for n, t in parameters if n == "only" and t))
        filters = Filters(**{name: values.pop(name) for name in _FILTERS if name in values})
        if filters.min_length > filters.max_length:
            raise BadRequest("min_length is larger than max_length; no video can have both")
        return cls(filters=filters, **values)

    @property
    def parameters(self) -> dict[str, Any]:
        """Names and values of an address that asks for the same."""
        values, defaults = ({**vars(of), **vars(of.filters)} for of in (self, PageQuery()))
        return {
            name: f"{round(value, 3):.9g}" if isinstance(value, float) else value
            for name, field in _FIELDS.items()
            if (value := values[field]) != defaults[field]
        }

    def address(self, **changes: Any) -> str:
        """The address of the page with these parameters, after `changes` of attributes."""
        given = dataclasses.replace(self, **changes).parameters
        text = urlencode(given, doseq=True, quote_via=quote, safe="/", errors="surrogateescape")
        return f"{ROOT.get()}/?{text}" if text else f"{ROOT.get()}/"

    def closed(self, **changes: Any) -> "PageQuery":
        """The first hits and no open video, after `changes` of attributes."""
        return dataclasses.replace(self, offset=0, video=None, time=None, moments=None, **changes)


def file_address(kind: str, path: str, **parameters: Any) -> str:
    """The address of something of an indexed file: `kind` is videos, frames, pictures or clips."""
    address = f"{ROOT.get()}/{kind}/{quote(path, safe='/', errors='surrogateescape')}"
    return f"{address}?{urlencode(parameters)}" if parameters else address


def parse_time(name: str, text: str) -> float:
    """Reads seconds, minutes:seconds or hours:minutes:seconds; a BadRequest if it is neither."""
    try:
        parts = [float(part) for part in text.split(":")]
        seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
        if len(parts) > 3 or min(parts) < 0 or not math.isfinite(seconds):
            raise ValueError
        return seconds
    except ValueError:
        raise BadRequest(f"{name} takes seconds, or minutes:seconds, not {text[:100]!r}") from None


def parse_number(name: str, text: str, least: int, most: int) -> int:
    """Reads a whole number; a BadRequest if it is none or not from `least` to `most`."""
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
        raise BadRequest(f"{name} must be a number from {least} to {most}, not {text[:100]!r}")
    return int(text)


def video_of(state: OpenIndex, path: str | None) -> IndexedVideo:
    """The video of an index with a path; a BadRequest if there is none."""
    if path is None:
        raise BadRequest("name the video with video=PATH")
    # Forms of browsers send a newline as CR LF.
    video = state.video_at(path) or state.video_at(path.replace("\r\n", "\n"))
    if video is None:
        raise BadRequest(f"no video of the index has the path {path[:200]!r}", 404)
    return video


def moment_of(state: OpenIndex, text: str) -> tuple[IndexedVideo, float]:
    """The video and the seconds of PATH@SECONDS; a BadRequest if there is no such moment."""
    path, _, seconds = text.rpartition("@")
    if not path:
        raise BadRequest(f"like takes PATH@SECONDS, not {text[:100]!r}")
    video, time = video_of(state, path), parse_time("like", seconds)
    if time > video.duration:
        raise BadRequest(f"like: {path} has the seconds 0 to {video.duration:.1f}")
    return video, time


def span_of(state: OpenIndex, text: str) -> tuple[IndexedVideo, float, float]:
    """The video and the seconds of PATH@START-END; a BadRequest if there is no such part."""
    path, _, span = text.rpartition("@")
    first, _, last = span.partition("-")
    if not path:
        raise BadRequest(f"moment takes PATH@START-END, not {text[:100]!r}")
    video = video_of(state, path)
    start, end = (parse_time("moment", one) for one in (first, last))
    # Addresses have milliseconds.
    if not start < min(end, video.duration) or end > video.duration + 0.002:
        raise BadRequest(f"moment: {path} has the seconds 0 to {video.duration:.3f}, not {span}")
    return video, start, end


_FILTERS = [field.name for field in dataclasses.fields(Filters)]
# The field of each parameter, in the order of addresses.
_FIELDS = {
    {"sentence": "q", "time": "t"}.get(name, name): name
    for field in dataclasses.fields(PageQuery)
    for name in (_FILTERS if field.name == "filters" else [field.name])
}
_READERS = {
    "top": functools.partial(parse_number, least=1, most=MAX_HITS),
    "text": functools.partial(parse_number, least=0, most=1),
    "rerank": functools.partial(parse_number, least=0, most=10**9),
    "offset": functools.partial(parse_number, least=0, most=10**9),
    "moments": functools.partial(parse_number, least=1, most=MAX_MOMENTS),
    **dict.fromkeys(("min_length", "max_length", "t"), parse_time),
    **dict.fromkeys(("since", "until"), parse_day),
}
