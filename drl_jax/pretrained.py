"""The model that videos are indexed with and that queries are asked of."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from drl_jax.config import Config
from drl_jax.data.video import VideoError, read_timed_frames
from drl_jax.evaluation.embedder import Embedder
from drl_jax.models.drl import Params
from drl_jax.models.interaction import Features
from drl_jax.models.tokenizer import token_strings, tokenize
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.errors import UserError
from drl_jax.sharding import Layout, make_layout
from drl_jax.training.state import abstract_params
from drl_jax.weights.load import config_of_weights, initial_params, read_weights


@dataclasses.dataclass(frozen=True)
class EmbeddedFile:
    """A video file as the model sees it.

    Attributes:
      frames: uint8 [F, S, S, 3].
      times: F seconds at which they are shown.
      features: the arrays of `DRL.encode_frames`, of one video.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    features: Features


@dataclasses.dataclass(frozen=True)
class SearchModel:
    """A model, ready to embed.

    Attributes:
      config: its configuration.
      params: its parameters.
      layout: of arrays over the devices.
      embedder: keeps token-level features, whatever the interaction.
      source: where it comes from: "workdir" and "checkpoint", or "weights".
      fingerprint: of configuration and parameters; features of two models with the same one can be
        compared.
    """

    config: Config
    params: Params
    layout: Layout
    embedder: Embedder
    source: dict[str, str]
    fingerprint: str

    def embed_sentences(self, sentences: Sequence[str]) -> Features:
        """N sentences -> the arrays of `DRL.encode_text`.

        Raises:
          UserError: there is none, or one is blank.
        """
        if not sentences or not all(sentence.strip() for sentence in sentences):
            raise UserError("a query is blank; write a sentence")
        return self.embedder.captions(self.params, list(sentences))

    def tokens(self, sentences: Sequence[str]) -> list[list[str]]:
        """The tokens of each sentence, as long as the model reads, with those of start and end."""
        text_ids, text_mask = tokenize(list(sentences), self.config.data.max_words)
        return [token_strings(ids[mask]) for ids, mask in zip(text_ids, text_mask, strict=True)]

    def embed_file(self, path: Path) -> EmbeddedFile:
        """A video file, decoded now.

        Raises:
          UserError: it cannot be read.
        """
        config = self.config
        try:
            frames, times = read_timed_frames(
                path, config.data.max_frames, config.model.clip.image_resolution
            )
        except VideoError as error:
            raise UserError(f"{path} {error}") from error
        features = self.embedder.videos(self.params, lambda rows: [frames] * len(rows), 1)
        return EmbeddedFile(frames, tuple(map(float, times)), features)


def from_workdir(workdir: Path, checkpoint: str = "best") -> SearchModel:
    """The model of a run.

    Args:
      workdir: of the run.
      checkpoint: "best", "latest" or a step.

    Raises:
      UserError: no such run or checkpoint.
    """
    config = load_config(workdir)
    layout = make_layout()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.find_step(checkpoint)
        params = checkpoints.restore_params(step, abstract_params(config.model, layout))
    return _ready(config, params, layout, {"workdir": str(workdir), "checkpoint": str(step)})


def from_weights(path: Path) -> SearchModel:
    """The model of a file: a whole DRL checkpoint, or CLIP as zero-shot retrieval uses it.

    Raises:
      UserError: the file cannot be read.
    """
    weights = read_weights(path)
    config = config_of_weights(weights)
    layout = make_layout()
    params = initial_params(config.model, weights, jax.random.key(0))
    return _ready(config, jax.device_put(params, layout.whole), layout, {"weights": str(path)})


def from_source(source: dict[str, str]) -> SearchModel:
    """The model that an index says it was made with.

    Raises:
      UserError: it is not there any more.
    """
    if "weights" in source:
        return from_weights(Path(source["weights"]))
    return from_workdir(Path(source["workdir"]), source["checkpoint"])


def _ready(config: Config, params: Params, layout: Layout, source: dict[str, str]) -> SearchModel:
    # What is compared and how wide it is, but not how it is computed.
    model = dataclasses.replace(config.model, init="", remat=False, scan_unroll=1)
    digest = hashlib.sha256(repr((model, config.data.max_frames)).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    embedder = Embedder(config, layout, keep_tokens=True)
    return SearchModel(config, params, layout, embedder, source, digest.hexdigest())
