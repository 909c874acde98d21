"""What requests send and ask for besides answers: pictures, videos as queries, and clips."""

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Generic, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256
from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure
from drl_jax.search.addresses import BadRequest, format_clock, status_of
from drl_jax.search.clips import MAX_CLIP, read_picture, write_clip
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.query import EncodedQuery, encode_read, sampling_of
from drl_jax.search.reading import allowed_seconds, open_picture, read_sent_video

# Seconds that one picture or clip may take.
_PICTURE_SECONDS, _CLIP_SECONDS = 10.0, 60.0
_WORKERS = 2
# Clips that are kept: a browser asks for parts of one again and again.
_KEPT_CLIPS = 8
# Pictures, and videos, that are kept; bytes of a picture, at most.
_MOST, MAX_PICTURE = 32, 20_000_000
# Seconds that decoding a video that was sent may take, beside those for its size.
_READ_SECONDS = 60.0

T = TypeVar("T")


class _Kept(Generic[T]):
    """The last values by name, in memory; safe to use from several threads."""

    def __init__(self, what: str):
        self._what = what
        self._values: collections.OrderedDict[str, T] = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, value: T) -> None:
        with self._lock:
            self._values[name] = value
            self._values.move_to_end(name)
            while len(self._values) > _MOST:
                self._values.popitem(last=False)

    def get(self, name: str) -> T:
        with self._lock:
            if name not in self._values:
                raise BadRequest(f"the {self._what} is not known any more; send it again", 404)
            return self._values[name]


class SentQueries:
    """Keeps pictures as frames, and videos as encoded queries."""

    def __init__(self, model: RetrievalModel):
        """Starts no process before the first file.

        Args:
          model: encodes the videos.
        """
        self._model = model
        self._pictures, self._videos = _Kept[bytes]("picture"), _Kept[EncodedQuery]("video")
        # A damaged file may crash or hang its decoder. Pictures do not wait for videos.
        self._picture_reader, self._video_reader = CallPool(1), CallPool(1)
        self._encoding = threading.Lock()  # It uses all cores.

    def add_picture(self, path: Path) -> str:
        """Reads an image file, which may be deleted then; returns its name.

        Raises:
          UserError: see `open_picture`.
        """
        form = self._model.frame_form
        picture = open_picture(self._picture_reader, path, form, "the picture")
        name = sha256(path)[:16]
        self._pictures.add(name, picture)
        return name

    def add_video(self, path: Path) -> str:
        """Reads and encodes a video file, which may be deleted then; returns its name.

        Args:
          path: of the file, in a directory in which other files may be written.

        Raises:
          UserError: it cannot be read, or not in time.
        """
        model = self._model
        read = self._video_reader.call(
            *(read_sent_video, path, (), sampling_of(model), path.with_name("frames")),
            timeout=allowed_seconds(_READ_SECONDS, path.stat().st_size),
        )
        if isinstance(read, WorkerFailure):
            raise BadRequest(f"the video cannot be read ({read.reason})", 422)
        with self._encoding:
            video = encode_read(model, "the video", read)
        name = read.sha256[:16]
        self._videos.add(name, video)
        return name

    def picture(self, name: str) -> bytes:
        """The frame of a picture, as `open_picture` decodes it.

        Raises:
          BadRequest: it is not kept (any more).
        """
        return self._pictures.get(name)

    def video(self, name: str) -> EncodedQuery:
        """A video.

        Raises:
          BadRequest: it is not kept (any more).
        """
        return self._videos.get(name)

    def close(self) -> None:
        """Ends the processes that read files."""
        self._picture_reader.close()
        self._video_reader.close()


def upload_routes(sent: SentQueries, max_video: int) -> list[Route]:
    """The addresses to which pictures and videos are sent.

    Args:
      sent: keeps them.
      max_video: bytes of a video, at most.
    """
    kinds = (
        ("/api/pictures", "picture", MAX_PICTURE, lambda path: sent.add_picture(path), "picture"),
        ("/api/videos", "video", max_video, lambda path: sent.add_video(path), "by_video"),
    )
    return [Route(path, _receiving(*kind), methods=["POST"]) for path, *kind in kinds]


