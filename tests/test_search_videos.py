"""Large indexes: rows are read when they are asked for, and checked in the background."""

import shutil

import numpy as np
import pytest
from drl_jax.search.indexing import update_index
from drl_jax.search.rows import SearchIndexError
from drl_jax.search.snapshot import IndexSnapshot
from drl_jax.search.store import Store
from drl_jax.search.videos import slots_of
from drl_jax.search.writer import IndexWriter
from support.videos import write_video

from drl_jax.runtime.errors import UserError
from drl_jax.search import integrity, rows, store, writer
from drl_jax.search.filters import Filters
from drl_jax.search.session import SearchSession

NAMES = ("a.mp4", "b.mp4", "c/d.mp4", "e.mp4", "long.mp4")


def frames(level: int, seconds: int) -> np.ndarray:
    return np.full((2 * seconds, 64, 64, 3), level, np.uint8)


@pytest.fixture(scope="module")
def shared(search_model, tmp_path_factory):
    """A folder of videos, of which one has several windows, and its index."""
    folder = tmp_path_factory.mktemp("large") / "videos"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, frames(40 * number, 30 if name == "long.mp4" else 2), fps=2)
    update_index(search_model, folder, folder.parent / "index", storage="float32")
    return folder.parent


@pytest.fixture
def copy(shared, tmp_path):
    for name in ("videos", "index"):
        shutil.copytree(shared / name, tmp_path / name)
    with IndexWriter(tmp_path / "index") as index_writer:
        index_writer.update_header(videos=str(tmp_path / "videos"))
    return tmp_path


@pytest.fixture
def in_background(monkeypatch):
    monkeypatch.setattr(integrity, "_AT_ONCE", 0)


def test_only_videos_that_are_shown_are_decoded(search_model, shared, monkeypatch):
    """Neither opening nor a query decodes other rows; the check does, and is off here."""
    monkeypatch.setattr(integrity.IndexCheck, "_run", lambda self: None)
    decoded = []
    monkeypatch.setattr(store, "from_row", lambda row: decoded.append(row[0]) or rows.from_row(row))
    snapshot = SearchSession(shared / "index", search_model).snapshot()
    assert len(snapshot.videos) == len(NAMES)
    assert snapshot.videos.windows == len(snapshot.videos.slots) > len(NAMES)
    assert decoded == []
    (hits,) = snapshot.search(["a"], top=2)
    assert sorted(decoded) == sorted(hit.video.path for hit in hits)
    snapshot.search(["a"], top=2)
    assert len(decoded) == 2  # They stay in memory.
    assert snapshot.video_at("c/d.mp4").path == "c/d.mp4"
    assert snapshot.video_at("d.mp4") is None


def test_a_sequence_of_the_videos(search_model, shared):
    snapshot = SearchSession(shared / "index", search_model).snapshot()
    videos = list(snapshot.videos)
    assert [video.path for video in videos] == list(NAMES)
    assert snapshot.videos[1:3] == videos[1:3]
    assert snapshot.videos[-1] == videos[-1]
    np.testing.assert_array_equal(snapshot.videos.slots, slots_of(videos))
    # Windows of the same video in between, each video once.
    order = [*videos[4].slots, videos[0].slot, videos[4].slot]
    assert snapshot.videos.at_slots(np.array(order)) == [videos[4], videos[0]]
    chosen = snapshot.filtered(Filters(folder="c"))
    assert [video.path for video in chosen] == ["c/d.mp4"]
    assert len(snapshot.filtered(Filters(min_length=10))) == 1
    only = ("long.mp4", "a.mp4")
    assert [video.path for video in snapshot.filtered(Filters(only=only))] == ["a.mp4", "long.mp4"]
    assert len(snapshot.filtered(Filters(only=only, min_length=10))) == 1
    with pytest.raises(UserError, match=r"no video of the index has the path 'x\.mp4'"):
        snapshot.filtered(Filters(only=("a.mp4", "x.mp4")))


def test_filters_that_many_videos_pass_find_the_same(search_model, shared):
    """The features of few are copied; of many they are compared in place."""
    snapshot = SearchSession(shared / "index", search_model).snapshot()
    (everything,) = snapshot.search(["a"], top=9)
    for few in ([0], [0, 4], [1, 2, 3, 4]):
        chosen = [snapshot.videos[number] for number in few]
        (found,) = snapshot.best_videos(search_model.encode_text(["a"]), 9, chosen)
        assert found == [hit.video for hit in everything if hit.video in chosen]


