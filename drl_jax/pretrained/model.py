"""The Python API: loads a model and encodes, compares and explains with it.

model = drl_jax.load("runs/shapes")
text = model.encode_text(["a red circle moves left"])
video = model.encode_videos(["clip.mp4"])
model.similarity(text, video)  # [1, 1]
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from drl_jax.config import FRAME_CLOCKS, Config, ConfigError
from drl_jax.data.frame_form import FrameForm
from drl_jax.evaluation.embedder import Embedder
from drl_jax.evaluation.openvino_encoder import OpenVINOImages, choose_encoder
from drl_jax.models.drl import Params, config_from_dict
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.interactions import INTERACTIONS, Features, Interaction
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.models.tokenizers.base import Tokenized, warn_of_cut
from drl_jax.pretrained.devices import claim_process, find_devices
from drl_jax.pretrained.inputs import Video, captions_of, features_of, items_of, read_video
from drl_jax.runs.reranker_file import LoadedReranker, reranker_path
from drl_jax.runs.workdir import BEST_FILE, load_config, own_manifest
from drl_jax.runtime.errors import UserError, as_path, one_line
from drl_jax.runtime.plugins import origin_of
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.source import is_name, is_weights, resolved, weights_path
from drl_jax.weights.weights_file import read_weights

# What `encode_videos` does with videos that cannot be read.
ERRORS = ("raise", "skip", "return")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class RetrievalModel:
    """A model with parameters, ready to encode."""

    config: Config
    params: Params
    layout: Layout
    # "workdir" or "weights", and the arguments of `load` that were given.
    source: dict[str, str]
    # What a file of weights says about its towers; empty for a run.
    towers: str
    _embedder: Embedder
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

    @property
    def about(self) -> dict[str, Any]:
        """What its users are told: name, family, interaction, resolution, knows, languages."""
        tower, dataset = self.config.model.backbone, self.config.data.dataset
        name = self.source.get("weights") or self.source["workdir"]
        knows = f"scenes as in {dataset}" if "workdir" in self.source else "everyday scenes"
        return {
            "name": name if is_name(name) else "/".join(Path(name).parts[-2:]),
            "family": tower.family,
            "interaction": self.config.model.interaction,
            "resolution": tower.image_resolution,
            # Datasets of drawn clips and stills have these names.
            "knows": "drawn shapes" if dataset.startswith("shapes") else knows,
            "languages": "many languages" if tower.is_multilingual else "English",
        }

    def with_encoder(self, encoder: str, recorded: str | None = None) -> "RetrievalModel":
        """The model with another encoder of frames: "jax", "openvino", or "auto".

        "auto" is what was `recorded` before, or else openvino on CPUs, if it is installed. Raises a
        UserError if OpenVINO is asked for and not there.
        """
        if (family := self.config.model.backbone.family) in EXTRACTORS:
            if encoder == "openvino":
                raise UserError(f"the feature extractor {family} encodes frames, not OpenVINO")
            return self
        if (encoder := choose_encoder(encoder, recorded)) == self.encoder:
            return self
        images = OpenVINOImages(self.config.model, self.params) if encoder == "openvino" else None
        embedder = self._embedder.with_images_by(images)
        return dataclasses.replace(self, encoder=encoder, _embedder=embedder)

    def encode_text(self, captions: Iterable[str]) -> Features:
        """Encodes N captions; one `UserWarning` says how many are cut to `data.max_words` tokens.

        Returns:
          NumPy arrays by name, first axis N: what the interaction compares (for wti `text_unit`
          [N, L, D], `text_mask` [N, L], `text_weight` [N, L]), and features of all tokens.

        Raises:
          UserError: there is no caption, or one is blank or no string.
        """
        captions = captions_of(captions)
        tokens = self.tokenize(captions)
        warn_of_cut(int(tokens.is_cut.sum()), len(captions), self.config.data.max_words)
        return self.encode_tokens(tokens)

    def tokenize(self, captions: Sequence[str]) -> Tokenized:
        """The token ids of captions, and which captions are cut to `data.max_words` tokens."""
        return self._embedder.tokenize(captions)

    def encode_tokens(self, tokens: Tokenized) -> Features:
        """As `encode_text`, of captions that `tokenize` has read."""
        return self._embedder.encode_text(self.params, tokens)

    def encode_videos(
        self, videos: Iterable[Any], *, errors: str = "raise", urls: bool = False
    ) -> Features | tuple[Features, dict[int, UserError]]:
        """Encodes N videos, each of them anything that `read_video` takes.

        Args:
          videos: a list, a column of a table, or a generator; they are read as they are encoded.
          errors: what to do with videos that cannot be read. "raise": raise the error of the first;
            "skip": leave them out, with a `UserWarning`; "return": leave them out, and return their
            errors by number, too.
          urls: see `read_video`.

        Returns:
          NumPy arrays by name, first axis N: what the interaction compares (for wti `frame_unit`
          [N, F, D], `frame_mask` [N, F], `frame_weight` [N, F]), and features of all frames. With
          errors="return", these and the errors.

        Raises:
          UserError: there is no video, or one, or with "skip" all, cannot be read.
        """
        if errors not in ERRORS:
            raise UserError(f"errors={errors!r}: choose {', '.join(ERRORS)}")
        failed: dict[int, UserError] = {}

        def read() -> Iterator[np.ndarray]:
            for number, video in enumerate(items_of(videos, "encode_videos", "video")):
                try:
                    yield self.read_video(video, urls=urls, name=f"video {number}").frames
                except UserError as error:
                    if errors == "raise":
                        raise
                    failed[number] = error

        def encode(batch: list[np.ndarray], size: int) -> Features:
            rows = [*batch, *batch[-1:] * (size - len(batch))]
            encoded = self._embedder.encode_video(
                self.params, lambda numbers: [rows[n] for n in numbers], size
            )
            return {name: array[: len(batch)] for name, array in encoded.items()}

        readable, size, parts = read(), self.config.eval.batch_size, []
        while batch := list(itertools.islice(readable, size)):
            # Batches after the first have its shape.
            parts.append(encode(batch, size if parts else len(batch)))
        if not (parts or failed):
            raise UserError("there is no video to encode")
        if not parts and errors != "return":
            raise UserError(f"no video can be read; the first one: {failed[min(failed)]}")
        if not parts:
            black = np.zeros((1, *self.frame_form.shape), np.uint8)
            parts = [{name: array[:0] for name, array in encode([black], 1).items()}]
        features = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if errors == "return":
            return features, failed
        if failed:
            first, count = min(failed), len(failed) + len(features["frame_mask"])
            text = f"{len(failed)} of {count} videos cannot be read, and are left out; number"
            warnings.warn(f"{text} {first}: {failed[first]}", UserWarning, stacklevel=2)
        return features

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

    def read_video(self, video: Any, *, urls: bool = False, name: str = "the video") -> Video:
        """The frames of a video that the model encodes.

        Args:
          video: a path; bytes of a video file, or an open file; an array of NumPy, JAX or torch,
            [F, H, W, 3] or [F, 3, H, W], uint8 or float in [0, 1]; a PIL image; a list of images;
            or what `read_video` returned.
          urls: whether an address http://... or https://... is downloaded.
          name: of a video without a path, for messages.

        Raises:
          UserError: it cannot be read, or is none of these.
        """
        return read_video(video, self.frame_form, self.config.data, urls=urls, name=name)

    def pool_text(self, text: Features) -> np.ndarray:
        """One unit vector for each of A texts, e.g. for a clustering: float32 [A, D].

        dp and xti: the sentence feature. ti and wti: the mean of the tokens by their weights.
        """
        with _refusing_others():
            return self.interaction.pool_text(features_of(text, "encode_text"))

    def pool_videos(self, videos: Features) -> np.ndarray:
        """One unit vector for each of B videos, to be compared with those of texts and videos.

        dp and xti: the mean of the unit frames. ti and wti: their mean by their weights. For dp,
        the dot products with vectors of texts are the similarities; for the others, they
        approximate them.
        """
        with _refusing_others():
            return self.interaction.pool_video(features_of(videos, "encode_videos"))

    def similarity(self, text: Features, video: Features) -> np.ndarray:
        """Compares A texts (`encode_text`) with B videos (`encode_videos`).

        Arrays may be float16; others, as a file of embeddings has them beside these, are ignored.

        Returns:
          float32 [A, B], without the temperature, as evaluation ranks them.

        Raises:
          UserError: an array is missing, or has another shape than it was encoded with.
        """
        interaction = self.interaction
        with _refusing_others():
            text = features_of(text, "encode_text", interaction.TEXT_ARRAYS)
            video = features_of(video, "encode_videos", interaction.VIDEO_ARRAYS)
            return self._embedder.similarity(self.params, text, video)

    @functools.cached_property
    def reranker(self) -> LoadedReranker:
        """The reranker of the run, or beside the file of weights (docs/rerank.md).

        Raises:
          UserError: there is none, or it is of another model, or damaged.
        """
        return LoadedReranker(reranker_path(self.source), self.config, self.params)

    def rerank(self, text: Features, video: Features) -> np.ndarray:
        """Compares A texts with B candidates, e.g. of a database, as the reranker ranks them.

        Returns:
          float32 [A, B]: `similarity` and what the reranker adds to it.

        Raises:
          UserError: as `similarity` and `reranker`.
        """
        scores = self.similarity(text, video)
        with _refusing_others():
            return scores + self.reranker.changes(text, video)

    def token_strings(self, captions: Sequence[str]) -> list[list[str]]:
        """The tokens of each caption as the model reads them, truncated, with start and end."""
        return self._embedder.tokenizer.strings_of(self.tokenize(captions))

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
        head, family = TEMPORAL_HEADS[model.agg_module], EXTRACTORS.get(model.backbone.family)
        for registered in (self.interaction, head, family):
            if (origin := origin_of(registered)) is not None:
                digest.update(origin.content)
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        """Five lines: where it is from, its towers, interaction, parameters and devices."""
        model, data, tower = self.config.model, self.config.data, self.config.model.backbone
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        devices = self.layout.mesh.devices
        (_, source), *asked = self.source.items()
        asked = f" ({', '.join(f'{name}={value}' for name, value in asked)})" if asked else ""
        return "\n".join(
            (
                f"RetrievalModel of {source}{asked}",
                f"  towers       {tower.family}, {tower.vision_layers} x {tower.vision_width} image"
                f" and {tower.text_layers} x {tower.text_width} text, {tower.embed_dim} channels",
                f"  input        {data.max_frames} frames of {tower.image_resolution} pixels,"
                f" {data.max_words} tokens",
                f"  interaction  {model.interaction}, temporal head {model.agg_module}",
                f"  parameters   {count / 1e6:.1f} M, {model.dtype} on {devices.size}"
                f" {devices.flat[0].platform} device(s), frames by {self.encoder}",
            )
        )

    def __reduce__(self) -> tuple:
        """Pickles configuration and parameters; the process that loads it has its own devices."""
        params = jax.tree.map(np.asarray, self.params)
        return _unpickled, (self.config, params, self.source, self.towers, self.encoder)


def _unpickled(
    config: Config, params: Params, source: dict[str, str], towers: str, encoder: str
) -> RetrievalModel:
    claim_process()
    layout = make_layout()
    params = jax.device_put(params, layout.replicated)
    embedder = Embedder(config, layout, keep_tokens=True)
    return RetrievalModel(config, params, layout, source, towers, embedder).with_encoder(encoder)


@contextlib.contextmanager
def _refusing_others() -> Iterator[None]:
    """Reports arrays that were not encoded by the model, which fail in many ways."""
    try:
        yield
    except (TypeError, LookupError, ValueError) as error:
        line = f"pass what encode_text and encode_videos of this model return ({one_line(error)})"
        raise UserError(line) from error


def check_model(model: Any, user: str) -> None:
    """Raises a UserError if what a user gave is no model."""
    if not isinstance(model, RetrievalModel):
        raise UserError(f"{user} takes a model that drl_jax.load returns, not {model!r}")


def load(
    path: str | os.PathLike,
    checkpoint: str | int = "best",
    *,
    device: str | jax.Device | Sequence[jax.Device] | None = None,
    dtype: str | None = None,
    max_words: int | None = None,
    release: str = "",
    weights_key: str = "",
    tokenizer: str = "",
) -> RetrievalModel:
    """Loads a model.

    Args:
      path: directory of a run; a file of weights or a folder with one: towers of CLIP, SigLIP or
        Perception Encoder, which get no temporal head and the interaction dp, as in zero-shot
        retrieval, a DRL checkpoint, or an exported run; or, as a string, the name of installed
        weights (`drl_jax.hub.installed.NAMES`), or of OpenAI's models ("ViT-B/32"), a model of
        `drl_jax.hub.recommended.RECOMMENDED` or a repository (`hf-hub:ORG/NAME`), whose weights are
        downloaded.
      checkpoint: of a run: "best", "latest" or a step.
      device: "cpu", "gpu" or "tpu", one of them as "gpu:1", or devices of JAX. None: all.
      dtype: of the computation, "float32", "tf32" or "bfloat16". None: that of the run; float32 of
        a file.
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
    as_path(path, "the model")
    if tokenizer:
        tokenizer = str(as_path(tokenizer, "tokenizer").resolve())
    claim_process()
    path = resolved(path)
    source, is_file = os.fspath(path), not is_name(path)
    # A run may have the name of installed weights.
    is_run = not is_weights(path)
    path = Path(path) if is_run else weights_path(path)
    layout = make_layout(find_devices(device))
    if not path.exists():
        raise UserError(f"no run in {path}: there is no such directory, nor a file of weights")
    if not is_run and checkpoint != "best":
        raise UserError(f"{source} is no run, and has no checkpoint {checkpoint!r}; leave that out")
    given = {"release": release, "weights_key": weights_key, "tokenizer": tokenizer}
    given = {name: value for name, value in given.items() if value}
    changed = {"max_words": max_words, "dtype": dtype}
    changed = {name: value for name, value in changed.items() if value is not None}

    def as_asked(config: Config) -> Config:
        fields = dataclasses.asdict(config)
        for group, name in (("data", "max_words"), ("model", "dtype")):
            fields[group] |= {name: changed[name]} if name in changed else {}
        try:
            return config_from_dict(fields)
        except ConfigError as error:  # Of what was given: the others are valid.
            raise UserError(re.sub(r"config\.(data|model)\.", "", str(error))) from error

    if is_run:
        if given:
            raise UserError(f"{path} is a run, which has its {min(given)}; leave that out")
        config = as_asked(load_config(path))
        step, params = _run_params(path, config, layout, str(checkpoint))
        # Absolute: an index is also asked from other directories.
        origin = {"workdir": str(path.resolve()), "checkpoint": str(step)}
        towers = ""
    else:
        weights = read_weights(path if is_file else source, release, weights_key)
        if tokenizer:
            weights = weights._replace(tokenizer=tokenizer)
        config = config_of_weights(weights)
        if weights.config is None:  # They are not of a run, which has its own way to sample.
            data = dataclasses.replace(config.data, frame_clock="time", as_shown=True)
            config = dataclasses.replace(config, data=data)
        config, towers = as_asked(config), str(weights.description)
        params = initial_params(config.model, weights, jax.random.key(0), for_use=True)
        params = jax.device_put(params, layout.replicated)
        origin = {"weights": str(path.absolute()) if is_file else source, **given}
    origin |= {name: str(value) for name, value in changed.items()}
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
