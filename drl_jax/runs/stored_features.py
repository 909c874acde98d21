"""Features of frozen towers, computed once (`config.data.features`): heads are trained on them.

    features.json      sealed: what the features are of
    frames-00000.npy   of a few videos: the features of their frames [R, D], one after another
    texts-00000.npy    of many texts: the features of the sentence and of the tokens of each [R, D]
    *.json             sealed, beside each part: its hash, and where the rows of each item end

A part is complete with its `.json`. A process that is killed loses the part it computes; another
one continues. Parts are mapped into memory.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from drl_jax.config import Config, ConfigError
from drl_jax.data.batches import load_split
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.pictures import pad_frames
from drl_jax.data.records import MANIFEST, VideoDataset, dataset_dir
from drl_jax.data.splits import Captions, Split
from drl_jax.evaluation.embedder import Embedder
from drl_jax.models.drl import Params, config_from_dict, param_shapes
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.tokenizers.base import Tokenized
from drl_jax.runtime.cluster import connect
from drl_jax.runtime.distributed import barrier, from_main, is_main
from drl_jax.runtime.errors import Notice, Unavailable, UserError, raise_if_refused
from drl_jax.runtime.files import json_sha256, replacing, seal, sha256, unseal, write_json
from drl_jax.runtime.lock import LOCK_FILE, locked
from drl_jax.runtime.plugins import origin_of
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.runtime.worker_pool import WorkerFailure
from drl_jax.training.trainable import Trainable
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

_ABOUT = "features.json"
_FORMAT = 2
# Items of a part: what a killed process computes again.
_PART = {"frames": 64, "texts": 1024}


class FeaturesError(UserError):
    """Stored features that are of something else."""


class _Part(NamedTuple):
    """The rows of some items: [R, D], and the end of those of each item, int64 [N]."""

    rows: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """Features of the videos and texts of a dataset's splits, in the dtype they are stored in."""

    _parts: dict[str, list[_Part]]
    _videos: np.ndarray  # record indices, ascending
    _texts: list[str]  # ascending
    max_frames: int
    max_words: int

    def frames(self, video: int) -> np.ndarray:
        """The features of the frames of a video, by its record index: [F, D]."""
        return self._item("frames", int(np.searchsorted(self._videos, video)))

    def read(self, video: int) -> tuple[np.ndarray, np.ndarray]:
        """The same, padded to [max_frames, D], with a mask."""
        return pad_frames(self.frames(video), self.max_frames)

    def text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """[1 + max_words, D] of the sentence and its tokens, and the tokens' mask [max_words]."""
        rows = self._item("texts", bisect.bisect_left(self._texts, text))
        return pad_frames(rows, 1 + self.max_words)[0], np.arange(self.max_words) < len(rows) - 1

    def tokenized(self, texts: Sequence[str]) -> Tokenized:
        """Features of N texts, [N, 1 + max_words, D], in place of token ids."""
        features, masks = zip(*map(self.text, texts), strict=True)
        return Tokenized(np.stack(features), np.stack(masks), np.zeros(len(texts), bool))

    def of_captions(self, captions: Captions) -> "_CaptionFeatures":
        """What `TrainBatches` reads in place of the tokens of captions."""
        return _CaptionFeatures(self, captions.texts)

    def _item(self, kind: str, number: int) -> np.ndarray:
        rows, ends = self._parts[kind][number // _PART[kind]]
        place = number % _PART[kind]
        found = rows[ends[place - 1] if place else 0 : ends[place]]
        return found.view(jnp.bfloat16) if found.dtype == np.uint16 else found


class _CaptionFeatures(NamedTuple):
    """As `data.tokens.Tokens`, with features in place of ids."""

    features: StoredFeatures
    texts: Sequence[str]

    def __getitem__(self, text: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        return self.features.text(self.texts[text])


def check_frozen(config: Config) -> None:
    """Raises ConfigError unless what stored features, or adapters, are of is there and frozen."""
    family = config.model.backbone.family
    if config.model.lora.rank and (config.data.features or family in EXTRACTORS):
        raise ConfigError(
            "config.model.lora.rank adapts towers, which stored features are without; leave it out"
        )
    if config.model.lora.rank and not config.model.init:
        raise ConfigError("config.model.lora.rank adapts trained towers: set --config.model.init")
    if not config.data.features:
        if family in EXTRACTORS:
            raise ConfigError(
                f"{family} is a feature extractor: give --features=DIR, where training stores its"
                " features"
            )
        return
    trained = Trainable.of(config.optim).parts(param_shapes(config.model))
    towers = [
        path for path in trained if path[0] == "backbone" and not path[1].startswith("logit_")
    ]
    if towers:
        raise ConfigError(
            f"--features is for frozen towers, but the run trains {'/'.join(map(str, towers[0]))};"
            " set --config.optim.trainable=temporal,interaction,logit_scale"
        )
    if not config.model.init and family not in EXTRACTORS:
        raise ConfigError("--features needs trained towers: set --config.model.init")


def stored_features(
    config: Config,
    dataset: VideoDataset,
    splits: Sequence[Split],
    params: Params | None,
    layout: Layout,
    *,
    ray: str = "",
) -> StoredFeatures:
    """Opens the features in `config.data.features`; computes those that are missing or damaged.

    All processes call it, and encode together; process 0 writes. With `ray`, the nodes of that
    cluster encode and write instead, each a part at a time, from `config.model.init`. `params` are
    of `config.model`, or None with a feature extractor, which has none.

    Raises:
      FeaturesError: the directory has features of other weights, another dataset or another form.
      LockError: another process computes them.
      ClusterError: the cluster cannot do the work.
      Unavailable: files cannot be read or written.
    """
    directory = Path(config.data.features)
    items = _items(splits)
    videos, texts = items.values()
    about = _about(config, dataset, videos, texts, params)
    names = [
        (kind, number)
        for kind, values in items.items()
        for number in range(-(-len(values) // _PART[kind]))
    ]
    with contextlib.ExitStack() as stack:
        found: dict[tuple[str, int], _Part | None] = dict.fromkeys(names)
        if is_main():
            if _has_parts(directory):
                _claim(directory, about)
                found = {name: _read(directory, *name) for name in names}
            if None in found.values():
                try:
                    lock = locked(directory / LOCK_FILE, f"the directory {directory}")
                    stack.enter_context(lock)
                except OSError as error:
                    raise Unavailable(directory, error, "written") from error
                _claim(directory, about)  # Now, no other process can claim it for others.
        missing = from_main(np.array([found[name] is None for name in names]))
        pending = [name for name, is_missing in zip(names, missing, strict=True) if is_missing]
        if pending and ray:
            if is_main():
                _compute_on(ray, config, dataset, pending)
        elif pending:
            encode = _encoders(config, dataset, params, layout)
            for kind, number in _progress(pending, len(names)):
                rows = encode[kind](_of_part(items, kind, number))
                if is_main():
                    _write(directory, kind, number, rows, config.data.features_dtype)
    barrier("stored features")
    opened = {name: found[name] or _read(directory, *name) for name in names}
    if damaged := next((name for name, part in opened.items() if part is None), None):
        raise FeaturesError(f"{directory}: part {damaged} cannot be read back; rerun")
    parts = {kind: [opened[kind, number] for k, number in names if k == kind] for kind in items}
    return StoredFeatures(parts, videos, texts, config.data.max_frames, config.data.max_words)


def _items(splits: Sequence[Split]) -> dict[str, Any]:
    """What has features, in the order of the parts: record indices of videos, and texts."""
    videos = np.unique(np.concatenate([split.videos for split in splits]))
    texts = {text for split in splits for of_video in split.captions for text in of_video}
    return {"frames": videos, "texts": sorted(texts)}


def _of_part(items: dict[str, Any], kind: str, number: int) -> Any:
    return items[kind][number * _PART[kind] : (number + 1) * _PART[kind]]


def _compute_on(
    ray: str, config: Config, dataset: VideoDataset, pending: list[tuple[str, int]]
) -> None:
    """Has the nodes of a Ray cluster compute parts."""
    if not config.model.init:
        raise ConfigError("--ray is for features of towers: an extractor is in this process only")
    values = json.dumps(dataclasses.asdict(config))
    with connect(ray) as cluster:
        cluster.check(
            {"--features": Path(config.data.features)},
            dataset.directory / MANIFEST,
            packages=("jax", "numpy"),
            modules=["drl_jax"],
        )
        done = cluster.map(_compute_part, [(values, *name) for name in pending])
        for result in tqdm(done, "storing features", len(pending), unit="part"):
            if isinstance(result, WorkerFailure):
                raise FeaturesError(f"a part cannot be computed: {result.reason}")


def _compute_part(values: str, kind: str, number: int) -> None:
    config, items, encode = _opened(values)
    rows = encode[kind](_of_part(items, kind, number))
    _write(Path(config.data.features), kind, number, rows, config.data.features_dtype)


@functools.lru_cache(maxsize=1)
def _opened(values: str) -> tuple[Config, dict[str, Any], dict[str, Callable]]:
    """What a worker keeps between parts: configuration, items and encoders."""
    config = config_from_dict(json.loads(values))
    dataset, model = VideoDataset(dataset_dir(config)), config.model
    splits = [load_split(dataset, name, config.data) for name in ("train", "val", "test")]
    weights = read_weights(model.init, model.release, model.weights_key)
    params = initial_params(model, weights, jax.random.key(config.seed))
    return config, _items(splits), _encoders(config, dataset, params, make_layout())


def _encoders(
    config: Config, dataset: VideoDataset, params: Params | None, layout: Layout
) -> dict[str, Callable[[Any], list[np.ndarray]]]:
    """Functions of videos (record indices) and of texts, which return the rows of each."""
    embedder = Embedder(config, layout)

    def frames(videos: np.ndarray) -> list[np.ndarray]:
        read = [dataset.read_frames(video) for video in videos]
        found = embedder.encode_frames(params or {}, np.concatenate(read))
        return np.split(found, np.cumsum([len(frames) for frames in read])[:-1])

    def texts(captions: list[str]) -> list[np.ndarray]:
        return embedder.encode_text_features(params or {}, embedder.tokenize(captions))

    return {"frames": frames, "texts": texts}


def _about(
    config: Config, dataset: VideoDataset, videos: np.ndarray, texts: list[str], params: Any
) -> dict[str, Any]:
    """All that features depend on, by the name that a message has for it."""
    model, data = config.model, config.data
    form = FrameForm.of(model.backbone, data.as_shown)
    weights = hashlib.sha256()
    backbone = (params or {}).get("backbone", {})
    # The temperature is trained with the heads, and features do not depend on it.
    for name in sorted(name for name in backbone if not name.startswith("logit_")):
        for leaf in jax.tree.leaves(backbone[name]):
            weights.update(np.asarray(leaf).tobytes())
    if (made := EXTRACTORS.get(model.backbone.family)) is None:
        own = {**model.backbone.of_towers, "dtype": model.dtype}
        own["tokenizer"] = sha256(Path(model.tokenizer)) if model.tokenizer else ""
    else:
        own = {"family": model.backbone.family, "VERSION": str(made.VERSION)}
        if (origin := origin_of(made)) is not None:
            weights.update(origin.content)
    return {
        "format": _FORMAT,
        "weights": weights.hexdigest(),
        "dataset": dataset.content,
        "splits": json_sha256([videos.tolist(), texts]),
        **own,
        **dataclasses.asdict(form),
        **{n: getattr(data, n) for n in ("max_frames", "max_words", "features_dtype")},
    }


def _has_parts(directory: Path) -> bool:
    try:
        return any(entry.suffix == ".npy" for entry in directory.iterdir())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unavailable(directory, error) from error


def _claim(directory: Path, about: dict[str, Any]) -> None:
    """Compares what the features in a directory are of, or writes it if there are none."""
    about, path = json.loads(json.dumps(about)), directory / _ABOUT
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not _has_parts(directory):
            write_json(path, seal(about), durable=True)
            return
        if not path.exists():
            raise FeaturesError(f"{path} is missing; give another --features")
        found = unseal(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unavailable(directory, error, "read or written") from error
    except ValueError as error:
        raise FeaturesError(f"{path} is damaged ({error}); give another --features") from error
    for name, value in about.items():
        if found.get(name) != value:
            raise FeaturesError(
                f"the features in {directory} are of something else ({name}:"
                f" {_short(found.get(name))} there, {_short(value)} here); give another --features"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _progress(pending: list, total: int) -> Iterator[tuple[str, int]]:
    done, shown = total - len(pending), None if is_main() else True
    yield from tqdm(pending, "storing features", total, initial=done, unit="part", disable=shown)


def _write(directory: Path, kind: str, number: int, items: list[np.ndarray], dtype: str) -> None:
    rows = np.concatenate(items).astype(dtype)
    path = directory / f"{kind}-{number:05d}.npy"
    try:
        with replacing(path, durable=True) as unfinished, unfinished.open("wb") as file:
            # NumPy's files have no bfloat16.
            np.save(file, rows.view(np.uint16) if dtype == "bfloat16" else rows)
            file.flush()
        ends = np.cumsum([len(item) for item in items]).tolist()
        about = {"rows_sha256": sha256(path), "ends": ends}
        write_json(path.with_suffix(".json"), seal(about), durable=True)
    except OSError as error:
        raise Unavailable(path, error, "written") from error


def _read(directory: Path, kind: str, number: int) -> _Part | None:
    """Maps a part; None: it is absent or damaged, which is said. Raises Unavailable."""
    path = directory / f"{kind}-{number:05d}.npy"
    about = path.with_suffix(".json")
    try:
        if not (about.exists() and path.exists()):
            return None
        values = unseal(about.read_text(encoding="utf-8"))
        if sha256(path) != values["rows_sha256"]:
            raise ValueError("its content differs from its hash")
        return _Part(np.load(path, mmap_mode="r"), np.array(values["ends"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise_if_refused(path, error)
        warnings.warn(f"{path} is damaged ({error}); it is computed again", Notice, stacklevel=2)
        return None
