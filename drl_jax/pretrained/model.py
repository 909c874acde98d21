"""The Python API: loads a model and encodes, compares and explains with it.

model = drl_jax.load("runs/shapes")
text = model.encode_text(["a red circle moves left"])
video = model.encode_videos(["clip.mp4"])
model.similarity(text, video)  # [1, 1]
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from drl_jax.config import FRAME_CLOCKS, Config
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import read_timed_frames
from drl_jax.data.video_file import VideoError
from drl_jax.evaluation.embedder import Embedder
from drl_jax.evaluation.openvino_encoder import OpenVINOImages, choose_encoder
from drl_jax.hub.installed import NAMES
from drl_jax.hub.repository import is_hub_name
from drl_jax.models.drl import Params, config_from_dict
from drl_jax.models.interactions import INTERACTIONS, Features, Interaction
from drl_jax.models.tokenizers.base import Tokenized, warn_of_cut
from drl_jax.runs.workdir import BEST_FILE, load_config, own_manifest
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.source import is_weights, weights_path
from drl_jax.weights.weights_file import read_weights


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded frames of a video."""

    frames: np.ndarray  # uint8 [F, S, S, 3], F at most the model's `data.max_frames`
    times: tuple[float, ...]  # F seconds from the start of the video


@dataclasses.dataclass(frozen=True)
class RetrievalModel:
    """A model with parameters, ready to encode."""

    config: Config
    params: Params
    layout: Layout
    # "workdir" or "weights", and the arguments of `load` that were given.
    source: dict[str, str]
    # What a file of weights says about its towers; empty for a run.
    towers: str
    _embedder: Embedder = dataclasses.field(repr=False)
    # What encodes frames, "jax" or "openvino".
    encoder: str = "jax"

    @property
    def interaction(self) -> type[Interaction]:
        """The class of the model's interaction."""
        return INTERACTIONS[self.config.model.interaction]

    @property
    def frame_form(self) -> FrameForm:
        """The form of the frames that the model takes."""
        return FrameForm.of(self.config.model.backbone, self.config.data.as_shown)

    def with_encoder(self, encoder: str, recorded: str | None = None) -> "RetrievalModel":
        """The model with another encoder of frames: "jax", "openvino", or "auto".

        "auto" is what was `recorded` before, or else openvino on CPUs, if it is installed. Raises a
        UserError if OpenVINO is asked for and not there.
        """
        if (encoder := choose_encoder(encoder, recorded)) == self.encoder:
            return self
        images = OpenVINOImages(self.config.model, self.params) if encoder == "openvino" else None
        embedder = self._embedder.with_images_by(images)
        return dataclasses.replace(self, encoder=encoder, _embedder=embedder)

    def encode_text(self, captions: Sequence[str]) -> Features:
        """Encodes N captions; one `UserWarning` says how many are cut to `data.max_words` tokens.

        Returns:
          NumPy arrays by name, first axis N: what the interaction compares (for wti `text_unit`
          [N, L, D], `text_mask` [N, L], `text_weight` [N, L]), and features of all tokens.

        Raises:
          UserError: there is no caption, or one is blank or no string.
        """
        if isinstance(captions, str):
            raise UserError("encode_text takes a list of captions, not one string")
        if not len(captions):
            raise UserError("there is no caption to encode")
        if wrong := [caption for caption in captions if not isinstance(caption, str)]:
            raise UserError(f"a caption is a string, not {type(wrong[0]).__name__}")
        if not all(caption.strip() for caption in captions):
            raise UserError("a query is blank; write a sentence")
        tokens = self.tokenize(captions)
        warn_of_cut(int(tokens.is_cut.sum()), len(captions), self.config.data.max_words)
        return self.encode_tokens(tokens)

    def tokenize(self, captions: Sequence[str]) -> Tokenized:
        """The token ids of captions, and which captions are cut to `data.max_words` tokens."""
        return self._embedder.tokenize(captions)

    def encode_tokens(self, tokens: Tokenized) -> Features:
        """As `encode_text`, of captions that `tokenize` has read."""
        return self._embedder.encode_text(self.params, tokens)

    def encode_videos(self, videos: Sequence[str | os.PathLike | np.ndarray]) -> Features:
        """Encodes N videos: paths of files, or frames uint8 [F, S, S, 3] as of `read_video`.

        Returns:
          NumPy arrays by name, first axis N: what the interaction compares (for wti `frame_unit`
          [N, F, D], `frame_mask` [N, F], `frame_weight` [N, F]), and features of all frames.

        Raises:
          UserError: there is no video, a file cannot be read, or frames have a wrong shape.
        """
        if isinstance(videos, str | os.PathLike):
            raise UserError("encode_videos takes a list of videos, not one path")
        if not len(videos):
            raise UserError("there is no video to encode")

        def read(rows: np.ndarray) -> list[np.ndarray]:
            # The embedder repeats the last row to fill its batch.
            frames = {row: self._frames(videos[row]) for row in dict.fromkeys(rows.tolist())}
            return [frames[row] for row in rows.tolist()]

        return self._embedder.encode_video(self.params, read, len(videos))

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [F, S, S, 3], maybe mapped -> features before the temporal head [F, D]."""
        return self._embedder.encode_frames(self.params, frames)

    def encode_frame_windows(
        self, image_feat: np.ndarray, windows: Sequence[Sequence[int]]
    ) -> Features:
        """As `encode_videos`, of N parts of a video, from `encode_frames` of its frames [F, D].

        `windows` are indices of the frames of each part, at most `data.max_frames`.
        """
        return self._embedder.encode_windows(self.params, image_feat, windows)

    def encode_windows(self, frames: np.ndarray, windows: Sequence[Sequence[int]]) -> Features:
        """As `encode_frame_windows`, of the frames of a video; every frame is encoded once."""
        return self.encode_frame_windows(self.encode_frames(frames), windows)

    def read_video(self, path: str | os.PathLike) -> Video:
        """Decodes the frames of a file that the model encodes; UserError: it cannot be read."""
        try:
            data = self.config.data
            clock = data.frame_clock
            frames, times = read_timed_frames(
                Path(path), data.max_frames, self.frame_form, clock=clock
            )
        except VideoError as error:
            raise UserError(f"{path} {error}") from error
        return Video(frames, tuple(map(float, times)))

    def pool_text(self, text: Features) -> np.ndarray:
        """One unit vector for each of A texts, e.g. for a clustering: float32 [A, D].

        dp and xti: the sentence feature. ti and wti: the mean of the tokens by their weights.
        """
        return self.interaction.pool_text(text)

    def pool_videos(self, videos: Features) -> np.ndarray:
        """One unit vector for each of B videos, to be compared with those of texts and videos.

        dp and xti: the mean of the unit frames. ti and wti: their mean by their weights. For dp,
        the dot products with vectors of texts are the similarities; for the others, they
        approximate them.
        """
        return self.interaction.pool_video(videos)

    def similarity(self, text: Features, video: Features) -> np.ndarray:
        """Compares A texts (`encode_text`) with B videos (`encode_videos`).

        Arrays may be float16; others, as a file of embeddings has them beside these, are ignored.

        Returns:
          float32 [A, B], without the temperature, as evaluation ranks them.

        Raises:
          UserError: an array is missing.
        """
        interaction = self.interaction
        text = _compared(text, interaction.TEXT_ARRAYS, "encode_text")
        video = _compared(video, interaction.VIDEO_ARRAYS, "encode_videos")
        return self._embedder.similarity(self.params, text, video)

    def token_strings(self, captions: Sequence[str]) -> list[list[str]]:
        """The tokens of each caption as the model reads them, truncated, with start and end."""
        text_ids, text_mask, _ = self.tokenize(captions)
        return [
            self._embedder.tokenizer.token_strings(ids[mask])
            for ids, mask in zip(text_ids, text_mask, strict=True)
        ]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that features of videos and similarities depend on.

        That is not how the model is computed (`similarity_block`, `remat`, ...), nor how much of a
        caption is read (`data.max_words`).
        """
        model = self.config.model
        identity = {
            "backbone": {n: v for n, v in dataclasses.asdict(model.backbone).items() if v != ""},
            "interaction": model.interaction,
            "agg_module": model.agg_module,
            "dtype": model.dtype,
            "max_frames": self.config.data.max_frames,
        }
        if (data := self.config.data).as_shown or data.frame_clock != FRAME_CLOCKS[0]:
            identity["frames"] = [data.frame_clock, data.as_shown]
        # Where it lies does not matter; CLIP's is not a file.
        if model.tokenizer:
            identity["tokenizer"] = self._embedder.tokenizer.sha256
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def _frames(self, video: str | os.PathLike | np.ndarray) -> np.ndarray:
        if not isinstance(video, np.ndarray):
            return self.read_video(video).frames
        most, shape = self.config.data.max_frames, self.frame_form.shape
        valid = video.dtype == np.uint8 and video.ndim == 4 and video.shape[1:] == shape
        if not valid or not 1 <= len(video) <= most:
            raise UserError(
                f"frames must be uint8 [1 to {most}, {', '.join(map(str, shape))}], not"
                f" {video.dtype} {list(video.shape)}"
            )
        return video


