"""`drl_jax.Index`: folders, files and hits, as a user of a notebook handles them."""

import shutil

import pytest

import drl_jax
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import join
from drl_jax.search.query import Query
from drl_jax.search.update import update_index


@pytest.fixture
def folders(test_videos, tmp_path):
    made = []
    for name, numbers in (("one", range(3)), ("two", range(3, 5))):
        folder = tmp_path / name
        folder.mkdir()
        for number in numbers:
            video = sorted(test_videos.iterdir())[number]
            shutil.copy(video, folder / video.name)
        made.append(folder)
    return made


def test_folders_and_files_are_added(search_model, folders, tmp_path, capfd):
    one, two = folders
    index = drl_jax.Index(tmp_path / "index", search_model)
    assert repr(index) == f"Index {tmp_path / 'index'} of 0 videos"
    with pytest.raises(drl_jax.UserError, match=r"no index in .*; make it with drl_jax\.Index"):
        index.search("a dog")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(drl_jax.UserError, match=r"no video in .*empty"):
        index.add(empty)
    assert index.add(one).added == 3
    assert capfd.readouterr().err == ""
    assert index.add(str(two), progress=True).added == 2
    assert "indexing" in capfd.readouterr().err
    assert repr(index).startswith(f"Index of 5 videos of {tmp_path} in")
    paths = [hit.path for hit in index.search("a dog", top=9)]
    assert sorted(paths) == sorted([*one.iterdir(), *two.iterdir()])
    # The scores are those of an index of one folder with all of them.
    alone = drl_jax.Index(tmp_path / "alone", search_model)
    alone.add(two)
    scores = {hit.path: hit.score for hit in index.search("a dog", top=9)}
    for hit in alone.search("a dog", top=9):
        assert scores[hit.path] == pytest.approx(hit.score, abs=1e-6)

    assert index.add(one).unchanged == 3
    (removed, *_), new = sorted(two.iterdir()), two / "new.mp4"
    shutil.copy(removed, new)
    assert index.add([new, one]).added == 1
    new.unlink()
    assert index.add([new]).removed == 1
    assert len(drl_jax.Index(tmp_path / "index").search("a dog", top=9)) == 5
    for given, message in (
        ([], "no video to add"),
        ("none", "none: neither .*one nor the index has such a video"),
        (tmp_path, "overlaps with .*one, which the index"),
        (__file__, "is in no folder of the index"),
        (None, "add takes a list of files, not NoneType"),
        ("", "a video: the path is empty"),
    ):
        with pytest.raises(drl_jax.UserError, match=message):
            index.add(given)


def test_a_second_folder_is_made_as_the_first_one(search_model, folders, tmp_path):
    one, two = folders
    directory = tmp_path / "index"
    update_index(search_model, one, directory, storage="int8", bank=["a dog", "a cat"])
    with pytest.raises(drl_jax.UserError, match="made with another storage, int8"):
        update_index(search_model, two, directory, storage="float32")
    index = drl_jax.Index(directory, search_model)
    assert index.add(two).added == 2
    assert index.state().header["hubness"]["captions"] == 2
    assert len(index.search("a dog", top=9)) == 5
    # A list of other indexes gets one, too.
    shutil.copytree(directory / "parts", tmp_path / "parts")
    (part,) = (tmp_path / "parts").iterdir()
    join(tmp_path / "joined", [part])
    joined = drl_jax.Index(tmp_path / "joined", search_model)
    assert joined.add(one).added == 3
    assert len(joined.search("a dog", top=9)) == 5


def test_an_index_without_a_video_is_filled_later(search_model, folders, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.mp4").write_bytes(b"")
    assert drl_jax.Index(tmp_path / "index", search_model).add(bad).bad.keys() == {"a.mp4"}
    index = drl_jax.Index(tmp_path / "index")
    with pytest.raises(drl_jax.UserError, match=r"has no video that can be searched \(1 cannot\)"):
        index.search("a dog")
    shutil.copy(min(folders[0].iterdir()), bad / "b.mp4")
    assert index.add(bad).added == 1
    assert len(index.search("a dog")) == 1
    with pytest.raises(drl_jax.UserError, match="path is empty"):
        drl_jax.Index("", search_model)
    for arguments in ({"top": 0}, {"top": True}, {"moments": 2.5}, {"filters": "x"}):
        with pytest.raises(drl_jax.UserError):
            index.search("a dog", **arguments)
    for query in (None, 3, {"a": 1}, [None]):
        with pytest.raises(drl_jax.UserError, match="a query is a sentence"):
            index.search(query)


def paths_of(index):
    return {hit.path for hit in index.search("a dog", top=9)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_of_two_folders_is_renamed_or_deleted(search_model, folders, tmp_path, order):
    index = drl_jax.Index(tmp_path / "index", search_model)
    for number in order:
        index.add(folders[number])
    new = folders[0].rename(tmp_path / "new")
    assert index.add(new).unchanged == 3
    assert paths_of(index) == {*new.iterdir(), *folders[1].iterdir()}
    # Another folder with the old name is another one, also if it has the same files.
    shutil.copytree(new, folders[0])
    assert index.add(folders[0]).added == 3
    assert index.add(new).unchanged == 3
    shutil.rmtree(new)
    with pytest.raises(drl_jax.UserError, match=r"no directory .*new; is it mounted"):
        index.add(new)
    assert index.add(new, prune=True).removed == 3
    assert paths_of(index) == {*folders[0].iterdir(), *folders[1].iterdir()}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Filters(folder=3),
        lambda: Filters(name=None),
        lambda: Filters(min_length="1"),
        lambda: Filters(max_length=float("nan")),
        lambda: Filters(since="2026-01-31"),
        lambda: Filters(only="a.mp4"),
        lambda: Query(sentence=3),
        lambda: Query(video=3),
        lambda: Query(picture=["a"]),
        lambda: Query(like="a.mp4"),
    ],
)
def test_wrong_filters_and_queries_are_one_line(wrong):
    with pytest.raises(drl_jax.UserError, match=r"^(Filters: \w+|\w+ of a Query) is a .*, not "):
        wrong()


def test_hits_are_shown(search_model, folders, tmp_path, monkeypatch):
    index = drl_jax.Index(tmp_path / "index", search_model)
    (folders[0] / "a <b>.mp4").write_bytes(min(folders[1].iterdir()).read_bytes())
    index.add(folders[0])
    hits = index.search("a dog & a cat", top=4)
    assert repr(hits).splitlines()[0] == "4 hits of 'a dog & a cat'"
    html = hits._repr_html_()
    assert "a dog &amp; a cat" in html
    assert "a &lt;b&gt;.mp4" in html
    assert html.count("data:image/jpeg;base64,") == 4
    assert hits[0].explain()._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(drl_jax.UserError, match="has 1 moments, from 0, and none 3"):
        hits[0].explain(3)
    monkeypatch.setattr(search_model.interaction, "HAS_EXPLANATION", False)
    with pytest.raises(drl_jax.UserError, match="has no explanation"):
        index.search("a cat", top=1)[0].explain()
    both = index.search(["a dog", "a cat"], top=2)
    assert [one.query for one in both] == ["a dog", "a cat"]
    pandas = pytest.importorskip("pandas")
    table = hits.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table["rank"].tolist() == [1, 2, 3, 4]
    assert hits[1:].to_pandas()["rank"].tolist() == [2, 3, 4]
    assert table["score"].tolist() == [hit.score for hit in hits]
