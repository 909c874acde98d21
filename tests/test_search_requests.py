"""Parts of the search page that need no server: access, filters, addresses, words."""

import asyncio
import errno
import json
import os
import re
import socket
import time
import types
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from drl_jax.models.interactions import Attribution
from drl_jax.runtime.errors import UserError
from drl_jax.search.addresses import BadRequest, PageQuery
from drl_jax.search.filters import Filters, natural_key, passing
from drl_jax.search.hits import Explanation
from drl_jax.search.media import upload_routes
from drl_jax.search.routes import TEMPLATES, health_route
from drl_jax.search.segments import SearchIndexError
from drl_jax.search.serve import Access, checked

# ---------------------------------------------------------------------- access


def answer_of(
    access: Access,
    path: str = "/",
    query: str = "",
    method: str = "GET",
    scheme: str = "http",
    **headers: str,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of the answer to a request that reached 192.0.2.7:8000."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    given = {"host": "localhost", **headers}
    scope = {
        **{"type": "http", "method": method, "path": path, "raw_path": path.encode()},
        **{"query_string": query.encode(), "server": ("192.0.2.7", 8000)},
        "headers": [(name.encode(), text.encode("latin-1")) for name, text in given.items()],
        "scheme": scheme,
    }
    app = checked(PlainTextResponse("inside"), access, {"", "api", "videos", "health"})
    asyncio.run(app(scope, None, send))
    names = {name.decode(): text.decode() for name, text in sent[0]["headers"]}
    return sent[0]["status"], names, sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (("localhost", "LOCALHOST.:80", "127.0.0.1:8000", "127.0.0.2", "[::1]", "[::1]:8000"), 200),
        (("[::ffff:127.0.0.1]:8000", "[0:0:0:0:0:0:0:1]", "192.0.2.7", "192.0.2.7:1"), 200),
        (("videos.example.org", "Videos.Example.org.:443", "[2001:DB8::5]:80", "server"), 200),
        (("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.8"), 400),
        (("", "[::1", "::1]:80", "[::1]x", "a@localhost", "localhost, evil.example"), 400),
        (("2130706433", "127.1", "localhost:port", "\xe4", "[2001:db8::6]", "0.0.0.0"), 400),
    ],
)
def test_only_requests_for_known_hosts_are_answered(hosts, status):
    access = Access("server", "127.0.0.1", "Videos.example.org:1, 2001:db8::5, ,")
    for host in hosts:
        found, _, body = answer_of(access, host=host)
        assert (found, body.count("\n")) == (status, 0), host
    assert ("--allowed_hosts adds names" in body) == (status == 400)


