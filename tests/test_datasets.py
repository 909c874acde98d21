"""Every builder on a small dataset with the real directory layout and annotation syntax."""

import errno
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from support.commands import error_of
from support.files import contents, refused
from support.videos import numbered_frames, write_video

from data_prep.annotations import AnnotationError
from data_prep.build import main as build
from data_prep.datasets import DRAWN, builder_class, dataset_names
from drl_jax.data.records import VideoDataset


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Returns `place(path, seconds)`, which writes a video of 1 to 4 seconds to a path."""
    made = tmp_path_factory.mktemp("clips")
    for suffix in (".mp4", ".avi", ".webm"):
        codec = {"codec": "libvpx-vp9", "lossless": "1"} if suffix == ".webm" else {}
        for seconds in range(1, 5):
            frames = numbered_frames(10 * seconds)
            write_video(made / f"{seconds}{suffix}", frames, fps=10, **codec)

    def place(path, seconds=2):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / f"{seconds}{path.suffix}", path)

    return place


# Each function writes a small dataset below `root`, and returns the expected splits: captions by
# video. Videos have 2 seconds unless stated otherwise.


def lay_out_msrvtt(root, place):
    videos = [f"video{n}" for n in range(6)]
    for video in videos[:5]:
        place(root / "videos" / "TrainVal" / f"{video}.mp4")
    place(root / "videos" / "Test" / "video5.webm")
    splits = ["train", "train", "train", "validate", "test", "test"]
    write_json(
        root / "annotations" / "MSRVTT_data.json",
        {
            "info": {},
            "videos": [
                {"video_id": v, "url": "", "start time": 0.0, "split": split}
                for v, split in zip(videos, splits, strict=True)
            ],
            "sentences": [
                {"video_id": v, "caption": f"{v} caption {k}", "sen_id": k}
                for v in videos
                for k in range(2)
            ],
        },
    )
    write(root / "annotations" / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo1\nvideo2\n")
    write(root / "annotations" / "MSRVTT_train.7k.csv", "video_id\nvideo0\n")
    write(
        root / "annotations" / "MSRVTT_JSFUSION_test.csv",
        'key,vid_key,video_id,sentence\nret0,msr4,video4,"one, two"\nret1,msr5,video5,three\n',
    )
    both = {v: [f"{v} caption 0", f"{v} caption 1"] for v in videos}
    return {
        "train_9k": {v: both[v] for v in videos[:3]},
        "train_7k": {"video0": both["video0"]},
        "full_train": {v: both[v] for v in videos[:3]},
        "full_val": {"video3": both["video3"]},
        "full_test": {v: both[v] for v in videos[4:]},
        "test": {"video4": ["one, two"], "video5": ["three"]},
    }


MSVD_WORDS = {
    "-4wsuPCjDBc_5_15": [["a", "squirrel", "is", "eating"], ["the", "squirrel", "eats"]],
    "0bSz70pYAP0_5_15": [["a", "man", "cooks"]],
    "04Gt01vatkk_248_265": [["a", "dog", "runs"]],
    "unused": [["never", "listed"]],
}


def lay_out_msvd(root, place):
    names = list(MSVD_WORDS)
    for name in names:
        place(root / "videos" / f"{name}.avi")
    for split, name in zip(("train", "val", "test"), names, strict=False):
        write(root / "annotations" / f"{split}_list.txt", f"{name}\n\n")
    # Protocol 0, as written by Python 2.
    (root / "annotations" / "raw-captions.pkl").write_bytes(pickle.dumps(MSVD_WORDS, protocol=0))
    joined = {v: [" ".join(words) for words in captions] for v, captions in MSVD_WORDS.items()}
    return {
        split: {name: joined[name]}
        for split, name in zip(("train", "val", "test"), names, strict=False)
    }


VATEX = ["Ptf_2VRj-V0_000122_000132", "bpKK_SpjHMA_000001_000003", "TkfL3wyNrhg_000018_000028"]


def lay_out_vatex(root, place, files="ref_captions"):
    captions = {v: [f"{v} caption {k}" for k in range(10)] for v in VATEX}
    # The second one is a whole YouTube video of 4 seconds; the others are cut clips.
    place(root / "videos" / f"{VATEX[0]}.mp4")
    place(root / "videos" / "bpKK_SpjHMA.mp4", 4)
    place(root / "videos" / f"{VATEX[2]}.mp4")
    annotations = root / "annotations"
    splits = {"train": VATEX[:2], "test": VATEX[2:]}
    if files == "ref_captions":
        write_json(annotations / "ref_captions.json", captions)
    elif files == "vatex_data":
        both = {v: {"enCap": c, "chCap": ["不看"]} for v, c in captions.items()}
        write_json(annotations / "vatex_data.json", both)
        splits = {"train": VATEX[:1], "val": VATEX[1:2], "test": VATEX[2:]}
    else:
        for name, split in (("training", "train"), ("validation", "test")):
            entries = [{"videoID": v, "enCap": captions[v], "path": "x"} for v in splits[split]]
            write_json(annotations / f"vatex_{name}_v1.0_ceph.json", entries)
    if files != "official":
        for split, videos in splits.items():
            write(annotations / f"{split}_list.txt", "\n".join(videos))
    return {split: {v: captions[v] for v in videos} for split, videos in splits.items()}


LSMDC = [
    "0001_American_Beauty_00.00.51.926-00.00.54.129",
    "0001_American_Beauty_00.01.45.884-00.01.49.090",
    "3064_SPARKLE_2012_01.41.06.000-01.41.10.793",
]


def lay_out_lsmdc(root, place):
    for clip in LSMDC:
        movie = clip.rsplit("_", 1)[0]
        place(root / "videos" / movie / f"{clip}.avi")

    def row(clip, sentence):
        return "\t".join((clip, "00.00.51.926", "00.00.54.129", "0", "1", sentence)) + "\n"

    annotations = root / "annotations"
    # A clip may have several rows; quotation marks are not CSV quoting.
    write(
        annotations / "LSMDC16_annos_training.csv",
        row(LSMDC[0], 'SOMEONE says "go.') + row(LSMDC[0], "She goes."),
    )
    write(annotations / "LSMDC16_annos_val.csv", row(LSMDC[1], "He waits, bored."))
    write(
        annotations / "LSMDC16_challenge_1000_publictect.csv", row(LSMDC[2], "Dancers take a bow.")
    )
    return {
        "train": {LSMDC[0]: ['SOMEONE says "go.', "She goes."]},
        "val": {LSMDC[1]: ["He waits, bored."]},
        "test": {LSMDC[2]: ["Dancers take a bow."]},
    }


def lay_out_activitynet(root, place):
    place(root / "videos" / "train" / "v_QOlSCBRmfWY.mp4")
    place(root / "videos" / "val" / "uqiMw7tQ1Cc.webm")
    annotations = root / "annotations"
    write_json(annotations / "train_ids.json", ["v_QOlSCBRmfWY"])
    write_json(annotations / "val_ids.json", ["v_uqiMw7tQ1Cc"])
    entry = {"duration": 2.0, "timestamps": [[0, 1], [1, 2]]}
    sentences = ["A woman is seen. ", " She dances."]
    write_json(annotations / "train.json", {"v_QOlSCBRmfWY": {**entry, "sentences": sentences}})
    write_json(
        annotations / "val_1.json", {"v_uqiMw7tQ1Cc": {**entry, "sentences": ["A man lifts."]}}
    )
    return {
        "train": {"QOlSCBRmfWY": ["A woman is seen. She dances."]},
        "test": {"uqiMw7tQ1Cc": ["A man lifts."]},
    }


DIDEMO = ["54322086@N00_2408598493_274c77d26a.avi", "12090392@N02_13482799053_87ef417396.mov"]


def lay_out_didemo(root, place):
    place(root / "videos" / DIDEMO[0])
    # A file in another container than the annotations say.
    place(root / "videos" / DIDEMO[1].replace(".mov", ".mp4"))
    annotations = root / "annotations"
    for split, video in zip(("train", "test"), DIDEMO, strict=True):
        write(annotations / f"{split}_list.txt", f"{video}\n")
        entries = [
            {"video": video, "description": text, "times": [[0, 0]], "annotation_id": k}
            for k, text in enumerate(("a dog turns", "the dog barks"))
        ]
        other = {"video": "absent.avi", "description": "x", "times": []}
        write_json(annotations / f"{split}_data.json", [*entries, other])
    both = ["a dog turns the dog barks"]
    return {
        split: {video.rpartition(".")[0]: both}
        for split, video in zip(("train", "test"), DIDEMO, strict=True)
    }


# More words than a training reads.
LONG = " ".join(["two roses"] * 20)


def lay_out_custom(root, place):
    place(root / "videos" / "holiday" / "beach.mp4", 4)
    place(root / "videos" / "garden.webm")
    place(root / "videos" / "cat.mp4")
    rows = [
        {"video": "holiday/beach.mp4", "caption": "waves", "start": 0, "end": 1, "split": "train"},
        {"video": "holiday/beach.mp4", "caption": "sand", "start": 2, "end": 3, "split": "train"},
        {"video": "garden", "captions": ["a rose", LONG], "split": "val"},
        {"video": "cat.mp4", "caption": "it sleeps", "split": "test"},
    ]
    write(root / "annotations", "\n".join(map(json.dumps, rows)), suffix=".jsonl")
    return {
        "train": {"holiday/beach.mp4@0-1": ["waves"], "holiday/beach.mp4@2-3": ["sand"]},
        "val": {"garden": ["a rose", LONG]},
        "test": {"cat.mp4": ["it sleeps"]},
    }


LAYOUTS = {
    "msrvtt": lay_out_msrvtt,
    "msvd": lay_out_msvd,
    "vatex": lay_out_vatex,
    "lsmdc": lay_out_lsmdc,
    "activitynet": lay_out_activitynet,
    "didemo": lay_out_didemo,
    "custom": lay_out_custom,
}


def write(path, text, suffix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(suffix or path.suffix).write_text(text, encoding="utf-8")


def write_json(path, value):
    write(path, json.dumps(value))


def annotations_of(root, name):
    return root / ("annotations.jsonl" if name == "custom" else "annotations")


def described(splits):
    return {name: {c.video_id: c.captions for c in split} for name, split in splits.items()}


def test_all_datasets_have_a_layout():
    assert {*LAYOUTS, *DRAWN} == set(dataset_names())


# Mean level of each stored frame, by video. `numbered_frames` at 10 frames per second has the level
# 40 s after s seconds, and one frame per second is stored, so a video of 2 seconds gives 0 and 40.
LEVELS = {
    "msrvtt": {f"video{n}": [0, 40] for n in range(6)},
    "msvd": {name: [0, 40] for name in list(MSVD_WORDS)[:3]},
    # The whole YouTube video is cut to the seconds 1 to 3, both included.
    "vatex": {VATEX[0]: [0, 40], VATEX[1]: [40, 80, 120], VATEX[2]: [0, 40]},
    "lsmdc": {name: [0, 40] for name in LSMDC},
    "activitynet": {"QOlSCBRmfWY": [0, 40], "uqiMw7tQ1Cc": [0, 40]},
    "didemo": {name.rpartition(".")[0]: [0, 40] for name in DIDEMO},
    "custom": {
        "holiday/beach.mp4@0-1": [0, 40],
        "holiday/beach.mp4@2-3": [80, 120],
        "garden": [0, 40],
        "cat.mp4": [0, 40],
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_small_dataset_is_built(name, tmp_path, clips, capsys):
    expected = LAYOUTS[name](tmp_path, clips)
    status = build(
        [
            name,
            f"--videos={tmp_path / 'videos'}",
            f"--annotations={annotations_of(tmp_path, name)}",
            f"--data_dir={tmp_path / 'data'}",
            "--image_size=32",
            "--storage=raw",
        ]
    )
    report, errors = capsys.readouterr()
    assert status == 0
    assert "left out" not in report
    said = re.findall(r"data_prep.build: (.*) captions cut to data.max_words=32 ", errors)
    assert said == (["split val, with CLIP's tokenizer: 1 of 2"] if name == "custom" else [])
    max_frames = builder_class(name).DEFAULT_STORAGE.max_frames
    dataset = VideoDataset(tmp_path / "data" / name / f"32px_{max_frames}f_raw" / "1.0.0")
    found = {
        split: {
            dataset.video_ids[video]: captions
            for video, captions in zip(
                dataset.split(split).videos, dataset.split(split).captions, strict=True
            )
        }
        for split in dataset.split_names
    }
    assert found == expected
    assert set(dataset.video_ids) == LEVELS[name].keys()
    for video, video_id in enumerate(dataset.video_ids):
        frames, levels = dataset.read_frames(video), LEVELS[name][video_id]
        assert frames.shape == (len(levels), 32, 32, 3)
        np.testing.assert_allclose(frames.reshape(len(levels), -1).mean(1), levels, atol=3)
    published = builder_class(name).PUBLISHED
    assert set(published) <= {*expected, "val"}
    for split in expected.keys() & published.keys():
        for unit, (low, _) in published[split].items():
            assert f"published {unit}: {low:,}" in report


@pytest.mark.parametrize("files", ["vatex_data", "official"])
def test_other_annotation_files_of_vatex(files, tmp_path, clips):
    expected = lay_out_vatex(tmp_path, clips, files)
    annotations = builder_class("vatex").read_annotations(tmp_path / "annotations")
    assert described(annotations.splits) == expected
    assert set(annotations.missing_files) == set()


def test_msvd_captions_can_be_sentences(tmp_path, clips):
    expected = lay_out_msvd(tmp_path, clips)
    (tmp_path / "annotations" / "raw-captions.pkl").unlink()
    sentences = {v: [" ".join(words) for words in captions] for v, captions in MSVD_WORDS.items()}
    write_json(tmp_path / "annotations" / "captions_msvd.json", sentences)
    annotations = builder_class("msvd").read_annotations(tmp_path / "annotations")
    assert described(annotations.splits) == expected


class Malicious:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, sentinel):
        self._sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self._sentinel}'",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_reading_a_pickle_runs_no_code(protocol, tmp_path, clips):
    lay_out_msvd(tmp_path, clips)
    path, sentinel = tmp_path / "annotations" / "raw-captions.pkl", tmp_path / "sentinel"
    content = pickle.dumps({"a": [["b", Malicious(sentinel)]]}, protocol)
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=r"is rejected: it refers to (posix|nt)\.system"):
        builder_class("msvd").read_annotations(tmp_path / "annotations")
    assert not sentinel.exists()
    pickle.loads(content)  # The pickle does run code elsewhere.
    assert sentinel.exists()


# (dataset, file, its new text or None to remove it, the message)
MISTAKES = [
    ("msvd", "raw-captions.pkl", "no pickle", "is not a pickle file of captions"),
    ("msvd", "raw-captions.pkl", None, "has no captions: neither raw-captions.pkl nor"),
    ("msvd", "test_list.txt", "other_1_2\n", "1 of the 1 videos of .*test_list.txt have no capt"),
    ("msvd", "val_list.txt", "", "val_list.txt is empty"),
    ("vatex", "ref_captions.json", "[]", "must contain an object, but contains list"),
    ("vatex", "ref_captions.json", '{"a": "b"}', "a: expected a list of captions, found 'b'"),
    ("lsmdc", "LSMDC16_annos_val.csv", "a,b,c\n", "line 1: expected 6 tab-separated fields"),
    ("lsmdc", "LSMDC16_annos_val.csv", "a\t1\t2\t3\t4\t \n", "found 6 with an empty one"),
    (
        "activitynet",
        "train.json",
        '{"v_a": {}}',
        r'train.json, video v_a: is not {"sentences": \["..", ..\]',
    ),
    ("activitynet", "train_ids.json", "{}", "must contain a list, but contains dict"),
    ("didemo", "train_data.json", '[{"video": "a"}]', 'entry 1: is not {"video": "..", "descr'),
    ("didemo", "train_data.json", "[", "train_data.json is not a JSON file"),
    ("msrvtt", "MSRVTT_data.json", '{"sentences": [{}]}', 'sentence 1: is not {"video_id"'),
    ("msrvtt", "MSRVTT_data.json", '{"sentences": 7}', "does not have MSR-VTT's structure"),
    (
        "msrvtt",
        "MSRVTT_data.json",
        '{"videos": [{"video_id": "a", "split": "tset"}], "sentences": []}',
        '"videos" does not list',
    ),
]


@pytest.mark.parametrize(("name", "file", "text", "message"), MISTAKES)
def test_an_invalid_annotation_file_is_named(name, file, text, message, tmp_path, clips):
    LAYOUTS[name](tmp_path, clips)
    path = tmp_path / "annotations" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(AnnotationError, match=message) as error:
        builder_class(name).read_annotations(tmp_path / "annotations")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- repeats, and what is left out


def read_changed(tmp_path, clips, name, **files):
    """Reads a dataset of which some files were replaced: text, or a value for JSON."""
    LAYOUTS[name](tmp_path, clips)
    for file, content in files.items():
        path = tmp_path / "annotations" / file
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return builder_class(name).read_annotations(tmp_path / "annotations")


def test_a_repeated_video_of_vatex_has_the_captions_of_all_its_entries(tmp_path):
    entries = [("a", ["one", "one"]), ("b", ["x"]), ("a", ["two", "one"])]
    entries = [{"videoID": video, "enCap": captions} for video, captions in entries]
    write_json(tmp_path / "vatex_training_v1.0.json", entries)
    # Another copy has the same captions, and one more video.
    write_json(
        tmp_path / "vatex_training_v1.0_copy.json", [*entries, {**entries[1], "videoID": "c"}]
    )
    found = builder_class("vatex").read_annotations(tmp_path)
    assert described(found.splits) == {
        "train": {"a": ["one", "one", "two"], "b": ["x"], "c": ["x"]}
    }
    write_json(tmp_path / "ref_captions.json", {"a": ["other"]})
    message = r"ref_captions.json and .*v1.0.json have different captions of a; keep one"
    with pytest.raises(AnnotationError, match=message):
        builder_class("vatex").read_annotations(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("vatex", "ref_captions.json", '{"a": ["b"],\n "a": ["c"]}',
         r"the key 'a' at line 1 column 2 and again: line 2 column 2"),
        ("vatex", "ref_captions.json", '{\n"a\\u0062": ["}{"],\n"c": [],\n"ab": []}',
         r"the key 'ab' at line 2 column 1 and again: line 4 column 1"),
        ("activitynet", "train.json", {"v_a": {"sentences": ["x"]}, "a": {"sentences": ["y"]}},
         r"train.json has the keys 'a' and 'v_a' of one video"),
        ("didemo", "train_list.txt", "v.avi\nv\n", r"have v.avi and v, which are one video"),
        ("msrvtt", "MSRVTT_data.json",
         {"videos": [{"video_id": "v", "split": s} for s in ("train", "train", "test")],
          "sentences": [{"video_id": "v", "caption": "x"}]},
         r"entry 1 of .videos. has 'v' in the split train, and entry 3 in test; correct one"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_both_places(name, file, content, message, tmp_path, clips):
    entries = [{"video": video, "description": "x"} for video in ("v", "v.avi")]
    extra = {"train_data.json": entries} if name == "didemo" else {}
    with pytest.raises(AnnotationError, match=message):
        read_changed(tmp_path, clips, name, **{file: content}, **extra)


def test_keys_of_a_pickle_that_are_one_id_are_refused(tmp_path):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({7: ["a"], "7": ["b"]}))
    (tmp_path / "test_list.txt").write_text("7\n")
    with pytest.raises(AnnotationError, match=r"has the key 7 and the key '7'"):
        builder_class("msvd").read_annotations(tmp_path)


def test_one_video_without_a_caption_is_left_out(tmp_path, clips):
    found = read_changed(
        *(tmp_path, clips, "msrvtt"),
        **{"MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo1.mp4\nvideo2\nvideo99\n"},
    )
    assert [entry.video_id for entry in found.splits["train_9k"]] == ["video0", "video2"]
    place, no_caption = "MSRVTT_train.9k.csv, ", "no caption in MSRVTT_data.json"
    assert found.left_out == {
        f"{place}video1.mp4": no_caption,
        f"{place}video99": no_caption,
    }
    with pytest.raises(AnnotationError, match=r"the first: 'video0.mp4'"):
        read_changed(
            *(tmp_path, clips, "msrvtt"), **{"MSRVTT_train.9k.csv": "video_id\nvideo0.mp4\n"}
        )
    found = read_changed(
        *(tmp_path / "msvd", clips, "msvd"), **{"test_list.txt": "04Gt01vatkk_248_265\nb\n"}
    )
    assert found.left_out == {"test_list.txt, b": "no caption in raw-captions.pkl"}


def test_wrong_entries_of_published_files_are_left_out(tmp_path, clips):
    sentences = [{"video_id": "video0", "caption": "x"}, {"video_id": "video0"}, {"video_id": 7}]
    document = {"sentences": sentences[:2]}
    rows = "video_id,sentence\nvideo4,one\nvideo5,\n"
    found = read_changed(
        *(tmp_path, clips, "msrvtt"),
        **{"MSRVTT_data.json": document, "MSRVTT_JSFUSION_test.csv": rows},
        **dict.fromkeys(("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv"), "video_id\nvideo0\n"),
    )
    assert described(found.splits)["test"] == {"video4": ["one"]}
    assert found.left_out == {
        "MSRVTT_data.json, sentence 2": 'is not {"video_id": "..", "caption": ".."}',
        "MSRVTT_JSFUSION_test.csv, row 3": "sentence is empty",
    }
    with pytest.raises(AnnotationError, match=r"2 of the 3 sentences of .* may lose at most 50%"):
        read_changed(tmp_path, clips, "msrvtt", **{"MSRVTT_data.json": {"sentences": sentences}})
    row = "{}\t1\t2\t3\t4\tx\n".format
    found = read_changed(
        *(tmp_path / "lsmdc", clips, "lsmdc"), **{"LSMDC16_annos_val.csv": row("a") + "b\tc\n"}
    )
    assert list(found.left_out) == ["LSMDC16_annos_val.csv, line 2"]


def test_a_build_warns_of_shared_videos_and_of_equal_captions(tmp_path, clips, capsys):
    clips(tmp_path / "videos" / "a.mp4", 2)
    clips(tmp_path / "videos" / "b.mp4", 3)
    rows = ["a,A dog,train", "a,a  dog,train", "b,a dog,train", "b,a cat,test", "./b,a cow,test"]
    (tmp_path / "mine.csv").write_text("\n".join(["video,caption,split", *rows]))
    flags = [
        f"--{name}={tmp_path / file}" for name, file in (("videos", "videos"), ("data_dir", "d"))
    ]
    flags += [f"--annotations={tmp_path / 'mine.csv'}", "--image_size=32"]
    line = error_of("data_prep.build", "custom", *flags, capsys=capsys)
    assert "'b' of train and './b' of test are the same file" in line
    (tmp_path / "mine.csv").write_text("\n".join(["video,caption,split", *rows[:4], "./a,x,train"]))
    assert build(["custom", *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        "1 videos are in both train and test, with 0 equal captions (the first: b): results on"
        in (out[1])
    )
    assert out[2].startswith("1 names are other names of the same file and span")
    (tmp_path / "mine.csv").write_text("\n".join(["video,caption,split", *rows[:3], "a,x,test"]))
    assert build(["custom", *flags, "--overwrite"]) == 0
    warned = "all captions of train are equal ('A dog'): they tell no video from another"
    assert capsys.readouterr().out.splitlines().count(warned) == 1


@pytest.mark.parametrize(("good", "ends"), [(1, True), (2, False)])
def test_a_build_ends_if_more_than_half_of_the_videos_cannot_be_decoded(
    good, ends, tmp_path, clips, capsys
):
    for number in range(good):
        clips(tmp_path / "videos" / f"{number}.mp4", 2)
    for number in (2, 3):
        (tmp_path / "videos" / f"{number}.mp4").write_text("no video")
    # A file that is absent is no loss: parts of datasets are built.
    rows = [f"{number},caption {number}" for number in range(9)]
    (tmp_path / "mine.csv").write_text("\n".join(["video,caption", *rows]))
    flags = [
        f"--{name}={tmp_path / file}" for name, file in (("videos", "videos"), ("data_dir", "d"))
    ]
    flags = ["custom", *flags, f"--annotations={tmp_path / 'mine.csv'}", "--image_size=32"]
    assert build(flags) == ends
    if ends:
        error = capsys.readouterr().err
        assert (
            "2 of the 3 annotated videos cannot be used, and a build may lose at most 50%" in error
        )
        # What the user has seen and listed is no loss.
        (tmp_path / "d" / "custom" / "quarantine.txt").write_text("2\n3\n")
        assert build(flags) == 0


def read_custom(tmp_path, text, suffix=".csv"):
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    return builder_class("custom").read_annotations(path)


def test_custom_csv(tmp_path):
    annotations = read_custom(
        tmp_path,
        'video,caption,start,end,split\na.mp4,"one, two",,,train\na.mp4,three,,,train\n'
        "b.mp4,four,1.5,3,test\n",
    )
    assert described(annotations.splits) == {
        "train": {"a.mp4": ["one, two", "three"]},
        "test": {"b.mp4@1.5-3": ["four"]},
    }
    assert annotations.sources["b.mp4@1.5-3"][0].span == (1.5, 3)
    lists = read_custom(tmp_path, 'video,captions,split\na,"[""x"", ""y""]",train\n')
    assert described(lists.splits) == {"train": {"a": ["x", "y"]}}


def test_custom_without_splits_holds_out_a_tenth_of_the_files_for_val_and_for_test(tmp_path):
    rows = [f"v{n}.mp4,caption {part},{part},{part + 1}" for n in range(30) for part in range(3)]
    annotations = read_custom(tmp_path, "video,caption,start,end\n" + "\n".join(rows) + "\n")
    files = {
        name: {annotations.sources[c.video_id][0].file for c in split}
        for name, split in annotations.splits.items()
    }
    assert {name: len(names) for name, names in files.items()} == {"train": 24, "val": 3, "test": 3}
    # No file is in two splits, and the order of the rows does not matter.
    assert len(set.union(*files.values())) == 30
    again = read_custom(tmp_path, "video,caption,start,end\n" + "\n".join(rows[::-1]) + "\n")
    assert {c.video_id for c in again.splits["test"]} == {
        c.video_id for c in annotations.splits["test"]
    }


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("file,caption\na,b\n", ".csv", "mine.csv has no video; it has file, caption"),
        ("video\na\n", ".csv", "mine.csv has no caption"),
        ("video,caption\n", ".csv", "has no rows"),
        ("video,caption\na,\n", ".csv", "row 2: caption is empty"),
        ("video,caption\n,b\n", ".csv", "row 2: video is empty"),
        ("video,captions\na,b\n", ".csv", "row 2: captions must be a JSON list"),
        ("video,caption,start,end\na,b,5,3\n", ".csv", "row 2: end must be after start"),
        ("video,caption,start,end\na,b,x,3\n", ".csv", "start and end must be seconds"),
        ("video,caption,start,end\na,b,5,\n", ".csv", "start is set but end is not"),
        ("video,caption,split\na,b,train\nc,d,\n", ".csv", "some rows have a split and others"),
        ('{"video": "a"}\n', ".jsonl", "line 1: has no caption; it has video"),
        ("{\n", ".jsonl", "line 1: is not JSON"),
        ("[]\n", ".jsonl", "line 1: is not an object"),
        ('{"video": "a", "captions": "b"}\n', ".jsonl", "line 1: captions must be a list"),
    ],
)
def test_an_error_in_a_custom_file_is_named(text, suffix, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read_custom(tmp_path, text, suffix)


@pytest.mark.parametrize("when", ["decoding", "writing"])
def test_a_full_disk_is_one_line_and_leaves_no_partial_dataset(
    when, tmp_path, clips, capsys, monkeypatch
):
    lay_out_custom(tmp_path, clips)

    def full(*_, **__):
        if when == "decoding":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # As array_record does on a full disk.
        raise RuntimeError("write() failed: No space left on device; writing x; at byte 3100672")

    target = "data_prep.retrieval_builder.decode_clips"
    if when == "writing":
        target = "tensorflow_datasets.core.SequentialWriter.close_all"
    monkeypatch.setattr(target, full)
    flags = [f"--videos={tmp_path / 'videos'}", f"--data_dir={tmp_path / 'data'}"]
    annotations = f"--annotations={annotations_of(tmp_path, 'custom')}"
    assert build(["custom", *flags, annotations, "--image_size=32"]) == 1
    assert "no space left in" in capsys.readouterr().err
    assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_a_cache_entry_that_cannot_be_read_ends_a_build(tmp_path, clips, capsys):
    """It is not decoded again: what is wrong with the disk is not known."""
    lay_out_custom(tmp_path, clips)
    flags = [f"--videos={tmp_path / 'videos'}", f"--data_dir={tmp_path / 'data'}"]
    flags = ["custom", *flags, f"--annotations={annotations_of(tmp_path, 'custom')}"]
    assert build([*flags, "--image_size=32"]) == 0
    entry = sorted((tmp_path / "data" / "cache").rglob("*.npz"))[0]
    before = contents(tmp_path / "data")
    with refused(entry):
        line = error_of("data_prep.build", *flags, "--image_size=32", "--overwrite", capsys=capsys)
    assert f"{entry.resolve()} cannot be read or written: Too many levels" in line
    assert contents(tmp_path / "data") == before


def test_a_video_whose_name_several_files_have_is_left_out(tmp_path, clips, capsys):
    lay_out_custom(tmp_path, clips)
    clips(tmp_path / "videos" / "elsewhere" / "garden.mp4")
    flags = [f"--videos={tmp_path / 'videos'}", f"--data_dir={tmp_path / 'data'}"]
    annotations = f"--annotations={annotations_of(tmp_path, 'custom')}"
    assert build(["custom", *flags, annotations, "--image_size=32"]) == 0
    found = "garden: several files have this name: elsewhere/garden.mp4, garden.webm"
    assert found in capsys.readouterr().out
