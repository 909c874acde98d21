"""Updates of single files, moved files, and joined indexes."""

import asyncio
import collections
import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import error_of
from support.search import made_up_videos, made_up_windows, write_index
from support.videos import write_video
from test_search_store import contents

from drl_jax.runtime.errors import UserError
from drl_jax.search import update as update_module
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.encoding import Correction
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import IndexPart, IndexWriter, join, read_header
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.segments import SearchIndexError
from drl_jax.search.serve import Access, make_app
from drl_jax.search.session import Index
from drl_jax.search.update import is_in_shard, parse_shard, update_index

NAMES = ("a.mp4", "c/d.mp4", "c/e.mp4", "g.mp4", "j.mp4", "long.mp4", "no.mp4")
# The shard of each, of four.
HASHES = (0, 0, 3, 3, 1, 2, 1)
BANK = ["a red circle", "a blue square moves", "two triangles", "nothing"]


def frames(level: int, seconds: int = 2) -> np.ndarray:
    rng = np.random.default_rng(level)
    return rng.integers(0, 256, (2 * seconds, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def shared(search_model, tmp_path_factory):
    """A folder of videos, an index of all, two shards of it, joined; not to be changed."""
    root = tmp_path_factory.mktemp("updates")
    for number, name in enumerate(NAMES):
        path = root / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames(number, 26 if name == "long.mp4" else 2), fps=2)
    (root / "videos" / "no.mp4").write_text("no video")
    update(search_model, root, "all", bank=BANK)
    header = read_header(root / "all")
    about = {name: header[name] for name in header if name not in ("segments", "format")}
    for number in range(2):  # With the same bits: features depend on what is encoded together.
        shard, directory = f"{number}/2", root / f"shard{number}"
        videos = [v for path, v in contents(root / "all").items() if is_in_shard(path, shard)]
        write_index(directory, search_model, [[v] for v in videos], **about, shard=shard)
        shutil.copy(root / "all" / "hubness_bank.json", directory)
    # A shard that has no file.
    write_index(root / "empty", search_model, [], **about)
    join(root / "joined", [root / name for name in ("shard0", "empty", "shard1")])
    return root


def update(model, root: Path, name: str, *only: str, **flags):
    videos = root / "videos"
    return update_index(model, videos, root / name, storage="float32", only=only, **flags)


@pytest.fixture
def copy(shared, tmp_path):
    root = shutil.copytree(shared, tmp_path / "copy")
    for name in ("all", "shard0", "shard1", "empty"):
        with IndexWriter(root / name) as writer:
            writer.update_header(videos=str(root / "videos"))
    return root


def damage(index: Path, *paths: str) -> None:
    """Changes the features of videos."""
    for segment in (one.segment for one in IndexPart(index).listed):
        rows = [row for path in paths if (row := segment.find(path)) is not None]
        for row in rows:
            array = segment.arrays["window.frame_unit"]
            with (segment.directory / "window.frame_unit.bin").open("r+b") as file:
                file.seek(int(segment.firsts["window"][row]) * array[0].nbytes)
                file.write(bytes(5))


# ---------------------------------------------------------------------- single files


def test_only_the_named_files_are_updated(search_model, copy):
    videos, opened = copy / "videos", Index(copy / "all", search_model)
    write_video(videos / "new.mp4", frames(21, 30), fps=2)
    write_video(videos / "g.mp4", frames(22), fps=2)
    (videos / "bad.mp4").write_text("no video")
    (videos / "c" / "d.mp4").unlink()
    # Others change, too, and are left alone.
    write_video(videos / "a.mp4", frames(23), fps=2)
    (videos / "c" / "e.mp4").unlink()
    damage(copy / "all", "j.mp4", "long.mp4")
    named = ("new.mp4", "./g.mp4", str(videos / "c" / "d.mp4"), "bad.mp4", "new.mp4", "j.mp4")
    report = update(search_model, copy, "all", *named)
    assert (report.added, report.changed, report.removed, report.unchanged) == (2, 2, 1, 0)
    assert report.bad.keys() == {"bad.mp4"}
    with pytest.raises(SearchIndexError, match=r"features of 'long.mp4' differ"):
        opened.state()
    # The whole folder: the rest follows.
    windows = report.windows
    report = update(search_model, copy, "all")
    assert (report.added, report.changed, report.removed, report.unchanged) == (0, 2, 1, 5)
    assert {v.path for v in opened.videos} == {"a.mp4", "g.mp4", "j.mp4", "long.mp4", "new.mp4"}
    assert report.windows == windows - 1 == len(opened.state().gallery)


def test_files_that_can_not_be_named(search_model, copy, search_run, capsys):
    videos = copy / "videos"
    (videos / "text.txt").write_text("")
    (videos / "link").symlink_to("c")
    for path, message in (
        ("none.mp4", r"--only=none.mp4: neither .* nor the index has such a video"),
        ("text.txt", r"neither .* nor the index has such a video"),
        ("c", r"neither .* nor the index has such a video"),
        ("../copy/videos/a.mp4", r"--only takes paths below .*videos, not \.\./copy"),
        (str(copy / "a.mp4"), r"--only takes paths below"),
        ("link/d.mp4", r"leads through a link: name c/d.mp4"),
        ("\udce9.mp4", r"its name is not UTF-8; rename it"),
    ):
        with pytest.raises(UserError, match=message):
            update(search_model, copy, "all", path)
    flags = (f"--workdir={search_run}", f"--videos={videos}", f"--index={copy / 'all'}")
    flags = (*flags, "--storage=float32", "--only=none.mp4")
    assert "nor the index has such" in error_of("drl_jax.search", "index", *flags, capsys=capsys)
    # A disk that is not mounted has an empty folder in its place.
    shutil.rmtree(videos)
    videos.mkdir()
    with pytest.raises(UserError, match=r"1 of the 1 videos .* is it the right folder, and moun"):
        update(search_model, copy, "all", "a.mp4")
    assert update(search_model, copy, "all", "a.mp4", prune=True).removed == 1


def test_the_work_of_an_update_does_not_depend_on_the_size(search_model, tmp_path):
    """Calls of functions of the package: to remove a file, and to try another one."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    update(search_model, tmp_path, "empty")  # What is done once is done.
    found = {}
    for size in (100, 10_000):
        windows = made_up_windows(search_model, size)
        videos = made_up_videos(search_model, [f"{n:06}.mp4" for n in range(size)], windows)
        about = {"videos": str(tmp_path / "videos")}
        write_index(tmp_path / str(size), search_model, [videos], **about)
        calls: collections.Counter[str] = collections.Counter()

        def count(frame, event, argument, calls=calls):
            if event == "call" and "/drl_jax/" in frame.f_code.co_filename:
                calls[frame.f_code.co_qualname] += 1

        sys.setprofile(count)
        report = update(search_model, tmp_path, str(size), "000050.mp4", "bad.mp4")
        sys.setprofile(None)
        assert (report.removed, report.added, report.windows) == (1, 1, size - 1)
        searched = {name for name in calls if name == "Segment.path"}  # By halves.
        found[size] = {name: calls[name] for name in calls if name not in searched}
        assert sum(calls[name] for name in searched) < 10 * np.log2(size)
    assert found[100] == found[10_000]


# ---------------------------------------------------------------------- moved files


def test_most_of_the_files_are_moved_and_one_is_deleted(search_model, copy):
    before = contents(copy / "all")
    for name in NAMES[:5]:
        (copy / "videos" / name).rename(copy / "videos" / f"moved_{name.replace('/', '_')}")
    (copy / "videos" / "long.mp4").unlink()
    report = update(search_model, copy, "all")
    assert (report.moved, report.removed, report.added, report.unchanged) == (5, 1, 0, 1)
    after = contents(copy / "all")
    for name in NAMES[:5]:
        arrays = after[f"moved_{name.replace('/', '_')}"].arrays
        for array, rows in before[name].arrays.items():
            np.testing.assert_array_equal(arrays[array], rows)


def test_a_file_moves_while_segments_are_merged(search_model, test_videos, tmp_path, monkeypatch):
    """Between the look at all files and its commit, its segment has been merged with others."""
    monkeypatch.setattr(update_module, "_STORED_EVERY", -1.0)
    paths = [f"{n:02}.mp4" for n in range(15)]
    videos = made_up_videos(search_model, paths, made_up_windows(search_model, 15))
    segments = []
    for video in videos:
        path = tmp_path / "videos" / ("moved.mp4" if video.path == "03.mp4" else video.path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(video.path + "....")
        os.utime(path, ns=(9, 9))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        segments.append([video._replace(sha256=digest, size=path.stat().st_size)])
    about = {"videos": str(tmp_path / "videos")}
    write_index(tmp_path / "index", search_model, segments, **about)
    shutil.copy(next(test_videos.iterdir()), tmp_path / "videos" / "a_new.mp4")
    report = update(search_model, tmp_path, "index")
    assert (report.added, report.moved, report.unchanged) == (1, 1, 14)
    assert len(IndexPart(tmp_path / "index").listed) < 16
    moved = contents(tmp_path / "index")["moved.mp4"].arrays["window.frame_unit"]
    np.testing.assert_array_equal(moved, videos[3].arrays["window.frame_unit"])


# ---------------------------------------------------------------------- joined indexes


@pytest.mark.parametrize("correction", [None, "is:20"])
def test_a_joined_index_is_one_of_all_files_bit_for_bit(search_model, shared, correction):
    """Hits, scores, order and refined moments, of queries of every kind."""
    options = SearchOptions(correction=correction and Correction.parse(correction))
    joined, one = (Index(shared / name, search_model, options) for name in ("joined", "all"))
    assert joined.state().count == one.state().count == len(NAMES) - 1
    picture = np.random.default_rng(0).bytes(int(np.prod(search_model.frame_form.shape)))
    for filters in (None, Filters(folder="c"), Filters(only=("a.mp4", "j.mp4", "long.mp4"))):
        for ask in (
            lambda state: "a red circle",
            lambda state: Query(like=(state.video_at("long.mp4"), 20.0)),
            lambda state: Query("a dog", without="a red circle"),
            lambda state: Query(picture=picture),
            lambda state: Query(video=shared / "videos" / "long.mp4"),
        ):
            for top in (2, 9):
                found, expected = (
                    index.search(ask(index.state()), top, filters=filters)
                    for index in (joined, one)
                )
                for hit, other in zip(found, expected, strict=True):
                    same = ("rank", "path", "moments", "windows", "score")
                    assert [getattr(hit, n) for n in same] == [getattr(other, n) for n in same]
                    np.testing.assert_array_equal(hit.scores, other.scores)


def test_a_joined_index_has_the_videos_of_its_shards(search_model, shared):
    indexes = [Index(shared / name, search_model) for name in ("joined", "all")]
    joined, one = (index.state() for index in indexes)
    assert (joined.folder, joined.unsearchable()) == (one.folder, one.unsearchable())
    for video, other in zip(joined.videos, one.videos, strict=True):
        assert (joined.video_at(video.path), video.windows) == (video, other.windows)
        assert joined.frames_of(video, (0, 1)) == one.frames_of(other, (0, 1))
        assert joined.is_unchanged(video)
    assert joined.video_at("no.mp4") is None
    pages = [SearchAPI(index, 10, 0) for index in indexes]
    for answer in (
        lambda page: page.facts(),
        lambda page: page.unsearchable(),
        lambda page: page.search(PageQuery("a dog")),
        lambda page: page.video(PageQuery("a dog", video="long.mp4")),
    ):
        assert answer(pages[0]) == answer(pages[1])


def test_the_page_of_a_joined_index(search_model, shared):
    access = Access("localhost", "127.0.0.1")
    app = make_app(Index(shared / "joined", search_model), 9, 1, access)

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
        assert get(f"/frames/{name}", "frame=0")[1].startswith(b"\xff\xd8")
    assert b"no.mp4" in get("/unsearchable")[1]
    assert get("/videos/no.mp4")[0] == 404


def test_shards_have_each_file_once(search_model, shared, tmp_path):
    assert [parse_shard(text) for text in ("0/2", "03/16")] == ["0/2", "3/16"]
    for text in ("2/2", "1", "a/b", "-1/2", "1/2/3", "0/100001"):
        with pytest.raises(UserError, match="write NUMBER/COUNT, from 0/16 to 15/16"):
            parse_shard(text)
    # The same on every machine, and in every version.
    for name, number in zip(NAMES, HASHES, strict=True):
        assert [is_in_shard(name, f"{n}/4") for n in range(4)] == [n == number for n in range(4)]
    stored = []
    for number in range(2):
        update_index(search_model, shared / "videos", tmp_path / str(number), shard=f"{number}/2")
        stored += contents(tmp_path / str(number))
    assert sorted(stored) == sorted(NAMES)


def test_an_open_index_follows_a_shard(search_model, copy):
    opened = Index(copy / "joined", search_model)
    before = opened.state()
    number = next(n for n in range(100) if is_in_shard(f"new{n}.mp4", "1/2"))
    write_video(copy / "videos" / f"new{number}.mp4", frames(77), fps=2)
    # The shard is known: neither it nor the bank need be named again.
    assert update(search_model, copy, "shard1").added == 1
    assert update(search_model, copy, "shard0").added == 0
    after = opened.state()
    assert after.count == before.count + 1
    assert after.segments[0].segment is before.segments[0].segment
    for name, shard, message in (
        ("shard1", "0/2", r"another --shard, 1/2; give another --index"),
        ("all", "0/2", r"was made with no --shard"),
        ("joined", None, r"joins other indexes; index their videos, each on its own"),
    ):
        with pytest.raises(SearchIndexError, match=message):
            update(search_model, copy, name, shard=shard)
    # A video that came into two shards after they were joined.
    with IndexWriter(copy / "shard0") as writer:
        writer.update_header(shard="1/2")
        writer.put([contents(copy / "shard1")["j.mp4"]])
    with pytest.raises(SearchIndexError, match=r"the video .*j.mp4 is in two shards"):
        Index(copy / "joined", search_model)


def test_a_joined_index_can_be_moved(search_model, copy, tmp_path):
    opened = Index(copy / "joined", search_model)
    expected = opened.search("a dog", 9)
    (copy / "shard1").rename(copy / "away")
    message = r"joins the shard .*shard1, which is not there: .* or join the shards again with"
    for ask in (lambda: opened.search("a", 1), lambda: Index(copy / "joined", search_model)):
        with pytest.raises(SearchIndexError, match=message):
            ask()
    (copy / "away").rename(copy / "shard1")
    assert [hit.moments for hit in opened.search("a dog", 9)] == [hit.moments for hit in expected]
    (tmp_path / "elsewhere").mkdir()
    for name in ("joined", "shard0", "shard1", "empty"):
        (copy / name).rename(tmp_path / "elsewhere" / name)
    moved = Index(tmp_path / "elsewhere" / "joined", search_model).search("a dog", 9)
    assert [(hit.path, hit.score) for hit in moved] == [(hit.path, hit.score) for hit in expected]
    damage(tmp_path / "elsewhere" / "shard1", "j.mp4")
    with pytest.raises(SearchIndexError, match=r"shard1 is damaged .*features of 'j.mp4'"):
        Index(tmp_path / "elsewhere" / "joined", search_model)


def test_folders_on_several_disks_are_searched_below_the_one_of_all(search_model, copy, tmp_path):
    """Videos have the same names there."""
    for disk in ("disk1", "disk2/films"):
        shutil.copytree(copy / "videos", tmp_path / disk)
        index = tmp_path / disk.partition("/")[0] / "index"
        shutil.copytree(copy / "shard0", index)
        with IndexWriter(index) as writer:
            writer.update_header(videos=str(tmp_path / disk))
    join(tmp_path / "joined", [tmp_path / "disk1" / "index", tmp_path / "disk2" / "index"])
    opened = Index(tmp_path / "joined", search_model)
    state, names = opened.state(), [name for name in NAMES if is_in_shard(name, "0/2")]
    paths = [f"{disk}/{name}" for disk in ("disk1", "disk2/films") for name in names]
    assert state.folder == tmp_path
    assert [video.path for video in state.videos] == paths
    hits = opened.search("a dog", 9)
    assert sorted(hit.path for hit in hits) == [tmp_path / path for path in paths]
    # Equal scores are in the order of the paths.
    assert [hit.video.path[:5] for hit in hits] == len(names) * ["disk1", "disk2"]
    assert all(state.is_unchanged(state.video_at(path)) for path in paths)
    assert len(state.filtered(Filters(folder="disk2"))) == len(names)
    folders = SearchAPI(opened, 5, 0).facts()["folders"]
    assert folders == ["disk1", "disk1/c", "disk2/films", "disk2/films/c"]


def test_indexes_are_joined_by_a_command(copy, capsys):
    flags = ("join", f"--index={copy / 'new'}")
    shards = [str(copy / name) for name in ("all", "shard1")]
    assert "is in two shards" in error_of("drl_jax.search", *flags, *shards, capsys=capsys)
    for changes, what in (
        ({"storage": "int8"}, "--storage"),
        ({"fingerprint": "other"}, "model"),
        ({"bank": ["a"]}, "captions of weak matches"),
        ({"hubness": {}}, "--bank"),
    ):
        shutil.copytree(copy / "shard1", copy / "other")
        with IndexWriter(copy / "other") as writer:
            writer.update_header(**changes)
        with pytest.raises(SearchIndexError, match=f"they differ in their {what}"):
            join(copy / "new", [copy / "shard0", copy / "other"])
        shutil.rmtree(copy / "other")
    assert not (copy / "new").exists()
    assert main([*flags, str(copy / "shard1")]) == 0
    printed = capsys.readouterr().out
    assert "1 shards, 4 files" in printed
    assert "shards that were not given: 0/2" in printed
