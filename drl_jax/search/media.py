"""What requests send and ask for besides answers: pictures, videos as queries, and clips."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.files import sha256
from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure
from drl_jax.search.addresses import BadRequest, format_clock
from drl_jax.search.clips import MAX_CLIP, read_picture, write_clip
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.query import EncodedVideo, encode_read, sampling_of
from drl_jax.search.reading import allowed_seconds, open_picture, read_sent_video

# Seconds that one picture or clip may take; a video that was sent, beside those for its size.
_PICTURE_SECONDS, _CLIP_SECONDS, _READ_SECONDS = 10.0, 60.0, 60.0
# Clips that are kept: a browser asks for parts of one again and again.
_KEPT_CLIPS = 8
# Pictures, and videos, that are kept; bytes of a picture, at most.
_KEPT_QUERIES, MAX_PICTURE = 32, 20_000_000

K, V = TypeVar("K"), TypeVar("V")


class Media:
    """Reads files in processes with time limits: a damaged one may crash or hang its decoder.

    Pictures and videos that are queries are kept in memory, clips in a temporary directory, until
    newer ones replace them. Safe to use from several threads.

    Methods raise UserError where a file cannot be read, or not in time, or is not kept any more.
    """

    def __init__(self, model: RetrievalModel):
        self._model = model
        self._pictures: dict[str, bytes] = {}
        self._videos: dict[str, EncodedVideo] = {}
        self._clips: dict[Path, Path] = {}
        self._making_clip = threading.Lock()
        # Pictures do not wait for videos, and pages not for what is sent.
        self._picture_pool, self._video_pool, self._page_pool = map(CallPool, (1, 1, 2))
        self._files = contextlib.ExitStack()
        self._folder = self._files.enter_context(temporary_directory())

    def close(self) -> None:
        """Ends the processes and deletes the clips."""
        for pool in (self._picture_pool, self._video_pool, self._page_pool):
            pool.close()
        self._files.close()

    def add_picture(self, path: Path) -> str:
        """Reads an image file, as `open_picture` does; returns its name."""
        form = self._model.frame_form
        picture = open_picture(self._picture_pool, path, form, "the picture")
        name = sha256(path)[:16]
        _keep(self._pictures, name, picture, _KEPT_QUERIES)
        return name

    def add_video(self, path: Path) -> str:
        """Reads and encodes a video file, beside which others may be written; returns its name."""
        arguments = (path, (), sampling_of(self._model), path.with_name("frames"))
        seconds = allowed_seconds(_READ_SECONDS, path.stat().st_size)
        read = self._video_pool.call(read_sent_video, *arguments, timeout=seconds)
        read = _made(read, "the video cannot be read")
        name = read.sha256[:16]
        video = encode_read(self._model, "the video", read)
        _keep(self._videos, name, video, _KEPT_QUERIES)
        return name

    def sent_picture(self, name: str) -> bytes:
        """The frame of a picture, as `open_picture` decodes it."""
        return _kept(self._pictures, name, "picture")

    def sent_video(self, name: str) -> EncodedVideo:
        """A video as a query."""
        return _kept(self._videos, name, "video")

    def picture(self, path: Path, time: float) -> bytes:
        """A JPEG file with the frame of an unchanged file at a time, seconds."""
        picture = self._page_pool.call(read_picture, path, time, timeout=_PICTURE_SECONDS)
        return _made(picture, "no picture can be read")

    def clip(self, path: Path, video: IndexedVideo, start: float, end: float) -> Path:
        """An mp4 file with a part, seconds, of the unchanged file of a video."""
        length = video.duration
        if start >= min(end, length):
            raise BadRequest(
                f"a clip from {start:g} to {end:g} s is not in the video, which has {length:.1f} s"
            )
        if end - start > MAX_CLIP:
            raise BadRequest(
                f"a clip has at most {MAX_CLIP:g} s, not {format_clock(end - start)};"
                " choose a later start or an earlier end"
            )
        clip = self._folder / f"{video.record.sha256}-{start}-{end}.mp4"
        with self._making_clip:
            if clip not in self._clips:
                arguments = (path, start, end, clip)
                made = self._page_pool.call(write_clip, *arguments, timeout=_CLIP_SECONDS)
                if isinstance(made, WorkerFailure):
                    clip.unlink(missing_ok=True)
                _made(made, "the clip cannot be made")
            for old in _keep(self._clips, clip, clip, _KEPT_CLIPS):
                old.unlink(missing_ok=True)
        return clip


def _keep(values: dict[K, V], name: K, value: V, most: int) -> list[V]:
    """Puts a value last; returns the first ones if there are too many, and drops them."""
    values.pop(name, None)
    values[name] = value
    return [values.pop(old) for old in list(values)[:-most]]


def _kept(values: dict[str, V], name: str, what: str) -> V:
    if name not in values:
        raise BadRequest(f"the {what} is not known any more; send it again", 404)
    return values[name]


def _made(result: V | WorkerFailure, failure: str) -> V:
    """The result of a call of a process, which did not fail."""
    if isinstance(result, WorkerFailure):
        raise BadRequest(f"{failure} ({result.reason})", 422)
    return result


def upload_routes(media: Media, max_video: int) -> list[Route]:
    """The addresses to which pictures and videos, of at most `max_video` bytes, are sent."""
    kinds = (
        ("/api/pictures", "picture", MAX_PICTURE, media.add_picture, "picture"),
        ("/api/videos", "video", max_video, media.add_video, "by_video"),
    )
    return [Route(path, _receiving(*kind), methods=["POST"]) for path, *kind in kinds]


def _receiving(what: str, most: int, add: Callable[[Path], str], parameter: str) -> Callable:
    """An endpoint that answers with the name of what was received."""
    # One file is read at a time. The others wait here, and not in the threads that answer pages.
    turn = asyncio.Semaphore(1)

    async def endpoint(request: Request) -> Response:
        try:
            with temporary_directory() as folder:
                path = folder / what
                await _receive(request, path, f"a {what}", most)
                async with turn:
                    return JSONResponse({parameter: await run_in_threadpool(add, path)})
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise BadRequest(f"the server cannot keep the file ({reason})", 507) from error
        except ClientDisconnect:
            return Response(status_code=400)  # Nobody reads it.

    return endpoint


async def _receive(request: Request, path: Path, what: str, most: int) -> None:
    """Writes the body of a request to a file."""
    # Only pages of this server send this; forms of other pages cannot.
    if request.headers.get("content-type") != "application/octet-stream":
        raise BadRequest("send it as application/octet-stream", 415)
    too_large = BadRequest(f"{what} has at most {most // 1_000_000:,} MB", 413)
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    count = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            count += len(chunk)
            if count > most:
                raise too_large
            await run_in_threadpool(file.write, chunk)