def test_damage_of_a_large_index_is_found_in_the_background(search_model, copy, in_background):
    flip(copy / "index", row=1)
    session = SearchSession(copy / "index", search_model)
    with pytest.raises(SearchIndexError, match=r"features of b.mp4 have changed"):
        session.snapshot().check.wait()
    with pytest.raises(SearchIndexError, match=r"features of b.mp4 have changed"):
        session.search(["a"], top=1)


def test_what_is_shown_is_checked_first(search_model, copy, in_background, monkeypatch):
    monkeypatch.setattr(integrity.IndexCheck, "_run", lambda self: None)
    flip(copy / "index", row=1)
    snapshot = SearchSession(copy / "index", search_model).snapshot()
    with pytest.raises(SearchIndexError, match=r"features of b.mp4 have changed"):
        snapshot.search(["a"], top=9)


def test_an_update_is_checked_from_where_the_check_was(search_model, copy, in_background):
    session = SearchSession(copy / "index", search_model)
    before = session.snapshot()
    before.check.wait()
    (checked,) = before.check.checked
    assert checked == max(before.videos.slots) + 1
    write_video(copy / "videos" / "new.mp4", frames(250, 2), fps=2)
    update_index(search_model, copy / "videos", copy / "index", storage="float32")
    flip(copy / "index", row=0)  # Checked before; a running process does not read it again.
    after = session.snapshot()
    after.check.wait()
    assert after.check.checked == [checked + 1]


def flip(index, row: int) -> None:
    (path,) = index.glob("frame_unit*.bin")
    with Store(index) as reader:
        size = reader.arrays()["frame_unit"][0].nbytes
    with path.open("r+b") as file:
        file.seek(row * size)
        byte = file.read(1)
        file.seek(row * size)
        file.write(bytes([byte[0] ^ 64]))


def test_an_old_state_is_answered_until_its_files_are_gone(search_model, copy, monkeypatch):
    """Videos are removed, and the index is compacted, while a reader has read no row yet."""
    monkeypatch.setattr(writer, "GROWTH", 1)

    def opened() -> IndexSnapshot:
        return SearchSession(copy / "index", search_model).snapshot()

    expected = [hit.to_json() for hit in opened().search(["a"], top=9)[0]]
    old = [opened(), opened()]
    for name in ("b.mp4", "long.mp4"):
        (copy / "videos" / name).unlink()
    generation = old[0].header["generation"]
    update_index(search_model, copy / "videos", copy / "index", storage="float32")
    write_video(copy / "videos" / "b.mp4", frames(9, 2), fps=2)
    assert opened().header["generation"] == generation + 1
    assert [hit.to_json() for hit in old[0].search(["a"], top=9)[0]] == expected
    assert old[0].video_at("long.mp4").path == "long.mp4"
    # The next writer removes the files of the old generation, and what is kept for its readers.
    update_index(search_model, copy / "videos", copy / "index", storage="float32")
    with pytest.raises(SearchIndexError, match="was made anew while it was read; ask again"):
        old[1].search(["a"], top=9)
    assert len(opened().videos) == len(NAMES) - 1


def test_an_index_without_counts_is_read_and_upgraded(search_model, copy):
    """One that an earlier version of the same format made."""
    expected = [hit.to_json() for hit in SearchSession(copy / "index").search(["a"], 9)[0]]
    with IndexWriter(copy / "index") as index_writer:
        index_writer._database.execute("DROP INDEX video_slots")
        index_writer._database.execute("DROP TABLE removed_videos")
        index_writer._database.execute("ALTER TABLE videos DROP COLUMN window_count")
        index_writer._database.commit()
    for _ in range(2):
        found = SearchSession(copy / "index", search_model).search(["a"], 9)[0]
        assert [hit.to_json() for hit in found] == expected
        with IndexWriter(copy / "index") as index_writer:
            index_writer.update_header(storage="float32")
    with Store(copy / "index") as reader:
        query = "SELECT window_count FROM videos ORDER BY slot"
        counts = [count for (count,) in reader._database.execute(query)]
        assert counts == reader.slots()[1].tolist()
