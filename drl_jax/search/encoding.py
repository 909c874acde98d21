"""What an index stores of windows: features, and their similarities to banks of captions."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from drl_jax.config import Config
from drl_jax.evaluation.hubness import inverted_softmax_bias, mean_of_largest
from drl_jax.evaluation.post_processing import BETAS, LARGEST
from drl_jax.models.interactions import Arrays, Features
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError, one_line
from drl_jax.runtime.files import json_sha256
from drl_jax.search.reading import VideoRead, frames_of
from drl_jax.search.segments import SearchIndexError

# Names of features end in one of these.
_FEATURE_SUFFIXES = ("_unit", "_feat")
# Arrays of an index: mean and standard deviation of the similarities of a window to the captions of
# the header, float32 [2]; and what corrections for hubs subtract, by `describe_bank`, float32 [P].
BANK_ARRAY, HUBNESS_ARRAY = "bank_similarity", "hubness"
_BANK_SIZE = 64  # Captions of the header.
# Windows that a query which is no sentence is compared with (`OpenIndex.spread`), and the fewest
# that make a scale.
SCALE_WINDOWS, _FEW = 64, 8
# Standard deviation of normal values whose median distance to their median is 1.
_DEVIATION = 1.4826
# A best moment that is less unusual than this many standard deviations is a weak match. Of the 200
# first captions of `shapes` (val), 99 % have more with their own clip.
WEAK = 2.5
# For models whose training captions are not at hand.
_SUBJECTS = ("a man", "a woman", "two children", "a dog", "a car", "a crowd", "a bird", "someone")
_ACTIONS = (
    *("is talking to the camera", "is cooking food in a kitchen", "runs across a field"),
    *("is shown in a cartoon", "plays a musical instrument on a stage"),
    *("moves along a street at night", "is swimming in the sea", "sits at a table indoors"),
)
# File of an index that has the captions for hubs.
BANK_FILE = "hubness_bank.json"
# Windows that are compared with them at a time.
_COMPARED = 1024
# What an index stores for methods that rank without hubs, of similarities and a parameter.
_METHODS = {"is": inverted_softmax_bias, "nnn": mean_of_largest}


def quantize(features: Features, storage: str) -> Features:
    """Converts features to the form in which an index stores them; other arrays do not change.

    bfloat16: the bits as uint16. int8: with a float32 scale of each vector (the last axis),
    `NAME * NAME.scale[..., None]` differs by at most 1/254 of its largest channel.
    """
    stored: Features = {}
    for name, array in features.items():
        if not name.endswith(_FEATURE_SUFFIXES) or storage == "float32":
            stored[name] = array
        elif storage == "bfloat16":
            stored[name] = array.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            largest = np.abs(array).max(axis=-1).astype(np.float32)
            scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            stored[name] = np.rint(array / scale[..., None]).astype(np.int8)
            stored[f"{name}.scale"] = scale
    return stored


def float32_of(stored: np.ndarray) -> np.ndarray:
    """Features stored as bfloat16 or float32, as float32; nothing is compiled for their shape."""
    is_bfloat16 = stored.dtype == np.uint16
    return stored.view(ml_dtypes.bfloat16).astype(np.float32) if is_bfloat16 else stored


def dequantize(arrays: dict[str, Any]) -> Arrays:
    """Converts stored arrays (`quantize`) to those that interactions take, features float32."""
    features = {}
    for name, array in arrays.items():
        if name.endswith(".scale"):
            continue
        if array.dtype == jnp.uint16:
            # bfloat16 is the upper half of a float32. XLA's own conversion, and any slice of a
            # bfloat16 array, is ten times slower than this on a CPU.
            bits = jnp.asarray(array).astype(jnp.uint32) << 16
            array = jax.lax.bitcast_convert_type(bits, jnp.float32)
        elif array.dtype == jnp.int8:
            array = array.astype(jnp.float32) * arrays[f"{name}.scale"][..., None]
        features[name] = array
    return features


def bank_of(config: Config) -> list[str]:
    """Captions of the training split of a model's dataset, or plain ones if it is not here."""
    # The libraries of datasets take half a second to import, and a query needs none.
    from drl_jax.data.batches import load_split
    from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir

    try:
        captions = load_split(VideoDataset(dataset_dir(config)), "train", config.data).captions
    except DatasetError:
        return [f"{subject} {action}" for subject in _SUBJECTS for action in _ACTIONS]
    distinct = sorted({sentences[0] for sentences in captions if sentences})
    chosen = np.linspace(0, len(distinct) - 1, min(_BANK_SIZE, len(distinct)), dtype=int)
    return [distinct[row] for row in chosen]


def bank_similarity(model: RetrievalModel, bank: Features, windows: Features) -> np.ndarray:
    """Mean and deviation of the similarities of W windows to encoded captions: float32 [W, 2]."""
    similarity = model.similarity(bank, windows)
    return np.stack([similarity.mean(axis=0), similarity.std(axis=0)], axis=1)


def gallery_scale(scores: np.ndarray) -> np.ndarray | None:
    """The scale of a query that is no sentence, float32 [2], of its scores; None for too few."""
    if len(scores) < _FEW:
        return None
    # What the query looks for may be among them, and moves neither of these.
    median = np.median(scores)
    deviation = _DEVIATION * np.median(np.abs(scores - median))
    return np.array([median, deviation], np.float32)


