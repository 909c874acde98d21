"""Opens what an evaluation needs: a checkpoint of a run and a split of its dataset."""

import dataclasses
from pathlib import Path

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import (
    Evaluation,
    Evaluator,
    FrameOrder,
    check_split,
    order_by_content,
)
from drl_jax.models.drl import Params
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.checksums import params_digest
from drl_jax.runs.protocol_card import ProtocolCard, protocol_card
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import own_manifest
from drl_jax.sharding import make_layout


@dataclasses.dataclass(frozen=True)
class OpenEvaluation:
    """A checkpoint and a split, ready to be evaluated.

    Attributes:
      config: of the run.
      params: of the checkpoint.
      dataset: of the run.
      split_name: as it was asked for.
      split: the split of this name.
      evaluator: of the model.
      frame_order: applied to the frames of every video; None: the order of time.
      card: the protocol, without post-processing.
    """

    config: Config
    params: Params
    dataset: VideoDataset
    split_name: str
    split: Split
    evaluator: Evaluator
    frame_order: FrameOrder | None
    card: ProtocolCard

    def run(self) -> Evaluation:
        """Evaluates the split."""
        return self.evaluator.run(self.params, self.split, frame_order=self.frame_order)

    def checked_split(self, name: str) -> Split:
        """Another split of the dataset.

        Raises:
          UserError: there is none, or it cannot be ranked.
        """
        split = load_split(self.dataset, name, self.config.data)
        _check_split(name, split, self.dataset, self.config)
        return split


def open_evaluation(
    workdir: Path, config: Config, *, checkpoint: str, split_name: str, frame_order: str
) -> OpenEvaluation:
    """Restores a checkpoint and loads a split; arguments as of `evaluate_run.evaluate`.

    Raises:
      UserError: no such run, checkpoint, dataset or split, or the split cannot be ranked.
    """
    layout = make_layout(fsdp=config.sharding.fsdp)
    step, params = restore_params(workdir, config.model, layout, checkpoint)
    dataset = VideoDataset(dataset_dir(config))
    _note_other_content(workdir, dataset)
    split = load_split(dataset, split_name, config.data)
    _check_split(split_name, split, dataset, config)
    card = protocol_card(
        workdir,
        config,
        dataset,
        split_name,
        split,
        checkpoint=checkpoint,
        step=step,
        parameters_sha256=params_digest(params),
        frame_order=frame_order,
    )
    return OpenEvaluation(
        config,
        params,
        dataset,
        split_name,
        split,
        Evaluator(config, dataset, layout),
        order_by_content if frame_order == "content" else None,
        card,
    )


def _check_split(name: str, split: Split, dataset: VideoDataset, config: Config) -> None:
    check_split(name, split, dataset, load_tokenizer(config.model), config.data.max_words)


def _note_other_content(workdir: Path, dataset: VideoDataset) -> None:
    """Says so if the run was trained with another build of the dataset."""
    manifest = own_manifest(workdir)
    expected = manifest["dataset"]["content"] if manifest else ""
    if expected and dataset.content and expected != dataset.content:
        print(f"note: {workdir} was trained with other frames or captions than {dataset.directory}")
