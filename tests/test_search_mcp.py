"""The MCP server in a process of its own, as an agent starts it, with the client of the SDK."""

import asyncio
import base64
import io
import json
import os
import shutil
import sys
from pathlib import Path

import av
import pytest
from PIL import Image
from support.commands import ROOT, error_line, run_module

from drl_jax.search.update import update_index

mcp = pytest.importorskip("mcp")
TOOLS = {
    "search": {"sentence", "top", "text"},
    "moments": {"path", "sentence"},
    "explain": {"path", "sentence", "time"},
    "clip": {"path", "start", "end"},
}


@pytest.fixture(scope="module")
def index(search_model, test_videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mcp") / "videos"
    folder.mkdir()
    for number, path in enumerate(sorted(test_videos.iterdir())[:3]):
        shutil.copy(path, folder / f"video{number}.mp4")
    (folder / "video1.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\na budget\n")
    update_index(search_model, folder, folder.parent / "index")
    return folder.parent / "index"


def test_an_agent_searches_and_looks_at_moments(index, tmp_path):
    asyncio.run(asyncio.wait_for(converse(index, tmp_path), 300))


async def converse(index: Path, temporary: Path) -> None:
    wire = index.parent / "wire"
    command = f"{sys.executable} -m drl_jax.search mcp --index={index} | tee {wire}"
    env = {**os.environ, "TMPDIR": str(temporary)}
    server = mcp.StdioServerParameters(command="sh", args=["-c", command], env=env, cwd=ROOT)
    async with mcp.Client(server) as client:
        tools = (await client.list_tools()).tools
        assert {tool.name: set(tool.input_schema["properties"]) for tool in tools} == TOOLS

        async def ask(name: str, **arguments):
            result = await client.call_tool(name, arguments)
            assert not result.is_error, result.content
            assert json.loads(result.content[0].text) == result.structured_content
            return result.structured_content

        assert "knows drawn shapes, in English." in client.instructions
        found = await ask("search", sentence="a budget", text=True)
        assert found["model"]["knows"] == "drawn shapes"
        assert (found["videos"], found["notice"], len(found["hits"])) == (3, None, 3)
        hit = found["hits"][0]
        assert (hit["path"], hit["rank"]) == ("video1.mp4", 1)
        assert set(hit) == {
            *("rank", "path", "duration", "state", "score", "weak", "found_by", "moments", "cues")
        }
        cue = {"start": 1.0, "end": 2.0, "text": "a budget", "file": "video1.vtt"}
        assert hit["cues"] == [cue]
        without = await ask("search", sentence="a budget", top=1)
        assert [one["cues"] for one in without["hits"]] == [[]]
        listed = await ask("search")
        assert [one["path"] for one in listed["hits"]] == [f"video{n}.mp4" for n in range(3)]

        video = await ask("moments", path="video1.mp4", sentence="a budget")
        assert (video["cues"], video["moments"]) == ([cue], hit["moments"])
        moment = video["moments"][0]
        assert set(moment) == {"start", "end", "peak", "score", "unusual"}

        arguments = {"path": "video1.mp4", "sentence": "a red circle", "time": 1.0}
        text, picture = (await client.call_tool("explain", arguments)).content
        why = json.loads(text.text)
        assert [row["word"] for row in why["words"]] == ["a", "red", "circle"]
        assert why["moment"]["start"] <= 1 <= why["moment"]["end"]
        frames = Image.open(io.BytesIO(base64.b64decode(picture.data)))
        assert (picture.mime_type, frames.width) == (
            "image/jpeg",
            frames.height * len(why["times"]),
        )

        part = await ask("clip", path="video1.mp4", start=0.5, end=1.5)
        assert part["seconds"] == 1.0
        assert Path(part["file"]).is_relative_to(temporary)
        with av.open(part["file"]) as clip:
            assert clip.duration / av.time_base == pytest.approx(1, abs=0.3)

        for name, given, line in (
            ("search", {"sentence": " "}, "the query is blank"),
            ("search", {"sentence": "a", "top": 51}, "top must be a number from 1 to 50"),
            ("moments", {"path": "no.mp4", "sentence": "a"}, "no video of the index has the path"),
            ("explain", {**arguments, "time": 99.0}, "t=99 is outside the video"),
            ("explain", {**arguments, "sentence": ""}, "give a sentence to explain"),
            ("clip", {"path": "video1.mp4", "start": 0, "end": 61}, "a clip has at most 60 s"),
            ("clip", {"path": "video1.mp4", "start": -1, "end": 1}, "start takes seconds"),
        ):
            result = await client.call_tool(name, given)
            assert result.is_error
            (content,) = result.content
            assert content.text.startswith(f"Error executing tool {name}: {line}")
            assert "\n" not in content.text
        (index.parent / "videos" / "video2.mp4").unlink()
        result = await client.call_tool("clip", {"path": "video2.mp4", "start": 0, "end": 1})
        assert "the file is missing" in result.content[0].text
    assert not [*temporary.iterdir()]
    # Nothing else is on stdout.
    assert {json.loads(line)["jsonrpc"] for line in wire.read_text().splitlines()} == {"2.0"}


def test_a_wrong_index_is_one_line(tmp_path):
    finished = run_module("drl_jax.search", "mcp", f"--index={tmp_path}", check=False)
    assert "there is no index in" in error_line(finished)
    assert finished.stdout == ""
