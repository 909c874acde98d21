"""A server of the Model Context Protocol on stdin and stdout: agents search an index.

Its tools give the answers of the JSON API without the addresses of its pages.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from drl_jax.runtime.errors import UserError
from drl_jax.search.addresses import MAX_MOMENTS, PageQuery, parse_time, video_of
from drl_jax.search.api import SearchAPI, unchanged_file

_INSTRUCTIONS = (
    "Finds moments in videos by what is seen and, where they have transcripts, said or written."
    " Times are seconds, paths are those that `search` gives. A weak hit is likely no answer."
    " The model, {name}, knows {knows}, in {languages}."
)
_HIT = ("path", "duration", "state", "score", "weak", "found_by")
_MOMENT, _CUE = ("start", "end", "peak", "score", "unusual"), ("start", "end", "text", "file")


def serve_tools(api: SearchAPI) -> None:
    """Answers on stdin and stdout until stdin ends; raises UserError if the SDK is missing."""
    try:
        from mcp.server import MCPServer
        from mcp.server.mcpserver import Image
        from mcp.server.mcpserver.exceptions import ToolError
    except ImportError as error:
        raise UserError("version 2 of mcp is not installed: pip install 'drl_jax[mcp]'") from error

    def search(sentence: str = "", top: int = 5, text: bool = False) -> dict[str, Any]:
        """Finds the videos with the best moments for a sentence, best first; at most 50.

        `text` also looks for the words of the sentence in transcripts (`cues`). Without a sentence,
        videos are listed by their paths.
        """
        found = api.search(_query(q=sentence, top=top, text=int(text)))
        hits = [{"rank": hit["rank"], **_described(hit)} for hit in found["hits"]]
        about = {"model": found["model"], "videos": found["total"], "notice": found["notice"]}
        return {**about, "hits": hits}

    def moments(path: str, sentence: str) -> dict[str, Any]:
        """Finds where in one video a sentence is true, or its words are said; best first."""
        return _described(api.video(_query(q=sentence, video=path, moments=MAX_MOMENTS, text=1)))

    def explain(path: str, sentence: str, time: float) -> list[Any]:
        """Shows why a moment was found: the cosine of each word with each frame, and the frames.

        The picture has the frames of the moment at `time`, or of the nearest one, side by side.
        """
        found = api.video(_query(q=sentence, video=path, t=time, moments=MAX_MOMENTS))
        if found["moment"] is None:
            raise UserError("give a sentence to explain")
        why = {name: part for name, part in found["explanation"].items() if name != "thumbnails"}
        moment = {name: found["moments"][found["moment"]][name] for name in _MOMENT}
        video = video_of(api.index.state(), path)
        away = np.abs(np.subtract.outer(why["times"], video.times))
        frames = video.thumbnails(away.argmin(axis=1).tolist())
        return [{"moment": moment, **why}, Image(data=frames, format="jpeg")]

    def clip(path: str, start: float, end: float) -> dict[str, Any]:
        """Cuts a part of a video into an mp4 file, which exists until this server ends."""
        state = api.index.state()
        video = video_of(state, path)
        start, end = parse_time("start", str(start)), parse_time("end", str(end))
        file = api.media.clip(unchanged_file(state, video), video, start, end)
        return {"file": str(file), "seconds": min(end, video.duration) - start}

    def reported(answer: Callable) -> Callable:
        @functools.wraps(answer)
        def tool(**arguments: Any) -> Any:
            try:
                return answer(**arguments)
            except UserError as error:
                raise ToolError(str(error)) from error

        return tool

    about = _INSTRUCTIONS.format(**api.index.model.about)
    server = MCPServer("drl_jax.search", instructions=about, log_level="WARNING")
    for answer in (search, moments, explain, clip):
        server.add_tool(reported(answer), structured_output=answer is not explain)
    server.run("stdio")


def _query(**parameters: Any) -> PageQuery:
    return PageQuery.of((name, str(value)) for name, value in parameters.items())


def _described(hit: dict[str, Any]) -> dict[str, Any]:
    """A hit or a video of the API without addresses."""
    parts = (("moments", _MOMENT), ("cues", _CUE))
    return {name: hit[name] for name in _HIT} | {
        part: [{name: one[name] for name in names} for one in hit[part]] for part, names in parts
    }
