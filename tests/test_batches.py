import dataclasses
import hashlib

import jax
import numpy as np
import pytest
from support.datasets import custom
from support.videos import numbered_frames, write_video

from data_prep.build import main as build
from drl_jax.config import DataConfig
from drl_jax.data import frames
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.pictures import pad_frames
from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runtime.sharding import make_layout


@pytest.fixture(scope="module")
def dataset(shapes_config):
    return VideoDataset(dataset_dir(shapes_config))


def take(batches, start, count, process=0, processes=1):
    stream = batches.iterate(start, process, processes)
    return [next(stream) for _ in range(count)]


def make(dataset, config, seed=0, batch_size=16, **changes):
    data = dataclasses.replace(config.data, **changes)
    split = load_split(dataset, "train", data)
    return TrainBatches(dataset, split, data, batch_size, seed, CLIPTokenizer())


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_shapes_and_dtypes_of_a_batch(dataset, shapes_config):
    (batch,) = take(make(dataset, shapes_config), 0, 1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "text_ids": ((16, 24), np.int32),
        "text_mask": ((16, 24), np.bool_),
        "frames": ((16, 4, 64, 64, 3), np.uint8),
        "frame_mask": ((16, 4), np.bool_),
    }


def test_iteration_can_start_at_any_step(dataset, shapes_config):
    run = take(make(dataset, shapes_config), 0, 15)
    assert_same(run[13:], take(make(dataset, shapes_config, num_threads=1), 13, 2))


def test_processes_split_the_batch_of_a_single_process(dataset, shapes_config):
    (whole,) = take(make(dataset, shapes_config), 5, 1)
    # Also where each of them reads one example.
    for batch_size, processes in ((16, 4), (2, 2), (1, 1)):
        batches = make(dataset, shapes_config, batch_size=batch_size)
        parts = [take(batches, 80 // batch_size, 1, p, processes)[0] for p in range(processes)]
        for name, array in whole.items():
            found = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(found, array[:batch_size])


def test_an_epoch_has_every_video_once_in_a_new_order(dataset, shapes_config):
    batches = make(dataset, shapes_config)
    assert batches.num_examples == 192
    assert batches.steps_per_epoch == 12

    def fingerprints(steps):
        return [frames.tobytes() for batch in steps for frames in batch["frames"]]

    run = take(batches, 0, 24)
    first, second = fingerprints(run[:12]), fingerprints(run[12:])
    assert sorted(first) == sorted(second)
    assert first != second
    texts = [batch["text_ids"].tobytes() for batch in run]
    assert len(set(texts)) == 24  # Captions are drawn anew each time.

    (other,) = take(make(dataset, shapes_config, seed=1), 0, 1)
    assert not np.array_equal(run[0]["frames"], other["frames"])
    expanded = make(dataset, shapes_config, expand_captions=True)
    assert (expanded.num_examples, expanded.steps_per_epoch) == (192 * 20, 240)


def test_holdout_separates_no_videos_of_one_file(tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    names = [f"{number}.mp4" for number in range(4)]
    for name in names:
        write_video(videos / name, numbered_frames(45)[5:], fps=10)
        (videos / f"link_{name}").symlink_to(name)
    rows = [f"{name},a,0,2,train" for name in names]
    rows += [f"link_{name},b,1,3,train" for name in names[:3]]
    rows += [f"{name},c,0,2,train" for name in names]
    (tmp_path / "mine.csv").write_text("\n".join(["video,caption,start,end,split", *rows]))
    size = ("--image_size=32", "--max_frames=4")
    assert build(custom(tmp_path, "mine.csv", tmp_path, *size)) == 0
    dataset = VideoDataset(tmp_path / "custom" / "32px_4f_jpeg_shown_time" / "1.0.0")
    files = [dataset.sources[video][0] for video in range(7)]
    assert sorted(files) == sorted([*names, *names[:3]])
    by_hash = sorted(range(7), key=lambda n: hashlib.sha256(dataset.video_ids[n].encode()).digest())
    for count in range(1, 6):
        if count == 3:  # The first bytes of hashes do not always tell which is smaller.
            monkeypatch.setattr(dataset, "id_hashes", np.zeros(7, np.uint64))
        data = DataConfig(train_split="train", holdout=count)
        splits = [load_split(dataset, name, data) for name in ("train", "val")]
        assert sorted(video for split in splits for video in split.videos) == list(range(7))
        assert {tuple(captions) for captions in splits[0].captions} <= {("a", "c"), ("b",)}
        assert {len(captions) for captions in splits[1].captions} == {1}
        train, val = ({files[video] for video in split.videos} for split in splits)
        assert not train & val
        assert train | val == set(names)
        # The files of the first videos by hash, until there are enough.
        ordered = list(dict.fromkeys(files[video] for video in by_hash))
        sizes = np.cumsum([files.count(file) for file in ordered])
        assert val == set(ordered[: np.searchsorted(sizes, count) + 1])
    with pytest.raises(DatasetError, match="leaves nothing to train on: train has 7 videos"):
        load_split(dataset, "val", DataConfig(train_split="train", holdout=8))


def test_padding_is_black_and_masked():
    frames, mask = pad_frames(np.full((2, 4, 4, 3), 7, np.uint8), 5)
    assert frames.shape == (5, 4, 4, 3)
    assert mask.tolist() == [True, True, False, False, False]
    assert frames[:2].min() == 7
    assert frames[2:].max() == 0


def test_every_cache_gives_the_same_batches(dataset, shapes_config, monkeypatch):
    expected = take(make(dataset, shapes_config), 0, 12)
    for cache, devices in (("none", 8), ("memory", 8), ("device", 1), ("device", 8)):
        layout = make_layout(jax.devices()[:devices])
        batches = make(dataset, shapes_config, cache=cache)
        stream = batches.on_devices(0, layout)
        found = [next(stream) for _ in expected]
        assert_same(found, expected)
        assert_same(expected, found)
        for array in found[0].values():
            assert array.sharding.is_equivalent_to(layout.batch_sharded, array.ndim)
        if cache == "memory":  # After an epoch it is full, and reads nothing.
            with monkeypatch.context() as context:
                context.setattr(dataset, "read_frames", None)
                assert_same(take(batches, 0, 12), expected)


class Device:
    """Memory statistics of an accelerator; a CPU has none."""

    def __init__(self, limit):
        self._limit = limit

    def memory_stats(self):
        return {"bytes_limit": self._limit, "bytes_in_use": self._limit}


def test_an_accelerator_chooses_threads_and_cache(monkeypatch):
    assert (frames.reader_threads(0), frames.reader_threads(3)) == (4, 3)
    assert frames.choose_cache("auto", 1) == "none"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(100)])
    monkeypatch.setattr(frames, "available_memory", lambda: 300)
    monkeypatch.setattr(frames, "available_cpus", lambda: 16)
    assert (frames.reader_threads(0), frames.reader_threads(3)) == (16, 3)
    # 30 % of 2 x 100 bytes on the devices, of 300 on the host.
    chosen = [frames.choose_cache("auto", size) for size in (60, 61, 90, 91)]
    assert chosen == ["device", "memory", "memory", "none"]
    assert frames.choose_cache("none", 1) == "none"


def test_a_cache_that_does_not_fit_is_an_error(dataset, shapes_config, monkeypatch):
    monkeypatch.setattr("drl_jax.data.frames.available_memory", lambda: 10_000)
    with pytest.raises(DatasetError, match=r"cache=memory: 192 videos need 0.0 GB.* 0.0 GB free"):
        make(dataset, shapes_config, cache="memory")
