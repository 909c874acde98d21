"""The kept corpus of damaged files that once broke a reader, and a short run of the fuzzer.

`python -m benchmarks.fuzz` is the long run. What it finds becomes a case here: a function that
damages a subject in a few lines.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.files import contents

from benchmarks.fuzz import runner
from benchmarks.fuzz.damage import FAILURE, LEGITIMATE
from drl_jax.weights.containers import open_weights

Damage = Callable[[Path], object]


def edit_json(name: str, change: Callable) -> Damage:
    """Changes a JSON file in place."""

    def damage(directory: Path) -> None:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
        change(value)
        (directory / name).write_text(json.dumps(value), encoding="utf-8")

    return damage


def edit(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Changes the bytes of a file, which may be a pattern, e.g. `*.bin`."""

    def damage(directory: Path) -> None:
        for path in directory.glob(name):
            data = path.read_bytes()
            damaged = change(data)
            assert damaged != data
            path.write_bytes(damaged)

    return damage


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


def flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return flip


# (subject, damage, a part of the refusal), or the outcomes that are accepted instead
LONG = b"9" * 5000
ANNOTATIONS = {
    "a memo of gigabytes": (
        *("msvd-pickle", edit("raw-captions.pkl", lambda d: b"\x80\x02}r\xff\xff\xff\x7f.")),
        "object 2147483647 of a pickle",
    ),
    "a number as a caption": (  # The sentence is left out.
        *("msrvtt", edit_json("MSRVTT_data.json", lambda v: v["sentences"][0].update(caption=1.5))),
        [runner.CHANGED],
    ),
    "a line break in an id": (
        *("msrvtt", edit("MSRVTT_data.json", replaced(b'"video_id": "', b'"video_id": "a\\n'))), "",
    ),
    "half a character in a caption": (
        *("vatex-ref", edit("ref_captions.json", replaced(b"two words", b"two \\ud800"))), "",
    ),
    "an empty list": ("activitynet", edit_json("train_ids.json", lambda v: v.clear()), ""),
    "5,000 digits as a number": ("activitynet", edit("val_1.json", replaced(b"2.0", LONG)), ""),
    "a long id": ("didemo", edit("train_list.txt", lambda d: LONG + d), ""),
    "U+0085 in a column": ("custom-csv", edit("*.csv", replaced(b"video", b"vid\xc2\x85eo")), ""),
    "a long column": ("custom-csv", edit("*.csv", lambda d: LONG + d), ""),
    "half a character in a field": (
        *("custom-jsonl", edit("*.jsonl", lambda d: d.replace(b'"video"', b'"\\ud800"'))), "",
    ),
    "100,000 brackets": ("vatex-official", edit("*.json", lambda d: b"[" * 100_000 + d), ""),
}  # fmt: skip


def memo_of_gigabytes(data: bytes) -> bytes:
    """The index of a memo entry, for which the standard unpickler allocates a table."""
    # The first `BINPUT 0`, in the fourth pickle: an `r` takes an index of four bytes.
    at = data.index(b"q\x00", 100)
    return data[:at] + b"r" + (2**31 - 1).to_bytes(4, "little") + data[at + 2 :]


def integer_weights(directory: Path) -> None:
    path = directory / "clip.safetensors"
    state = load_file(path)
    state["ln_final.bias"] = np.zeros(state["ln_final.bias"].shape, np.int32)
    save_file(state, path)


def long_name(directory: Path) -> None:
    path = directory / "clip.safetensors"
    save_file({**load_file(path), "visual." + "x\u2028" * 1000: np.zeros(1, np.float32)}, path)


def other_configuration(directory: Path) -> None:
    path = directory / "exported.safetensors"
    metadata = open_weights(path).metadata
    metadata["drl_jax_config"] = metadata["drl_jax_config"].replace('"seed": 0', '"seed": 1')
    save_file(load_file(path), path, metadata=metadata)


LEGACY, EXPORTED, CLIP = "clip_legacy.pt", "exported.safetensors", "clip.safetensors"
WEIGHTS = {
    "a memo of gigabytes": (LEGACY, edit("*", memo_of_gigabytes), "object 2147483647 of a pickle"),
    "bytes after the end": (LEGACY, edit("*", lambda d: d + d[-64:]), "has 64 bytes after"),
    "a bit in a zip file": (
        "clip_torchscript.pt",
        edit("*", flipped(900_000)),
        "a checksum is wrong",
    ),
    "a bit of an exported tensor": (EXPORTED, edit("*", flipped(-9)), "checksum is wrong"),
    "an exported configuration": (EXPORTED, other_configuration, "checksum is wrong"),
    "integers": (CLIP, integer_weights, "ln_final.bias is int32"),
    "a name of 2,000 characters": (CLIP, long_name, "x\\u2028"),
}


def missing(name: str) -> Damage:
    return lambda directory: [path.unlink() for path in directory.glob(name)]