def _receiving(what: str, most: int, add: Callable[[Path], str], parameter: str) -> Callable:
    """An endpoint that answers with the name of what was received, or says what is wrong."""
    # One file is read at a time. The others wait here, and not in the threads that answer pages.
    turn = asyncio.Semaphore(1)

    async def endpoint(request: Request) -> Response:
        try:
            with temporary_directory() as folder:
                path = folder / what
                with path.open("wb") as file:
                    await _receive(request, file, f"a {what}", most)
                async with turn:
                    return JSONResponse({parameter: await run_in_threadpool(add, path)})
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_of(error))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            return JSONResponse({"error": f"the server cannot keep the file ({reason})"}, 507)
        except ClientDisconnect:
            return Response(status_code=400)  # Nobody reads it.

    return endpoint


async def _receive(request: Request, file: IO[bytes], what: str, most: int) -> None:
    """Writes the body of a request to a file.

    Raises:
      BadRequest: it is too large, or may be from a page of another site.
      ClientDisconnect: it ended before its end.
    """
    # Only pages of this server send this; forms of other pages cannot.
    if request.headers.get("content-type") != "application/octet-stream":
        raise BadRequest("send it as application/octet-stream", 415)
    too_large = BadRequest(f"{what} has at most {most // 1_000_000:,} MB", 413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_large
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > most:
            raise too_large
        await run_in_threadpool(file.write, chunk)


class Media:
    """Makes pictures and clips; safe to use from several threads."""

    def __init__(self) -> None:
        self._pool = CallPool(_WORKERS)
        self._files = contextlib.ExitStack()
        self._folder = self._files.enter_context(temporary_directory())
        self._clips: collections.OrderedDict[tuple, Path] = collections.OrderedDict()
        self._made = 0
        self._making_clip = threading.Lock()

    def picture(self, path: Path, time: float) -> bytes:
        """A JPEG file with the frame of an unchanged file at a time, seconds.

        Raises:
          BadRequest: it cannot be decoded in time.
        """
        picture = self._pool.call(read_picture, path, time, timeout=_PICTURE_SECONDS)
        if isinstance(picture, WorkerFailure):
            raise BadRequest(f"no picture can be read ({picture.reason})", 422)
        return picture

    def clip(self, path: Path, video: IndexedVideo, start: float, end: float) -> Path:
        """An mp4 file with a part of an unchanged file; kept until newer ones replace it.

        Args:
          path: of the file.
          video: the file in the index.
          start: seconds.
          end: seconds.

        Raises:
          BadRequest: the part is empty, too long or not in the video, or it cannot be made in time.
        """
        length = video.duration
        if not 0 <= start < end or start >= length:
            raise BadRequest(
                f"a clip from {start:g} to {end:g} s is not in the video, which has {length:.1f} s"
            )
        if end - start > MAX_CLIP:
            raise BadRequest(
                f"a clip has at most {MAX_CLIP:g} s, not {format_clock(end - start)};"
                " choose a later start or an earlier end"
            )
        key = (video.path, video.record.sha256, start, end)
        with self._making_clip:
            if key not in self._clips:
                self._clips[key] = self._make_clip(path, start, end)
            self._clips.move_to_end(key)
            while len(self._clips) > _KEPT_CLIPS:
                self._clips.popitem(last=False)[1].unlink(missing_ok=True)
            return self._clips[key]

    def _make_clip(self, path: Path, start: float, end: float) -> Path:
        self._made += 1
        out = self._folder / f"{self._made}.mp4"
        made = self._pool.call(write_clip, path, start, end, out, timeout=_CLIP_SECONDS)
        if isinstance(made, WorkerFailure):
            out.unlink(missing_ok=True)
            raise BadRequest(f"the clip cannot be made ({made.reason})", 422)
        return out

    def close(self) -> None:
        """Ends the processes and deletes the clips."""
        self._pool.close()
        self._files.close()
