"""Queries: a sentence, a picture, a video, a moment of an indexed video, and their combinations."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError, as_path
from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import CallPool
from drl_jax.search.engine import Part
from drl_jax.search.open_index import IndexedVideo, stored_windows
from drl_jax.search.reading import (
    FrameSampling,
    VideoRead,
    frames_of,
    open_picture,
    read_video,
)
from drl_jax.search.windows import window_at

# What `without` subtracts, as a share of the similarity to its sentence.
_WITHOUT = -0.5
# Windows of a video that is a query, evenly spaced if it has more.
_MAX_WINDOWS = 32
# Longest sentence, characters; a model reads a few hundred at most.
_MAX_CHARACTERS = 10_000


@dataclasses.dataclass(frozen=True)
class Query:
    """What to look for; at least one of sentence, picture, video and like."""

    sentence: str = ""
    without: str = ""
    picture: bytes | Path = b""  # A file, or as `read_picture` decodes it.
    video: "Path | EncodedQuery | None" = None
    like: tuple[IndexedVideo, float] | None = None  # And a time in it, seconds.

    def __post_init__(self) -> None:
        for name in ("picture", "video"):
            if isinstance(file := getattr(self, name), str):
                object.__setattr__(self, name, as_path(file, name))
        kinds = {"sentence": str, "without": str, "picture": bytes | Path}
        kinds |= {"video": Path | EncodedQuery | None, "like": tuple | None}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                what = "a string" if kind is str else "a path"
                what = "a video of the index and a time" if name == "like" else what
                raise UserError(f"{name} of a Query is {what}, not {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedQuery:
    """A query as the engine takes it."""

    parts: tuple[Part, ...]
    words: list[str]  # Tokens of the first part, of several texts those of the longest.
    is_sentence: bool = False
    # What a video is beside other parts: frames that are spread over it, [1, ...].
    whole: Features | None = None


def encode_sentences(model: RetrievalModel, sentences: Sequence[str]) -> list[EncodedQuery]:
    """Encodes queries of one sentence each; raises UserError if one is blank or too long."""
    if (longest := max(map(len, sentences), default=0)) > _MAX_CHARACTERS:
        line = f"the sentence has {longest:,} characters; at most {_MAX_CHARACTERS:,} are read"
        raise UserError(line)
    text = model.encode_text(sentences)
    return [
        EncodedQuery((Part({name: a[[row]] for name, a in text.items()}),), words, True)
        for row, words in enumerate(model.token_strings(sentences))
    ]


def encode_query(model: RetrievalModel, query: Query) -> EncodedQuery:
    """Encodes a query, whose video is encoded already; raises UserError if it is empty."""
    if query.video is not None and query == Query(video=query.video):
        return query.video
    encoded: list[EncodedQuery] = []
    if query.sentence.strip():
        encoded += encode_sentences(model, [query.sentence])
    if query.picture:
        # A shot in which nothing moves. One frame alone is unlike the windows that a model is
        # trained with, and most like other windows of one frame, whatever they show.
        frame = np.frombuffer(query.picture, np.uint8)
        if frame.size != math.prod(model.frame_form.shape):
            raise UserError("the picture of a Query is a path, or what read_picture returns")
        frame = frame.reshape(1, *model.frame_form.shape)
        still = np.repeat(frame, model.config.data.max_frames, axis=0)
        encoded.append(_of_frames(model, model.encode_videos([still]), "[picture]"))
    if query.video is not None:
        encoded.append(_of_frames(model, query.video.whole, "[video]"))
    if query.like is not None:
        liked, time = query.like
        window = [window_at(liked.windows, time)]
        arrays = {name: array[window] for name, array in stored_windows(liked).items()}
        encoded.append(_of_frames(model, arrays, "[moment]"))
    if not encoded:
        raise UserError("the query is blank: give a sentence, a picture or a video")
    parts = [part for one in encoded for part in one.parts]
    if query.without.strip():
        (without,) = encode_sentences(model, [query.without])
        parts.append(without.parts[0]._replace(weight=_WITHOUT))
    is_sentence = encoded[0].is_sentence and len(parts) == 1
    return EncodedQuery(tuple(parts), encoded[0].words, is_sentence)


def _of_frames(
    model: RetrievalModel, windows: Features, name: str, whole: Features | None = None
) -> EncodedQuery:
    """A query that finds what is like one of some windows."""
    text = model.interaction.video_as_text(windows)
    words = [name] * int(text["text_mask"].sum(axis=1).max())
    return EncodedQuery((Part(text),), words, whole=whole)


def sampling_of(model: RetrievalModel, fps: float = 1.0) -> FrameSampling:
    """What is sampled of a video: what a viewer sees of it, by the time at which it is seen."""
    form = dataclasses.replace(model.frame_form, as_shown=True)
    return FrameSampling(form, model.config.data.max_frames, fps)


def read_picture(model: RetrievalModel, path: Path) -> bytes:
    """Reads an image file, as a query: uint8 [S, S, 3]; raises UserError if it cannot be read."""
    with contextlib.closing(CallPool(1)) as pool:
        return open_picture(pool, path, model.frame_form)


def encode_video_file(model: RetrievalModel, path: Path) -> EncodedQuery:
    """Reads and encodes a video file, as a query; raises UserError if it cannot be read."""
    with temporary_directory() as folder:
        read = read_video(path, (), sampling_of(model), folder / "frames")
        return encode_read(model, str(path), read)


def encode_read(model: RetrievalModel, name: str, read: VideoRead) -> EncodedQuery:
    """Encodes a video file that was read, as a query; raises UserError if it has no frames."""
    if reason := read.error:
        raise UserError(f"{name} {reason}")
    frames, windows = frames_of(read, model.frame_form), read.windows
    count = min(len(windows), _MAX_WINDOWS)
    windows = [windows[number] for number in np.linspace(0, len(windows) - 1, count, dtype=int)]
    if count > 1:
        most = min(len(frames), model.config.data.max_frames)
        windows.append(tuple(np.linspace(0, len(frames) - 1, most, dtype=int).tolist()))
    # Only these frames go through the image tower.
    used = np.unique(np.concatenate(windows))
    encoded = model.encode_windows(frames[used], [np.searchsorted(used, w) for w in windows])
    single = {name: array[:count] for name, array in encoded.items()}
    whole = {name: array[-1:] for name, array in encoded.items()}
    return _of_frames(model, single, "[video]", whole)
