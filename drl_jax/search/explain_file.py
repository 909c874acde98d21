"""`search explain`: a figure of the best window of a video file for a sentence."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from drl_jax.evaluation.figures import interaction_figure
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import temporary_directory
from drl_jax.search.hits import explain, format_timestamp
from drl_jax.search.query import encode_sentences, sampling_of
from drl_jax.search.reading import frames_of, read_video


class ExplainedFile(NamedTuple):
    """The best window of a file.

    Attributes:
      score: its similarity to the sentence.
      span: its start and end, seconds.
      peak: time of the frame that contributes most, seconds.
    """

    score: float
    span: tuple[float, float]
    peak: float


def explain_file(model: RetrievalModel, path: Path, sentence: str, out: Path) -> ExplainedFile:
    """Draws how the words of a sentence and the frames of the best window of a file match.

    Args:
      model: compares them.
      path: a video file.
      sentence: the query.
      out: a file with a suffix that matplotlib writes: .png, .svg, .pdf.

    Raises:
      UserError: the file cannot be read, the sentence is blank, or `out` cannot be written.
    """
    (query,) = encode_sentences(model, [sentence])
    part = query.parts[0]
    with temporary_directory() as folder:
        read = read_video(path, (), sampling_of(model), folder / "frames")
        if reason := read.error or read.failure:
            raise UserError(f"{path} {reason}")
        frames = frames_of(read, model.frame_form)
        videos = model.encode_windows(frames, read.windows)
        scores = model.similarity(part.text, videos)[0]
        best = int(scores.argmax())
        chosen = read.windows[best]
        times = tuple(read.arrays["frame.time"][list(chosen)].tolist())
        arrays = {name: array[best] for name, array in videos.items()}
        explanation = explain(model.interaction, part, arrays, query.words, times)
        pictures = np.array(frames[list(chosen)])
    score = float(scores[best])
    clocks = [format_timestamp(time) for time in times]
    title = f"“{sentence}”  {score:.4f}\n{path.name}"
    figure = interaction_figure(explanation.attribution, explanation.words, clocks, pictures, title)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write --out={out} ({reason})") from error
    span = tuple(read.arrays["window.span"][best].tolist())
    return ExplainedFile(score, span, explanation.peak)
