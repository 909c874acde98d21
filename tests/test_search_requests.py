"""Parts of the search page that need no server: filters, addresses, words."""

import asyncio
import errno
import json
import os
import types
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from starlette.requests import Request

from drl_jax.models.interactions import Attribution
from drl_jax.search.addresses import PageQuery, format_clock
from drl_jax.search.explain import Explanation
from drl_jax.search.filters import Filters, passing
from drl_jax.search.listing import Listing
from drl_jax.search.page_view import duration, extent, marks_note, span, timeline_curve
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.uploads import upload_routes
from drl_jax.search.word_table import word_rows


def test_filters():
    def video(path: str, duration: float) -> IndexedVideo:
        return IndexedVideo(path, 0, 0, "", slot=0, duration=duration)

    videos = [video("a.mp4", 5), video("films/B[1].MKV", 60), video("films2/b.mp4", 600)]
    listing = Listing.of_videos(videos)
    for filters, expected in (
        (Filters(), [0, 1, 2]),
        (Filters(folder="films"), [1]),
        (Filters(folder="films/"), [1]),
        (Filters(folder="film"), []),
        (Filters(name="b"), [1, 2]),
        (Filters(name="*.mp4"), [0, 2]),
        (Filters(name="?.mp4"), [0, 2]),
        (Filters(name="[1]"), [1]),
        (Filters(min_length=60), [1, 2]),
        (Filters(min_length=6, max_length=60), [1]),
    ):
        assert np.flatnonzero(passing(listing, filters)).tolist() == expected, filters
        assert bool(filters) == (len(expected) < 3)
    assert not Filters(only=("a.mp4",)).of_properties


def test_addresses_survive_a_round_trip():
    path = 'a/5\'s #5% "<b>"\nä.mp4'
    filters = Filters(folder="a & b", name='"%#', min_length=62.5, only=(path, "b & c.mp4"))
    query = PageQuery(
        "ä <b> + 5 % #",
        without="&?",
        picture="0a",
        by_video="1b",
        like=f"{path}@1.5",
        top=7,
        offset=3,
        filters=filters,
        video=path,
        time=1.25,
        moments=30,
    )
    parts = [part.split("=", 1) for part in query.address().removeprefix("/?").split("&")]
    assert PageQuery.of([(name, unquote(text)) for name, text in parts]) == query
    names = ("sentence", "without", "picture", "by_video", "like", "top", "video", "moments")
    cleared = dict.fromkeys(names)
    assert query.address(**cleared, offset=0, filters=Filters()) == "/?t=1.25"
    closed = query.closed(filters=filters.leaving_out(path))
    assert (closed.video, closed.time, closed.moments, closed.offset) == (None, None, None, 0)
    assert closed.filters == Filters(
        folder="a & b", name='"%#', min_length=62.5, only=("b & c.mp4",)
    )
    assert [format_clock(seconds) for seconds in (0, 62.4, 3600)] == ["0:00", "1:02", "1:00:00"]


def test_a_full_disk_while_a_video_is_sent_is_one_line():
    def add_video(path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def receive() -> dict:
        return {"type": "http.request", "body": b"a video", "more_body": False}

    route = upload_routes(types.SimpleNamespace(add_video=add_video, add_picture=None), 100)[1]
    headers = [(b"content-type", b"application/octet-stream")]
    scope = {"type": "http", "method": "POST", "path": route.path, "headers": headers}
    answer = asyncio.run(route.endpoint(Request(scope, receive)))
    assert answer.status_code == 507
    assert json.loads(answer.body) == {
        "error": "the server cannot keep the file (No space left on device)"
    }


def test_tokens_are_joined_to_words():
    words = ["[start]", "a", "skate-", "board-", "er", "-", "[end]"]
    weight = np.array([0.1, 0.2, 0.1, 0.1, 0.0, 0.1, 0.4])
    similarity = np.arange(14.0).reshape(7, 2)
    attribution = Attribution(similarity, weight, np.ones(2) / 2, np.ones(2))
    rows, marks = word_rows(Explanation(words, np.arange(2.0), attribution))
    assert [row.word for row in rows] == ["a", "skateboarder", "-"]
    assert [row.weight for row in rows] == pytest.approx([0.2, 0.2, 0.1])
    # The mean of the rows with weights; so weights times similarities add up as before.
    np.testing.assert_allclose(rows[1].similarity, [5, 6])
    assert marks == pytest.approx(0.5)
    assert marks_note(marks).startswith("50% of the score rests on the marks")
    assert marks_note(0.1) == ""


def test_times_and_the_timeline_are_written_as_people_read_them():
    moment = {"start": 12.2, "end": 18.4}
    assert span(moment) == "0:12 to 0:18"
    assert span({"start": 0.0, "end": 0.3}) == "0:00.0 to 0:00.3"
    assert [duration(seconds) for seconds in (0.3, 6.2, 59.6, 3723)] == [
        *("0.3 s", "6 s", "1:00", "1:02:03")
    ]
    assert extent({"moments": [moment], "duration": 328.0}) == "6 s of 5:28"
    assert extent({"moments": [moment], "duration": 6.3}) == "the whole video, 6 s"
    heat = [{"start": 0, "end": 5, "score": -1.0}, {"start": 5, "end": 10, "score": 2.0}]
    heights = [int(point.split()[1]) for point in timeline_curve(heat, 10.0).split("L")[1:-1]]
    # Low in the first half, up to the top in the second.
    assert heights == [88] * 240 + [0] * 240
    assert timeline_curve([], 10.0) == ""
