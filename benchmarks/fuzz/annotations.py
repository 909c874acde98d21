"""Annotation files of every builder, damaged in their bytes, their text and their structure."""

import io
import itertools
import json
import pickle
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from benchmarks.fuzz.damage import LEGITIMATE, Damage, damage_file, damage_text, damage_tree
from benchmarks.fuzz.runner import InvalidResult
from data_prep.annotations import Annotations, leave_out_texts
from data_prep.datasets import builder_class

_VIDEOS = ("video0", "video1", "video2")
_VATEX = ("Ptf_2VRj-V0_000122_000132", "bpKK_SpjHMA_000001_000003", "TkfL3wyNrhg_000018_000028")
_LISTS = ("train", "val", "test")


def prepare(root: Path) -> None:
    """Writes the annotation files of each dataset, in each of its forms."""
    for subject, files in _subjects().items():
        for name, content in files.items():
            path = root / "subjects" / subject / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".pkl"):
                path.write_bytes(pickle.dumps(content, protocol=0))
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                text = content if isinstance(content, str) else json.dumps(content)
                path.write_text(text, encoding="utf-8")


def _subjects() -> dict[str, dict[str, Any]]:
    """File contents by dataset and file name; dicts and lists become JSON, or a pickle."""
    captions = {video: [f"a {video} öffnet", "two words"] for video in _VATEX}
    lists = {f"{split}_list.txt": f"{video}\n" for split, video in zip(_LISTS, _VATEX, strict=True)}
    official = [{"videoID": video, "enCap": found} for video, found in captions.items()]
    wrapped = {video: {"enCap": found, "chCap": ["看"]} for video, found in captions.items()}
    words = {video: [["a", "dog"], ["two", "dogs", "run"]] for video in _VATEX}
    moments = [
        {"video": "5@N00_24.avi", "description": text, "times": [[0, 0]], "annotation_id": k}
        for k, text in enumerate(("a dog türns", "the dog barks"))
    ]
    paragraph = {"duration": 2.0, "timestamps": [[0, 1]], "sentences": ["A woman. ", " She sits."]}
    times = "\t00.00.51.926\t00.00.54.129\t0\t1\t"
    rows = [
        {"video": "a/beach.mp4", "caption": "wäves", "start": 0, "end": 1.5, "split": "train"},
        {"video": "garden", "captions": ["a rose", "two roses"], "split": "val"},
        {"video": "cat.mp4", "caption": "it sleeps", "split": "test"},
    ]
    csv = (
        'video,caption,start,end\nbeach.mp4,"wäves, high",0,1.5\ngarden,a rose,,\ncat.mp4,it,1,2\n'
    )
    return {
        "custom-jsonl": {"captions.jsonl": "\n".join(map(json.dumps, rows))},
        "custom-csv": {"captions.csv": csv},
        "custom-tar": {"captions.tar": _shard()},
        "custom-parquet": {"captions.parquet": _table()},
        "msrvtt": _msrvtt(),
        "msvd-pickle": {**lists, "raw-captions.pkl": words},
        "msvd-json": {**lists, "captions_msvd.json": captions},
        "vatex-ref": {**lists, "ref_captions.json": captions},
        "vatex-data": {**lists, "vatex_data.json": wrapped},
        "vatex-official": {"vatex_training_v1.0.json": official},
        "didemo": {
            f"{split}_{name}": content
            for split in ("train", "test")
            for name, content in (("list.txt", "5@N00_24.avi\n"), ("data.json", moments))
        },
        "activitynet": {
            **{"train_ids.json": ["v_QOlSCBRmfWY"], "train.json": {"v_QOlSCBRmfWY": paragraph}},
            **{"val_ids.json": ["v_uqiMw7tQ1Cc"], "val_1.json": {"v_uqiMw7tQ1Cc": paragraph}},
        },
        "lsmdc": {
            "LSMDC16_annos_training.csv": f'0001_A_00{times}SOMEONE says "gö.\n1_B{times}Goes.\n',
            "LSMDC16_challenge_1000_publictect.csv": f"3064_C_01{times}Dancers bow.\n",
        },
    }


