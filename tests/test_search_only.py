"""Updates of some files, `index --only`: they do not take longer for a larger index."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from drl_jax.search.indexing import update_index
from drl_jax.search.rows import IndexedVideo, SearchIndexError
from drl_jax.search.store import Store
from drl_jax.search.writer import IndexWriter
from support.commands import error_of
from support.videos import write_video

from drl_jax.runtime.errors import UserError
from drl_jax.search import store as store_module
from drl_jax.search.session import SearchSession
from drl_jax.search.windows import Window


def frames(level: int, seconds: int = 2) -> np.ndarray:
    return np.full((2 * seconds, 64, 64, 3), level, np.uint8)


@pytest.fixture(scope="module")
def shared(search_model, tmp_path_factory):
    """A folder of four videos, and its index; not to be changed."""
    root = tmp_path_factory.mktemp("only")
    (root / "videos" / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "b.mp4", "sub/c.mp4", "sub/d.mp4")):
        write_video(root / "videos" / name, frames(50 * number), fps=2)
    update_index(search_model, root / "videos", root / "index", storage="float32")
    return root


@pytest.fixture
def copy(shared, tmp_path):
    root = shutil.copytree(shared, tmp_path / "copy")
    with IndexWriter(root / "index") as writer:
        writer.update_header(videos=str(root / "videos"))
    return root


def update(model, root: Path, *only: str, **flags):
    return update_index(
        model, root / "videos", root / "index", storage="float32", only=only, **flags
    )


def header(index: Path) -> dict:
    with contextlib.closing(sqlite3.connect(index / "index.sqlite")) as database:
        return json.loads(database.execute("SELECT value FROM header").fetchone()[0])


def test_only_the_named_files_are_updated(search_model, copy):
    videos, index = copy / "videos", copy / "index"
    session = SearchSession(index, search_model)
    assert (header(index)["rows"], header(index)["windows"]) == (4, 4)
    write_video(videos / "new.mp4", frames(210, 30), fps=2)
    write_video(videos / "b.mp4", frames(230), fps=2)
    (videos / "bad.mp4").write_text("no video")
    (videos / "sub" / "c.mp4").unlink()
    # Others change, too, and are left alone.
    write_video(videos / "a.mp4", frames(240), fps=2)
    (videos / "sub" / "d.mp4").unlink()
    named = ("new.mp4", "./b.mp4", str(videos / "sub" / "c.mp4"), "bad.mp4", "new.mp4")
    report = update(search_model, copy, *named)
    assert (report.added, report.changed, report.removed, report.unchanged) == (2, 1, 1, 0)
    assert report.bad.keys() == {"bad.mp4"}
    found = session.snapshot()
    assert {v.path for v in found.videos} == {"a.mp4", "b.mp4", "new.mp4", "sub/d.mp4"}
    assert found.unsearchable_count == 1
    windows = found.videos.windows
    assert (header(index)["rows"], header(index)["windows"]) == (5, windows)
    assert report.windows == windows == 3 + len(found.video_at("new.mp4").windows)
    # The whole folder: the rest follows, and what is counted is right.
    report = update_index(search_model, videos, index, storage="float32")
    assert (report.added, report.changed, report.removed, report.unchanged) == (0, 1, 1, 3)
    assert (header(index)["rows"], header(index)["windows"]) == (4, windows - 1)
    assert len(session.snapshot().videos) == 3


def test_files_that_can_not_be_named(search_model, copy, search_run, capsys):
    videos = copy / "videos"
    (videos / "text.txt").write_text("")
    (videos / "link").symlink_to("sub")
    for path, message in (
        ("none.mp4", r"--only=none.mp4: neither .* nor the index has such a video"),
        ("text.txt", r"neither .* nor the index has such a video"),
        ("sub", r"--only takes files, and .*sub is a folder"),
        ("../copy/videos/a.mp4", r"--only takes paths below .*videos, not \.\./copy"),
        (str(copy / "a.mp4"), r"--only takes paths below"),
        ("link/c.mp4", r"leads through a link: name sub/c.mp4"),
        ("\udce9.mp4", r"its name is not UTF-8; rename it"),
    ):
        with pytest.raises(UserError, match=message):
            update(search_model, copy, path)
    assert len(SearchSession(copy / "index", search_model).videos) == 4
    flags = (f"--workdir={search_run}", f"--videos={videos}", f"--index={copy / 'index'}")
    flags = (*flags, "--storage=float32", "--only=none.mp4")
    assert "nor the index has such" in error_of("drl_jax.search", "index", *flags, capsys=capsys)
    # A disk that is not mounted has an empty folder in its place.
    shutil.rmtree(videos)
    videos.mkdir()
    with pytest.raises(UserError, match=r"1 of the 4 videos .* is it the right folder, and moun"):
        update(search_model, copy, "a.mp4")
    assert update(search_model, copy, "a.mp4", prune=True).removed == 1


def test_damage_of_other_files_is_left_to_others(search_model, copy):
    """That of the named ones is seen."""
    index = copy / "index"
    with Store(index) as reader:
        slots = {video.path: video.slot for video in reader.videos()}
    (path,) = index.glob("frame_unit*.bin")
    content = bytearray(path.read_bytes())
    row_bytes = len(content) // 256
    for name in ("a.mp4", "b.mp4"):
        content[slots[name] * row_bytes + 1] ^= 64
    path.write_bytes(content)
    assert update(search_model, copy, "sub/c.mp4").unchanged == 1
    assert update(search_model, copy, "a.mp4").changed == 1
    with pytest.raises(SearchIndexError, match=r"the features of b.mp4 have changed"):
        SearchSession(index, search_model)
    assert update_index(search_model, copy / "videos", index, storage="float32").changed == 1
    assert len(SearchSession(index, search_model).videos) == 4


def test_rows_and_windows_are_counted_once(search_model, copy):
    """Of an index whose version did not count them, or counted them wrong."""
    index, (videos, windows) = copy / "index", (4, 4)
    for change in ("rows", "windows"):
        with IndexWriter(index) as writer:
            del writer.header[change]
            writer.update_header()
        assert (header(index)["rows"], header(index)["windows"]) == (videos, windows)
    with IndexWriter(index) as writer:
        writer.update_header(windows=3)
    assert update_index(search_model, copy / "videos", index, storage="float32").windows == windows
    with IndexWriter(index) as writer:
        writer.update_header(windows=1, next_slot=1000)
        writer.compact()
    assert header(index)["windows"] == windows
    assert header(index)["generation"] == 1  # There are in fact many unused slots.
    assert header(index)["next_slot"] == windows
    with IndexWriter(index) as writer:
        writer.update_header(windows=1, next_slot=300)
        writer._database.execute("UPDATE videos SET window_count = 70")
        writer._database.execute("UPDATE videos SET slot = 70 * slot")
        writer._database.commit()
        writer.compact()
    assert (header(index)["windows"], header(index)["generation"]) == (280, 1)


# ---------------------------------------------------------------------- time


def made_index(root: Path, model, size: int) -> Path:
    """An index of made-up videos, of which there are no files."""
    rng = np.random.default_rng(0)
    window = Window(0.0, 1.0, (0, 1))
    videos = [
        IndexedVideo(f"{n:06}.mp4", n, n, "0", times=(0.0, 1.0), windows=(window,), duration=2.0)
        for n in range(size)
    ]
    directory = root / str(size)
    with IndexWriter(directory) as writer:
        writer.update_header(
            source=model.source,
            fingerprint=model.fingerprint,
            videos=str(root / "videos"),
            storage="float32",
        )
        rows = rng.normal(size=(size, 2, 4)).astype(np.float32)
        writer.put(videos, {"frame_unit": rows}, {video.path: [b"jpeg"] for video in videos})
    return directory


def test_the_work_of_an_update_does_not_depend_on_the_size(search_model, tmp_path, monkeypatch):
    """Instructions of SQLite's virtual machine: of the whole update, and of storing one video."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "other.txt").write_text("")
    steps, opened = [0], []
    open_database = store_module.open_database

    def counted(directory, *, write):
        connection = open_database(directory, write=write)
        # The handler goes on by returning 0.
        connection.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)
        opened.append(connection)
        return connection

    def steps_of(work) -> int:
        steps[0] = 0
        work()
        return steps[0]

    found = {}
    for size in (100, 10_000):
        index = made_index(tmp_path, search_model, size)
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "open_database", counted)

            def remove(index=index):
                path = "000050.mp4"
                update_index(
                    search_model, tmp_path / "videos", index, storage="float32", only=[path]
                )

            def add(index=index):
                window = Window(0.0, 1.0, (0, 1))
                video = IndexedVideo("new.mp4", 1, 1, "1", times=(0.0, 1.0), windows=(window,))
                with IndexWriter(index) as writer:
                    writer.put([video], {"frame_unit": np.zeros((1, 2, 4), np.float32)}, {})
                    writer.compact()

            found[size] = [steps_of(work) for work in (remove, add)]
        with Store(index) as reader:
            assert len(reader.slots()[0]) == size
    assert opened
    for few, many in zip(found[100], found[10_000], strict=True):
        assert 100 < many < 1.2 * few, found
