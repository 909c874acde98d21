"""Damaged datasets: nothing is read silently, and each error is one line that says what to do."""

import collections
import dataclasses
import hashlib
import itertools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support.commands import TINY, error_line, error_of, run_module
from support.files import contents, refused
from support.params import random_params

from data_prep.build import main as build
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.records import DatasetError, VideoDataset
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runtime.errors import Unavailable
from drl_jax.runtime.sharding import make_layout

VARIANT = Path("shapes") / "64px_4f_raw" / "1.0.0"


@pytest.fixture(scope="module")
def jpeg_data(tmp_path_factory, shapes_data) -> Path:
    """The small `shapes` as jpeg, built from the videos of `shapes_data`."""
    data_dir = tmp_path_factory.mktemp("jpeg")
    shutil.copytree(shapes_data / "source", data_dir / "source")
    assert build(["shapes", "--size=smoke", f"--data_dir={data_dir}", "--storage=jpeg"]) == 0
    return data_dir


@pytest.fixture
def damaged(shapes_data, tmp_path) -> Path:
    """Directory of a copy of the small `shapes` that a test may damage."""
    return Path(shutil.copytree(shapes_data / VARIANT, tmp_path / VARIANT))


def shard_of(directory):
    (shard,) = directory.glob("*.array_record*")
    return shard


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def damage_record(directory, video):
    """Flips a bit in the record of a video, and in no other."""
    shard = shard_of(directory)
    # Where a record starts is not documented, so try positions.
    for position in range(200, shard.stat().st_size, 500):
        flip_bit(shard, position)
        dataset = VideoDataset(directory)
        if not readable(dataset, video) and all(
            readable(dataset, other) for other in range(len(dataset)) if other != video
        ):
            return
        flip_bit(shard, position)
    raise AssertionError("no position found")


def readable(dataset, video):
    try:
        dataset.read_frames(video)
    except DatasetError:
        return False
    return True


def digests(directory):
    """Hash of the frames of each video, or the error."""
    dataset, found = VideoDataset(directory), []
    for video in range(len(dataset)):
        try:
            found.append(hashlib.sha256(dataset.read_frames(video).tobytes()).hexdigest())
        except DatasetError as error:
            found.append(error)
    return found


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_a_flipped_bit_in_the_records_is_never_read_silently(
    encoding, shapes_data, jpeg_data, tmp_path
):
    name = f"shapes/64px_4f_{encoding}/1.0.0"
    source = {"raw": shapes_data, "jpeg": jpeg_data}[encoding] / name
    directory = Path(shutil.copytree(source, tmp_path / name))
    shard, whole = shard_of(directory), digests(source)
    ids = VideoDataset(source).video_ids
    rng, errors = np.random.default_rng(0), 0
    for position in rng.integers(0, shard.stat().st_size, 16):
        bit = rng.integers(8)
        flip_bit(shard, position, bit)
        for video, (found, expected) in enumerate(zip(digests(directory), whole, strict=True)):
            if found == expected:
                continue
            errors += 1
            line = str(found)
            assert isinstance(found, DatasetError)
            assert line.startswith(f"{shard}, record {video} (video {ids[video]}) is damaged")
            assert "\n" not in line
            assert line.endswith(
                f"rebuild it with: python -m data_prep.build shapes --data_dir={tmp_path}"
                f" --image_size=64 --max_frames=4 --storage={encoding} --overwrite"
            )
        flip_bit(shard, position, bit)
    assert errors >= 10
    assert digests(directory) == whole


@pytest.mark.parametrize("size", [0, 10, 65536, 65540, 300_000, -1])
def test_a_truncated_file_of_records_is_one_line_for_each_video(size, damaged):
    shard = shard_of(damaged)
    shard.write_bytes(shard.read_bytes()[:size])
    for error in digests(damaged):
        assert str(error).startswith(f"{shard}, record ")
        assert "\n" not in str(error)


