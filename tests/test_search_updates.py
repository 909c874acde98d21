"""Updates of an index: changed, named and moved files, accidents, and joined indexes."""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.commands import start_interruptible
from support.processes import killing_workers
from support.search import damage, made_up_videos, made_up_windows, write_index
from support.videos import (
    write_video,
    write_video_of_unknown_codec,
    write_video_with_latin_title,
)
from test_search_store import assert_same_arrays, contents

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import WorkerFailure
from drl_jax.search import index_file
from drl_jax.search import update as update_module
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.encoding import Correction
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import IndexPart, IndexWriter, join, read_header, read_progress
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.segments import SearchIndexError
from drl_jax.search.session import Index
from drl_jax.search.update import IndexReport, is_in_shard, parse_shard, update_index

NAMES = ("a.mp4", "c/d.mp4", "c/e.mp4", "g.mp4", "j.mp4", "long.mp4", "no.mp4")
# The shard of each, of four.
HASHES = (0, 0, 3, 3, 1, 2, 1)
CORRECTION = Correction("is:20")
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


def update(model, root: Path, name: str, *only: str, **flags) -> IndexReport:
    videos = root / "videos"
    return update_index(model, videos, root / name, storage="float32", only=only, **flags)


def counts(report: IndexReport) -> tuple[int, ...]:
    """Files that were added, changed, moved and removed, and unchanged ones."""
    return report.added, report.changed, report.moved, report.removed, report.unchanged


@pytest.fixture
def copy(shared, tmp_path):
    root = shutil.copytree(shared, tmp_path / "copy")
    for name in ("all", "shard0", "shard1", "empty"):
        with IndexWriter(root / name) as writer:
            writer.update_header(videos=str(root / "videos"))
    return root


def scores(index: Index) -> dict[str, float]:
    return {hit.video.path: hit.score for hit in index.search("a red circle", top=20)}


# ---------------------------------------------------------------------- changed files


def test_only_changed_files_are_decoded_and_an_open_index_shows_them(search_model, copy):
    videos, opened = copy / "videos", Index(copy / "all", search_model)
    before, old_state, old = contents(copy / "all"), opened.state(), scores(opened)
    write_video(videos / "new.mp4", frames(21), fps=2)
    write_video(videos / "a.mp4", frames(22), fps=2)
    (videos / "c" / "d.mp4").unlink()
    os.utime(videos / "g.mp4", (1, 1))  # Another time, the same content.
    assert counts(update(search_model, copy, "all")) == (1, 1, 0, 1, 5)
    after = contents(copy / "all")
    assert after.keys() == before.keys() - {"c/d.mp4"} | {"new.mp4"}
    assert after["a.mp4"].sha256 != before["a.mp4"].sha256
    for name in after.keys() - {"a.mp4", "new.mp4"}:
        assert_same_arrays(after[name], before[name])
    new = scores(opened)
    assert new == scores(Index(copy / "all", search_model))
    assert new.keys() == after.keys() - {"no.mp4"}
    # A query that was running meanwhile has the features of the videos it lists.
    hits = opened.answer(old_state, Query("a red circle"), 20)
    assert {hit.video.path: hit.score for hit in hits} == old
    assert counts(update(search_model, copy, "all")) == (0, 0, 0, 0, 7)
    assert opened.state() is opened.state()  # Nothing changed: not opened again.


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
    assert counts(report) == (1, 2, 0, 1, 0)  # What can be searched.
    assert report.bad.keys() == {"bad.mp4"}
    with pytest.raises(SearchIndexError, match=r"features of 'long.mp4' differ"):
        opened.state()
    # The whole folder: the rest follows.
    windows = report.windows
    report = update(search_model, copy, "all")
    assert counts(report) == (0, 2, 0, 1, 5)
    assert {v.path for v in opened.videos} == {"a.mp4", "g.mp4", "j.mp4", "long.mp4", "new.mp4"}
    assert report.windows == windows - 1 == len(opened.state().gallery)