def of_file(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return edit(f"segments/*/{name}", change)


def of_list(change: Callable) -> Damage:
    return edit_json("index.json", change)


def rotated(data: bytes) -> bytes:
    return data[-len(data) // 2 :] + data[: -len(data) // 2]


# Of the subject "int8".
INDEX = {
    "a missing array": (missing("segments/*/window.frame_weight.bin"), "frame_weight"),
    "no list": (missing("index.json"), "there is no index in"),
    "half an array": (of_file("window.frame_unit.bin", lambda d: d[:300]), "300 bytes, not"),
    "a bit of a feature": (of_file("window.frame_unit.bin", flipped(70)), "features of"),
    "a bit of a frame's": (of_file("feature.image_feat.bin", flipped(70)), "features of"),
    "a bit of a mask": (of_file("window.frame_mask.bin", flipped(2)), "features of"),
    "a bit of a span": (of_file("window.span.bin", flipped(7)), "features of"),
    "other videos": (of_file("window.frame_unit.bin", rotated), "features of"),
    "a bit of a thumbnail": (of_file("byte.strip.bin", flipped(70)), "thumbnails of"),
    "where it ends": (of_file("strip.end.bin", lambda d: b"\xff" * len(d)), "features of"),
    "a path": (of_file("videos.arrow", lambda d: d.replace(b"3.mp4", b"4.mp4")), "from its hash"),
    "an offset of a table": (of_file("videos.arrow", flipped(-900)), "from its hash"),
    "the folder": (of_list(lambda v: v.update(videos="/elsewhere")), "from its hash"),
    "a gone video": (of_list(lambda v: v["segments"][0].update(gone=[1])), "from its hash"),
    "a segment less": (of_list(lambda v: v.update(segments=[])), "from its hash"),
}

# Of the subject "run". Whether a checkpoint is "the best" may change, its parameters must not.
STEP = "checkpoints/0"
CHECKPOINTS = {
    "another metric": (f"{STEP}/metrics.json", lambda d: d.replace(b"R1", b"R2")),
    "a list as a metric": (f"{STEP}/metrics.json", lambda d: d.replace(b"12.5", b"[1]")),
    "half a metric": (f"{STEP}/metrics.json", lambda d: d[:12]),
    "a metric in Latin-1": (f"{STEP}/metrics.json", lambda d: d + b"\xe9"),
    "a log in Latin-1": ("metrics.jsonl", lambda d: d + b"\xe9\n"),
    "a configuration in Latin-1": ("config.json", lambda d: d + b"\xe9"),
    "a manifest": (f"{STEP}/params/manifest.ocdbt", lambda d: d[:60]),
    "metadata": (f"{STEP}/params/_METADATA", lambda d: d[:2000]),
    "shardings": (f"{STEP}/params/_sharding", flipped(9000)),
    "values": (f"{STEP}/params/ocdbt.process_0/d/*", flipped(5000)),
    "values of the optimiser": (f"{STEP}/opt_state/manifest.ocdbt", lambda d: d[:60]),
}
CASES = {
    **{("annotations", name): case for name, case in ANNOTATIONS.items()},
    **{("weights", name): case for name, case in WEIGHTS.items()},
    **{("index", name): ("int8", *case) for name, case in INDEX.items()},
    **{
        ("checkpoints", name): ("run", edit(*case), [runner.IDENTICAL, runner.REFUSED])
        for name, case in CHECKPOINTS.items()
    },
}
CASES["checkpoints", "a log in Latin-1"][2].append(runner.CHANGED)


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


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_case_of_the_corpus(kind, name, roots, tmp_path):
    subject, damage, expected = CASES[kind, name]
    root, directory = roots(kind), tmp_path / "input"
    shutil.copytree(root / "subjects" / subject, directory)
    damage(directory)
    accepted = [runner.REFUSED] if isinstance(expected, str) else expected
    if_changed = LEGITIMATE if runner.CHANGED in accepted else FAILURE
    outcome = runner.judge(runner.Outcome(kind, 0, subject, name), if_changed, root, directory)
    assert outcome.status in accepted, outcome.trace or outcome.detail
    assert not isinstance(expected, str) or expected in outcome.detail


@pytest.mark.parametrize("kind", runner.KINDS)
def test_a_short_run_of_the_fuzzer(kind, roots, tmp_path):
    outcomes = [runner.run_input(kind, roots(kind), 0, number) for number in range(10)]
    failed = [outcome for outcome in outcomes if outcome.status == runner.FAILED]
    assert not failed, "\n".join(f"{o.subject}: {o.damage}: {o.detail[:200]}" for o in failed)
    # An input is made again from its seed and number.
    one, other = tmp_path / "one", tmp_path / "other"
    made = [runner.make_input(kind, roots(kind), 3, 1, directory) for directory in (one, other)]
    assert made[0] == made[1]
    assert contents(one) == contents(other)
