"""Requests that send a picture or a video as a query."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import temporary_directory
from drl_jax.search.addresses import BadRequest, status_of
from drl_jax.search.sent import SentQueries

# Bytes of a picture, at most.
MAX_PICTURE = 20_000_000


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
