"""Videos that show the same, and pictures that are frames of indexed videos."""

import io
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from support.videos import SHARED, write_video

from drl_jax.data.pictures import FrameConverter, to_form
from drl_jax.data.video import read_timed_frames
from drl_jax.search import duplicates
from drl_jax.search.duplicates import find_duplicates, same_picture
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.reading import MIRRORED, picture_hash
from drl_jax.search.update import update_index

FPS, SIDE = 4, 192


def film(seed: int, count: int = 40) -> np.ndarray:
    """Frames of shapes that move over a gradient, another picture each second."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(0, count, FPS):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        frames += [np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))] * FPS
    return np.stack(frames[:count])


def copied(source: Path, out: Path, *, crf: int = 23, scale: float = 1, mirror: bool = False):
    """Encodes a video again."""
    with av.open(str(source)) as container, av.open(str(out), "w") as copy:
        rate = container.streams.video[0].average_rate or 25
        stream, to_rgb = (
            copy.add_stream("libx264", rate=rate, options={"crf": str(crf)}),
            FrameConverter(False),
        )
        for number, frame in enumerate(container.decode(video=0)):
            picture = Image.fromarray(to_rgb(frame))
            if mirror:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            width, height = (int(side * scale) // 2 * 2 for side in picture.size)
            again = av.VideoFrame.from_ndarray(np.asarray(picture.resize((width, height))))
            if not number:
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = frame.time_base
            again.pts, again.time_base = frame.pts, frame.time_base
            copy.mux(stream.encode(again))
        copy.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four films, copies of them, and films between black and grey frames."""
    folder = tmp_path_factory.mktemp("duplicates") / "videos"
    folder.mkdir()
    for seed in range(4):
        write_video(folder / f"film{seed}.mp4", film(seed), FPS)
    copied(folder / "film0.mp4", folder / "small.mp4", crf=38, scale=0.5)
    copied(folder / "film0.mp4", folder / "mirrored.mp4", mirror=True)
    copied(folder / "film1.mp4", folder / "all.mp4", crf=38, scale=0.5, mirror=True)
    symmetrical = film(5)
    symmetrical[:, :, SIDE // 2 :] = symmetrical[:, :, : SIDE // 2][:, :, ::-1]
    write_video(folder / "symmetrical.mp4", symmetrical, FPS)
    copied(folder / "symmetrical.mp4", folder / "symmetrical2.mp4")
    black = np.full((24, SIDE, SIDE, 3), 16, np.uint8)
    noise = np.random.default_rng(9).integers(0, 12, (24, SIDE, SIDE, 3), np.uint8)
    title = film(7, FPS)
    for number in range(2):
        leader = black + noise[:, :: 1 - 2 * number]
        write_video(
            folder / f"leader{number}.mp4", np.concatenate([leader, film(20 + number, 16)]), FPS
        )
        write_video(folder / f"black{number}.mp4", leader, FPS)
        # The same title, and else nothing.
        write_video(folder / f"title{number}.mp4", np.concatenate([leader, title]), FPS)
    return folder


@pytest.fixture(scope="module")
def index(search_model, videos):
    directory = videos.parent / "index"
    update_index(search_model, videos, directory)
    return OpenIndex(directory, search_model)


def test_copies_are_found(index):
    found = [(d.first, d.second, d.share, d.is_mirrored) for d in find_duplicates(index)]
    assert found == [
        ("all.mp4", "film1.mp4", 1.0, True),
        ("film0.mp4", "mirrored.mp4", 1.0, True),
        ("film0.mp4", "small.mp4", 1.0, False),
        ("mirrored.mp4", "small.mp4", 1.0, True),
        ("symmetrical.mp4", "symmetrical2.mp4", 1.0, False),
    ]


def test_videos_that_are_gone_are_not(search_model, videos, tmp_path):
    own = shutil.copytree(videos, tmp_path / "videos")
    update_index(search_model, own, tmp_path / "index")
    (own / "film0.mp4").unlink()
    update_index(search_model, own, tmp_path / "index")
    found = find_duplicates(OpenIndex(tmp_path / "index", search_model))
    assert [d.first for d in found] == ["all.mp4", "mirrored.mp4", "symmetrical.mp4"]


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_a_picture_is_a_frame(index, videos, suffix):
    frames, _ = read_timed_frames(videos / "film0.mp4", 4, index.model.frame_form)
    video = index.video_at("film0.mp4")
    for number in range(len(frames)):
        with av.open(str(videos / "film0.mp4")) as container:
            picture = next(
                frame
                for frame in container.decode(video=0)
                if frame.time >= video.times[number] - 1e-3
            )
        file = io.BytesIO()
        picture.to_image().save(file, suffix)
        read = to_form(np.asarray(Image.open(file)), index.model.frame_form)
        assert [found.path for found in same_picture(index, read)] == ["film0.mp4", "small.mp4"]
    assert same_picture(index, film(99, 1)[0]) == []
    assert same_picture(index, np.full((64, 64, 3), 16, np.uint8)) == []


def test_thumbnails_decide_between_like_hashes(index, videos, monkeypatch):
    frames, _ = read_timed_frames(videos / "film2.mp4", 4, index.model.frame_form)
    monkeypatch.setattr(duplicates, "picture_hash", lambda picture: picture_hash(frames[0]))
    assert [video.path for video in same_picture(index, frames[0])] == ["film2.mp4"]
    assert same_picture(index, film(98, 1)[0]) == []


def test_hashes_of_mirrored_and_plain_pictures():
    pictures = [film(seed, 1)[0] for seed in range(20)]
    for picture in pictures:
        mirrored = picture_hash(np.ascontiguousarray(picture[:, ::-1]))
        assert np.bitwise_count(picture_hash(picture) ^ MIRRORED ^ mirrored) <= 4
    hashes = np.array([picture_hash(picture) for picture in pictures])
    apart = np.bitwise_count(hashes[:, None] ^ hashes) + 64 * np.eye(len(hashes), dtype=int)
    assert apart.min() > 8
    noise = np.random.default_rng(0).integers(0, 30, (SIDE, SIDE, 3), np.uint8)
    assert picture_hash(noise) == 0


def test_many_videos(monkeypatch):
    """Of 3,000 videos, 200 copies are found whose hashes differ in some bits, and no others."""
    rng, count, frames = np.random.default_rng(0), 3000, 12
    hashes = rng.integers(0, 2**63, (count, frames), dtype=np.uint64) << np.uint64(1)
    flipped = np.packbits(rng.random((200, frames, 64)) < 0.04, axis=2).view(">u8")[..., 0]
    hashes[-200:] = hashes[:200] ^ flipped.astype(np.uint64)
    hashes[-100:] ^= MIRRORED
    found = duplicates._candidates(hashes.ravel(), np.full(count, frames))
    expected = [[n, count - 200 + n, int(n >= 100)] for n in range(200)]
    assert [pair for pair in found if pair in expected] == expected
    assert len(found) < 210


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="no real clips")
def test_real_clips(search_model, tmp_path):
    """Of one series, so that some are alike."""
    clips, videos = sorted((SHARED / "clips").glob("mma_*")), tmp_path / "videos"
    for folder in ("small", "mirrored", "original"):
        (videos / folder).mkdir(parents=True)
    for path in clips:
        shutil.copy(path, videos / "original")
        copied(path, videos / "small" / path.name, crf=38, scale=0.5)
        copied(path, videos / "mirrored" / path.name, mirror=True)
    update_index(search_model, videos, tmp_path / "index")
    pairs = {d[:2]: d for d in find_duplicates(OpenIndex(tmp_path / "index", search_model))}
    assert all(Path(first).name == Path(second).name for first, second in pairs)
    for path in clips:
        assert pairs[f"mirrored/{path.name}", f"original/{path.name}"].is_mirrored
        assert not pairs[f"original/{path.name}", f"small/{path.name}"].is_mirrored
