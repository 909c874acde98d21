"""Published datasets: every builder on a few files with their layout and syntax."""

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.datasets import captions_of
from support.videos import SHARED, numbered_frames, write_video

from data_prep.annotations import AnnotationError, Annotations
from data_prep.build import main as build
from data_prep.datasets import DRAWN, builder_class, dataset_names
from drl_jax.data.records import VideoDataset


class Layout(NamedTuple):
    """A dataset with all parts of a published one.

    Attributes:
      videos: seconds of the video files, by path below their folder.
      files: annotation files by name: text, bytes, or a value for JSON.
      splits: the expected captions.
    """

    videos: dict[str, int]
    files: dict[str, Any]
    splits: dict[str, dict[str, list[str]]]


def of_videos(*numbers):
    return {f"video{n}": [f"video{n} caption {k}" for k in range(2)] for n in numbers}


MSRVTT = Layout(
    {**{f"TrainVal/video{n}.mp4": 2 for n in range(5)}, "Test/video5.webm": 2},
    {
        "MSRVTT_data.json": {
            "info": {},
            "videos": [
                {"video_id": f"video{n}", "url": "", "start time": 0.0, "split": split}
                for n, split in enumerate([*["train"] * 3, "validate", "test", "test"])
            ],
            "sentences": [
                {"video_id": video, "caption": text, "sen_id": 0}
                for video, texts in of_videos(*range(6)).items()
                for text in texts
            ],
        },
        "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo1\nvideo2\n",
        "MSRVTT_train.7k.csv": "video_id\nvideo0\n",
        "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
        'ret0,msr4,video4,"one, two"\nret1,msr5,video5,three\n',
    },
    {
        "train_9k": of_videos(0, 1, 2),
        "train_7k": of_videos(0),
        "full_train": of_videos(0, 1, 2),
        "full_val": of_videos(3),
        "full_test": of_videos(4, 5),
        "test": {"video4": ["one, two"], "video5": ["three"]},
    },
)
MSVD_WORDS = {
    "-4wsuPCjDBc_5_15": [["a", "squirrel", "is", "eating"], ["the", "squirrel", "eats"]],
    "0bSz70pYAP0_5_15": [["a", "man", "cooks"]],
    "04Gt01vatkk_248_265": [["a", "dog", "runs"]],
    "unused": [["never", "listed"]],
}
MSVD_SENTENCES = {video: [" ".join(words) for words in c] for video, c in MSVD_WORDS.items()}
MSVD_SPLITS = dict(zip(("train", "val", "test"), MSVD_WORDS, strict=False))
MSVD = Layout(
    {f"{name}.avi": 2 for name in MSVD_WORDS},
    {
        # Protocol 0, as written by Python 2.
        "raw-captions.pkl": pickle.dumps(MSVD_WORDS, protocol=0),
        **{f"{split}_list.txt": f"{name}\n\n" for split, name in MSVD_SPLITS.items()},
    },
    {split: {name: MSVD_SENTENCES[name]} for split, name in MSVD_SPLITS.items()},
)
CLIPS = ["Ptf_2VRj-V0_000122_000132", "bpKK_SpjHMA_000001_000003", "TkfL3wyNrhg_000018_000028"]
CLIP_CAPTIONS = {clip: [f"{clip} caption {k}" for k in range(10)] for clip in CLIPS}


def of_clips(**splits):
    return {name: {clip: CLIP_CAPTIONS[clip] for clip in clips} for name, clips in splits.items()}


