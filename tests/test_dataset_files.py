"""Files of a built dataset: few of them are open, nothing damaged is read silently, and each error
is one line that says what to do."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.commands import ROOT, TINY, error_of
from support.files import contents, refused
from support.params import random_params

from data_prep import retrieval_builder
from data_prep.annotations import Annotations, Captioned
from data_prep.custom.custom_dataset_builder import Builder
from data_prep.video_folder import Clip, Plan
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.record_files import RecordFiles
from drl_jax.data.records import DatasetError, VideoDataset
from drl_jax.data.storage import StorageSpec
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runtime.errors import Unavailable
from drl_jax.runtime.files import sha256
from drl_jax.runtime.sharding import make_layout

VARIANT = Path("shapes") / "64px_4f_raw" / "1.0.0"


@pytest.fixture
def copy(shapes_data, tmp_path) -> Path:
    """Directory of a copy of the small `shapes` that a test may change."""
    return Path(shutil.copytree(shapes_data / VARIANT, tmp_path / VARIANT))


def shard_of(directory):
    (shard,) = directory.glob("*.array_record*")
    return shard


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def read_everything(directory):
    dataset = VideoDataset(directory)
    dataset.read_frames(0)
    for name in dataset.split_names:
        dataset.split(name)


# ---------------------------------------------------------------- records


def digests(directory):
    """Hash of the frames of each video, or the error."""
    dataset, found = VideoDataset(directory), []
    for video in range(len(dataset)):
        try:
            found.append(hashlib.sha256(dataset.read_frames(video).tobytes()).hexdigest())
        except DatasetError as error:
            found.append(error)
    return found


def test_a_flipped_bit_in_the_records_is_never_read_silently(copy, tmp_path):
    shard, whole = shard_of(copy), digests(copy)
    ids = VideoDataset(copy).video_ids
    rng, errors = np.random.default_rng(0), 0
    for position in rng.integers(0, shard.stat().st_size, 8):
        bit = rng.integers(8)
        flip_bit(shard, position, bit)
        for video, (found, expected) in enumerate(zip(digests(copy), whole, strict=True)):
            if found == expected:
                continue
            errors += 1
            assert isinstance(found, DatasetError)
            line = str(found)
            assert line.startswith(f"{shard}, record {video} (video {ids[video]}) is damaged")
            assert "\n" not in line
            assert line.endswith(
                f"rebuild it with: python -m data_prep.build shapes --data_dir={tmp_path}"
                " --image_size=64 --max_frames=4 --storage=raw --overwrite"
            )
        flip_bit(shard, position, bit)
    assert errors >= 5
    assert digests(copy) == whole


@pytest.mark.parametrize("size", [0, 10, 65540, 300_000, -1])
def test_a_truncated_file_of_records_is_one_line_for_each_video(size, copy):
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:size])
    for error in digests(copy):
        assert str(error).startswith(f"{shard}, record ")
        assert "\n" not in str(error)


def test_a_record_of_another_variant_or_video(copy, tmp_path):
    ids = list(VideoDataset(copy).video_ids)
    sizes = ("32px_4f_raw", "64px_3f_raw", "64px_4f_jpeg")
    for name in (*sizes, "64px_4f_raw_squash", "64px_4f_raw_time"):
        other = Path(shutil.copytree(copy, tmp_path / "shapes" / name / "1.0.0"))
        with pytest.raises(DatasetError, match=r"manifest.json says 64px_4f_raw \(crop, bicubic\)"):
            VideoDataset(other)
    dataset = VideoDataset(copy)
    dataset.video_ids = ids[::-1]
    with pytest.raises(DatasetError, match=rf"it holds the video b'{ids[7]}'"):
        dataset.read_frames(7)


def test_the_error_reaches_the_main_thread_and_commands(
    shapes_config, copy, tmp_path, tiny_weights, capsys
):
    data = dataclasses.replace(shapes_config.data, data_dir=str(tmp_path))
    config = dataclasses.replace(shapes_config, data=data)
    split = load_split(VideoDataset(copy), "train", data)
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-1])
    dataset, layout = VideoDataset(copy), make_layout(jax.devices()[:1])
    message = r"array_record-00000, record \d+ \(video video\d+\) is damaged"

    def read_an_epoch(cache):
        data_of_cache = dataclasses.replace(data, cache=cache)
        batches = TrainBatches(dataset, split, data_of_cache, 16, 0, CLIPTokenizer())
        list(itertools.islice(batches.on_devices(0, layout), 12))

    for cache in ("none", "memory", "device"):
        with pytest.raises(DatasetError, match=message):
            read_an_epoch(cache)
    evaluator = Evaluator(config, dataset, layout)
    with pytest.raises(DatasetError, match=message):
        evaluator.run(random_params(config.model), split)
    train = (
        *("drl_jax.train", "--config=configs/shapes.py:smoke", *TINY),
        *(f"--config.model.init={tiny_weights}", f"--workdir={tmp_path / 'run'}"),
        f"--config.data.data_dir={tmp_path}",
    )
    line = error_of(*train, capsys=capsys)
    assert line.startswith(f"drl_jax.train: {shard}, record ")
    assert " is damaged (" in line


# ---------------------------------------------------------------- descriptions

DESCRIPTIONS = ("dataset_info.json", "features.json", "metadata.json", "manifest.json")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", [*DESCRIPTIONS, "videos.arrow", "captions.train.arrow"])
def test_a_damaged_description_is_one_line(name, damage, copy):
    path = copy / name
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    else:
        # In a manifest, not every letter matters.
        flip_bit(path, 0 if name == "manifest.json" else path.stat().st_size // 2)
    with pytest.raises(DatasetError, match=f"{name} is|No such file.*{name}") as error:
        read_everything(copy)
    assert " is damaged (" in str(error.value)
    assert "\n" not in str(error.value)
    assert "python -m data_prep.build shapes --data_dir=" in str(error.value)
    if name.startswith("captions"):
        VideoDataset(copy).split("test")


def test_a_manifest_of_another_form_or_dataset_is_damaged(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    for changed in (
        *([], {"annotations": [1]}, {**manifest, "annotations": {"a": 1}}),
        *({**manifest, "files": "a"}, {**manifest, "splits": {"train": 1}}),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(DatasetError, match=r"manifest.json is damaged \("):
            VideoDataset(copy)


def test_a_missing_file_of_records_is_named(copy):
    shard_of(copy).unlink()
    with pytest.raises(DatasetError, match=r"is damaged \(.*No such file.*array_record"):
        VideoDataset(copy)


def test_another_layout_is_refused_with_the_command_that_builds_it_anew(copy):
    (copy / "metadata.json").write_text(json.dumps({"layout": 1, "splits": {}}))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["metadata.json"] = sha256(copy / "metadata.json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError) as error:
        VideoDataset(copy)
    assert str(error.value) == (
        f"{copy} has the layout 1, of another version, and this one reads 2; rebuild it"
        f" with: python -m data_prep.build shapes --data_dir={copy.parents[2]} --image_size=64"
        " --max_frames=4 --storage=raw --overwrite"
    )


@pytest.mark.parametrize("name", [*DESCRIPTIONS, "*.array_record*", "videos.arrow", "captions.*"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(name, copy):
    """Nor is the dataset to be built again."""
    before, opened = contents(copy), VideoDataset(copy)
    path = sorted(copy.glob(name))[0]
    with refused(path):
        with pytest.raises(Unavailable, match=r"Too many levels .*\(ELOOP\)") as error:
            read_everything(copy)
        if name == "*.array_record*":
            with pytest.raises(Unavailable, match=f"{path}, record 3 .* cannot be read: Too many"):
                opened.read_frames(3)
    assert str(path) in str(error.value)
    assert "nothing was moved or deleted" in str(error.value)
    assert "rebuild" not in str(error.value)
    assert contents(copy) == before
    read_everything(copy)


# ---------------------------------------------------------------- many files

CLIPS, PER_SHARD = 240, 2


@contextlib.contextmanager
def few_files_allowed(count):
    """Lets this process open `count` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    # The limit is on the number of a file, and a file gets the smallest free number.
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """The files of records of a large dataset, written where few may be open.

    Only the decoding is left out.
    """

    def decode_clips(clips, **_):
        return (np.full((1, 2, 2, 3), n % 256, np.uint8) for n in range(len(clips)))

    data_dir, folder = tmp_path_factory.mktemp("many"), Path("videos")
    ids = [f"clip{number}" for number in range(CLIPS)]
    annotations = Annotations({"train": [Captioned(name, [f"about {name}"]) for name in ids]})
    clips = [Clip(name, folder / f"{name}.mp4", None) for name in ids]
    config = tfds.core.BuilderConfig(name=StorageSpec(FrameForm(2), 1, "raw").name)
    builder = Builder(data_dir=data_dir, config=config, file_format="array_record")
    with pytest.MonkeyPatch.context() as patch, few_files_allowed(40):
        patch.setattr(retrieval_builder, "decode_clips", decode_clips)
        patch.setattr(retrieval_builder, "_VIDEOS_PER_SHARD", PER_SHARD)
        builder.store(Plan(annotations, folder, clips, {}, []), data_dir / "cache", timeout=1)
    files = sorted(Path(builder.data_dir).glob("*.array_record*"))
    assert len(files) == CLIPS // PER_SHARD
    return files


