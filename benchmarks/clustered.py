"""Synthetic galleries whose videos are clustered as real ones are, and sentences about them.

Features of CLIP share a common direction, have a spectrum that falls, and come in clusters. A frame
here is a sum of five directions, and the variance of each says how alike two frames are:

    frame = common + topic + video + scene + rest      (MEAN_COSINES between two frames)

Directions are Gaussian with a falling spectrum, in a random basis: about 80 of 512 dimensions
(the participation ratio) hold the variance. Topics have different sizes, by Zipf's law. A video has
one to three scenes, in the order of its frames, and one of ten is shorter than 12 frames.

A sentence has 8 to 16 words and is aimed at a video of the gallery: the first word (start) is the
same for all and counts little, the last (end) is aimed at the whole video and counts most, and each
other one is aimed at a scene. All have a common direction of texts, a part that the words of a
sentence share and that fits no video, and a part of their own. So the cosine of a word and a frame
that it is aimed at is about 0.3, and the video that a sentence is aimed at is often not its first
hit.
"""

import dataclasses
from pathlib import Path

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.search.encoding import quantize

FRAMES, WIDTH, MAX_WORDS = 12, 512, 32
# Share of a frame's variance. The sums from the left are the cosines of two frames: of any two
# videos, of one topic, of one video, of one scene.
COMMON, TOPIC, VIDEO, SCENE, REST = 0.35, 0.27, 0.15, 0.14, 0.09
# Of a word's.
TEXT_COMMON, AIM, SHARED, OWN = 0.4, 0.12, 0.18, 0.3
# Videos that are made at a time; each block has its own random numbers.
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Directions, float32, that all videos and sentences of a gallery have in common."""

    scale: np.ndarray  # [D], standard deviation of each channel before the rotation
    rotation: np.ndarray  # [D, D], orthogonal
    topics: np.ndarray  # [T, D], unit vectors, before the rotation
    shares: np.ndarray  # [T], share of the videos that each topic has
    common: np.ndarray  # [D], unit vector of frames, before the rotation
    text_common: np.ndarray  # [D], unit vector of words, after the rotation
    start: np.ndarray  # [D], unit vector of the first word, after the rotation


def make_clusters(seed: int, videos: int) -> Clusters:
    """Clusters of a gallery: one topic for 250 videos, but 100 at least."""
    topics = max(100, videos // 250)
    rng = np.random.default_rng([seed, 0])
    variance = (1 + np.arange(WIDTH) / 16) ** -1.5
    scale = np.sqrt(variance / variance.sum()).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    sizes = 1 / (10 + np.arange(topics)) ** 0.8
    common, of_texts = _directions(rng, scale, 2)
    # As in CLIP, the cosine of any word and any frame is positive.
    text_common = _unit(common + 2.5 * of_texts)
    # In no direction of the frames' spectrum: it is like no video more than like others.
    start = _unit(common + 4 * _unit(rng.standard_normal(WIDTH, np.float32)))
    return Clusters(
        scale,
        rotation,
        _directions(rng, scale, topics),
        sizes / sizes.sum(),
        common,
        text_common @ rotation,
        start @ rotation,
    )


def _directions(rng: np.random.Generator, scale: np.ndarray, *shape: int) -> np.ndarray:
    """Unit vectors [*shape, D] with the spectrum of the gallery."""
    return _unit(rng.standard_normal((*shape, WIDTH), np.float32) * scale)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _videos(clusters: Clusters, rng: np.random.Generator, count: int) -> Features:
    """Features of some videos as `encode_video` gives them."""
    scale = clusters.scale
    topic = rng.choice(len(clusters.shares), count, p=clusters.shares)
    center = np.sqrt(COMMON) * clusters.common + np.sqrt(TOPIC) * clusters.topics[topic]
    center += np.sqrt(VIDEO) * _directions(rng, scale, count)
    scenes = np.sqrt(SCENE) * _directions(rng, scale, count, 3)
    # The scene of each frame: scenes start at random frames.
    several = rng.choice(3, count, p=(0.6, 0.25, 0.15))
    starts = rng.integers(1, FRAMES, (count, 2))
    starts[several < [[1], [2]][0]] = FRAMES
    starts[:, 1][several < 2] = FRAMES
    scene = (np.arange(FRAMES)[None, :, None] >= starts[:, None, :]).sum(axis=2)
    frames = _directions(rng, scale, count, FRAMES) * np.sqrt(REST, dtype=np.float32)
    frames += center[:, None]
    frames += np.take_along_axis(scenes, scene[:, :, None], axis=1)
    valid = np.where(rng.random(count) < 0.1, rng.integers(3, FRAMES, count), FRAMES)
    mask = np.arange(FRAMES) < valid[:, None]
    weight = np.exp(rng.normal(0, 0.5, (count, FRAMES))) * mask
    return {
        "frame_unit": (_unit(frames) * mask[..., None]) @ clusters.rotation,
        "frame_mask": mask,
        "frame_weight": (weight / weight.sum(1, keepdims=True)).astype(np.float32),
    }


def make_gallery(directory: Path, videos: int, *, seed: int = 0) -> Features:
    """Stored arrays (`quantize`, bfloat16) of a gallery, mapped; made if they are missing."""
    clusters = make_clusters(seed, videos)
    done, create = directory / "done", np.lib.format.open_memmap
    if not done.exists():
        directory.mkdir(parents=True, exist_ok=True)
        files: Features = {}
        for number, start in enumerate(range(0, videos, BLOCK)):
            rng = np.random.default_rng([seed, 1, number])
            for name, array in quantize(_videos(clusters, rng, BLOCK), "bfloat16").items():
                if name not in files:
                    shape, path = (videos, *array.shape[1:]), directory / f"{name}.npy"
                    files[name] = create(path, "w+", array.dtype, shape)
                files[name][start : start + BLOCK] = array[: videos - start]
        done.touch()
    names = ("frame_unit", "frame_mask", "frame_weight")
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}


def make_sentences(
    clusters: Clusters, gallery: Features, count: int, *, seed: int = 0
) -> tuple[Features, np.ndarray]:
    """Features of sentences as `encode_text` gives them, and the videos that they are aimed at."""
    rng = np.random.default_rng([seed, 2])
    targets = np.sort(rng.choice(len(gallery["frame_mask"]), count, replace=False))
    words = rng.integers(8, 17, count)
    position = np.arange(MAX_WORDS)
    mask = position < words[:, None]
    bits = gallery["frame_unit"][targets].astype(np.uint32) << 16
    frames = bits.view(np.float32)
    common = clusters.common @ clusters.rotation
    content = frames - (frames @ common)[..., None] * common
    content *= gallery["frame_mask"][targets][..., None]
    # A frame for each word; the end has their mean.
    valid = gallery["frame_mask"][targets].sum(axis=1)
    chosen = rng.integers(0, valid[:, None], (count, MAX_WORDS))
    aim = np.take_along_axis(content, chosen[:, :, None], axis=1)
    is_end = position == words[:, None] - 1
    aim = _unit(np.where(is_end[..., None], content.sum(axis=1, keepdims=True), aim))
    shared, own = (
        _directions(rng, clusters.scale, count, length) @ clusters.rotation
        for length in (1, MAX_WORDS)
    )
    unit = _unit(
        np.sqrt(TEXT_COMMON) * clusters.text_common
        + np.sqrt(AIM) * aim
        + np.sqrt(SHARED) * shared
        + np.sqrt(OWN) * own
    )
    unit[:, 0] = clusters.start
    logits = rng.normal(0, 1, (count, MAX_WORDS)) + 1.5 * is_end - 1.5 * (position == 0)
    weight = np.exp(logits) * mask
    return {
        "text_unit": unit.astype(np.float32),
        "text_mask": mask,
        "text_weight": (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32),
    }, targets
