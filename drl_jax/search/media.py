"""What requests send and ask for besides answers: pictures, videos as queries, and clips."""

import asyncio
import contextlib
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import printable
from drl_jax.runtime.files import sha256
from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure
from drl_jax.search.addresses import BadRequest
from drl_jax.search.clips import MAX_CLIP, Timing, read_picture, read_timing, write_clip
from drl_jax.search.exports import MAX_SECONDS, Cut
from drl_jax.search.hits import format_clock
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.query import encode_read, sampling_of
from drl_jax.search.reading import allowed_seconds, open_picture, read_sent_video

# Seconds that one picture or clip may take; a video that was sent, beside those for its size.
_PICTURE_SECONDS, _CLIP_SECONDS, _READ_SECONDS = 10.0, 60.0, 60.0
# Queries of a kind that are kept; clips, of which a browser asks for parts again and again.
_KEPT_QUERIES, _KEPT_CLIPS = 32, 8
# Bytes of a picture, at most.
MAX_PICTURE = 20_000_000


class Media:
    """Reads files in processes with time limits: a damaged one may crash or hang its decoder.

    Keeps the last queries and clips. Safe to use from several threads. Methods raise UserError
    where a file cannot be read, or not in time, or is not kept any more.
    """

    def __init__(self, model: RetrievalModel, max_video: int):
        self._model, self.max_video = model, max_video
        self._sent = {what: OrderedDict[str, Any]() for what in ("picture", "video")}
        self._clips: OrderedDict[Path, Path] = OrderedDict()
        self._making_clip = threading.Lock()
        self._files = contextlib.ExitStack()
        self._folder = self._files.enter_context(temporary_directory())
        # Pictures do not wait for videos, and pages not for what is sent.
        self._pools = {
            what: self._files.enter_context(contextlib.closing(CallPool(count)))
            for what, count in (("picture", 1), ("video", 1), ("page", 2))
        }

    def close(self) -> None:
        self._files.close()

    def add(self, what: str, path: Path) -> str:
        """Decodes a "picture" or encodes a "video"; returns the name by which `sent` knows it."""
        if what == "picture":
            form, name = self._model.frame_form, sha256(path)
            value = open_picture(self._pools[what], path, form, "the picture")
        else:
            call = (read_sent_video, path, (), sampling_of(self._model), path.with_name("frames"))
            seconds = allowed_seconds(_READ_SECONDS, path.stat().st_size)
            read = self._call(what, "the video cannot be read", seconds, *call)
            name, value = read.sha256, encode_read(self._model, "the video", read)
        _keep(self._sent[what], name[:16], value, _KEPT_QUERIES)
        return name[:16]

    def sent(self, what: str, name: str) -> Any:
        """A "picture", as `open_picture` decodes it, or a "video", an EncodedQuery."""
        if (value := self._sent[what].get(name)) is None:
            raise BadRequest(f"the {what} is not known any more; send it again", 404)
        return value

    def picture(self, path: Path, time: float) -> bytes:
        """A JPEG file with the frame of an unchanged file at a time, seconds."""
        call = (read_picture, path, time)
        return self._call("page", "no picture can be read", _PICTURE_SECONDS, *call)

    def timing(self, path: Path) -> Timing:
        return self._call("page", "it cannot be read", _PICTURE_SECONDS, read_timing, path)

    def zip(self, cuts: Iterable[Cut]) -> IO[bytes]:
        """An open zip file with a clip of each cut, at its start."""
        if sum(cut.end - cut.start for cut in cuts) > MAX_SECONDS:
            raise BadRequest(f"a zip file has at most {MAX_SECONDS:g} s of clips; choose fewer")
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        with zipfile.ZipFile(file, "w") as archive:
            for number, cut in enumerate(cuts, start=1):
                try:
                    clip = self.clip(cut.file, cut.video, cut.start, cut.end)
                except BadRequest as error:
                    line = f"{printable(cut.video.path)}: {error}"
                    raise BadRequest(line, error.http_status) from error
                name = f"{number:02} {Path(cut.name).stem} {cut.start:.1f}-{cut.end:.1f}.mp4"
                archive.write(clip, name)
        file.seek(0)
        return file

    def clip(self, path: Path, video: IndexedVideo, start: float, end: float) -> Path:
        """An mp4 file with a part, seconds, of the unchanged file of a video."""
        if start >= min(end, video.duration):
            where = f"is not in the video, which has {video.duration:.1f} s"
            raise BadRequest(f"a clip from {start:g} to {end:g} s {where}")
        if end - start > MAX_CLIP + 0.002:  # Addresses have milliseconds.
            length = f"at most {MAX_CLIP:g} s, not {format_clock(end - start)}"
            raise BadRequest(f"a clip has {length}; choose a later start or an earlier end")
        clip = self._folder / f"{video.record.sha256}-{start}-{end}.mp4"
        with self._making_clip:
            if clip not in self._clips:
                call = (write_clip, path, start, end, clip)
                try:
                    self._call("page", "the clip cannot be made", _CLIP_SECONDS, *call)
                except BadRequest:
                    clip.unlink(missing_ok=True)
                    raise
            for old in _keep(self._clips, clip, clip, _KEPT_CLIPS):
                old.unlink(missing_ok=True)
        return clip

    def _call(self, pool: str, failure: str, seconds: float, *call: Any) -> Any:
        result = self._pools[pool].call(*call, timeout=seconds)
        if isinstance(result, WorkerFailure):
            raise BadRequest(f"{failure} ({result.reason})", 422)
        return result


def _keep(values: OrderedDict, name: Any, value: Any, most: int) -> list[Any]:
    """Puts a value last; returns the first ones if there are too many, and drops them."""
    values[name] = value
    values.move_to_end(name)
    return [values.popitem(last=False)[1] for _ in range(len(values) - most)]


def upload_routes(media: Media) -> list[Route]:
    kinds = (("picture", MAX_PICTURE, "picture"), ("video", media.max_video, "by_video"))
    return [Route(f"/api/{k[0]}s", _receiving(media, *k), methods=["POST"]) for k in kinds]


def _receiving(media: Media, what: str, most: int, parameter: str) -> Callable:
    # One file is read at a time. The others wait here, and not in the threads that answer pages.
    turn = asyncio.Semaphore(1)
    too_large = f"a {what} has at most {most // 1_000_000:,} MB"

    async def endpoint(request: Request) -> Response:
        # Only pages of this server send this; forms of other pages cannot.
        if request.headers.get("content-type") != "application/octet-stream":
            raise BadRequest("send it as application/octet-stream", 415)
        if int(request.headers.get("content-length", 0)) > most:
            raise BadRequest(too_large, 413)
        try:
            with temporary_directory() as folder:
                path = folder / what
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        await run_in_threadpool(file.write, chunk)
                        if file.tell() > most:
                            raise BadRequest(too_large, 413)
                async with turn:
                    name = await run_in_threadpool(media.add, what, path)
            return JSONResponse({parameter: name})
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise BadRequest(f"the server cannot keep the file ({reason})", 507) from error
        except ClientDisconnect:
            return Response(status_code=400)  # Nobody reads it.

    return endpoint
