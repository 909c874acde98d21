"""Explains a score: which token matches which frame, and the moment that contributes most."""

import dataclasses

import numpy as np

from drl_jax.models.interactions import Attribution, Features, Interaction


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Tokens and frames of one query and one video.

    Attributes:
      words: L tokens of the query, with those of its start and end: they are compared too, and a
        model may give them most of the weight.
      times: float [F], times of the frames, seconds.
      attribution: how they contribute to the score.
    """

    words: list[str]
    times: np.ndarray
    attribution: Attribution

    @property
    def moment(self) -> float:
        """Time of the frame that contributes most, seconds."""
        return float(self.times[np.argmax(self.attribution.frame_contribution)])

    def matches(self) -> list[tuple[str, float, float, float]]:
        """For each token: the token, the time of its best frame, their cosine, its weight."""
        similarity, weights = self.attribution.similarity, self.attribution.token_weight
        best = similarity.argmax(axis=1)
        return [
            (word, float(self.times[frame]), float(similarity[row, frame]), float(weight))
            for row, (word, frame, weight) in enumerate(zip(self.words, best, weights, strict=True))
        ]


def explain(
    interaction: type[Interaction],
    text: Features,
    video: Features,
    words: list[str],
    times: tuple[float, ...],
) -> Explanation:
    """Explains the score of one pair.

    Args:
      interaction: of the model.
      text: arrays of one text, without the axis of items (see `Interaction.attribution`).
      video: arrays of one video, likewise, float32.
      words: tokens of the text, with start and end; those behind its last token are left out.
      times: times of the video's frames, seconds.
    """
    attribution = interaction.attribution(text, video)
    frames = len(attribution.frame_contribution)
    tokens = len(attribution.token_weight)
    return Explanation(words[:tokens], np.asarray(times[:frames]), attribution)


def format_timestamp(seconds: float) -> str:
    """Formats seconds as 1:02.5, or 1:00:02.5 with hours."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:04.1f}"
    return f"{minutes}:{rest:04.1f}"
