"""Stores the ranks of an evaluation beside its table, with the protocol card that they belong to.

`eval_SPLIT_STEP.npz` has the arrays of `metrics.Ranks` and `card`, the JSON of a `ProtocolCard`.
"""

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from drl_jax.evaluation.metrics import Ranks
from drl_jax.runs.protocol_card import ProtocolCard
from drl_jax.runtime.errors import raise_if_refused
from drl_jax.runtime.files import replacing


def evaluation_path(workdir: Path, split_name: str, step: int, suffix: str = "") -> Path:
    """Path of the table of an evaluation, `eval_SPLIT_STEP.json`; its ranks end in `.npz`."""
    return workdir / f"eval_{split_name}_{step}{suffix}.json"


def write_ranks(path: Path, ranks: Ranks, card: ProtocolCard) -> None:
    """Writes ranks atomically.

    Raises:
      OSError: they cannot be written.
    """
    arrays = {field.name: getattr(ranks, field.name) for field in dataclasses.fields(Ranks)}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, card=json.dumps(card.as_dict()), **arrays)


def read_ranks(path: Path) -> tuple[Ranks, ProtocolCard] | None:
    """Reads ranks and their card; None if there are none, or they cannot be used.

    Raises:
      Unavailable: the file cannot be read.
    """
    try:
        with np.load(path) as arrays:
            ranks = Ranks(**{field.name: arrays[field.name] for field in dataclasses.fields(Ranks)})
            card = ProtocolCard.from_dict(json.loads(str(arrays["card"])))
        videos = np.arange(len(ranks.v2t))
        if ranks.t2v.shape != ranks.text_to_video.shape:
            raise ValueError("its arrays do not fit together")
        if not np.array_equal(np.unique(ranks.text_to_video), videos):
            raise ValueError("it lacks captions")
        return ranks, card
    # Damaged files, and those of a version whose cards say less.
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise_if_refused(path, error)
        return None
