"""Addresses that the server answers: the page, its JSON API, and files of indexed videos.

Where a request cannot be answered, these raise UserError; only the pages show it themselves.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from drl_jax.data.video_file import VIDEO_SUFFIXES
from drl_jax.runtime.errors import UserError
from drl_jax.search.addresses import (
    MAX_CHARACTERS,
    ROOT,
    PageQuery,
    parse_number,
    parse_time,
    status_of,
    video_of,
)
from drl_jax.search.api import STATES, SearchAPI, outside, unchanged_file
from drl_jax.search.exports import FORMATS
from drl_jax.search.filters import Filters
from drl_jax.search.hits import format_clock, format_timestamp
from drl_jax.search.media import MAX_PICTURE, upload_routes
from drl_jax.search.open_index import IndexedVideo, OpenIndex

HEALTH = "/health"
_PAGE = Path(__file__).parent / "page"
# Frames side by side in one answer.
_MOST_FRAMES = 64


class _FilePath(PathConvertor):
    """The path of a file in an address; also with a newline."""

    regex = r"[\s\S]*"


register_url_convertor("file", _FilePath())


TEMPLATES = Jinja2Templates(_PAGE)
TEMPLATES.env.trim_blocks = TEMPLATES.env.lstrip_blocks = True
TEMPLATES.env.filters |= {"clock": format_clock, "tenths": format_timestamp}
TEMPLATES.env.globals |= {
    "states": STATES,
    "formats": [*FORMATS],
    "no_filters": Filters(),
    "video_suffixes": VIDEO_SUFFIXES,
    "max_picture": MAX_PICTURE,
    "root": ROOT.get,
}


def _query(request: Request) -> PageQuery:
    return PageQuery.of(request.query_params.multi_items())


def page_routes(api: SearchAPI) -> list[BaseRoute]:
    constant = {"max_video": api.media.max_video}

    def page(template: str, parts: Callable[[Request], Iterable[tuple[str, Any]]]) -> Callable:
        """A page that shows its parts up to the first one that is wrong, and why it is."""

        def endpoint(request: Request) -> Response:
            # Where the request is wrong, the sentence need not be written again.
            sentence = request.query_params.get("q", "")[:MAX_CHARACTERS] or None
            context, status = {**constant, "index": {}, "query": PageQuery(sentence)}, 200
            try:
                for name, answer in parts(request):
                    context[name] = answer
            except UserError as error:
                context["error"], status = str(error), status_of(error)
            return TEMPLATES.TemplateResponse(request, template, context, status_code=status)

        return endpoint

    def search(request: Request) -> Iterator[tuple[str, Any]]:
        yield "index", api.facts()
        query = _query(request)
        yield "query", query
        yield "found", api.search(query)
        if query.video is not None:
            yield "open", api.video(query)

    def unsearchable(request: Request) -> Iterator[tuple[str, Any]]:
        yield "index", api.facts()
        yield from api.unsearchable().items()

    def part(template: str, name: str, answer: Callable[[PageQuery], dict[str, Any]]) -> Callable:
        def endpoint(request: Request) -> Response:
            query = _query(request)
            context = {"query": query, name: answer(query)}
            return TEMPLATES.TemplateResponse(request, template, context)

        return endpoint

    return [
        Route("/", page("page.html", search)),
        Route("/unsearchable", page("unsearchable.html", unsearchable)),
        Route("/tiles", part("tiles.html", "found", api.search)),
        Route("/viewer", part("viewer.html", "open", api.video)),
    ]


def api_routes(api: SearchAPI) -> list[BaseRoute]:

    def of(answer: Callable[[PageQuery], dict[str, Any]]) -> Callable:
        return lambda request: JSONResponse(answer(_query(request)))

    def export(request: Request) -> Response:
        parameters = request.query_params.multi_items()
        own = {name: [t for n, t in parameters if n == name] for name in ("format", "moment")}
        kind = "".join(own["format"][-1:])
        query = PageQuery.of((name, text) for name, text in parameters if name not in own)
        answer = api.export(kind, own["moment"], query)
        headers = {"Content-Disposition": f'attachment; filename="moments.{kind}"'}
        if isinstance(answer, bytes):
            return Response(answer, 200, headers, FORMATS[kind])
        parts = iter(lambda: answer.read(1 << 20), b"")
        return StreamingResponse(parts, 200, headers, FORMATS[kind])

    return [
        Route("/api/search", of(api.search)),
        Route("/api/video", of(api.video)),
        Route("/api/index", of(lambda query: api.facts())),
        Route("/api/export", export),
        Route("/api/unsearchable", of(lambda query: api.unsearchable())),
        Route("/api/openapi.json", lambda request: FileResponse(_PAGE / "openapi.json")),
        *upload_routes(api.media),
    ]


def health_route(api: SearchAPI, *, shows_reason: bool) -> Route:
    """Whether the index can be searched, for programs that restart servers. Names no files."""

    def endpoint(request: Request) -> Response:
        try:
            state = api.index.state()
        except UserError as error:
            # Its line names files, and the answer needs no token.
            line = str(error) if shows_reason else "the index cannot be opened: see /api/index"
            return JSONResponse({"status": "error", "error": line}, 503)
        facts = {"status": "ok", "videos": state.count, "indexing": state.progress()}
        return JSONResponse(facts)

    return Route(HEALTH, endpoint)


def file_routes(api: SearchAPI) -> list[BaseRoute]:

    def of_video(answer: Callable[[Request, OpenIndex, IndexedVideo], Response]) -> Callable:
        def endpoint(request: Request) -> Response:
            state = api.index.state()
            return answer(request, state, video_of(state, request.path_params["path"]))

        return endpoint

    def file(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        return FileResponse(unchanged_file(state, video))

    def frames(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        """One frame, or several side by side."""
        last = len(video.times) - 1
        names = request.query_params.get("frames", request.query_params.get("frame", "0"))
        chosen = [parse_number("frame", n, 0, last) for n in names.split(",")[:_MOST_FRAMES]]
        return _jpeg(request, video.thumbnails(chosen))

    def picture(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        time = parse_time("t", request.query_params.get("t", "0"))
        if time > video.duration:
            raise outside(time, video)
        return _jpeg(request, api.media.picture(unchanged_file(state, video), time))

    def clip(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        given = {"start": "0", "end": str(video.duration), **request.query_params}
        start, end = (parse_time(name, given[name]) for name in ("start", "end"))
        file = api.media.clip(unchanged_file(state, video), video, start, end)
        name = f"{PurePosixPath(video.path).stem} {start:.1f}-{end:.1f}.mp4"
        # Of a name like data:x.mp4, no type is found.
        how = {"media_type": "video/mp4", "content_disposition_type": "inline"}
        return FileResponse(file, filename=name, **how)

    kinds = {"videos": file, "frames": frames, "pictures": picture, "clips": clip}
    return [
        *(Route(f"/{kind}/{{path:file}}", of_video(answer)) for kind, answer in kinds.items()),
        Mount("/static", StaticFiles(directory=_PAGE / "static")),
    ]


def _jpeg(request: Request, content: bytes) -> Response:
    # What names the content in `v` stays right.
    headers = {"Cache-Control": "private, max-age=86400"} if "v" in request.query_params else {}
    return Response(content, media_type="image/jpeg", headers=headers)
