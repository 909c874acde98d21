"""Pictures of the evaluations of a run, for TensorBoard."""

import numpy as np

from drl_jax.config import Config
from drl_jax.data.records import VideoDataset
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.tokenizers.base import Tokenizer

# Pairs of a caption and its video whose words and frames are drawn.
_PAIRS = 2
# Pixels per inch: words and numbers are readable, and a picture has some 50 kB.
_DPI = 72


class EvaluationPictures:
    """Draws the similarity matrix, and the words and frames of a few pairs, always the same."""

    def __init__(self, config: Config, dataset: VideoDataset, split: Split, tokenizer: Tokenizer):
        """Chooses pairs that are evenly spaced in the split.

        Args:
          config: of the run.
          dataset: has the frames.
          split: the split that is evaluated.
          tokenizer: of the model.
        """
        self._config, self._dataset, self._split = config, dataset, split
        self._tokenizer = tokenizer
        self._caption_to_video, self._captions = split.caption_pairs()
        count = min(_PAIRS, len(self._captions))
        self._pairs = [number * len(self._captions) // count for number in range(count)]

    def draw(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        """Pictures of an evaluation of the split, by tag: uint8 [H, W, 3].

        Words and frames are drawn for interactions that compare them.
        """
        # It takes half a second to import, which only runs with TensorBoard files need.
        from drl_jax.evaluation.figures import rendered, similarity_figure

        pictures = {"eval/similarity": rendered(similarity_figure(evaluation.sim_matrix), _DPI)}
        if INTERACTIONS[self._config.model.interaction].COMPARES_TOKENS:
            for number, caption in enumerate(self._pairs, start=1):
                pictures[f"eval/words_and_frames_{number}"] = self._draw_pair(evaluation, caption)
        return pictures

    def _draw_pair(self, evaluation: Evaluation, caption: int) -> np.ndarray:
        """Draws a caption and its video."""
        from drl_jax.evaluation.figures import interaction_figure, rendered

        video = self._caption_to_video[caption]
        record = self._split.videos[video]
        attribution = INTERACTIONS[self._config.model.interaction].attribution(
            {name: array[caption] for name, array in evaluation.text.items()},
            {name: array[video] for name, array in evaluation.video.items()},
        )
        sentence = self._captions[caption]
        tokens = self._tokenizer.tokenize([sentence], self._config.data.max_words)
        frames = self._dataset.read_frames(record)
        figure = interaction_figure(
            attribution,
            self._tokenizer.token_strings(tokens.text_ids[0][tokens.text_mask[0]]),
            [f"frame {number + 1}" for number in range(len(frames))],
            frames,
            f"{self._dataset.video_ids[record]}: {sentence}",
        )
        return rendered(figure, _DPI)
