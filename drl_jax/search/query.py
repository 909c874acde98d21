"""Queries: a sentence, a picture, a video, a moment of an indexed video, and their combinations."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from drl_jax.evaluation.embedder import pad_tokens
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import temporary_directory
from drl_jax.search.engine import BEST
from drl_jax.search.reading import VideoRead, frames_of, read_video
from drl_jax.search.rows import IndexedVideo

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
      picture: a frame in the form of the model, as `pictures.open_picture` decodes it.
      video: a video file, or one that was encoded before.
      like: an indexed video and a time in it, seconds.
    """

    sentence: str = ""
    without: str = ""
    picture: bytes = b""
    video: "Path | EncodedVideo | None" = None
    like: tuple[IndexedVideo, float] | None = None


@dataclasses.dataclass(frozen=True)
class EncodedQuery:
    """A query as the engine takes it.

    Attributes:
      parts: arrays of Q texts, or of frames in their place.
      weights: Q numbers, and the score is the weighted sum of the similarities; or BEST, and it is
        the largest of them.
      words: names of the tokens of the first part; with BEST, of the longest part.
      is_sentence: whether the query is one sentence.
    """

    parts: Features
    weights: tuple[float, ...] | str
    words: list[str]
    is_sentence: bool = False

    @property
    def explaining(self) -> list[Features]:
        """The parts of which one explains a hit, without the axis of parts: all with BEST."""
        count = len(next(iter(self.parts.values()))) if self.weights == BEST else 1
        return [{name: array[n] for name, array in self.parts.items()} for n in range(count)]


@dataclasses.dataclass(frozen=True)
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
        _check_length(sentence)
    text = model.encode_text(sentences)
    return [
        EncodedQuery({name: a[[row]] for name, a in text.items()}, (1.0,), words, True)
        for row, words in enumerate(model.token_strings(sentences))
    ]


def encode_query(
    model: RetrievalModel, query: Query, stored: Features | None = None
) -> EncodedQuery:
    """Encodes a query of any kind.

    Args:
      model: of the index.
      query: what to look for.
      stored: arrays of the window of `query.like`, [1, ...] each.

    Raises:
      UserError: the query is empty, or a part of it cannot be read.
    """
    video = query.video
    if isinstance(video, Path):
        video = encode_video_file(model, video)
    if video is not None and stored is None and query == Query(video=query.video):
        return video.windows
    parts: list[tuple[Features, float, list[str]]] = []

    def add_frames(video: Features, name: str) -> None:
        text = model.interaction.video_as_text(video)
        parts.append((text, 1.0, [name] * int(text["text_mask"].sum())))

    if query.sentence.strip():
        (encoded,) = encode_sentences(model, [query.sentence])
        parts.append((encoded.parts, 1.0, encoded.words))
    if query.picture:
        # A shot in which nothing moves. One frame alone is unlike the windows that a model is
        # trained with, and most like other windows of one frame, whatever they show.
        frame = np.frombuffer(query.picture, np.uint8).reshape(1, *model.frame_form.shape)
        still = np.repeat(frame, model.config.data.max_frames, axis=0)
        add_frames(model.encode_videos([still]), "[picture]")
    if video is not None:
        add_frames(video.whole, "[video]")
    if stored is not None:
        add_frames(stored, "[moment]")
    if not parts:
        raise UserError("the query is empty: give a sentence, a picture or a video")
    if query.without.strip():
        (encoded,) = encode_sentences(model, [query.without])
        parts.append((encoded.parts, _WITHOUT, encoded.words))
    return EncodedQuery(
        _joined([part for part, _, _ in parts]),
        tuple(weight for _, weight, _ in parts),
        parts[0][2],
        is_sentence=len(parts) == 1 and bool(query.sentence.strip()),
    )


def encode_video_file(model: RetrievalModel, path: Path) -> EncodedVideo:
    """Reads and encodes a video file, as a query.

    Raises:
      UserError: it cannot be read.
    """
    with temporary_directory() as folder:
        spool = folder / "frames"
        read = read_video(path, (), model.config.data.max_frames, model.frame_form, spool)
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
    if read.error:
        raise UserError(f"{name} {read.error}")
    if read.failure:
        raise UserError(f"the frames of {name} cannot be written ({read.failure})")
    frames = frames_of(read, model.frame_form)
    count = min(len(read.windows), _MAX_WINDOWS)
    chosen = np.linspace(0, len(read.windows) - 1, count, dtype=int)
    windows = [read.windows[number].frames for number in chosen]
    if count > 1:
        most = min(len(frames), model.config.data.max_frames)
        windows.append(tuple(np.linspace(0, len(frames) - 1, most, dtype=int).tolist()))
    # Only these frames go through the image tower.
    used = np.unique(np.concatenate(windows))
    encoded = model.encode_windows(frames[used], [np.searchsorted(used, w) for w in windows])
    whole = {name: array[-1:] for name, array in encoded.items()}
    text = model.interaction.video_as_text({n: array[:count] for n, array in encoded.items()})
    words = ["[video]"] * int(text["text_mask"].sum(axis=1).max())
    return EncodedVideo(EncodedQuery(text, BEST if count > 1 else (1.0,), words), whole)


def _check_length(sentence: str) -> None:
    if len(sentence) > _MAX_CHARACTERS:
        raise UserError(
            f"the sentence has {len(sentence):,} characters; at most {_MAX_CHARACTERS:,} are read"
        )


def _joined(parts: Sequence[Features]) -> Features:
    """Arrays of several texts; tokens are padded to the longest."""
    if len(parts) == 1:
        return dict(parts[0])
    names = set.intersection(*(set(part) for part in parts))
    length = max(part["text_mask"].shape[1] for part in parts)
    parts = [pad_tokens(part, length) for part in parts]
    return {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}
