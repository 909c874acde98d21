"""The protocol card: what a number was measured on, and how; and the ranks that it belongs to."""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.config import Config, DataConfig
from drl_jax.data.records import VideoDataset
from drl_jax.data.splits import Split
from drl_jax.evaluation.metrics import TIE_RULE, Ranks
from drl_jax.models.drl import Params
from drl_jax.runs.checkpoint_files import params_digest, read_metric
from drl_jax.runs.workdir import CHECKPOINTS, own_manifest
from drl_jax.runtime.errors import raise_if_refused
from drl_jax.runtime.files import replacing

# Post-processing of similarities: none.
RAW = "raw"
# Digits of a hash that are printed.
_SHORT = 12


@dataclasses.dataclass(frozen=True)
class ProtocolCard:
    """States the protocol of metrics beside them.

    Attributes:
      split: stored name of the split.
      protocol: what publications call the protocol of this split (1k-A); empty if unknown.
      content: hash of all frames, ids and captions of the dataset.
      frames: storage variant of the frames.
      frame_order: "time", or "content" if the frames of each video were sorted by their pixels.
      queries: SHA-256 of the ids and captions of the split.
      captions_per_video: the smallest and the largest number of captions of a video.
      post_processing: of the similarities, "raw" for none.
      trained_on: training split, with its protocol and what was held out.
      chosen: how the checkpoint was chosen.
      step: of the checkpoint; None on the card of several runs.
      init: initial weights; empty for random ones.
      init_sha256: SHA-256 of their file; empty if unknown.
      parameters_sha256: `params_digest` of the checkpoint; empty on the card of several runs.
    """

    dataset: str
    split: str
    protocol: str
    content: str
    frames: str
    frame_order: str
    queries: str
    videos: int
    captions: int
    captions_per_video: tuple[int, int]
    ties: str
    post_processing: str
    trained_on: str
    chosen: str
    step: int | None
    seeds: tuple[int, ...]
    model: str
    init: str
    init_sha256: str
    parameters_sha256: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProtocolCard":
        """The card from its JSON values; TypeError: a field is missing or unknown."""
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def rows(self) -> dict[str, str]:
        """A few sentences by subject."""
        low, high = self.captions_per_video
        a_video = f"{low}" if low == high else f"{low} to {high}"
        protocol = f" ({self.protocol})" if self.protocol else ""
        step = "" if self.step is None else f"step {self.step}, "
        order = "" if self.frame_order == "time" else f", frames sorted by {self.frame_order}"
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        init = f"from {self.init} {self.init_sha256[:_SHORT]}".rstrip() if self.init else "random"
        parameters = self.parameters_sha256[:_SHORT]
        return {
            "data": f"{self.dataset}, split {self.split}{protocol}: {self.videos:,} videos,"
            f" {self.captions:,} captions, {a_video} a video; content"
            f" {self.content[:_SHORT]}",
            "ranks": f"among {self.videos:,} candidates; ties: {self.ties}; similarities:"
            f" {self.post_processing}{order}",
            "checkpoint": f"{step}{self.chosen}; trained on {self.trained_on}, {seeds}",
            "model": self.model,
            "weights": f"initial: {init}" + (f"; parameters {parameters}" if parameters else ""),
        }

    def __str__(self) -> str:
        """The rows as lines for a terminal."""
        return "\n".join(f"  {name:<11}{text}" for name, text in self.rows().items())


def protocol_card(
    workdir: Path,
    config: Config,
    dataset: VideoDataset,
    split_name: str,
    split: Split,
    checkpoint: str,
    step: int,
    params: Params,
    *,
    frame_order: str = "time",
) -> ProtocolCard:
    """Makes the card of an evaluation of a run; `checkpoint` is as it was asked for."""
    data, counts = config.data, split.caption_counts()
    stored, tower = _stored_name(split_name, data), config.model.backbone
    trained_on = _stored_name("train", data)
    if protocol := dataset.protocol(data.train_split):
        trained_on += f" ({protocol})"
    model = (
        f"{tower.family}, {tower.vision_layers} image layers of {tower.vision_width}, patches of"
        f" {tower.vision_patch_size} pixels at {tower.image_resolution}; interaction"
        f" {config.model.interaction}, temporal head {config.model.agg_module}; {data.max_frames}"
        f" frames, {data.max_words} words"
    )
    return ProtocolCard(
        dataset=data.dataset,
        split=stored,
        protocol=dataset.protocol(stored),
        content=dataset.content,
        frames=dataset.storage.name,
        frame_order=frame_order,
        queries=dataset.queries_sha256(split),
        videos=len(split.videos),
        captions=int(counts.sum()),
        captions_per_video=(int(counts.min()), int(counts.max())),
        ties=TIE_RULE,
        post_processing=RAW,
        trained_on=trained_on,
        chosen=how_chosen(workdir, data, checkpoint, step),
        step=step,
        seeds=(config.seed,),
        model=model,
        init=config.model.init,
        init_sha256=(own_manifest(workdir) or {}).get("weights_sha256", ""),
        parameters_sha256=params_digest(params),
    )


def _stored_name(split_name: str, data: DataConfig) -> str:
    if data.holdout and split_name == "val":
        return f"{data.holdout} held-out videos of {data.train_split}"
    if data.holdout and split_name == "train":
        return f"{data.train_split} without {data.holdout} held-out videos"
    stored = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    return stored.get(split_name, split_name)


def how_chosen(workdir: Path, data: DataConfig, checkpoint: str, step: int) -> str:
    """How a checkpoint was chosen, in words; arguments and errors as of `protocol_card`."""
    if checkpoint == "latest":
        return "the latest"
    if checkpoint != "best":
        return "named by the user"
    if read_metric(workdir / CHECKPOINTS / str(step)) is None:
        return "the latest, since none was evaluated"
    val = _stored_name("val", data)
    on_test = ", which is the test split" if val == data.test_split else ""
    return f"the best by t2v R@1 on {val}{on_test}"


# ---------------------------------------------------------------- ranks


def evaluation_path(workdir: Path, split_name: str, step: int, suffix: str = "") -> Path:
    """Path of the table of an evaluation, `eval_SPLIT_STEP.json`; its ranks end in `.npz`."""
    return workdir / f"eval_{split_name}_{step}{suffix}.json"


def write_ranks(path: Path, ranks: Ranks, card: ProtocolCard) -> None:
    """Writes the arrays of `Ranks`, and `card` as JSON, atomically."""
    arrays = {field.name: getattr(ranks, field.name) for field in dataclasses.fields(Ranks)}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, card=json.dumps(dataclasses.asdict(card)), **arrays)


def read_ranks(path: Path) -> tuple[Ranks, ProtocolCard] | None:
    """Reads ranks and their card; None if there are none, or they are damaged."""
    try:
        with np.load(path) as arrays:
            ranks = Ranks(**{field.name: arrays[field.name] for field in dataclasses.fields(Ranks)})
            card = ProtocolCard.from_dict(json.loads(str(arrays["card"])))
        if ranks.t2v.shape != ranks.text_to_video.shape:
            raise ValueError("its arrays do not fit together")
        if not np.array_equal(np.unique(ranks.text_to_video), np.arange(len(ranks.v2t))):
            raise ValueError("it lacks captions")
        return ranks, card
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise_if_refused(path, error)
        return None