def _shard() -> bytes:
    """A WebDataset shard; its videos are not read."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (
            *(("0.mp4", b"0" * 700), ("0.txt", "wäves".encode())),
            *(("1.mkv", b"1" * 700), ("1.json", b'{"captions": ["a", "b"], "end": 2}')),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _table() -> bytes:
    """A Parquet file with videos."""
    file = io.BytesIO()
    captions = {"caption": ["wäves", "a rose", "it"], "start": [0.0, None, 1.0]}
    columns = {"bytes": [b"0" * 9] * 3, **captions, "end": [1.5, None, 2.0]}
    parquet.write_table(pa.table(columns), file, row_group_size=2)
    return file.getvalue()


def _msrvtt() -> dict[str, Any]:
    splits = zip(_VIDEOS, ("train", "validate", "test"), strict=True)
    videos = [{"video_id": v, "url": "", "start time": 0.0, "split": s} for v, s in splits]
    sentences = [
        {"video_id": video, "caption": f"{video} caption {k}", "sen_id": k}
        for video in _VIDEOS
        for k in range(2)
    ]
    return {
        "MSRVTT_data.json": {"videos": videos, "sentences": sentences},
        "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo1\n",
        "MSRVTT_JSFUSION_test.csv": (
            'key,vid_key,video_id,sentence\nret0,msr2,video2,"one, twö"\nret1,msr1,video1,three\n'
        ),
    }


# ---------------------------------------------------------------- damage and judgement


def damage(root: Path, name: str, directory: Path, random: Random) -> Damage:
    """Damages one file: its structure, its text or its bytes."""
    del root, name
    path = random.choice(sorted(directory.iterdir()))
    choice = random.random()
    if choice < 0.5 and path.suffix in (".json", ".jsonl", ".pkl"):
        return Damage(f"{path.name}: {_damage_structure(path, random)}", LEGITIMATE)
    if choice < 0.8 and path.suffix not in (".pkl", ".tar", ".parquet"):
        data, what = damage_text(path.read_bytes(), random)
        path.write_bytes(data)
        return Damage(f"{path.name}: {what}", LEGITIMATE)
    return Damage(damage_file(path, random), LEGITIMATE)


def _damage_structure(path: Path, random: Random) -> str:
    if path.suffix == ".pkl":
        tree, what = damage_tree(pickle.loads(path.read_bytes()), random)
        path.write_bytes(pickle.dumps(tree, protocol=random.randrange(5)))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tree, what = damage_tree(rows, random)
        rows = tree if isinstance(tree, list) else [tree]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        tree, what = damage_tree(json.loads(path.read_text(encoding="utf-8")), random)
        path.write_text(json.dumps(tree), encoding="utf-8")
    return what


def read(root: Path, name: str, directory: Path) -> str:
    """The annotations in words."""
    del root
    dataset, _, form = name.partition("-")
    path = directory / f"captions.{form}" if dataset == "custom" else directory
    annotations = builder_class(dataset).read_annotations(path)
    leave_out_texts(annotations)  # As a build does.
    _check(annotations)
    return repr((annotations.splits, annotations.sources))


def _check(annotations: Annotations) -> None:
    """Checks what the build relies on: text that can be stored, and spans that are numbers."""
    for split, videos in annotations.splits.items():
        if not _is_text(split) or not videos:
            raise InvalidResult(f"split {split!r} has {len(videos)} videos")
        for video in videos:
            captions = video.captions
            if not isinstance(captions, list) or not captions:
                raise InvalidResult(f"captions of {video.video_id!r} are {captions!r}")
            if not all(map(_is_text, [video.video_id, *captions])):
                raise InvalidResult(f"{video.video_id!r} or one of {captions!r} is no text")
    for source in itertools.chain.from_iterable(annotations.sources.values()):
        spans = () if source.span is None else source.span
        if not _is_text(source.file) or not np.isfinite(spans).all():
            raise InvalidResult(f"a source is {source}")


def _is_text(value: Any) -> bool:
    """Whether a value is a string that is not blank and can be written in UTF-8."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value == value.encode(errors="ignore").decode()