VATEX = Layout(
    # The second one is a whole YouTube video; the others are cut clips.
    {f"{CLIPS[0]}.mp4": 2, "bpKK_SpjHMA.mp4": 4, f"{CLIPS[2]}.mp4": 2},
    {
        "ref_captions.json": CLIP_CAPTIONS,
        "train_list.txt": "\n".join(CLIPS[:2]),
        "test_list.txt": CLIPS[2],
    },
    of_clips(train=CLIPS[:2], test=CLIPS[2:]),
)
# Other published forms of its annotations.
VATEX_DATA = Layout(
    VATEX.videos,
    {
        "vatex_data.json": {v: {"enCap": c, "chCap": ["不看"]} for v, c in CLIP_CAPTIONS.items()},
        **{f"{split}_list.txt": CLIPS[n] for n, split in enumerate(("train", "val", "test"))},
    },
    of_clips(train=CLIPS[:1], val=CLIPS[1:2], test=CLIPS[2:]),
)
VATEX_OFFICIAL = Layout(
    VATEX.videos,
    {
        f"vatex_{name}_v1.0_ceph.json": [
            {"videoID": clip, "enCap": CLIP_CAPTIONS[clip], "path": "x"} for clip in clips
        ]
        for name, clips in (("training", CLIPS[:2]), ("validation", CLIPS[2:]))
    },
    VATEX.splits,
)
MOVIES = [
    "0001_American_Beauty_00.00.51.926-00.00.54.129",
    "0001_American_Beauty_00.01.45.884-00.01.49.090",
    "3064_SPARKLE_2012_01.41.06.000-01.41.10.793",
]
LSMDC_ROW = "{}\t00.00.51.926\t00.00.54.129\t0\t1\t{}\n".format
LSMDC = Layout(
    {f"{clip.rsplit('_', 1)[0]}/{clip}.avi": 2 for clip in MOVIES},
    {
        # A clip may have several rows; quotation marks are not CSV quoting.
        "LSMDC16_annos_training.csv": LSMDC_ROW(MOVIES[0], 'SOMEONE says "go.')
        + LSMDC_ROW(MOVIES[0], "She goes."),
        "LSMDC16_annos_val.csv": LSMDC_ROW(MOVIES[1], "He waits, bored."),
        "LSMDC16_challenge_1000_publictect.csv": LSMDC_ROW(MOVIES[2], "Dancers take a bow."),
    },
    {
        "train": {MOVIES[0]: ['SOMEONE says "go.', "She goes."]},
        "val": {MOVIES[1]: ["He waits, bored."]},
        "test": {MOVIES[2]: ["Dancers take a bow."]},
    },
)
ACTIVITYNET = Layout(
    {"train/v_QOlSCBRmfWY.mp4": 2, "val/uqiMw7tQ1Cc.webm": 2},
    {
        "train_ids.json": ["v_QOlSCBRmfWY"],
        "val_ids.json": ["v_uqiMw7tQ1Cc"],
        "train.json": {
            "v_QOlSCBRmfWY": {"duration": 2.0, "sentences": ["A woman is seen. ", " She dances."]}
        },
        "val_1.json": {"v_uqiMw7tQ1Cc": {"timestamps": [[0, 1]], "sentences": ["A man lifts."]}},
    },
    {
        "train": {"QOlSCBRmfWY": ["A woman is seen. She dances."]},
        "test": {"uqiMw7tQ1Cc": ["A man lifts."]},
    },
)


def moments(*names):
    """The descriptions of DiDeMo: two of each video."""
    return [
        {"video": name, "description": f"{name} {part}", "times": [[0, 0]], "annotation_id": part}
        for name in names
        for part in (1, 2)
    ]


