"""How annotated videos are found among the files of a folder, under whatever names."""

import errno
import os
import unicodedata
from pathlib import Path

import pytest
from support.datasets import captions_of, read_custom

from data_prep.annotations import AnnotationError, Annotations, Captioned, Source
from data_prep.quarantine import read_quarantine, write_quarantine
from data_prep.video_folder import VideoFolder, make_plan
from drl_jax.runtime.files import files_below


def located(folder, *names):
    """Paths of the files that are found for annotated names, or the reasons, in order."""
    entries = [Captioned(name, ["a"]) for name in names]
    sources = {name: (Source(name),) for name in names}
    clips, reasons = VideoFolder(folder).locate(Annotations({"train": entries}, sources=sources))
    found = {clip.video_id: str(clip.location.relative_to(folder)) for clip in clips} | reasons
    return [found[name] for name in names]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_full_names_come_first(tmp_path):
    touch(tmp_path, "x.mov", "x.mp4", "y.mp4", "sub/z.3g2", "dots..mp4", "ends.", "two.mov.mp4")
    touch(tmp_path, "a\\b.mp4", "a/b.mp4", "c/d.mp4")
    for names, files in (
        (("x.mov", "x.mp4"), ["x.mov", "x.mp4"]),
        (("x",), ["several files have this name: x.mov, x.mp4"]),
        # A file in another container than annotated, but not the file of another video.
        (("y.avi", "y"), ["y.mp4", "y.mp4"]),
        (("y.avi", "y.mp4"), ["no such file", "y.mp4"]),
        (("z.3G2", "sub/z", "sub/z.mov"), ["sub/z.3g2"] * 3),
        (("dots.", "ends."), ["dots..mp4", "ends."]),
        (("two.mov",), ["two.mov.mp4"]),
        (("two.mov", "two.mov.mp4"), ["no such file", "two.mov.mp4"]),
        (("two.mov.mp4.qt",), ["two.mov.mp4"]),
        # A name with a backslash comes before a path.
        (("a\\b.mp4", "a/b.mp4", "c\\d"), ["a\\b.mp4", "a/b.mp4", "c/d.mp4"]),
        # Names that no file can have.
        (
            ("n" * 5000, "deep/" * 1000 + "y.mp4", "nul\0.mp4", "y"),
            ["no such file"] * 3 + ["y.mp4"],
        ),
    ):
        assert located(tmp_path, *names) == files


