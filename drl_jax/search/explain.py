"""Why a video has its score: which word found which frame, and the moment that counts most."""

import dataclasses

import numpy as np

from drl_jax.models.interaction import Features


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One query and one video, word by word and frame by frame; padding is left out.

    Attributes:
      words: L tokens of the query, with the marks of its start and end: they are compared, too, and
        a model may give them most of the weight.
      times: float [F], seconds at which the frames are shown.
      similarity: float [L, F], cosine of each word and frame.
      word_weights: float [L], shares of the words in the score; alike where none are learnt.
      frame_weights: float [F], the same of frames.
      frame_shares: float [F], what each frame adds to the score (of dp and xti: its cosine with the
        sentence), so that the largest is the best moment.
    """

    words: list[str]
    times: np.ndarray
    similarity: np.ndarray
    word_weights: np.ndarray
    frame_weights: np.ndarray
    frame_shares: np.ndarray

    @property
    def moment(self) -> float:
        """When the frame that adds most is shown, seconds."""
        return float(self.times[np.argmax(self.frame_shares)])

    def matches(self) -> list[tuple[str, float, float, float]]:
        """For each word: itself, when its best frame is shown, their cosine, the word's weight."""
        best = self.similarity.argmax(axis=1)
        return [
            (word, float(self.times[frame]), float(self.similarity[row, frame]), float(weight))
            for row, (word, frame, weight) in enumerate(
                zip(self.words, best, self.word_weights, strict=True)
            )
        ]


def explain(
    text: Features, video: Features, tokens: list[str], times: tuple[float, ...]
) -> Explanation:
    """Explains a pair.

    Args:
      text: arrays of one query, as `DRL.encode_text` with token-level features, without the axis of
        queries.
      video: arrays of one video, the same, float32.
      tokens: the query's, with the marks of start and end.
      times: seconds of the video's frames.
    """
    words = _unit(text["text_feat"][text["text_mask"]])
    frames = _unit(video["frame_feat"][video["frame_mask"]])
    similarity = words @ frames.T
    weighted = "text_weight" in text and "frame_weight" in video
    if weighted:
        word_weights = text["text_weight"][text["text_mask"]]
        frame_weights = video["frame_weight"][video["frame_mask"]]
        # Where there is padding, a word or a frame that nothing is like finds its similarity, 0.
        word_floor = -np.inf if video["frame_mask"].all() else 0
        frame_floor = -np.inf if text["text_mask"].all() else 0
        shares = frame_weights * np.maximum(similarity.max(axis=0), frame_floor)
        found = word_weights * np.maximum(similarity.max(axis=1), word_floor)
        np.add.at(shares, similarity.argmax(axis=1), found)
        shares = shares / 2
    else:
        word_weights = np.full(len(words), 1 / len(words))
        frame_weights = np.full(len(frames), 1 / len(frames))
        shares = _unit(frames) @ _unit(text["sentence_feat"])
    return Explanation(
        tokens,
        np.asarray(times[: len(frames)]),
        similarity,
        word_weights,
        frame_weights,
        shares,
    )


def clock(seconds: float) -> str:
    """Seconds as 1:02.5, or 1:00:02.5 with hours."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:04.1f}"
    return f"{minutes}:{rest:04.1f}"


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