def test_files_that_can_not_be_named(search_model, copy):
    videos = copy / "videos"
    (videos / "text.txt").write_text("")
    (videos / "link").symlink_to("c")
    for path, message in (
        ("none.mp4", r"none.mp4: neither .* nor the index has such a video"),
        ("text.txt", r"neither .* nor the index has such a video"),
        ("c", r"neither .* nor the index has such a video"),
        ("../copy/videos/a.mp4", r"a path below .*videos is needed, not \.\./copy"),
        (str(copy / "a.mp4"), r"a path below .* is needed"),
        ("link/d.mp4", r"leads through a link: name c/d.mp4"),
        ("\udce9.mp4", r"neither .* nor the index has such a video"),
    ):
        with pytest.raises(UserError, match=message):
            update(search_model, copy, "all", path)


def test_a_folder_that_is_not_mounted_removes_nothing(search_model, copy):
    """There is an empty folder in its place, or a part of the files."""
    away = (copy / "videos").rename(copy / "away")
    (copy / "videos").mkdir()
    with pytest.raises(UserError, match=r"1 of the 1 files .* is it the right folder, and moun"):
        update(search_model, copy, "all", "a.mp4")
    shutil.copy2(away / "a.mp4", copy / "videos")
    with pytest.raises(UserError, match=r"6 of the 7 files .* is it the right folder, and moun"):
        update(search_model, copy, "all")
    assert counts(update(search_model, copy, "all", "no.mp4")) == (0, 0, 0, 1, 0)
    assert counts(update(search_model, copy, "all", prune=True)) == (0, 0, 0, 5, 1)


