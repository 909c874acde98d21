"""Indexes of some files: one shard of a folder, and several of them that open as one."""

import asyncio
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drl_jax.search.candidates import CandidateSearch
from drl_jax.search.indexing import update_index
from drl_jax.search.joined import join
from drl_jax.search.rows import SearchIndexError
from drl_jax.search.slots import PART_SLOTS
from drl_jax.search.store import Store
from drl_jax.search.video_files import Shard
from drl_jax.search.writer import IndexWriter
from support.commands import error_of
from support.videos import write_video

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import seal
from drl_jax.search import integrity
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.filters import Filters
from drl_jax.search.hubness import Correction
from drl_jax.search.query import Query
from drl_jax.search.recall import measure_recall
from drl_jax.search.serve import make_app
from drl_jax.search.session import SearchSession

NAMES = ("a.mp4", "c/d.mp4", "c/e.mp4", "g.mp4", "j.mp4", "long.mp4", "no.mp4")
# The shard of each, of four.
HASHES = (0, 0, 3, 3, 1, 2, 1)
BANK = ["a red circle", "a blue square moves", "two triangles", "nothing"]


def frames(level: int, seconds: int) -> np.ndarray:
    rng = np.random.default_rng(level)
    return rng.integers(0, 256, (2 * seconds, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def shared(search_model, tmp_path_factory):
    """A folder of videos, an index of all, and the two shards of it, joined; not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(NAMES):
        path = root / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "no.mp4":
            path.write_text("no video")
        else:
            write_video(path, frames(number, 26 if name == "long.mp4" else 2), fps=2)
    update(search_model, root, "all")
    for number in range(2):
        update(search_model, root, f"shard{number}", shard=Shard(number, 2))
    # A shard that has no file, and so no arrays.
    update(search_model, root, "empty", shard=Shard(0, 1000))
    report = join(root / "joined", [root / name for name in ("shard0", "empty", "shard1")])
    assert (report.shards, report.videos) == (3, len(NAMES))
    return root


def update(model, root: Path, name: str, **flags):
    flags = {"storage": "float32", "bank": BANK, **flags}
    return update_index(model, root / "videos", root / name, **flags)


@pytest.fixture
def copy(shared, tmp_path):
    """A copy of all of it."""
    root = shutil.copytree(shared, tmp_path / "copy")
    for name in ("all", "shard0", "shard1", "empty"):
        with IndexWriter(root / name) as writer:
            writer.update_header(videos=str(root / "videos"))
    return root


def assert_same_hits(found, expected):
    assert [hit.path for hit in found] == [hit.path for hit in expected]
    for hit, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(hit.scores, other.scores, atol=1e-6)
        assert [moment.window for moment in hit.moments] == [m.window for m in other.moments]
        for moment, same in zip(hit.moments, other.moments, strict=True):
            assert (moment.start, moment.end, moment.peak) == (same.start, same.end, same.peak)
            assert moment.unusual == pytest.approx(same.unusual, abs=1e-3)


@pytest.mark.parametrize("correction", [None, "is:20"])
def test_a_joined_index_ranks_as_one_of_all_files(correction, search_model, shared):
    correction = correction and Correction.parse(correction)
    one, joined = (
        SearchSession(shared / name, search_model, correction) for name in ("all", "joined")
    )
    assert len(joined.videos) == len(one.videos) == len(NAMES) - 1
    for top in (2, 9):
        found, expected = (
            session.search(["a red circle", "a dog"], top) for session in (joined, one)
        )
        for hits, others in zip(found, expected, strict=True):
            assert_same_hits(hits, others)
    if correction is not None:
        return
    snapshots = [session.snapshot() for session in (joined, one)]
    for ask in (
        lambda snapshot: Query(like=(snapshot.video_at("long.mp4"), 20.0)),
        lambda snapshot: Query("a dog", without="a red circle"),
    ):
        assert_same_hits(*(snapshot.answer(ask(snapshot), 9) for snapshot in snapshots))
    for filters in (Filters(folder="c"), Filters(only=("a.mp4", "j.mp4", "long.mp4"))):
        found = [
            snapshot.answer(Query("a dog"), 9, snapshot.filtered(filters)) for snapshot in snapshots
        ]
        assert_same_hits(*found)


def test_a_joined_index_has_the_videos_of_its_shards(search_model, shared):
    joined, one = (SearchSession(shared / name, search_model) for name in ("joined", "all"))
    snapshot, expected = joined.snapshot(), one.snapshot()
    assert snapshot.folder == expected.folder
    assert [video.path for video in snapshot.unsearchable()] == ["no.mp4"]
    parts = {video.slot // PART_SLOTS for video in snapshot.videos}
    assert parts == {0, 2}
    for video in snapshot.videos:
        other = expected.video_at(video.path)
        assert snapshot.video_at(video.path) == video
        assert (video.windows, video.sha256) == (other.windows, other.sha256)
        assert snapshot.thumbnails(video) == expected.thumbnails(other)
        assert snapshot.is_unchanged(video)
        for name, array in snapshot.stored([video]).items():
            np.testing.assert_array_equal(array, expected.stored([other])[name])
    assert snapshot.video_at("no.mp4") is None
    pages = [SearchAPI(session, 10) for session in (joined, one)]
    assert pages[0].index() == pages[1].index()
    assert pages[0].unsearchable() == pages[1].unsearchable()
    hits = [page.search(PageQuery("a dog"))["hits"] for page in pages]
    assert [hit["path"] for hit in hits[0]] == [hit["path"] for hit in hits[1]]
    opened = [page.video(PageQuery("a dog", video="long.mp4")) for page in pages]
    assert opened[0]["explanation"]["words"] == opened[1]["explanation"]["words"]


def test_the_page_of_a_joined_index(search_model, shared):
    app = make_app(shared / "joined", search_model, top=9, max_upload=1)

    def get(path: str, query: str = "") -> tuple[int, bytes]:
        """Status and body of an answer."""
        sent = []
        scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode()}
        scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1", "scheme": "http"}

        async def receive():
            await asyncio.Event().wait()  # The client sends no more, and stays.

        async def send(message):
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    status, page = get("/", "q=a+dog&video=long.mp4")
    assert status == 200
    for name in NAMES[:-1]:
        assert name.encode() in page
        assert get(f"/videos/{name}") == (200, (shared / "videos" / name).read_bytes())
        assert get(f"/frames/{name}", "window=0")[1].startswith(b"\xff\xd8")
    assert b"no.mp4" in get("/unsearchable")[1]
    assert get("/videos/no.mp4")[0] == 404


def test_an_engine_finds_candidates_in_a_joined_index(search_model, copy):
    session = SearchSession(copy / "joined", search_model)
    windows = session.snapshot().videos.windows
    with contextlib.closing(CandidateSearch(session, candidates=windows)) as engine:
        assert engine.export().sent == windows
        for queries in (["a dog"], ["a red circle", "two triangles"]):
            expected = session.search(queries, 9)
            for found, others in zip(engine.search(queries, 9), expected, strict=True):
                assert_same_hits(found, others)
        (measured,) = measure_recall(engine, ["a dog"], [windows], 3)
        assert measured.recall == 1
        assert engine.export().unchanged == windows


def test_shards_have_each_file_once(shared):
    assert [Shard.parse(text) for text in ("0/2", "15/16")] == [Shard(0, 2), Shard(15, 16)]
    for text in ("2/2", "1", "a/b", "-1/2", "1/2/3", "0/100001"):
        with pytest.raises(UserError, match="write NUMBER/COUNT, from 0/16 to 15/16"):
            Shard.parse(text)
    # The same on every machine, and in every version.
    for name, number in zip(NAMES, HASHES, strict=True):
        assert [Shard(n, 4).has(name) for n in range(4)] == [n == number for n in range(4)]
    stored = []
    for name in ("shard0", "shard1"):
        with Store(shared / name) as store:
            stored += [video.path for video in store.videos()]
    assert sorted(stored) == sorted(NAMES)


def test_an_open_session_follows_a_shard(search_model, copy, monkeypatch):
    session = SearchSession(copy / "joined", search_model)
    before = session.snapshot()
    monkeypatch.setattr(integrity, "_AT_ONCE", 0)
    number = next(n for n in range(100) if Shard(1, 2).has(f"new{n}.mp4"))
    write_video(copy / "videos" / f"new{number}.mp4", frames(77, 2), fps=2)
    # The shard is known: neither it nor the bank need be named again.
    assert update(search_model, copy, "shard1", bank=()).added == 1
    assert update(search_model, copy, "shard0", bank=()).added == 0
    after = session.snapshot()
    assert len(after.videos) == len(before.videos) + 1
    assert after.parts[0] is before.parts[0]
    after.check.wait()
    assert after.check.checked[0] == before.check.checked[0]
    assert after.check.checked[2] == before.check.checked[2] + 1
    # A hit of before is still right: slots do not change.
    path = before.videos[0].path
    assert after.video_at(path) == before.video_at(path)
    with pytest.raises(SearchIndexError, match=r"another --shard, 1/2; give another --index"):
        update(search_model, copy, "shard1", shard=Shard(0, 2))
    with pytest.raises(SearchIndexError, match=r"another --shard, all files"):
        update(search_model, copy, "all", shard=Shard(0, 2))


def test_a_joined_index_can_be_moved(search_model, copy, tmp_path):
    expected = SearchSession(copy / "joined", search_model).search(["a dog"], 9)[0]
    session = SearchSession(copy / "joined", search_model)
    shutil.move(copy / "shard1", copy / "away")
    message = r"joins the shard .*shard1, which is not there: .* or join the shards again with"
    with pytest.raises(SearchIndexError, match=message):
        session.search(["a dog"], 1)
    with pytest.raises(SearchIndexError, match=message):
        SearchSession(copy / "joined", search_model)
    shutil.move(copy / "away", copy / "shard1")
    (tmp_path / "elsewhere").mkdir()
    for name in ("joined", "shard0", "shard1", "empty"):
        shutil.move(copy / name, tmp_path / "elsewhere" / name)
    moved = SearchSession(tmp_path / "elsewhere" / "joined", search_model)
    assert_same_hits(moved.search(["a dog"], 9)[0], expected)


def test_damage_of_a_shard_names_it(search_model, copy):
    (path,) = (copy / "shard1").glob("frame_unit*.bin")
    content = bytearray(path.read_bytes())
    content[5] ^= 64
    path.write_bytes(content)
    with pytest.raises(SearchIndexError, match=r"shard1 is damaged \(the features of .*decoded"):
        SearchSession(copy / "joined", search_model)
    path.write_bytes(content[:100])
    with pytest.raises(SearchIndexError, match=r"shard1 is damaged .*only the damaged ones"):
        SearchSession(copy / "joined", search_model)
    listed = copy / "joined" / "shards.json"
    for content in ("{", "[]", json.dumps(seal({"format": 2, "shards": []})), "{}"):
        listed.write_text(content)
        with pytest.raises(SearchIndexError, match=r"shards.json is damaged .*join the shards ag"):
            SearchSession(copy / "joined", search_model)


def test_folders_on_several_disks_are_searched_below_the_one_of_all(search_model, copy, tmp_path):
    """Videos have the same names there."""
    for disk in ("disk1", "disk2/films"):
        shutil.copytree(copy / "videos", tmp_path / disk)
        index = tmp_path / disk.partition("/")[0] / "index"
        shutil.copytree(copy / "shard0", index)
        with IndexWriter(index) as writer:
            writer.update_header(videos=str(tmp_path / disk))
    join(tmp_path / "joined", [tmp_path / "disk1" / "index", tmp_path / "disk2" / "index"])
    session = SearchSession(tmp_path / "joined", search_model)
    snapshot = session.snapshot()
    assert snapshot.folder == tmp_path
    names = ("a.mp4", "c/d.mp4", "long.mp4")
    paths = [f"{disk}/{name}" for disk in ("disk1", "disk2/films") for name in names]
    assert [video.path for video in snapshot.videos] == paths
    (hits,) = session.search(["a dog"], 9)
    assert sorted(hit.path for hit in hits) == [tmp_path / path for path in paths]
    for path in paths:
        video = snapshot.video_at(path)
        assert snapshot.is_unchanged(video)
        assert snapshot.thumbnails(video)
    assert len(snapshot.filtered(Filters(folder="disk2"))) == 3
    folders = SearchAPI(session, 5).index()["folders"]
    assert folders == ["disk1", "disk1/c", "disk2/films", "disk2/films/c"]


def test_indexes_that_cannot_be_joined(search_model, copy, tmp_path, capsys):
    def error(*shards, index=copy / "new"):
        with pytest.raises(SearchIndexError) as raised:
            join(index, [copy / shard for shard in shards])
        return str(raised.value)

    assert "no index in" in error("shard0", "videos")
    assert "shard0 is named twice" in error("shard0", "shard1", "shard0")
    assert "is a joined index; name its shards" in error("joined", "shard0")
    assert "is an index with videos; give another --index" in error("shard0", index=copy / "all")
    both = error("all", "shard1")
    assert "is in two shards" in both
    assert "copy/all and" in both
    assert "copy/shard1;" in both
    for changes, what in (
        ({"storage": "int8"}, "--storage"),
        ({"fingerprint": "other"}, "model"),
        ({"bank": ["a"]}, "captions of weak matches"),
        ({"hubness": {}}, "--bank"),
    ):
        shutil.copytree(copy / "shard1", copy / "other")
        with IndexWriter(copy / "other") as writer:
            writer.update_header(**changes)
        assert f"they differ in their {what}" in error("shard0", "other")
        shutil.rmtree(copy / "other")
    assert not (copy / "new").exists()
    report = join(copy / "new", [copy / "shard0"])
    assert report.missing == ["1/2"]
    with pytest.raises(SearchIndexError, match=r"joins others; update these instead.*shard0"):
        update(search_model, copy, "new")
    # A video that came into two shards after they were joined.
    join(copy / "new", [copy / "shard0", copy / "shard1"])
    with Store(copy / "shard1") as store:
        path = store.videos()[0].path
    with IndexWriter(copy / "shard0") as writer:
        writer.update_header(shard="1/2")
        writer.rename("a.mp4", dataclasses.replace(writer.videos()[0], path=path))
    with pytest.raises(SearchIndexError, match=f"the video .*{path} is in two shards"):
        SearchSession(copy / "new", search_model)
    assert "no index in" in error_of(
        "drl_jax.search", "join", f"--index={tmp_path / 'j'}", str(tmp_path), capsys=capsys
    )
    assert main(["join", f"--index={copy / 'j'}", str(copy / "shard1")]) == 0
    assert "1 shards with" in capsys.readouterr().out