@pytest.mark.parametrize(
    ("host", "address", "url"),
    [
        ("::1", "::1", "http://[::1]:8000/"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", "http://[::ffff:127.0.0.1]:8000/"),
        ("here", "127.0.1.1", "http://here:8000/"),
        ("0.0.0.0", "0.0.0.0", "http://the-machine:8000/?token="),
        ("::ffff:0.0.0.0", "::ffff:0.0.0.0", "http://the-machine:8000/?token="),
        ("2001:db8::5", "2001:db8::5", "http://[2001:db8::5]:8000/?token="),
    ],
)
def test_an_address_that_other_machines_reach_has_a_token(host, address, url, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "the-machine")
    access = Access(host, address)
    assert access.url(8000) == url + access.token
    assert (len(access.token) > 30) == url.endswith("=")
    name = url.removeprefix("http://").partition("/")[0]
    assert answer_of(access, host=name)[0] == (401 if access.token else 200)
    without = Access(host, address, needs_token=False)
    assert without.url(8000) == url.removesuffix("?token=")


def test_the_token_of_an_address_becomes_a_cookie():
    access = Access("server", "192.0.2.7")
    other = Access("server", "192.0.2.7")
    assert access.token != other.token
    query = f"q=a+%26&token={access.token}&t=1"
    status, headers, body = answer_of(access, "//sub%20folder/", query)
    # Not the address //sub%20folder of another host.
    assert (status, headers["location"], body) == (303, "/sub%20folder/?q=a+%26&t=1", "")
    cookie, _, attributes = headers["set-cookie"].partition("; ")
    assert cookie == f"drl_jax_token_8000={access.token}"
    assert {part.lower() for part in attributes.split("; ")} == {
        *("httponly", "path=/", "samesite=lax")
    }
    assert answer_of(access, cookie=f"a=b; {cookie}")[::2] == (200, "inside")
    assert answer_of(access, authorization=f"Bearer {access.token}", method="POST")[0] == 200
    for path in ("/", "/videos/video.mp4", "/static/page.js", "/api/index"):
        for query, given in (
            *(("", {}), ("token=", {}), (f"token={other.token}", {}), ("token=%C3%A4", {})),
            ("", {"cookie": cookie[:-1]}),
            ("", {"cookie": cookie.replace("8000", "8001")}),
            ("", {"authorization": f"Bearer {other.token}", "cookie": "drl_jax_token_8000=\xe4"}),
            ("", {"authorization": f"Basic {access.token}"}),
            ("", {"authorization": "Bearer \xe4"}),
            (f"token={access.token}", {"method": "POST"}),
        ):
            status, headers, body = answer_of(access, path, query, **given)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            line = json.loads(body)["error"] if path.startswith("/api/") else body
            assert line.startswith("this server requires its token: open the address that it")
    assert answer_of(access, host="evil.example", cookie=cookie)[0] == 400


def test_a_token_behind_a_proxy():
    """Whether or not the proxy cuts its path off; the browser sees it, and HTTPS."""
    access = Access("server", "192.0.2.7", root_path="videos/")
    assert access.url(8000) == f"http://server:8000/videos/?token={access.token}"
    token = f"token={access.token}"
    for path in ("/videos/videos/a.mp4", "/videos/a.mp4"):
        status, headers, _ = answer_of(access, path, token, scheme="https")
        assert (status, headers["location"]) == (303, "/videos/videos/a.mp4")
        cookie, _, attributes = headers["set-cookie"].partition("; ")
        assert {"secure", "path=/videos"} <= {part.lower() for part in attributes.split("; ")}
        assert answer_of(access, path, cookie=cookie)[0] == 200
        assert answer_of(access, path)[0] == 401
    assert "secure" not in answer_of(access, "/", token)[1]["set-cookie"].lower()
    for path in ("/videos/api/index", "/api/index"):
        assert "error" in json.loads(answer_of(access, path)[2])
    assert answer_of(access, "/videos", "q=a?", cookie=cookie)[1]["location"] == "/videos/?q=a?"
    for root in ("/a b", "http://a/", "/a//b", "/\xe4"):
        with pytest.raises(UserError, match="write a path such as /videos"):
            Access("localhost", "127.0.0.1", root_path=root)


def test_health_needs_no_token_and_names_no_files():
    access = Access("server", "192.0.2.7")
    assert [answer_of(access, path)[0] for path in ("/health", "/healthy")] == [200, 401]
    assert answer_of(access, "/health", host="evil.example")[0] == 400

    def state() -> None:
        raise SearchIndexError("the features of 'private.mp4' differ")

    api = types.SimpleNamespace(index=types.SimpleNamespace(state=state))
    for shows_reason in (False, True):
        answer = health_route(api, shows_reason=shows_reason).endpoint(None)
        assert (answer.status_code, b"private" in answer.body) == (503, shows_reason)


def test_names_of_hosts_that_are_none_are_one_line():
    for text in ("http://videos.example.org/", "*", "a b", "videos.example.org/path", "\xe4.org"):
        with pytest.raises(UserError, match="is not the name of a host; write"):
            Access("localhost", "127.0.0.1", text)


# ---------------------------------------------------------------------- requests


def test_filters():
    paths, lengths = ["a.mp4", "films/B[1].MKV", "films2/b.mp4"], np.array([5.0, 60.0, 600.0])
    zeros = np.zeros(3, np.int64)
    columns = {"path": paths, "mtime_ns": zeros, "duration": lengths, "row": np.arange(3)}
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
        assert passing(pa.table(columns), filters)["row"].to_pylist() == expected, filters
        assert bool(filters) == (len(expected) < 3)
    assert not Filters(only=("a.mp4",)).of_properties


def test_paths_are_in_the_order_of_their_numbers():
    ordered = ["1.mp4", "02", "2", "10 a2", "10 a11", "20240101123045.mp4", "a", "a1\n2", "a1\n10"]
    ordered += ["b00000000000000000012", "b12345678901234567890", "ä2", "ä10"]
    for paths in (ordered, ordered[::-1]):
        assert sorted(paths, key=natural_key) == ordered


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


def sending(add: Callable[[str, Path], str]) -> Callable:
    """Sends a file to the address of pictures."""
    route = upload_routes(types.SimpleNamespace(add=add, max_video=100))[0]
    headers = [(b"content-type", b"application/octet-stream")]
    scope = {"type": "http", "method": "POST", "path": route.path, "headers": headers}

    async def receive() -> dict:
        return {"type": "http.request", "body": b"name", "more_body": False}

    return lambda: route.endpoint(Request(scope, receive))


def test_a_full_disk_while_a_file_is_sent_is_one_line():
    def add(what: str, path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BadRequest, match=r"cannot keep the file \(No space") as raised:
        asyncio.run(sending(add)())
    assert raised.value.http_status == 507


def test_files_that_are_sent_are_read_one_by_one():
    running, most = [], []

    def add(what: str, path: Path) -> str:
        running.append(path.read_bytes())
        most.append(len(running))
        time.sleep(0.02)
        return running.pop().decode()

    async def send_five() -> list:
        send = sending(add)
        return await asyncio.gather(*(send() for _ in range(5)))

    answers = asyncio.run(send_five())
    assert [json.loads(answer.body) for answer in answers] == 5 * [{"picture": "name"}]
    assert most == [1, 1, 1, 1, 1]


def test_hits_with_the_same_pictures_are_folded():
    def hit(path: str, same_as: str | None) -> dict:
        moment = {"start": 1.0, "end": 2.0, "strip": "", "strip_frames": 1}
        texts = dict.fromkeys(("page", "media", "picture", "thumbnail"), "")
        facts = {"state": "ok", "weak": False, "same_picture": False, "duration": 9.0}
        return {"path": path, "name": path, "same_as": same_as, "moments": [moment]} | texts | facts

    paths = {"a & b.mp4": None, "c.mp4": "a & b.mp4", "d.mp4": None, "e.mp4": "a & b.mp4"}
    found = {"hits": [hit(*pair) for pair in paths.items()], "next": None}
    tiles = TEMPLATES.env.get_template("tiles.html")
    text = tiles.render(found=found, query=PageQuery("a dog", offset=4))
    assert re.findall('data-video="(.*?)"', text) == ["a &amp; b.mp4", "d.mp4"]
    assert re.findall('data-moment="(.*?)"', text)[0] == "a &amp; b.mp4@1.000-2.000"
    (link,) = re.findall('class="folded" href="(.*?)">2 more with the same pictures<', text)
    assert link == "/?q=a%20dog&amp;only=a%20%26%20b.mp4&amp;only=c.mp4&amp;only=e.mp4"
    # Its page shows all of them, whose selection is for exports.
    shown = tiles.render(found=found, query=PageQuery("a dog", filters=Filters(only=tuple(paths))))
    assert len(re.findall("data-video=", shown)) == 4
    assert 'class="folded"' not in shown
    assert ('name="only"' in text, 'name="only"' in shown) == (True, False)


def words_of_page() -> types.ModuleType:
    """The macros of the page that write times and moments."""
    return TEMPLATES.env.get_template("words.html").module


def test_tokens_are_joined_to_words():
    words = ["[start]", "a", "skate-", "board-", "er", "-", "[end]"]
    weight = np.array([0.1, 0.2, 0.1, 0.1, 0.0, 0.1, 0.4])
    similarity = np.arange(14.0).reshape(7, 2)
    attribution = Attribution(similarity, weight, np.ones(2) / 2, np.ones(2))
    explained = Explanation(words, np.arange(2.0), attribution).to_json()
    assert [(row["word"], row["weight"]) for row in explained["words"]] == [
        *(("a", 0.2), ("skateboarder", 0.2), ("-", 0.1))
    ]
    # The mean of the rows with weights; so weights times similarities add up as before.
    assert explained["words"][1]["similarity"] == [5, 6]
    assert explained["marks_share"] == 0.5
    note = words_of_page().marks_note
    assert note(0.5).startswith("50% of the score rests on the marks")
    assert note(0.1) == ""


def test_times_and_the_timeline_are_written_as_people_read_them():
    words = words_of_page()
    span, length, extent = words.span, words.length, words.extent
    moment = {"start": 12.2, "end": 18.4}
    assert span(moment) == "0:12 to 0:18"
    assert span({"start": 0.0, "end": 0.3}) == "0:00.0 to 0:00.3"
    assert [length(seconds) for seconds in (0.3, 6.2, 59.6, 3723)] == [
        *("0.3 s", "6 s", "1:00", "1:02:03")
    ]
    assert extent({"moments": [moment], "duration": 328.0}) == "6 s of 5:28"
    assert extent({"moments": [moment], "duration": 6.3}) == "the whole video, 6 s"
    names = {"a/b c.mp4@62.4": "b c.mp4 at 1:02", "a@nan": "a@nan", "a@inf": "a@inf", "x": "x"}
    assert [words.moment_name(like) for like in names] == [*names.values()]
    heat = [{"start": 0, "end": 5, "score": -1.0}, {"start": 5, "end": 10, "score": 2.0}]
    # Low in the first half, up to the top in the second.
    assert words.curve(heat, 10.0) == "M0 100 V88 H120 V100 ZM120 100 V0 H240 V100 Z"
    assert words.curve([], 10.0) == ""