def test_the_work_of_an_update_does_not_depend_on_the_size(search_model, tmp_path):
    """Calls of functions of the package: to remove a file, and to try another one."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    update(search_model, tmp_path, "empty")  # What is done once is done.
    found = {}
    for size in (100, 3_000):
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
        assert (report.removed, {*report.bad}, report.windows) == (1, {"bad.mp4"}, size - 1)
        assert calls.pop("Segment.path") < 10 * np.log2(size)  # By halves.
        found[size] = calls
    assert found[100] == found[3_000]


# ---------------------------------------------------------------------- moved files


def test_a_moved_folder_with_moved_files_keeps_its_features(
    search_model, copy, tmp_path, monkeypatch
):
    """One file is deleted, and another one replaced by a third."""
    before = contents(copy / "all")
    (copy / "videos").rename(tmp_path / "videos")
    places = {"a.mp4": "c/a.mp4", "c/d.mp4": "d.mp4", "c/e.mp4": "e.mp4", "g.mp4": "j.mp4"}
    for name, place in places.items():
        (tmp_path / "videos" / name).rename(tmp_path / "videos" / place)
    (tmp_path / "videos" / "long.mp4").unlink()
    (copy / "all").rename(tmp_path / "all")
    monkeypatch.setattr(type(search_model), "encode_frames", None)  # Nothing is encoded.
    assert counts(update(search_model, tmp_path, "all")) == (0, 0, 4, 1, 1)
    after = contents(tmp_path / "all")
    assert after.keys() == {*places.values(), "no.mp4"}
    for name, place in places.items():
        assert_same_arrays(after[place], before[name])
    (hit,) = Index(tmp_path / "all", search_model).search("a", top=1)
    assert hit.path.parent in (tmp_path / "videos", tmp_path / "videos" / "c")
    assert counts(update(search_model, tmp_path, "all")) == (0, 0, 0, 0, 5)


def test_a_moved_file_does_not_keep_damaged_features(search_model, copy):
    damage(copy / "all", "long.mp4")
    (copy / "videos" / "long.mp4").rename(copy / "videos" / "other.mp4")
    assert counts(update(search_model, copy, "all")) == (1, 0, 0, 1, 6)


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
    assert counts(update(search_model, tmp_path, "index")) == (1, 0, 1, 0, 14)
    assert len(IndexPart(tmp_path / "index").listed) < 16
    moved = contents(tmp_path / "index")["moved.mp4"].arrays["window.frame_unit"]
    np.testing.assert_array_equal(moved, videos[3].arrays["window.frame_unit"])


# ---------------------------------------------------------------------- accidents


def test_files_that_cannot_be_searched_are_listed_and_not_tried_again(search_model, copy):
    videos = copy / "videos"
    write_video_of_unknown_codec(videos / "unknown.mp4", frames(5), fps=2)
    write_video_with_latin_title(videos / "latin_title.mp4", frames(6), fps=2)
    os.mkfifo(videos / "pipe.mp4")
    (videos / "link.mp4").symlink_to("nowhere.mp4")
    report = update(search_model, copy, "all")
    assert counts(report) == (1, 0, 0, 0, 7)
    text = str(report)
    assert text.startswith("1 added, 0 changed, 0 moved, 0 removed, 7 unchanged; 4 cannot be sea")
    assert "cannot be searched (4):\n" in text
    assert "is not a video: its content is text" in report.bad.pop("no.mp4")
    none = "it is no file, e.g. a link to nothing"
    assert report.bad == {
        "unknown.mp4": "has a video codec that FFmpeg cannot decode",
        **{"pipe.mp4": none, "link.mp4": none},
    }
    assert counts(update(search_model, copy, "all")) == (0, 0, 0, 0, 9)
    write_video(videos / "no.mp4", frames(7), fps=2)
    report = update(search_model, copy, "all")
    assert counts(report) == (0, 1, 0, 0, 8)
    assert "no.mp4" not in report.bad


def test_a_folder_that_may_not_be_listed_keeps_its_videos(search_model, copy, monkeypatch):
    videos, scan = copy / "videos", os.scandir
    (videos / "c" / "d.srt").write_text("1\n0:01 --> 0:02\nhello\n")
    update(search_model, copy, "all")

    def refuse(path):
        if str(path).endswith("/c"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    write_video(videos / "new.mp4", frames(9), fps=2)
    report = update(search_model, copy, "all")
    assert (counts(report)[0], report.removed, report.transcripts) == (1, 0, 1)
    assert report.unavailable == {"c": "it cannot be listed: Permission denied"}
    assert {"c/d.mp4", "c/e.mp4", "new.mp4"} < contents(copy / "all").keys()


def test_names_that_are_not_utf8_are_escaped(search_model, copy):
    name = "caf\udce9.mp4"  # The byte 0xe9 alone.
    write_video(copy / "videos" / name, frames(9), fps=2)
    assert counts(update(search_model, copy, "all"))[0] == 1
    assert counts(update(search_model, copy, "all", name))[0] == 0
    index = Index(copy / "all", search_model)
    hits = index.search("a red circle", 99)
    (hit,) = [hit for hit in hits if hit.path.name == name]
    assert hit.path.read_bytes()[4:8] == b"ftyp"
    assert hit.to_json()["path"].endswith("caf\\xe9.mp4")
    hits._repr_html_().encode()
    write_video(copy / "videos" / "caf\\xe9.mp4", frames(3), fps=2)
    report = update(search_model, copy, "all")
    assert report.bad["caf\\xe9.mp4"].startswith("its name is not UTF-8")


def test_files_that_could_not_be_read_this_time_are_read_by_the_next_update(
    search_model, copy, monkeypatch
):
    """The process of a file is killed, or there is no place where the frames of a film can wait."""
    write_video(copy / "videos" / "new.mp4", frames(8, 16), fps=2)
    with killing_workers():
        reports = [update(search_model, copy, "all")]
    absent = copy / "absent" / "0"
    with monkeypatch.context() as patch:
        patch.setattr(IndexWriter, "spool_file", lambda writer, number: absent)
        reports.append(update(search_model, copy, "all"))
    for report, reason in zip(
        reports,
        (
            "the process that worked on it died (exit code -9)",
            f"{absent} cannot be written: No such file or directory (ENOENT)",
        ),
        strict=True,
    ):
        assert report.unavailable == {"new.mp4": reason}
        assert counts(report) == (0, 0, 0, 0, 7)
        assert report.bad.keys() == {"no.mp4"}
    assert counts(update(search_model, copy, "all")) == (1, 0, 0, 0, 7)


def test_a_video_that_took_too_long_is_tried_again_with_more_time(search_model, copy, monkeypatch):
    write_video(copy / "videos" / "late.mp4", frames(9), fps=2)
    late = WorkerFailure("took longer than 1 s", is_passing=True, timed_out=True)
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "map_in_processes", lambda *a, **flags: iter([late]))
        assert update(search_model, copy, "all", timeout=1).bad["late.mp4"] == late.reason
    assert counts(update(search_model, copy, "all", timeout=1)) == (0, 0, 0, 0, 8)
    report = update(search_model, copy, "all", timeout=100)
    assert counts(report) == (0, 1, 0, 0, 7)
    assert report.bad.keys() == {"no.mp4"}


def test_a_segment_that_is_cut_is_made_again(search_model, copy):
    expected = scores(Index(copy / "all", search_model))
    (path,) = (copy / "all").glob("segments/*/window.frame_unit.bin")
    os.truncate(path, 1000)
    with pytest.raises(SearchIndexError, match=r"is damaged .*; index the videos again, and only"):
        Index(copy / "all", search_model)
    assert counts(update(search_model, copy, "all")) == (6, 0, 0, 0, 1)
    assert scores(Index(copy / "all", search_model)) == pytest.approx(expected, abs=1e-6)


def test_an_index_belongs_to_what_it_was_made_with(search_model, copy):
    def model_with(**groups):
        config = search_model.config
        for name, fields in groups.items():
            group = dataclasses.replace(getattr(config, name), **fields)
            config = dataclasses.replace(config, **{name: group})
        return dataclasses.replace(search_model, config=config)

    other = model_with(data={"max_frames": 3})
    with pytest.raises(SearchIndexError, match="was made with another model"):
        Index(copy / "all", other)
    given = {"model": search_model, "videos": copy / "videos", "storage": "float32"}
    for name, changes, message in (
        ("all", {"model": other}, "was made with another model; give another directory"),
        ("all", {"videos": copy / "videos" / "c"}, "overlaps with"),
        ("all", {"storage": "int8"}, "another storage, float32"),
        ("all", {"fps": 2.0}, "another fps, 1.0"),
        ("all", {"bank": BANK[1:]}, "another bank"),
        ("all", {"shard": "0/2"}, "no shard"),
        ("shard1", {"shard": "0/2"}, "another shard, 1/2"),
        ("joined", {}, "joins the shards of a folder; index the videos of each on its own"),
    ):
        with pytest.raises(SearchIndexError, match=message):
            update_index(directory=copy / name, **{**given, **changes})
    # Nothing that is stored depends on this.
    blocks = model_with(model={"similarity_block": 3})
    assert counts(update(blocks, copy, "all")) == (0, 0, 0, 0, 7)


def test_other_processes_see_the_progress(search_model, copy, monkeypatch):
    directory, seen, put = copy / "index", [], IndexWriter.put

    def watched(writer, videos, *arguments):
        if not seen:
            seen.append(read_progress(directory))
            with pytest.raises(SearchIndexError, match=r"is being made \(6 of 7 files are read\),"):
                Index(directory, search_model).search("a")
        put(writer, videos, *arguments)

    monkeypatch.setattr(IndexWriter, "put", watched)
    monkeypatch.setattr(index_file, "_INTERVAL", 0.0)
    update(search_model, copy, "index")
    assert seen == [{"done": 6, "total": 7}]
    assert read_progress(directory) is None
    assert not (directory / "indexing.json").exists()


def test_an_indexer_that_is_ended_loses_nothing(search_run, search_model, copy):
    """As a terminal does it: also the processes that decode get the signal."""
    for number in range(150):
        shutil.copy(copy / "videos" / "a.mp4", copy / "videos" / f"copy{number}.mp4")
    total, ended, errors = 157, {"killed": [signal.SIGKILL], "ctrl-c": 3 * [signal.SIGINT]}, {}
    flags = [f"--workdir={search_run}", f"--videos={copy / 'videos'}", "--storage=float32"]
    flags.append("--encoder=jax")  # As the updates below.
    command = [sys.executable, "-m", "drl_jax.search", "index", *flags]
    options = {"stderr": subprocess.PIPE, "start_new_session": True}
    started = {n: start_interruptible([*command, f"--index={copy / n}"], **options) for n in ended}
    waiting = dict(started)
    while waiting:
        time.sleep(0.01)
        for name, process in [*waiting.items()]:
            if count_stored(copy / name) >= 16 or process.poll() is not None:
                del waiting[name]
                for sent in ended[name]:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, sent)
                    time.sleep(0.2 * (sent == signal.SIGINT))
    for name, process in started.items():
        errors[name] = process.communicate()[1]
        assert "Traceback" not in errors[name]
        before = contents(copy / name)
        assert 16 <= len(before) < total
        report = update(search_model, copy, name)
        new = total - len(before) - ("no.mp4" not in before)
        assert (report.unchanged, report.added) == (len(before), new)
        after = contents(copy / name)
        for path, video in before.items():
            assert_same_arrays(after[path], video)
    assert [process.returncode for process in started.values()] == [-signal.SIGKILL, 130]
    line = "drl_jax.search: interrupted; the index is kept; rerun the command to continue"
    assert errors["ctrl-c"].splitlines()[-1] == line


def count_stored(directory: Path) -> int:
    try:
        return IndexPart(directory).videos()
    except SearchIndexError:  # Not created yet.
        return 0


# ---------------------------------------------------------------------- joined indexes


def test_a_joined_index_is_one_of_all_files_bit_for_bit(search_model, shared):
    """Hits, scores, order and refined moments, of queries of every kind."""

    def open_both(options):
        return [Index(shared / name, search_model, options) for name in ("joined", "all")]

    picture = np.random.default_rng(0).bytes(int(np.prod(search_model.frame_form.shape)))
    plain, corrected = map(open_both, (SearchOptions(), SearchOptions(correction=CORRECTION)))
    for indexes, ask in (
        (corrected, lambda state: "a red circle"),
        (plain, lambda state: "a red circle"),
        (plain, lambda state: Query(like=(state.video_at("long.mp4"), 20.0))),
        (plain, lambda state: Query("a dog", without="a red circle")),
        (plain, lambda state: Query(picture=picture)),
        (plain, lambda state: Query(video=shared / "videos" / "long.mp4")),
    ):
        for filters in (None, Filters(folder="c"), Filters(only=("a.mp4", "long.mp4"))):
            joined, one = (i.search(ask(i.state()), 9, filters=filters) for i in indexes)
            assert len(joined) == {None: 6}.get(filters, 2)
            for hit, other in zip(joined, one, strict=True):
                same = ("rank", "path", "moments", "windows", "score")
                assert [getattr(hit, n) for n in same] == [getattr(other, n) for n in same]
                np.testing.assert_array_equal(hit.scores, other.scores)
    joined, one = (index.state() for index in plain)
    for video, other in zip(joined.videos, one.videos, strict=True):
        assert (joined.video_at(video.path), video.windows) == (video, other.windows)
        assert video.thumbnails((0, 1)) == other.thumbnails((0, 1))
        assert joined.is_unchanged(video)
    pages = [SearchAPI(index, 10, 0) for index in plain]
    for answer in (
        lambda page: page.facts(),
        lambda page: page.unsearchable(),
        lambda page: page.video(PageQuery("a dog", video="long.mp4")),
    ):
        assert answer(pages[0]) == answer(pages[1])


def test_a_file_is_in_one_shard(search_model, copy):
    assert [parse_shard(text) for text in ("0/2", "03/16")] == ["0/2", "3/16"]
    for text in ("2/2", "1", "a/b", "-1/2", "1/2/3", "0/100001"):
        with pytest.raises(UserError, match="write NUMBER/COUNT, from 0/16 to 15/16"):
            parse_shard(text)
    # The same on every machine, and in every version.
    for name, number in zip(NAMES, HASHES, strict=True):
        assert [is_in_shard(name, f"{n}/4") for n in range(4)] == [n == number for n in range(4)]
    update(search_model, copy, "quarter", shard="3/4")
    assert contents(copy / "quarter").keys() == {"c/e.mp4", "g.mp4"}


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
