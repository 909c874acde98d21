"""However many files the records are in, few of them are open."""

import contextlib
import itertools
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.commands import ROOT

from data_prep import retrieval_builder
from data_prep.annotations import Annotations, Captioned
from data_prep.custom.custom_dataset_builder import Builder
from data_prep.video_folder import Clip, Plan
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.record_files import RecordFiles
from drl_jax.data.storage import StorageSpec

CLIPS, PER_SHARD = 240, 2


def open_files():
    return [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]


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


def frames_of(number):
    return np.full((1, 2, 2, 3), number % 256, np.uint8)


def build(data_dir):
    """Builds a dataset; only the decoding is left out."""
    ids = [f"clip{number}" for number in range(CLIPS)]
    folder = Path("videos")
    plan = Plan(
        Annotations({"train": [Captioned(name, [f"about {name}"]) for name in ids]}),
        folder,
        [Clip(name, folder / f"{name}.mp4", None) for name in ids],
        {},
        [],
    )
    spec = StorageSpec(FrameForm(2), 1, "raw")
    config = tfds.core.BuilderConfig(name=spec.name)
    builder = Builder(data_dir=data_dir, config=config, file_format="array_record")
    builder.store(plan, data_dir / "cache", timeout=1)
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A dataset of many files of records, written where few may be open."""

    def decode_clips(clips, **_):
        return (frames_of(number) for number in range(len(clips)))

    with pytest.MonkeyPatch.context() as patch, few_files_allowed(40):
        patch.setattr(retrieval_builder, "decode_clips", decode_clips)
        patch.setattr(retrieval_builder, "_VIDEOS_PER_SHARD", PER_SHARD)
        return build(tmp_path_factory.mktemp("many"))


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


def test_a_dataset_of_many_files_is_read_where_few_may_be_open(built):
    command = [sys.executable, "-c", READ, str(built)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout == "2000\n", finished.stderr


def test_files_are_kept_open_while_there_are_few(built):
    files = sorted(built.glob("*.array_record*"))
    assert len(files) == CLIPS // PER_SHARD
    records = RecordFiles(files, [PER_SHARD] * len(files))
    before = len(open_files())
    assert len({records[record] for record in range(CLIPS)}) == CLIPS
    opened = len(open_files()) - before
    assert 1 < opened <= 256
    assert len({records[record] for record in range(CLIPS)}) == CLIPS
    assert len(open_files()) - before == opened
    del records
    assert len(open_files()) == before


def test_records_outside_and_files_that_are_missing(built, tmp_path):
    files = sorted(built.glob("*.array_record*"))[:2]
    records = RecordFiles(files, [PER_SHARD, PER_SHARD])
    assert [records.file(record) for record in range(4)] == [*files[:1] * 2, *files[1:] * 2]
    for record in (-1, 4):
        with pytest.raises(IndexError):
            records[record]
    with pytest.raises(FileNotFoundError, match=r"No such file.*absent"):
        RecordFiles([*files, tmp_path / "absent"], [2, 2, 2])