def unusual(score: float, scale: np.ndarray) -> float:
    """By how many deviations a similarity is above the mean of a row of BANK_ARRAY or a scale."""
    mean, deviation = map(float, scale)
    return (score - mean) / max(deviation, 1e-6)


class Correction(NamedTuple):
    """Ranks without hubs: subtracts `factor` times a column of HUBNESS_ARRAY, is:BETA or nnn:K."""

    column: str
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Correction":
        """Reads is, is:BETA, nnn, nnn:K or nnn:K:W; raises UserError if it is none of these."""
        if match := re.fullmatch(r"is(?::(\d+))?", text):
            return cls(f"is:{int(match[1] or 20)}")
        if match := re.fullmatch(r"nnn(?::(\d+)(?::(\d*\.?\d+))?)?", text):
            return cls(f"nnn:{int(match[1] or 128)}", float(match[2] or 0.75))
        raise UserError(f"--hubness={text}: write is, is:BETA, nnn, nnn:K or nnn:K:W")

    def __str__(self) -> str:
        return f"{self.column}:{self.factor:g}" if self.column.startswith("nnn") else self.column


def describe_bank(captions: Sequence[str]) -> dict[str, Any]:
    """What the header of an index says of the captions for hubs, and of what is stored of them."""
    columns = [*(f"is:{beta}" for beta in BETAS), *(f"nnn:{count}" for count in LARGEST)]
    return {"captions": len(captions), "sha256": json_sha256(list(captions)), "columns": columns}


def encode_banks(
    model: RetrievalModel, directory: Path, header: Mapping[str, Any]
) -> list[Features]:
    """The captions of weak matches, and those for hubs, encoded; or as `read_bank`."""
    banks = [model.encode_text(header["bank"])]
    if captions := read_bank(directory, header):
        banks.append(model.encode_text(captions))
    return banks


def read_bank(directory: Path, header: Mapping[str, Any]) -> list[str]:
    """The captions for hubs of an index, if it has them; a SearchIndexError if these changed."""
    if "hubness" not in header:
        return []
    path = directory / BANK_FILE
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
        if json_sha256(captions) == header["hubness"]["sha256"]:
            return captions
        reason = "has changed"
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({one_line(error)})"
    raise SearchIndexError(f"{path} {reason}; give the captions of the index again with --bank")


def _hubness_of(
    model: RetrievalModel, columns: Sequence[str], bank: Features, windows: Features
) -> np.ndarray:
    """HUBNESS_ARRAY of W windows and encoded captions: float32 [W, P]."""
    count, parts = len(next(iter(windows.values()))), []
    for start in range(0, count, _COMPARED):
        size = min(_COMPARED, count - start)
        # Few shapes: the number of windows is rounded up to a power of two.
        rows = start + np.minimum(np.arange(1 << (size - 1).bit_length()), size - 1)
        part = {name: array[rows] for name, array in windows.items()}
        similarity = model.similarity(bank, part)[:, :size]
        of_columns = [
            _METHODS[method](similarity, int(value))
            for method, _, value in (column.partition(":") for column in columns)
        ]
        parts.append(np.stack(of_columns, axis=1).astype(np.float32))
    return np.concatenate(parts)


def encode_reads(
    model: RetrievalModel, reads: Sequence[VideoRead]
) -> tuple[Features, list[np.ndarray]]:
    """Encodes the windows of videos; those of one window are encoded together.

    Returns the arrays of all windows, as `RetrievalModel.encode_videos`, none without a window; and
    for each video the features of its frames, float32 [N, D], [0, D] of one window.
    """
    short = [number for number, read in enumerate(reads) if read.frames is not None]
    together = model.encode_videos([reads[number].frames for number in short]) if short else {}
    rows: list[Features] = []
    nothing = np.zeros((0, model.config.model.backbone.embed_dim), np.float32)
    features = [nothing] * len(reads)
    for number, read in enumerate(reads):
        if read.frames is not None:
            rows.append({name: array[[short.index(number)]] for name, array in together.items()})
        elif read.spooled is not None:
            image_feat = model.encode_frames(frames_of(read, model.frame_form))
            rows.append(model.encode_frame_windows(image_feat, read.windows))
            if len(read.windows) > 1:
                features[number] = image_feat
    names = rows[0] if rows else ()
    return {name: np.concatenate([row[name] for row in rows]) for name in names}, features


def encode_for_index(
    model: RetrievalModel,
    header: Mapping[str, Any],
    banks: Sequence[Features],
    reads: Sequence[VideoRead],
) -> list[dict[str, np.ndarray]]:
    """The arrays of each video that need the model (`VideoRecord.arrays`); errors have none."""
    windows, features = encode_reads(model, reads)
    if not windows:
        return [{} for _ in reads]
    stored = quantize(windows, header["storage"])
    if model.interaction.HAS_VECTORS:
        stored |= quantize({"pooled_unit": model.interaction.video_vectors(windows)}, "int8")
    stored[BANK_ARRAY] = bank_similarity(model, banks[0], windows)
    if "hubness" in header:
        columns = header["hubness"]["columns"]
        stored[HUBNESS_ARRAY] = _hubness_of(model, columns, banks[1], windows)
    ends = np.cumsum([len(read.windows) for read in reads])
    parts = {f"window.{name}": np.split(array, ends[:-1]) for name, array in stored.items()}
    parts["feature.image_feat"] = [
        quantize({"image_feat": feat}, "bfloat16")["image_feat"] for feat in features
    ]
    return [
        {name: part[number] for name, part in parts.items()} if read.arrays else {}
        for number, read in enumerate(reads)
    ]