DESCRIPTIONS = ("dataset_info.json", "features.json", "metadata.json", "manifest.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in DESCRIPTIONS for damage in ("flip", "truncate", "remove")),
        ("*.array_record*", "remove"),
    ],
)
def test_a_damaged_description_is_one_line(name, damage, damaged):
    (path,) = damaged.glob(name)
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    else:
        # In a manifest, not every letter matters.
        flip_bit(path, 0 if name == "manifest.json" else path.stat().st_size // 2)
    with pytest.raises(DatasetError, match="is damaged") as error:
        VideoDataset(damaged)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert "python -m data_prep.build shapes --data_dir=" in str(error.value)


@pytest.mark.parametrize("name", [*DESCRIPTIONS, "*.array_record*", "videos.arrow", "captions.*"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(name, damaged):
    """Nor is the dataset to be built again."""
    before = contents(damaged)
    path = sorted(damaged.glob(name))[0]
    with refused(path), pytest.raises(Unavailable, match=r"Too many levels .*\(ELOOP\)") as error:
        read_everything(damaged)
    assert str(path) in str(error.value)
    assert "nothing was moved or deleted" in str(error.value)
    assert "rebuild" not in str(error.value)
    assert contents(damaged) == before
    read_everything(damaged)


def test_records_that_can_no_longer_be_read_are_not_called_damaged(damaged):
    """Opened when the dataset was intact."""
    dataset, shard = VideoDataset(damaged), shard_of(damaged)
    message = rf"{shard}, record 3 .* cannot be read: Too many levels"
    with refused(shard), pytest.raises(Unavailable, match=message):
        dataset.read_frames(3)


def read_everything(directory):
    dataset = VideoDataset(directory)
    dataset.read_frames(0)
    for name in dataset.split_names:
        dataset.split(name)


def test_a_record_of_another_variant_or_video(damaged, tmp_path):
    ids = VideoDataset(damaged).video_ids
    for name in ("32px_4f_raw", "64px_3f_raw", "64px_4f_jpeg", "64px_4f_raw_time"):
        other = Path(shutil.copytree(damaged, tmp_path / "shapes" / name / "1.0.0"))
        with pytest.raises(DatasetError, match=r"manifest.json says 64px_4f_raw \(crop, bicubic\)"):
            VideoDataset(other)
    dataset = VideoDataset(damaged)
    dataset.video_ids = list(ids)[::-1]
    with pytest.raises(DatasetError, match=rf"it holds the video b'{ids[7]}'"):
        dataset.read_frames(7)


def test_the_error_reaches_the_main_thread(shapes_config, damaged, tmp_path):
    data = dataclasses.replace(shapes_config.data, data_dir=str(tmp_path))
    config = dataclasses.replace(shapes_config, data=data)
    split = load_split(VideoDataset(damaged), "train", data)
    damage_record(damaged, 0)
    dataset, layout = VideoDataset(damaged), make_layout(jax.devices()[:1])
    message = rf"array_record-00000, record 0 \(video {dataset.video_ids[0]}\) is damaged"
    for cache in ("none", "memory", "device"):
        with pytest.raises(DatasetError, match=message):
            read_an_epoch(dataset, split, dataclasses.replace(data, cache=cache), layout)
    evaluator = Evaluator(config, dataset, layout)
    with pytest.raises(DatasetError, match=message):
        evaluator.run(random_params(config.model), split)


def read_an_epoch(dataset, split, data, layout):
    batches = TrainBatches(dataset, split, data, 16, 0, CLIPTokenizer())
    collections.deque(itertools.islice(batches.on_devices(0, layout), 12), maxlen=0)


def test_commands_print_one_line(damaged, tmp_path, tiny_weights, capsys):
    damage_record(damaged, 0)
    record = f"{shard_of(damaged)}, record 0 (video {VideoDataset(damaged).video_ids[0]})"
    train = (
        *("drl_jax.train", "--config=configs/shapes.py:smoke", *TINY),
        *(f"--config.model.init={tiny_weights}", f"--workdir={tmp_path / 'run'}"),
        f"--config.data.data_dir={tmp_path}",
    )
    finished = run_module(*train, check=False)
    assert error_line(finished).startswith(f"drl_jax.train: {record} is damaged")
    (damaged / "metadata.json").write_text("{")
    line = error_of(*train, capsys=capsys)
    assert "metadata.json is not the file that the build wrote" in line