@pytest.mark.parametrize(("annotated", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_compared_in_their_composed_form(annotated, stored, tmp_path):
    name = unicodedata.normalize(stored, "Café/été.mp4")
    touch(tmp_path, name)
    names = ("Café/été.mp4", "été.mp4", "été", "été.mov", "Café/été")
    for text in (unicodedata.normalize(annotated, name) for name in names):
        assert located(tmp_path, text) == [name]


def test_folders_behind_links_are_searched_once(tmp_path):
    folder, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    touch(folder, "real/a.mp4")
    touch(elsewhere, "b.mp4", "deep/c.mp4")
    (folder / "again").symlink_to("real")
    (folder / "link").symlink_to(elsewhere)
    (folder / "other_link").symlink_to(elsewhere)
    (folder / "real" / "loop").symlink_to("..")
    (elsewhere / "back").symlink_to(folder)
    (folder / "broken").symlink_to("nowhere")
    found = [str(path.relative_to(folder)) for path in files_below(folder)]
    assert found == ["link/b.mp4", "link/deep/c.mp4", "real/a.mp4"]
    assert located(folder, "a", "again/a.mp4", "link/deep/c.mp4", "other_link/b.mp4") == [
        *("real/a.mp4", "again/a.mp4", "link/deep/c.mp4", "other_link/b.mp4")
    ]


def test_files_are_found_however_the_folder_is_written(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    touch(folder, "a.mp4", "sub/b.mp4")
    touch(elsewhere, "c.mp4")
    (folder / "link").symlink_to(elsewhere)
    (folder / "other").symlink_to("link")
    (tmp_path / "through").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = (
        *("other/c.mp4", "./a.mp4", "sub/../a.mp4", "sub\\b.mp4", ".\\sub\\b", "other\\c.mp4"),
        *(f"{folder}/sub/b.mp4", f"{tmp_path}/through/a.mp4", f"{folder}/other/c.mp4"),
    )
    inner = ["other/c.mp4", "a.mp4", "a.mp4", "sub/b.mp4", "sub/b.mp4", "other/c.mp4"]
    inner += ["sub/b.mp4", "a.mp4", "link/c.mp4"]
    for written in ("videos", folder, "elsewhere/../videos", "through", "through/sub/.."):
        paths = [folder.parent / written / name for name in inner]
        found = located(tmp_path / written if written == folder else Path(written), *names)
        assert [(Path(written) / name).resolve() for name in found] == [p.resolve() for p in paths]
    outside = ("../elsewhere/c.mp4", f"{elsewhere}/d.mp4", "C:\\a.mp4", "..\\videos\\a.mp4")
    assert located(folder, *outside) == ["no such file"] * 4


def test_videos_of_a_folder_that_is_refused_are_not_absent(tmp_path, monkeypatch):
    """An index would remove them, and a build leave them out."""
    touch(tmp_path, "a.mp4", "b/c.mp4", "lost+found/d.mp4")
    scan = os.scandir

    def refuse(path):
        if Path(path).name in refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = {"lost+found"}
    assert files_below(tmp_path) == [tmp_path / "a.mp4", tmp_path / "b" / "c.mp4"]
    refused = {"b"}
    with pytest.raises(PermissionError, match=f"{tmp_path}/b"):
        files_below(tmp_path)


def test_ids_in_quarantine_can_start_with_a_hash(tmp_path):
    path = tmp_path / "quarantine.txt"
    reasons = {"#cat": "a", "\\#dog": "b", "\\\\#cow": "c", "\\bird": "d", "two\u2028lines": "e"}
    write_quarantine(path, reasons)
    assert read_quarantine(path) == reasons
    # Edited with Notepad.
    path.write_bytes("\ufeff# comment\r\nvideo1\tblack\r\n#cat\ta\r\n\r\nvideo2\r\n".encode())
    assert read_quarantine(path) == {"video1": "black", "video2": "no reason given"}


# ---------------------------------------------------------------- one file, several names

SPELLINGS = ("normal.mp4", "normal", "./normal.mp4", "sub/../normal.mp4", "link.mp4", "hard.mp4")


@pytest.fixture
def videos(tmp_path):
    """Two files; one of them has two more paths. The files are not opened."""
    folder = tmp_path / "videos"
    touch(folder, "normal.mp4", "sub/a.mp4")
    (folder / "link.mp4").symlink_to("normal.mp4")
    (folder / "hard.mp4").hardlink_to(folder / "normal.mp4")
    return folder


def planned(videos, rows, columns="video,caption,split"):
    annotations = read_custom(videos.parent / "mine.csv", "\n".join([columns, *rows]))
    return make_plan(annotations, videos, {})


def test_a_file_is_not_in_two_splits_under_two_names(videos):
    for other in SPELLINGS[1:]:
        message = (
            rf"'normal.mp4' of train and '{other}' of test are"
            r" the same file, .*normal.mp4, in different splits \(pairs of such names: 1\)"
        )
        with pytest.raises(AnnotationError, match=message):
            planned(videos, ["normal.mp4,a dog,train", "sub/a,a cat,val", f"{other},a bird,test"])


def test_names_of_one_file_are_one_video(videos):
    plan = planned(videos, [f"{name},a {name},train" for name in SPELLINGS])
    expected = {"normal.mp4": [f"a {name}" for name in SPELLINGS]}
    assert captions_of(plan.annotations) == {"train": expected}
    assert [clip.video_id for clip in plan.clips] == ["normal.mp4"]
    assert plan.merged == dict.fromkeys(SPELLINGS[1:], "normal.mp4")


def test_splits_are_drawn_by_files(videos):
    touch(videos, *(f"{number}.mp4" for number in range(27)))
    rows = [f"{number},caption {number}" for number in range(27)]
    plan = planned(videos, [*rows, *(f"{name},a {name}" for name in SPELLINGS)], "video,caption")
    splits = captions_of(plan.annotations).values()
    assert sorted(len(split) for split in splits) == [3, 3, 22]
    (kept,) = set(SPELLINGS) & {clip.video_id for clip in plan.clips}
    (found,) = (split[kept] for split in splits if kept in split)
    assert sorted(found) == sorted(f"a {name}" for name in SPELLINGS)


def test_spans_of_one_file_in_different_splits_must_not_overlap(videos):
    columns = "video,caption,start,end,split"
    rows = ["normal,a,0,5,train", "link.mp4,b,5,9,test", "normal.mp4,c,2,6,train"]
    message = r"'normal.mp4@2-6' of train and 'link.mp4@5-9' of test .* with spans that overlap"
    with pytest.raises(AnnotationError, match=message):
        planned(videos, rows, columns)
    plan = planned(videos, [*rows[:2], "hard.mp4,c,2,5,train", "normal.mp4,d,0,5.0,train"], columns)
    assert captions_of(plan.annotations) == {
        "train": {"normal@0-5": ["a", "d"], "hard.mp4@2-5": ["c"]},
        "test": {"link.mp4@5-9": ["b"]},
    }
    # One path of a file, which tells later that the videos are of one.
    assert {clip.location for clip in plan.clips} == {videos / "normal.mp4"}
    with pytest.raises(AnnotationError, match=r"in different splits"):
        planned(videos, ["normal,a,,,train", "hard,b,1,2,val"], columns)


def test_splits_of_different_protocols_may_have_one_file_under_two_names(videos):
    splits = {"train": "normal", "full": "link.mp4", "test": "sub/a.mp4"}
    annotations = Annotations({name: [Captioned(v, [name])] for name, v in splits.items()})
    plan = make_plan(annotations, videos, {}, protocols=(("train", "test"), ("full",)))
    assert [clip.video_id for clip in plan.clips] == ["normal", "sub/a.mp4"]
    assert captions_of(plan.annotations)["full"] == {"normal": ["full"]}
    with pytest.raises(AnnotationError, match=r"'normal' of train and 'link.mp4' of full are the"):
        make_plan(annotations, videos, {})
    # A name that is left out is in no split.
    plan = make_plan(annotations, videos, {"link.mp4": "black"})
    assert plan.unusable == {"link.mp4": "in quarantine: black"}
