"""How annotated videos are found among the files of a folder; names as in DiDeMo and MSVD."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from support.videos import numbered_frames, write_video

from data_prep.annotations import AnnotationError, Annotations, Captioned, Source
from data_prep.build import main as build
from data_prep.datasets import builder_class
from data_prep.quarantine import read_quarantine, write_quarantine
from data_prep.video_folder import VideoFolder, make_plan
from drl_jax.data.records import VideoDataset
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
    assert located(tmp_path, "x.mov", "x.mp4") == ["x.mov", "x.mp4"]
    assert located(tmp_path, "x") == ["several files have this name: x.mov, x.mp4"]
    # A file in another container than annotated, but not the file of another video.
    assert located(tmp_path, "y.avi", "y") == ["y.mp4", "y.mp4"]
    assert located(tmp_path, "y.avi", "y.mp4") == ["no such file", "y.mp4"]
    assert located(tmp_path, "z.3G2", "sub/z", "sub/z.mov") == ["sub/z.3g2"] * 3
    assert located(tmp_path, "dots.", "ends.") == ["dots..mp4", "ends."]
    assert located(tmp_path, "two.mov") == ["two.mov.mp4"]
    assert located(tmp_path, "two.mov", "two.mov.mp4") == ["no such file", "two.mov.mp4"]
    assert located(tmp_path, "two.mov.mp4.qt") == ["two.mov.mp4"]


def test_a_name_that_no_file_can_have_is_not_found(tmp_path):
    touch(tmp_path, "x.mp4")
    names = ["n" * 5000, "deep/" * 1000 + "x.mp4", "nul\0.mp4"]
    assert located(tmp_path, *names, "x") == ["no such file"] * 3 + ["x.mp4"]


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


# Names that real files of DiDeMo have.
STRANGE = [
    "1@N00_a.",
    "2@N00_b.mts",
    "3@N00_c.m2ts",
    "4@N00_d.3g2",
    "5@N00_e.qt",
    "6@N00_f.mov.mp4",
]


def lay_out_didemo(root, *, list_suffixes=True):
    """Two videos of each split have names that differ in the suffix alone."""
    write_video(root / "short.mp4", numbered_frames(10), fps=10)
    write_video(root / "long.mp4", numbered_frames(20), fps=10)
    (root / "videos").mkdir()
    (root / "annotations").mkdir()
    for split, names in (("train", STRANGE), ("test", ["same.mov", "same.mp4", "own.avi"])):
        for name in names:
            source = "long.mp4" if name == "same.mp4" else "short.mp4"
            shutil.copy(root / source, root / "videos" / name)
        listed = names if list_suffixes else [name.rpartition(".")[0] for name in names]
        (root / "annotations" / f"{split}_list.txt").write_text("\n".join(dict.fromkeys(listed)))
        entries = [
            {"video": name, "description": f"{name} {part}"} for name in names for part in (1, 2)
        ]
        (root / "annotations" / f"{split}_data.json").write_text(json.dumps(entries))
    return builder_class("didemo"), root / "annotations"


def test_every_name_of_didemo_is_found_and_no_query_has_the_sentences_of_two_videos(tmp_path):
    lay_out_didemo(tmp_path)
    flags = [f"--{name}={tmp_path / name}" for name in ("videos", "annotations")]
    assert build(["didemo", *flags, f"--data_dir={tmp_path}", "--image_size=32"]) == 0
    dataset = VideoDataset(tmp_path / "didemo" / "32px_64f_jpeg" / "1.0.0")
    assert dataset.manifest["left_out"] == {}
    split = dataset.split("test")
    assert dict(
        zip((dataset.video_ids[video] for video in split.videos), split.captions, strict=True)
    ) == {
        "same.mov": ["same.mov 1 same.mov 2"],
        "same.mp4": ["same.mp4 1 same.mp4 2"],
        "own": ["own.avi 1 own.avi 2"],
    }
    assert [len(dataset.read_frames(video)) for video in split.videos] == [1, 2, 1]
    train = [dataset.video_ids[video] for video in dataset.split("train").videos]
    assert train == ["1@N00_a", "2@N00_b", "3@N00_c", "4@N00_d", "5@N00_e", "6@N00_f.mov"]


def test_lists_of_didemo_without_suffixes(tmp_path):
    builder, annotations = lay_out_didemo(tmp_path, list_suffixes=False)
    with pytest.raises(AnnotationError, match=r"same can be same.mov or same.mp4 of .*full name"):
        builder.read_annotations(annotations)
    (annotations / "test_list.txt").write_text("own\nsame.mov\n")
    found = builder.read_annotations(annotations)
    assert [entry.video_id for entry in found.splits["test"]] == ["own", "same.mov"]
    assert found.sources["own"][0].file == "own.avi"
    assert located(tmp_path / "videos", *(found.sources[v][0].file for v in found.sources)) == [
        *STRANGE, "own.avi", "same.mov",
    ]  # fmt: skip
    (annotations / "test_list.txt").write_text("own\nother.mov\n")
    found = builder.read_annotations(annotations)
    assert [entry.video_id for entry in found.splits["test"]] == ["own"]
    assert found.left_out == {"test_list.txt, other": "no caption in test_data.json"}
    (annotations / "test_list.txt").write_text("other.mov\n")
    with pytest.raises(AnnotationError, match=r"1 of the 1 videos of .* no caption .*'other'\)"):
        builder.read_annotations(annotations)
    (annotations / "test_list.txt").write_text("own\n")
    (annotations / "test_data.json").write_text('[{"video": "own.avi", "description": " "}]')
    with pytest.raises(AnnotationError, match=r"1 of the 1 videos of .* have no caption"):
        builder.read_annotations(annotations)


@pytest.mark.parametrize("described", [["same"], ["same.mp4"]])
def test_two_listed_videos_of_didemo_never_have_the_same_description(described, tmp_path):
    builder, annotations = lay_out_didemo(tmp_path)
    entries = [{"video": name, "description": "a"} for name in (*described, "own")]
    (annotations / "test_data.json").write_text(json.dumps(entries))
    message = rf"lists same.mov and same.mp4, but .*test_data.json describes {described[0]} alone"
    with pytest.raises(AnnotationError, match=message):
        builder.read_annotations(annotations)
    (annotations / "test_list.txt").write_text("same.mov\nown.avi\n")
    assert len(builder.read_annotations(annotations).splits["test"]) == 2


@pytest.mark.parametrize("protocol", [0, 4])
def test_the_pickle_of_msvd_can_have_sentences(protocol, tmp_path):
    content = {"v": ["a man", ["a", "dog", "runs"]]}
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(content, protocol))
    (tmp_path / "test_list.txt").write_text("v\n")
    annotations = builder_class("msvd").read_annotations(tmp_path)
    assert annotations.splits["test"] == [Captioned("v", ["a man", "a dog runs"])]


@pytest.mark.parametrize("content", [{"v": "a man"}, {"v": [["a", 7]]}, {"v": [7]}, ["a"]])
def test_a_pickle_of_msvd_with_another_structure(content, tmp_path):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "test_list.txt").write_text("v\n")
    with pytest.raises(
        AnnotationError, match=r"raw-captions.pkl(, video v: expected a list of|.*must)"
    ):
        builder_class("msvd").read_annotations(tmp_path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"sentences": [{"video_id": "v", "caption": 7}]},
         "sentence 1: video_id and caption must be texts, not 'v' and 7"),
        ({"sentences": [{"video_id": 7010, "caption": "a"}]}, "sentence 1: .* not 7010 and 'a'"),
        ({"sentences": [{"video_id": ["v"], "caption": "a"}]}, "sentence 1: video_id and caption"),
        ({"sentences": [], "videos": [{"video_id": 7, "split": "test"}]},
         "video_id 7 is not a text"),
    ],
)  # fmt: skip
def test_numbers_in_the_json_of_msrvtt(document, message, tmp_path):
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=message) as error:
        builder_class("msrvtt").read_annotations(tmp_path)
    assert "\n" not in str(error.value)


def test_ids_in_quarantine_can_start_with_a_hash(tmp_path):
    path = tmp_path / "quarantine.txt"
    reasons = {"#cat": "a", "\\#dog": "b", "\\\\#cow": "c", "\\bird": "d", "two\u2028lines": "e"}
    write_quarantine(path, reasons)
    assert read_quarantine(path) == reasons
    # A file of an earlier version, or edited with Notepad.
    path.write_bytes("\ufeff# comment\r\nvideo1\tblack\r\n#cat\ta\r\n\r\nvideo2\r\n".encode())
    assert read_quarantine(path) == {"video1": "black", "video2": "no reason given"}
    path.write_bytes("café\ta\n".encode("latin-1"))
    with pytest.raises(AnnotationError, match=r"quarantine.txt is not text in UTF-8"):
        read_quarantine(path)


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
    path = videos.parent / "mine.csv"
    path.write_text("\n".join([columns, *rows]))
    return make_plan(builder_class("custom").read_annotations(path), videos, {})


def captions(plan):
    return {
        split: {entry.video_id: entry.captions for entry in captioned}
        for split, captioned in plan.annotations.splits.items()
    }


@pytest.mark.parametrize("other", SPELLINGS[1:])
def test_a_file_is_not_in_two_splits_under_two_names(other, videos):
    message = (
        rf"'normal.mp4' of train and '{other}' of test are"
        r" the same file, .*normal.mp4, in different splits \(pairs of such names: 1\)"
    )
    with pytest.raises(AnnotationError, match=message):
        planned(videos, ["normal.mp4,a dog,train", "sub/a,a cat,val", f"{other},a bird,test"])


def test_names_of_one_file_are_one_video(videos):
    plan = planned(videos, [f"{name},a {name},train" for name in SPELLINGS])
    assert captions(plan) == {"train": {"normal.mp4": [f"a {name}" for name in SPELLINGS]}}
    assert [clip.video_id for clip in plan.clips] == ["normal.mp4"]
    assert plan.merged == dict.fromkeys(SPELLINGS[1:], "normal.mp4")


def test_splits_are_drawn_by_files(videos):
    touch(videos, *(f"{number}.mp4" for number in range(27)))
    rows = [f"{number},caption {number}" for number in range(27)]
    plan = planned(videos, [*rows, *(f"{name},a {name}" for name in SPELLINGS)], "video,caption")
    assert sorted(len(split) for split in captions(plan).values()) == [3, 3, 22]
    (kept,) = set(SPELLINGS) & {clip.video_id for clip in plan.clips}
    found = next(split[kept] for split in captions(plan).values() if kept in split)
    assert sorted(found) == sorted(f"a {name}" for name in SPELLINGS)


def test_spans_of_one_file_in_different_splits_must_not_overlap(videos):
    columns = "video,caption,start,end,split"
    rows = ["normal,a,0,5,train", "link.mp4,b,5,9,test", "normal.mp4,c,2,6,train"]
    with pytest.raises(
        AnnotationError,
        match=r"'normal.mp4@2-6' of train and 'link.mp4@5-9' of test .* with spans that overlap",
    ):
        planned(videos, rows, columns)
    plan = planned(videos, [*rows[:2], "hard.mp4,c,2,5,train", "normal.mp4,d,0,5.0,train"], columns)
    assert captions(plan) == {
        "train": {"normal@0-5": ["a", "d"], "hard.mp4@2-5": ["c"]},
        "test": {"link.mp4@5-9": ["b"]},
    }
    # One path of a file, which tells later that the videos are of one.
    assert {clip.location for clip in plan.clips} == {videos / "normal.mp4"}
    with pytest.raises(AnnotationError, match=r"in different splits"):
        planned(videos, ["normal,a,,,train", "hard,b,1,2,val"], columns)


def test_splits_of_different_protocols_may_have_one_file_under_two_names(videos):
    splits = {
        "train": [Captioned("normal", ["a"])],
        "full": [Captioned("link.mp4", ["b"])],
        "test": [Captioned("sub/a.mp4", ["c"])],
    }
    protocols = (("train", "test"), ("full",))
    plan = make_plan(Annotations(splits), videos, {}, protocols=protocols)
    assert [clip.video_id for clip in plan.clips] == ["normal", "sub/a.mp4"]
    assert captions(plan)["full"] == {"normal": ["b"]}
    with pytest.raises(AnnotationError, match=r"'normal' of train and 'link.mp4' of full are the"):
        make_plan(Annotations(splits), videos, {})
    # A name that is left out is in no split.
    plan = make_plan(Annotations(splits), videos, {"link.mp4": "black"})
    assert plan.unusable == {"link.mp4": "in quarantine: black"}


# ---------------------------------------------------------------- how paths are written


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


def test_a_name_with_a_backslash_comes_before_a_path(tmp_path):
    touch(tmp_path, "a\\b.mp4", "a/b.mp4", "c/d.mp4")
    assert located(tmp_path, "a\\b.mp4", "a/b.mp4", "c\\d") == ["a\\b.mp4", "a/b.mp4", "c/d.mp4"]
