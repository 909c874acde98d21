"""Explains the best moment of a video file for a sentence."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import temporary_directory
from drl_jax.search.explain import Explanation, explain
from drl_jax.search.reading import frames_of, read_video
from drl_jax.search.windows import Window


class ExplainedFile(NamedTuple):
    """The best window of a file.

    Attributes:
      score: its similarity to the sentence.
      window: the window.
      frames: uint8 [F, S, S, 3], its frames.
      explanation: of the score.
    """

    score: float
    window: Window
    frames: np.ndarray
    explanation: Explanation


def explain_file(model: RetrievalModel, path: Path, sentence: str) -> ExplainedFile:
    """Finds and explains the window of a file that is most similar to a sentence.

    Raises:
      UserError: the file cannot be read, or the sentence is blank.
    """
    text = model.encode_text([sentence])
    with temporary_directory() as folder:
        spool = folder / "frames"
        read = read_video(path, (), model.config.data.max_frames, model.frame_form, spool)
        if reason := read.error or read.failure:
            raise UserError(f"{path} {reason}")
        frames = frames_of(read, model.frame_form)
        videos = model.encode_windows(frames, [window.frames for window in read.windows])
        scores = model.similarity(text, videos)[0]
        best = int(scores.argmax())
        window = read.windows[best]
        explanation = explain(
            model.interaction,
            {name: array[0] for name, array in text.items()},
            {name: array[best] for name, array in videos.items()},
            model.token_strings([sentence])[0],
            tuple(read.times[frame] for frame in window.frames),
        )
        chosen = np.array(frames[list(window.frames)])
    return ExplainedFile(float(scores[best]), window, chosen, explanation)
