"""Queries: a sentence, a picture, a video, a moment of an indexed video, and their combinations."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import temporary_directory
from drl_jax.search.engine import Part
from drl_jax.search.open_index import IndexedVideo, stored_windows
from drl_jax.search.reading import FrameSampling, VideoRead, frames_of, read_video
from drl_jax.search.windows import window_at

# What `without` subtracts, as a share of the similarity to its sentence.
_WITHOUT = -0.5
# Windows of a video that is a query, evenly spaced if it has more.
_MAX_WINDOWS = 32
# Longest sentence, characters; a model reads a few hundred at most.
_MAX_CHARACTERS = 10_000


@dataclasses.dataclass(frozen=True)
class Query:
    """What to look for; at least one of sentence, picture, video and like.

    Attributes:
      sentence: what is seen.
      without: what is not seen.
      picture: a frame in the form of the model, as `reading.open_picture` decodes it.
      video: a video file, or one that was encoded before.
      like: a video of an open index and a time in it, seconds.
    """

    sentence: str = ""
    without: str = ""
    picture: bytes = b""
    video: "Path | EncodedVideo | None" = None
    like: tuple[IndexedVideo, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedQuery:
    """A query as the engine takes it.

    Attributes:
      parts: of the query; see `Part`.
      words: names of the tokens of the first part; of several texts, of the longest.
      is_sentence: whether the query is one sentence.
    """

    parts: tuple[Part, ...]
    words: list[str]
    is_sentence: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedVideo:
    """A video file as a query.

    Attributes:
      windows: as the only part of a query: what is found is like one of its windows.
      whole: beside other parts: arrays of frames that are evenly spaced over it, [1, ...] each.
    """

    windows: EncodedQuery
    whole: Features


def encode_sentences(model: RetrievalModel, sentences: Sequence[str]) -> list[EncodedQuery]:
    """Encodes queries of one sentence each.

    Raises:
      UserError: a sentence is blank or too long.
    """
    for sentence in sentences:
        if len(sentence) > _MAX_CHARACTERS:
            raise UserError(
                f"the sentence has {len(sentence):,} characters; at most {_MAX_CHARACTERS:,} are"
                " read"
            )
    text = model.encode_text(sentences)
    return [
        EncodedQuery((Part({name: a[[row]] for name, a in text.items()}),), words, True)
        for row, words in enumerate(model.token_strings(sentences))
    ]


def encode_query(model: RetrievalModel, query: Query) -> EncodedQuery:
    """Encodes a query of any kind.

    Raises:
      UserError: the query is empty, or a part of it cannot be read.
    """
    video = query.video
    if isinstance(video, Path):
        video = encode_video_file(model, video)
    if video is not None and query == Query(video=query.video):
        return video.windows
    parts: list[Part] = []
    words: list[list[str]] = []

    def add_sentence(sentence: str, weight: float) -> None:
        (encoded,) = encode_sentences(model, [sentence])
        parts.append(encoded.parts[0]._replace(weight=weight))
        words.append(encoded.words)

    def add_frames(video: Features, name: str) -> None:
        text = model.interaction.video_as_text(video)
        parts.append(Part(text))
        words.append([name] * int(text["text_mask"].sum()))

    if query.sentence.strip():
        add_sentence(query.sentence, 1.0)
    if query.picture:
        # A shot in which nothing moves. One frame alone is unlike the windows that a model is
        # trained with, and most like other windows of one frame, whatever they show.
        frame = np.frombuffer(query.picture, np.uint8).reshape(1, *model.frame_form.shape)
        still = np.repeat(frame, model.config.data.max_frames, axis=0)
        add_frames(model.encode_videos([still]), "[picture]")
    if video is not None:
        add_frames(video.whole, "[video]")
    if query.like is not None:
        liked, time = query.like
        window = window_at(liked.windows, time)
        add_frames({n: a[[window]] for n, a in stored_windows(liked).items()}, "[moment]")
    if not parts:
        raise UserError("the query is blank: give a sentence, a picture or a video")
    is_sentence = len(parts) == 1 and bool(query.sentence.strip()) and not query.without.strip()
    if query.without.strip():
        add_sentence(query.without, _WITHOUT)
    return EncodedQuery(tuple(parts), words[0], is_sentence)


def sampling_of(model: RetrievalModel) -> FrameSampling:
    """What is sampled of a video that is a query."""
    return FrameSampling(model.frame_form, model.config.data.max_frames, 1.0)


def encode_video_file(model: RetrievalModel, path: Path) -> EncodedVideo:
    """Reads and encodes a video file, as a query.

    Raises:
      UserError: it cannot be read.
    """
    with temporary_directory() as folder:
        read = read_video(path, (), sampling_of(model), folder / "frames")
        return encode_read(model, str(path), read)


def encode_read(model: RetrievalModel, name: str, read: VideoRead) -> EncodedVideo:
    """Encodes a video file that was read, as a query.

    Args:
      model: of the index.
      name: of the file, for the message of an error.
      read: its frames; nothing is deleted.

    Raises:
      UserError: it has no frames.
    """
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
    whole = {name: array[-1:] for name, array in encoded.items()}
    text = model.interaction.video_as_text({n: array[:count] for n, array in encoded.items()})
    words = ["[video]"] * int(text["text_mask"].sum(axis=1).max())
    return EncodedVideo(EncodedQuery((Part(text),), words), whole)