READ = f"""
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from drl_jax.data.records import VideoDataset
dataset = VideoDataset(Path(sys.argv[1]))
def is_right(video):
    return (dataset.read_frames(video) == video % 256).all()
with ThreadPoolExecutor(8) as pool:
    print(sum(pool.map(is_right, np.random.default_rng(0).integers(0, {CLIPS}, 2000))))
"""


def test_a_dataset_of_many_files_is_read_where_few_may_be_open(many):
    command = [sys.executable, "-c", READ, str(many[0].parent)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout == "2000\n", finished.stderr


def test_files_are_kept_open_while_there_are_few(many, tmp_path):
    def open_files():
        return sum(path.is_symlink() for path in Path("/proc/self/fd").iterdir())

    records = RecordFiles(many, [PER_SHARD] * len(many))
    before = open_files()
    assert len({records[record] for record in range(CLIPS)}) == CLIPS
    opened = open_files() - before
    assert 1 < opened <= 256
    assert len({records[record] for record in range(CLIPS)}) == CLIPS
    assert open_files() - before == opened
    assert [records.file(record) for record in range(4)] == [many[0]] * 2 + [many[1]] * 2
    for record in (-1, CLIPS):
        with pytest.raises(IndexError):
            records[record]
    del records
    assert open_files() == before
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent"):
        RecordFiles([*many, tmp_path / "absent"], [PER_SHARD] * (len(many) + 1))