def _compared(arrays: Features, names: Sequence[str], origin: str) -> Features:
    """Those of the arrays that an interaction compares, as they were encoded."""
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"there is no {missing[0]}; pass the arrays that {origin} returns")
    chosen = {name: np.asarray(arrays[name]) for name in names}
    precise = {n: a.astype(np.float32, copy=False) for n, a in chosen.items() if a.dtype != bool}
    return chosen | precise


def load(
    path: str | os.PathLike,
    checkpoint: str | int = "best",
    *,
    release: str = "",
    weights_key: str = "",
    tokenizer: str = "",
    max_words: int | None = None,
) -> RetrievalModel:
    """Loads a model.

    Args:
      path: directory of a run; a file of weights or a folder with one: towers of CLIP, SigLIP or
        Perception Encoder, which get no temporal head and the interaction dp, as in zero-shot
        retrieval, a DRL checkpoint, or an exported run; or, as a string, the name of installed
        weights (`drl_jax.hub.installed.NAMES`) or of a repository (`hf-hub:ORG/NAME`), whose
        weights are downloaded.
      checkpoint: of a run: "best", "latest" or a step.
      release: of a CLIP whose activation nothing else says, one of
        `drl_jax.hub.releases.RELEASES`.
      weights_key: prefix of the towers in a file that holds several pairs of them; "clip": of a DRL
        checkpoint, without its heads.
      tokenizer: file of the tokenizer of a file of weights, if it is not beside it.
      max_words: tokens that are read of a caption, 3 to the context length of the text tower, start
        and end included. None: those of the run; of a file, all that towers alone have positions
        for (CLIP 77, SigLIP 64), and 32 with heads of DRL.

    Raises:
      UserError: there is no such run, checkpoint or file, or it cannot be read.
    """
    source = os.fspath(path)
    # A run may have the name of installed weights.
    is_run = not is_weights(path)
    path = Path(path) if is_run else weights_path(path)
    layout = make_layout()
    if not path.exists():
        raise UserError(f"no run in {path}: there is no such directory, nor a file of weights")
    given = {"release": release, "weights_key": weights_key, "tokenizer": tokenizer}
    given = {name: value for name, value in given.items() if value}
    if is_run:
        if given:
            raise UserError(f"{path} is a run, which has its {min(given)}; leave that out")
        config = load_config(path)
        step, params = _run_params(path, config, layout, str(checkpoint))
        # Absolute: an index is also asked from other directories.
        origin = {"workdir": str(path.resolve()), "checkpoint": str(step)}
        towers = ""
    else:
        is_file = not is_hub_name(source) and source not in NAMES
        weights = read_weights(path if is_file else source, release, weights_key)
        if tokenizer:
            weights = weights._replace(tokenizer=str(Path(tokenizer).resolve()))
        config = config_of_weights(weights)
        if weights.config is None:  # They are not of a run, which has its own way to sample.
            data = dataclasses.replace(config.data, frame_clock="time", as_shown=True)
            config = dataclasses.replace(config, data=data)
        towers = str(weights.description)
        params = initial_params(config.model, weights, jax.random.key(0), for_use=True)
        params = jax.device_put(params, layout.replicated)
        origin = {"weights": str(path.absolute()) if is_file else source, **given}
    if max_words is not None:
        data = dataclasses.replace(config.data, max_words=max_words)
        config = config_from_dict(dataclasses.asdict(dataclasses.replace(config, data=data)))
        origin["max_words"] = str(max_words)
    embedder = Embedder(config, layout, keep_tokens=True)
    return RetrievalModel(config, params, layout, origin, towers, embedder)


def _run_params(
    workdir: Path, config: Config, layout: Layout, checkpoint: str
) -> tuple[int, Params]:
    """Step and parameters of a checkpoint; those of the best one from their own file, if it is
    intact and this run's."""
    file = workdir / BEST_FILE
    if file.exists():
        try:
            weights = read_weights(file)
            step, run = weights.origin["step"], weights.origin["run"]
            is_own = (own_manifest(workdir) or {}).get("id") == run
            if is_own and checkpoint in ("best", str(step)):
                params = initial_params(config.model, weights, jax.random.key(0))
                return step, jax.device_put(params, layout.replicated)
        except (WeightsError, KeyError):
            pass  # Damaged: the checkpoint has the same.
    # Orbax, which takes half a second to import.
    from drl_jax.runs.run_params import restore_params

    return restore_params(workdir, config.model, layout, checkpoint)


def load_source(source: dict[str, str]) -> RetrievalModel:
    """Loads the model that `RetrievalModel.source` describes; raises the errors of `load`."""
    given: dict[str, Any] = dict(source)
    path = given.pop("weights", None) or given.pop("workdir")
    if "max_words" in source:
        given["max_words"] = int(source["max_words"])
    return load(path, **given)