# Names that real files have; two of the test differ in the suffix alone.
FLICKR = {
    "train": ["1@N00_a.", "2@N00_b.mts", "3@N00_c.m2ts", "4@N00_d.3g2", "5@N00_f.mov.mp4"],
    "test": ["same.mov", "same.mp4", "own.avi"],
}
DIDEMO = Layout(
    # `own` is in another container than the annotations say.
    {**dict.fromkeys(FLICKR["train"], 1), "same.mov": 1, "same.mp4": 2, "own.mp4": 3},
    {
        **{f"{split}_list.txt": "\n".join(names) for split, names in FLICKR.items()},
        **{f"{split}_data.json": moments(*names, "absent.avi") for split, names in FLICKR.items()},
    },
    {
        "train": {
            # Names without their last suffix.
            name.rpartition(".")[0]: [f"{name} 1 {name} 2"]
            for name in FLICKR["train"]
        },
        "test": {
            "same.mov": ["same.mov 1 same.mov 2"],
            "same.mp4": ["same.mp4 1 same.mp4 2"],
            "own": ["own.avi 1 own.avi 2"],
        },
    },
)
LONG = " ".join(["two roses"] * 20)  # More words than a training reads.
CUSTOM = Layout(
    {"holiday/beach.mp4": 4, "garden.webm": 2, "cat.mp4": 2},
    {
        "mine.jsonl": "\n".join(
            json.dumps(row)
            for row in (
                {"video": "holiday/beach.mp4", "caption": "waves", "end": 1, "split": "train"},
                {
                    **{"video": "holiday/beach.mp4", "caption": "sand"},
                    **{"start": 2, "end": 3, "split": "train"},
                },
                {"video": "garden", "captions": ["a rose", LONG], "split": "val"},
                {"video": "cat.mp4", "caption": "it sleeps", "split": "test"},
            )
        )
    },
    {
        "train": {"holiday/beach.mp4@0-1": ["waves"], "holiday/beach.mp4@2-3": ["sand"]},
        "val": {"garden": ["a rose", LONG]},
        "test": {"cat.mp4": ["it sleeps"]},
    },
)
LAYOUTS = {
    "msrvtt": MSRVTT,
    "msvd": MSVD,
    "vatex": VATEX,
    "lsmdc": LSMDC,
    "activitynet": ACTIVITYNET,
    "didemo": DIDEMO,
    "custom": CUSTOM,
}
# Mean level of each stored frame, where it is not 0 and 40, the levels of a video of two seconds:
# `numbered_frames` at 10 frames a second has the level 40 s after s seconds.
LEVELS = {
    # The whole YouTube video is cut to the seconds 1 to 3, both included.
    CLIPS[1]: [40, 80, 120],
    **{video: [0] for video in (*DIDEMO.splits["train"], "same.mov")},
    "own": [0, 40, 80],
    "holiday/beach.mp4@2-3": [80, 120],
}


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path, name: str, files: dict[str, Any] = {}) -> Annotations:  # noqa: B006
    """Reads the annotation files of a layout, of which some are others; None: it is absent."""
    files = {**LAYOUTS[name].files, **files}
    present = {file: content for file, content in files.items() if content is not None}
    return builder_class(name).read_annotations(write_files(folder, present))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Returns `place(path, seconds)`, which writes a video of 1 to 4 seconds to a path."""
    made = tmp_path_factory.mktemp("clips")

    def place(path, seconds):
        file = made / f"{seconds}{'.webm' if path.suffix == '.webm' else '.mp4'}"
        if not file.exists():
            codec = {"codec": "libvpx-vp9", "lossless": "1"} if file.suffix == ".webm" else {}
            write_video(file, numbered_frames(10 * seconds), fps=10, **codec)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, path)

    return place


def test_all_datasets_have_a_layout():
    assert {*LAYOUTS, *DRAWN} == set(dataset_names())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_small_dataset_is_built(name, tmp_path, clips, capsys):
    layout, cls = LAYOUTS[name], builder_class(name)
    for path, seconds in layout.videos.items():
        clips(tmp_path / "videos" / path, seconds)
    annotations = write_files(tmp_path / "annotations", layout.files)
    if name == "custom":
        annotations /= "mine.jsonl"
    sources = (f"--videos={tmp_path / 'videos'}", f"--annotations={annotations}")
    form = (f"--data_dir={tmp_path / 'data'}", "--image_size=32", "--storage=raw")
    assert build([name, *sources, *form]) == 0
    report, errors = capsys.readouterr()
    assert "left out" not in report
    said = re.findall(r"data_prep.build: (.*) captions cut to data.max_words=32 ", errors)
    assert said == (["split val, with CLIP's tokenizer: 1 of 2"] if name == "custom" else [])
    form = dataclasses.replace(cls.DEFAULT_STORAGE.form, size=32)
    storage = dataclasses.replace(cls.DEFAULT_STORAGE, form=form, encoding="raw")
    dataset = VideoDataset(tmp_path / "data" / name / storage.name / "1.0.0")
    ids = list(dataset.video_ids)
    splits = {split: dataset.split(split) for split in dataset.split_names}
    found = {
        name: dict(zip((ids[v] for v in split.videos), split.captions, strict=True))
        for name, split in splits.items()
    }
    assert found == layout.splits
    assert set(ids) == {video for split in layout.splits.values() for video in split}
    for video, video_id in enumerate(ids):
        frames, levels = dataset.read_frames(video), LEVELS.get(video_id, [0, 40])
        assert frames.shape == (len(levels), 32, 32, 3)
        np.testing.assert_allclose(frames.reshape(len(levels), -1).mean(1), levels, atol=3)
    assert {*cls.PUBLISHED} <= {*found, "val"}
    for split in found.keys() & cls.PUBLISHED.keys():
        for unit, (low, _) in cls.PUBLISHED[split].items():
            assert f"published {unit}: {low:,}" in report
    if name == "msrvtt":
        protocols = [dataset.protocol(split) for split in ("test", "train_9k", "other")]
        assert protocols == ["1k-A", "9k", ""]


@pytest.mark.parametrize("layout", [VATEX_DATA, VATEX_OFFICIAL])
def test_other_annotation_files_of_vatex(layout, tmp_path):
    annotations = builder_class("vatex").read_annotations(write_files(tmp_path, layout.files))
    assert captions_of(annotations) == layout.splits
    assert annotations.missing_files == {}


@pytest.mark.skipif(not (SHARED / "msrvtt").is_dir(), reason="no MSR-VTT files beside the project")
def test_the_original_csv_files_have_their_published_sizes(tmp_path):
    shutil.copytree(SHARED / "msrvtt", tmp_path, dirs_exist_ok=True)
    with (tmp_path / "MSRVTT_train.9k.csv").open() as file:
        names = [row["video_id"] for row in csv.DictReader(file)]
    sentences = [{"video_id": name, "caption": "a"} for name in names]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    annotations = builder_class("msrvtt").read_annotations(tmp_path)
    sizes = {name: len(split) for name, split in annotations.splits.items()}
    assert sizes == {"train_9k": 9000, "test": 1000}
    assert set(annotations.missing_files) == {"MSRVTT_train.7k.csv"}


# ---------------------------------------------------------------- what is refused

V = {"video_id": "v"}
MSRVTT_JSON = {
    '{"sentences": [{}]}': 'sentence 1: is not {"video_id"',
    '{"sentences": 7}': "does not have MSR-VTT's structure",
    "{": "MSRVTT_data.json is not a JSON file",
    '{"sentences": [{"video_id": "v", "caption": 7}]}': "caption must be texts, not 'v' and 7",
    '{"sentences": [{"video_id": 7010, "caption": "a"}]}': "sentence 1: .* not 7010 and 'a'",
    '{"videos": [{"video_id": "a", "split": "tset"}], "sentences": []}': '"videos" does not list',
    '{"videos": [{"video_id": 7, "split": "test"}], "sentences": []}': "video_id 7 is not a text",
    json.dumps(
        {
            "videos": [{**V, "split": split} for split in ("train", "train", "test")],
            "sentences": [{**V, "caption": "x"}],
        }
    ): r"entry 1 of .videos. has 'v' in the split train, and entry 3 in test; correct one",
}


def pickled(value):
    return {"raw-captions.pkl": pickle.dumps(value), "test_list.txt": "v\n"}


NO_LISTS = dict.fromkeys(("train_list.txt", "val_list.txt"))
# (dataset, files that are others, the message)
MISTAKES = [
    *(("msrvtt", {"MSRVTT_data.json": text}, message) for text, message in MSRVTT_JSON.items()),
    ("msrvtt", {"MSRVTT_train.9k.csv": "video\nvideo0\n"}, "9k.csv has no column 'video_id'"),
    ("msrvtt", {"MSRVTT_train.9k.csv": "video_id\nvideo0.mp4\n"}, "the first: 'video0.mp4'"),
    ("msrvtt", dict.fromkeys(MSRVTT.files), "no split can be read from .* missing MSRVTT_data"),
    ("msvd", {"raw-captions.pkl": "no pickle"}, "is not a pickle file of captions"),
    ("msvd", {"raw-captions.pkl": None}, "has no captions: neither raw-captions.pkl nor"),
    ("msvd", {"test_list.txt": "other_1_2\n"}, "1 of the 1 videos of .*test_list.txt have no capt"),
    ("msvd", {"val_list.txt": ""}, "val_list.txt is empty"),
    ("msvd", pickled({"v": "a man"}), "raw-captions.pkl, video v: expected a list of captions"),
    ("msvd", pickled({"v": [["a", 7]]}), "raw-captions.pkl, video v: expected a list of captions"),
    ("msvd", pickled(["a"]), "raw-captions.pkl must contain {video"),
    ("msvd", pickled({7: ["a"], "7": ["b"]}), "has the key 7 and the key '7'"),
    ("vatex", {"ref_captions.json": "[]"}, "must contain an object, but contains list"),
    ("vatex", {"ref_captions.json": {"a": "b"}}, "a: expected a list of captions, found 'b'"),
    ("vatex", {"ref_captions.json": '{"a": ["b"],\n "a": ["c"]}'},
     "the key 'a' at line 1 column 2 and again: line 2 column 2"),
    ("vatex", {"ref_captions.json": '{\n"a\\u0062": ["}{"],\n"c": [],\n"ab": []}'},
     "the key 'ab' at line 2 column 1 and again: line 4 column 1"),
    ("vatex", {"vatex_training_v1.0.json": [{"videoID": CLIPS[0], "enCap": ["other"]}]},
     "ref_captions.json and .*v1.0.json have different captions of Ptf_.*; keep one of the files"),
    ("lsmdc", {"LSMDC16_annos_val.csv": "a,b,c\n"}, "line 1: expected 6 tab-separated fields"),
    ("lsmdc", {"LSMDC16_annos_val.csv": "a\t1\t2\t3\t4\t \n"}, "found 6 with an empty one"),
    ("activitynet", {"train.json": {"v_a": {}}}, r'video v_a: is not {"sentences": \["..", ..\]'),
    ("activitynet", {"train_ids.json": {}}, "must contain a list, but contains dict"),
    ("activitynet", {"train.json": {"v_a": {"sentences": ["x"]}, "a": {"sentences": ["y"]}}},
     "train.json has the keys 'a' and 'v_a' of one video"),
    ("didemo", {"train_data.json": [{"video": "a"}]}, 'entry 1: is not {"video": "..", "descr'),
    ("didemo", {"test_list.txt": "same.mov\nsame\n"}, "same can be same.mov or same.mp4 of .*full"),
    ("didemo", {"test_list.txt": "v.avi\nv\n", "test_data.json": moments("v", "v.avi")},
     "have v.avi and v, which are one video"),
    *(("didemo", {"test_data.json": moments(name, "own")},
       f"lists same.mov and same.mp4, but .*test_data.json describes {name} alone")
      for name in ("same", "same.mp4")),
    ("didemo", {"test_list.txt": "other.mov"}, r"1 of the 1 videos of .* no caption .*'other'\)"),
    ("didemo", {"test_list.txt": "own", "test_data.json": [{"video": "own", "description": " "}]},
     "1 of the 1 videos of .* have no caption"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "message"), MISTAKES)
def test_a_mistake_is_refused_with_its_place(name, files, message, tmp_path):
    with pytest.raises(AnnotationError, match=message) as error:
        read(tmp_path, name, files)
    assert "\n" not in str(error.value)


class Malicious:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, sentinel):
        self._sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self._sentinel}'",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_reading_a_pickle_runs_no_code(protocol, tmp_path):
    sentinel = tmp_path / "sentinel"
    content = pickle.dumps({"a": [["b", Malicious(sentinel)]]}, protocol)
    with pytest.raises(AnnotationError, match=r"is rejected: it refers to (posix|nt)\.system"):
        read(tmp_path, "msvd", {"raw-captions.pkl": content})
    assert not sentinel.exists()
    pickle.loads(content)  # The pickle does run code elsewhere.
    assert sentinel.exists()


# ---------------------------------------------------------------- what is read, and left out


def test_captions_of_msvd_can_be_sentences(tmp_path):
    files = {"raw-captions.pkl": None, "captions_msvd.json": MSVD_SENTENCES}
    assert captions_of(read(tmp_path / "json", "msvd", files)) == MSVD.splits
    both = {"v": ["a man", ["a", "dog", "runs"]]}
    found = read(tmp_path / "pickle", "msvd", {**NO_LISTS, **pickled(both)})
    assert captions_of(found) == {"test": {"v": ["a man", "a dog runs"]}}


def test_a_repeated_video_of_vatex_has_the_captions_of_all_its_entries(tmp_path):
    entries = [("a", ["one", "one"]), ("b", ["x"]), ("a", ["two", "one"])]
    entries = [{"videoID": video, "enCap": captions} for video, captions in entries]
    # Another copy has the same captions, and one more video.
    copy = [*entries, {"videoID": "c", "enCap": ["x"]}]
    files = {"vatex_training_v1.0.json": entries, "vatex_training_v1.0_copy.json": copy}
    found = builder_class("vatex").read_annotations(write_files(tmp_path, files))
    assert captions_of(found) == {"train": {"a": ["one", "one", "two"], "b": ["x"], "c": ["x"]}}


def test_lists_of_didemo_may_have_no_suffixes(tmp_path):
    files = {"train_list.txt": "2@N00_b\n5@N00_f.mov", "test_list.txt": "own\nsame.mov\nother.mp4"}
    found = read(tmp_path, "didemo", files)
    assert {name: list(split) for name, split in captions_of(found).items()} == {
        "train": ["2@N00_b", "5@N00_f.mov"],
        "test": ["own", "same.mov"],
    }
    assert found.sources["own"][0].file == "own.avi"
    assert found.sources["2@N00_b"][0].file == "2@N00_b.mts"
    assert found.left_out == {"test_list.txt, other": "no caption in test_data.json"}


def test_wrong_entries_of_published_files_are_left_out(tmp_path):
    sentences = [{"video_id": "video0", "caption": "x"}, {"video_id": "video0"}, {"video_id": 7}]
    files = {
        "MSRVTT_data.json": {"sentences": sentences[:2]},
        "MSRVTT_JSFUSION_test.csv": "video_id,sentence\nvideo4,one\nvideo5,\n",
        "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo0.mp4\n",
        "MSRVTT_train.7k.csv": None,
    }
    found = read(tmp_path, "msrvtt", files)
    assert captions_of(found) == {"train_9k": {"video0": ["x"]}, "test": {"video4": ["one"]}}
    assert found.left_out == {
        "MSRVTT_data.json, sentence 2": 'is not {"video_id": "..", "caption": ".."}',
        "MSRVTT_JSFUSION_test.csv, row 3": "sentence is empty",
        "MSRVTT_train.9k.csv, video0.mp4": "no caption in MSRVTT_data.json",
    }
    assert found.missing_files == {"MSRVTT_train.7k.csv": "the split train_7k"}
    files["MSRVTT_data.json"] = {"sentences": sentences}
    with pytest.raises(AnnotationError, match=r"2 of the 3 sentences of .* may lose at most 50%"):
        read(tmp_path, "msrvtt", files)
    row = "{}\t1\t2\t3\t4\tx\n".format
    found = read(tmp_path / "lsmdc", "lsmdc", {"LSMDC16_annos_val.csv": row("a") + "b\tc\n"})
    assert list(found.left_out) == ["LSMDC16_annos_val.csv, line 2"]
