"""The kept corpus of damaged files that once broke a reader, and a short run of the fuzzer.

`python -m benchmarks.fuzz` is the long run. What it finds becomes a case here: a function that
damages a subject in a few lines.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.files import contents

from benchmarks.fuzz import runner
from benchmarks.fuzz.damage import FAILURE, LEGITIMATE
from benchmarks.fuzz.videos import latin_1_title, unknown_codec
from drl_jax.weights.torch_file import read_metadata, read_torch_file


class Case(NamedTuple):
    """A damaged subject.

    Attributes:
      kind: of input.
      subject: name of the undamaged subject.
      damage: damages a copy of its directory.
      accepted: outcomes.
      message: a part of the refusal.
    """

    kind: str
    subject: str
    damage: Callable[[Path], object]
    accepted: tuple[str, ...] = (runner.REFUSED,)
    message: str = ""


def edit_json(name: str, change: Callable) -> Callable[[Path], None]:
    """Changes a JSON file in place."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
        change(value)
        (directory / name).write_text(json.dumps(value), encoding="utf-8")

    return damage


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the bytes of a file, which may be a pattern, e.g. `*.bin`."""

    def damage(directory: Path) -> None:
        for path in directory.glob(name):
            data = path.read_bytes()
            damaged = change(data)
            assert damaged != data
            path.write_bytes(damaged)

    return damage


def flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return flip


# ---------------------------------------------------------------- videos and annotations

ANY = (runner.IDENTICAL, runner.REFUSED, runner.CHANGED)
TITLED = ("h264.mov", "h264.mkv", "vp9.webm", "mjpeg.avi", "h264.flv", "mpeg4.mp4")
CODED = ("h264.mp4", "h264.mov", "mpeg4.avi", "mjpeg.avi", "vp8.webm")
LONG = "9" * 5000

VIDEOS = {
    **{
        f"Latin-1 title of {name}": Case(
            "videos", name, lambda d, name=name: latin_1_title(d / name), (runner.IDENTICAL,)
        )
        for name in TITLED
    },
    **{
        f"unknown codec of {name}": Case(
            "videos", name, lambda d, name=name: unknown_codec(d / name, Random(0))
        )
        for name in CODED
    },
}
ANNOTATIONS = {
    "a memo of gigabytes": Case(
        "annotations",
        "msvd-pickle",
        edit("raw-captions.pkl", lambda d: b"\x80\x02}r\xff\xff\xff\x7f."),
        message="object 2147483647 of a pickle",
    ),
    "a number as a caption": Case(
        "annotations",
        "msrvtt",
        edit_json("MSRVTT_data.json", lambda v: v["sentences"][0].update(caption=1.5)),
        (runner.CHANGED,),  # The sentence is left out.
    ),
    "a line break in a video id": Case(
        "annotations",
        "msrvtt",
        edit_json("MSRVTT_data.json", lambda v: v["videos"][0].update(video_id="a\nb")),
    ),
    "a lone surrogate in a caption": Case(
        "annotations",
        "vatex-ref",
        edit("ref_captions.json", lambda data: data.replace(b"two words", b"two \\ud800", 1)),
    ),
    "an empty list of videos": Case(
        "annotations", "activitynet", edit_json("train_ids.json", lambda v: v.clear())
    ),
    "5,000 digits as a JSON number": Case(
        "annotations", "activitynet", edit("val_1.json", lambda d: d.replace(b"2.0", LONG.encode()))
    ),
    "an id of 5,000 characters": Case(
        "annotations", "didemo", edit("train_list.txt", lambda d: LONG.encode() + d)
    ),
    "U+0085 in a column name": Case(
        "annotations", "custom-csv", edit("*.csv", lambda d: d.replace(b"video", b"vid\xc2\x85eo"))
    ),
    "a column name of 5,000 characters": Case(
        "annotations", "custom-csv", edit("*.csv", lambda d: LONG.encode() + d)
    ),
    "a surrogate in a field name": Case(
        "annotations",
        "custom-jsonl",
        edit("*.jsonl", lambda d: d.replace(b'"video"', b'"\\ud800"')),
    ),
    "100,000 brackets": Case(
        "annotations", "vatex-official", edit("*.json", lambda d: b"[" * 100_000 + d)
    ),
}

# ---------------------------------------------------------------- weights


def memo_of_gigabytes(data: bytes) -> bytes:
    """The index of a memo entry, for which the standard unpickler allocates a table."""
    # The first `BINPUT 0`, in the fourth pickle: an `r` takes an index of four bytes.
    at = data.index(b"q\x00", 100)
    return data[:at] + b"r" + (2**31 - 1).to_bytes(4, "little") + data[at + 2 :]


def integer_weights(directory: Path) -> None:
    path = directory / "clip.safetensors"
    state = read_torch_file(path)
    state["ln_final.bias"] = np.zeros(state["ln_final.bias"].shape, np.int32)
    save_file(state, path)


def long_name(directory: Path) -> None:
    path = directory / "clip.safetensors"
    save_file({**read_torch_file(path), "x\u2028" * 1000: np.zeros(1, np.float32)}, path)


def other_configuration(directory: Path) -> None:
    path = directory / "exported.safetensors"
    metadata = read_metadata(path)
    metadata["drl_jax_config"] = metadata["drl_jax_config"].replace('"seed": 0', '"seed": 1')
    save_file(read_torch_file(path), path, metadata=metadata)


WEIGHTS = {
    "a memo of gigabytes": Case(
        "weights",
        "clip_legacy.pt",
        edit("*", memo_of_gigabytes),
        message="object 2147483647 of a pickle",
    ),
    "bytes after the end": Case(
        "weights", "clip_legacy.pt", edit("*", lambda d: d + d[-64:]), message="has 64 bytes after"
    ),
    "a bit of a tensor in a zip file": Case(
        "weights", "clip_torchscript.pt", edit("*", flipped(900_000)), message="Bad CRC-32"
    ),
    "a bit of an exported tensor": Case(
        "weights", "exported.safetensors", edit("*", flipped(-9)), message="checksum is wrong"
    ),
    "an exported configuration": Case(
        "weights", "exported.safetensors", other_configuration, message="checksum is wrong"
    ),
    "integers": Case("weights", "clip.safetensors", integer_weights, message="has the type int32"),
    "a name of 2,000 characters": Case(
        "weights", "clip.safetensors", long_name, message="x\\u2028"
    ),
}

# ---------------------------------------------------------------- search indexes


def missing(name: str) -> Callable[[Path], None]:
    return lambda directory: [path.unlink() for path in directory.glob(name)]


def in_segment(name: str, change: Callable[[bytes], bytes], message: str) -> Case:
    return Case("index", "int8", edit(f"segments/*/{name}", change), message=message)


def in_list(change: Callable) -> Case:
    return Case("index", "int8", edit_json("index.json", change), message="from its hash")


INDEX = {
    "a missing array": Case(
        "index", "int8", missing("segments/*/window.frame_weight.bin"), message="frame_weight"
    ),
    "no list": Case("index", "int8", missing("index.json"), message="there is no index in"),
    "a truncated array": in_segment("window.frame_unit.bin", lambda d: d[:300], "300 bytes, not"),
    "a bit of a feature": in_segment("window.frame_unit.bin", flipped(70), "features of"),
    "a bit of a frame's feature": in_segment("feature.image_feat.bin", flipped(70), "features of"),
    "a bit of a mask": in_segment("window.frame_mask.bin", flipped(2), "features of"),
    "a bit of a span": in_segment("window.span.bin", flipped(7), "features of"),
    "features of other videos": in_segment(
        "window.frame_unit.bin", lambda d: d[-len(d) // 2 :] + d[: -len(d) // 2], "features of"
    ),
    "a bit of a thumbnail": in_segment("byte.strip.bin", flipped(70), "thumbnails of"),
    "where a thumbnail ends": in_segment(
        "strip.end.bin", lambda d: b"\xff" * len(d), "features of"
    ),
    "a path": in_segment("videos.arrow", lambda d: d.replace(b"3.mp4", b"4.mp4"), "from its hash"),
    "an offset of a table": in_segment("videos.arrow", flipped(-900), "from its hash"),
    "the folder in the list": in_list(lambda v: v.update(videos="/elsewhere")),
    "a video that is gone": in_list(lambda v: v["segments"][0].update(gone=[1])),
    "a segment less": in_list(lambda v: v.update(segments=[])),
}

# ---------------------------------------------------------------- runs

STEP = "checkpoints/0"
# Whether a checkpoint is "the best" may change, its parameters must not.
INTACT = (runner.IDENTICAL, runner.REFUSED)


def run(name: str, change: Callable[[bytes], bytes], accepted: tuple[str, ...] = INTACT) -> Case:
    return Case("checkpoints", "run", edit(name, change), accepted)


CHECKPOINTS = {
    "a metric of another name": run(f"{STEP}/metrics.json", lambda d: d.replace(b"R1", b"R2")),
    "a metric that is a list": run(f"{STEP}/metrics.json", lambda d: d.replace(b"12.5", b"[1]")),
    "half a metric": run(f"{STEP}/metrics.json", lambda d: d[:12]),
    "a metric in Latin-1": run(f"{STEP}/metrics.json", lambda d: d + b"\xe9"),
    "a log in Latin-1": run("metrics.jsonl", lambda d: d + b"\xe9\n", ANY),
    "a configuration in Latin-1": run("config.json", lambda d: d + b"\xe9"),
    "a manifest": run(f"{STEP}/params/manifest.ocdbt", lambda d: d[:60]),
    "metadata": run(f"{STEP}/params/_METADATA", lambda d: d[:2000]),
    "shardings": run(f"{STEP}/params/_sharding", flipped(9000)),
    "values": run(f"{STEP}/params/ocdbt.process_0/d/*", flipped(5000)),
    "values of the optimiser": run(f"{STEP}/opt_state/manifest.ocdbt", lambda d: d[:60]),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("videos", VIDEOS),
        ("annotations", ANNOTATIONS),
        ("weights", WEIGHTS),
        ("index", INDEX),
        ("checkpoints", CHECKPOINTS),
    )
    for name, case in cases.items()
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Returns the prepared directory of a kind."""
    made: dict[str, Path] = {}

    def root(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            runner.prepare(kind, made[kind])
        return made[kind]

    return root


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_the_corpus(name, roots, tmp_path):
    case = CASES[name]
    root, directory = roots(case.kind), tmp_path / "input"
    shutil.copytree(root / "subjects" / case.subject, directory)
    case.damage(directory)
    if_changed = LEGITIMATE if runner.CHANGED in case.accepted else FAILURE
    outcome = runner.judge(
        runner.Outcome(case.kind, 0, case.subject, name), if_changed, root, directory
    )
    assert outcome.status in case.accepted, outcome.trace or outcome.detail
    assert case.message in outcome.detail


@pytest.mark.parametrize("kind", runner.KINDS)
def test_a_short_run_of_the_fuzzer(kind, roots):
    outcomes = [runner.run_input(kind, roots(kind), 0, number) for number in range(15)]
    failed = [outcome for outcome in outcomes if outcome.status == runner.FAILED]
    assert not failed, "\n".join(f"{o.subject}: {o.damage}: {o.detail[:200]}" for o in failed)


def test_an_input_is_made_again_from_its_seed_and_number(roots, tmp_path):
    for kind in runner.KINDS:
        made = [
            runner.make_input(kind, roots(kind), 3, 1, tmp_path / f"{kind}{time}")
            for time in range(2)
        ]
        assert made[0] == made[1]
        assert contents(tmp_path / f"{kind}0") == contents(tmp_path / f"{kind}1")
