"""Videos that show the same, and pictures that are frames of indexed videos."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from support.videos import write_video

from drl_jax.data.pictures import to_form
from drl_jax.data.video import read_timed_frames
from drl_jax.search import duplicates
from drl_jax.search.duplicates import find_duplicates, same_moments, same_picture
from drl_jax.search.index_file import IndexWriter
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


def halved(frames: np.ndarray) -> np.ndarray:
    squares = frames.reshape(len(frames), SIDE // 2, 2, SIDE // 2, 2, 3)
    return squares.mean(axis=(2, 4)).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four films, copies of them, and films between black and grey frames."""
    folder = tmp_path_factory.mktemp("duplicates") / "videos"
    folder.mkdir()
    films = {f"film{seed}": film(seed) for seed in range(4)}
    symmetrical, title = film(5), film(7, FPS)
    symmetrical[:, :, SIDE // 2 :] = symmetrical[:, :, : SIDE // 2][:, :, ::-1]
    copies = {"mirrored": films["film0"][:, :, ::-1], "symmetrical2": symmetrical}
    copies |= {"small": halved(films["film0"]), "all": halved(films["film1"][:, :, ::-1])}
    noise = np.random.default_rng(9).integers(16, 28, (24, SIDE, SIDE, 3), np.uint8)
    for number, leader in enumerate((noise, noise[:, ::-1])):
        films[f"leader{number}"] = np.concatenate([leader, film(20 + number, 16)])
        films[f"black{number}"] = leader
        # The same title, and else nothing.
        films[f"title{number}"] = np.concatenate([leader, title])
    for name, frames in (films | {"symmetrical": symmetrical}).items():
        write_video(folder / f"{name}.mp4", frames, FPS)
    for name, frames in copies.items():
        write_video(folder / f"{name}.mp4", frames, FPS, qp="36")
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


def test_moments_that_show_the_same_are_folded_under_the_first(index):
    def parts(*names: str, start: float = 2.0) -> list:
        return [(index.video_at(f"{name}.mp4"), start, start + 5) for name in names]

    same = parts("film2", "small", "film0", "film1", "mirrored", "all")
    assert same_moments(index, same) == [0, 1, 1, 3, 1, 3]
    # Videos have the same pictures at other times.
    assert same_moments(index, parts("film0") + parts("small", start=7)) == [0, 1]
    assert same_moments(index, []) == []
    # A film that is played backwards is another one.
    hashes = np.random.default_rng(0).integers(1, 2**63, 5, np.uint64)
    both = np.concatenate([hashes, hashes[::-1]])
    frames = duplicates._Frames(both, np.array([0, 5, 10]), [(0, 0), (0, 1)], [0, 0])
    assert duplicates._find_pairs(index, frames) == {(0, 1): (1.0, True)}
    assert duplicates._find_pairs(index, frames, in_order=True) == {}


def test_videos_that_are_gone_are_not(search_model, index, tmp_path):
    shutil.copytree(index.directory, tmp_path / "index")
    with IndexWriter(tmp_path / "index") as writer:
        writer.put([], gone=["film0.mp4"])
    found = find_duplicates(OpenIndex(tmp_path / "index", search_model))
    assert [d.first for d in found] == ["all.mp4", "mirrored.mp4", "symmetrical.mp4"]


def test_a_picture_is_a_frame(index):
    for time in index.video_at("film0.mp4").times:
        Image.fromarray(film(0)[int(time * FPS)]).save(file := io.BytesIO(), "jpeg")
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
