"""Writes the embeddings of captions and of videos to files."""

import contextlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import drl_jax
from drl_jax.embeddings import SHARD_SIZE
from drl_jax.embeddings.inputs import VideoFolder
from drl_jax.embeddings.output import Output
from drl_jax.models.interactions import Features
from drl_jax.models.tokenizers.base import Tokenized, warn_of_cut
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.files import json_sha256
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search.encoding import encode_reads
from drl_jax.search.query import sampling_of
from drl_jax.search.reading import VideoRead, read_video, read_whole_video

# Videos that a worker may read ahead.
_AHEAD = 2


def embed_captions(
    model: RetrievalModel,
    captions: Sequence[str],
    out: Path,
    *,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
) -> Output:
    """Writes the features of captions; after an interruption, the same call continues.

    Args:
      model: encodes them.
      captions: none is blank.
      out: see `output.check_out`.
      dtype: of the features, one of `embeddings.DTYPES`.
      shard_size: captions per file.

    Returns:
      The files.

    Raises:
      UserError: a file cannot be written, or exists and is of another origin.
    """
    made_with = {
        "model": model.fingerprint,
        "list of captions": json_sha256(list(captions)),
        "--dtype": dtype,
        "max_words": model.config.data.max_words,
    }
    encoded = cut = 0
    with Output(out, made_with, len(captions), shard_size) as output:
        pending = list(output.pending())
        with _progress(pending, len(captions), "caption") as progress:
            for file, numbers in pending:
                part = captions[numbers.start : numbers.stop]
                tokens = model.tokenize(part)
                output.write(file, _of_captions(model, part, tokens, dtype), _about(model), {}, {})
                encoded, cut = encoded + len(part), cut + int(tokens.is_cut.sum())
                progress.update(len(part))
    warn_of_cut(cut, encoded, model.config.data.max_words)
    return output


def embed_videos(
    model: RetrievalModel,
    videos: VideoFolder,
    out: Path,
    *,
    windows: bool = False,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
) -> Output:
    """Writes the features of videos; after an interruption, the same call continues.

    Args:
      model: encodes them.
      videos: the files.
      out: see `output.check_out`.
      windows: a row for each window of a video, as in a search index, not for each video.
      dtype: of the features, one of `embeddings.DTYPES`.
      shard_size: videos per file.

    Returns:
      The files, and which videos could not be read.

    Raises:
      UserError: a file cannot be written, or exists and is of another origin.
    """
    found = videos.found
    made_with = {
        "model": model.fingerprint,
        "list of videos": json_sha256([(v.path, v.size, v.mtime_ns) for v in found]),
        "--dtype": dtype,
        "--windows": windows,
    }
    sampling = sampling_of(model)
    with Output(out, made_with, len(found), shard_size, videos.unusable) as output:
        pending = list(output.pending())
        numbers = [number for _, numbers in pending for number in numbers]
        files = [videos.folder / found[number].path for number in numbers]
        if windows:
            calls = [
                (file, frozenset(), sampling, output.spool / f"{number}.frames")
                for number, file in zip(numbers, files, strict=True)
            ]
        else:
            calls = [(file, sampling) for file in files]
        reads = map_in_processes(
            read_video if windows else read_whole_video,
            calls,
            timeout=[found[number].allowed for number in numbers],
            ahead=_AHEAD,
        )
        with contextlib.closing(reads), _progress(pending, len(found), "video") as progress:
            for file, numbers in pending:
                paths = [found[number].path for number in numbers]
                shard = _VideoShard(model, dtype, windows)
                for path, read in zip(paths, islice(reads, len(paths)), strict=True):
                    shard.add(path, read)
                    progress.update()
                output.write(
                    file, shard.arrays(), _about(model), shard.unreadable, shard.unavailable
                )
    return output


class _VideoShard:
    """The rows of one file; encodes a batch at a time."""

    def __init__(self, model: RetrievalModel, dtype: str, windows: bool):
        self.unreadable: dict[str, str] = {}
        self.unavailable: dict[str, str] = {}
        self._model, self._dtype, self._windows = model, dtype, windows
        self._waiting: list[tuple[str, VideoRead]] = []
        self._encoded: list[dict[str, np.ndarray]] = []

    def add(self, path: str, read: VideoRead | WorkerFailure) -> None:
        """Takes a video that was read."""
        if isinstance(read, WorkerFailure):
            (self.unavailable if read.is_passing else self.unreadable)[path] = read.reason
        elif read.error:
            self.unreadable[path] = read.error
        else:
            self._waiting.append((path, read))
        rows = sum(len(read.windows) for _, read in self._waiting)
        if rows >= self._model.config.eval.batch_size:
            self._encode()

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file; without rows if no video could be read."""
        if self._waiting:
            self._encode()
        if not self._encoded:
            black = np.zeros((1, *self._model.frame_form.shape), np.uint8)
            arrays = {
                "window.frames": np.zeros((1, 1), np.int32),
                "window.span": np.zeros((1, 2)),
                "frame.time": np.zeros(1),
            }
            self._waiting = [("", VideoRead("", arrays=arrays, frames=black))]
            self._encode()
            self._encoded = [{name: array[:0] for name, array in self._encoded[0].items()}]
        parts = self._encoded
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _encode(self) -> None:
        reads, self._waiting = self._waiting, []
        video, _ = encode_reads(self._model, [read for _, read in reads])
        for _, read in reads:
            if read.spooled is not None:
                read.spooled.unlink(missing_ok=True)
        rows = [(path, read, window) for path, read in reads for window in read.windows]
        # Not a number where there is no frame.
        frame_time = np.full(video["frame_mask"].shape, np.nan, np.float32)
        for row, (_, read, window) in enumerate(rows):
            frame_time[row, : len(window)] = read.arrays["frame.time"][list(window)]
        arrays = {"video_id": np.array([path for path, _, _ in rows])}
        if self._windows:
            spans = np.concatenate([read.arrays["window.span"] for _, read in reads])
            arrays["start"], arrays["end"] = spans.astype(np.float32).T
        features = {"pooled": self._model.pool_videos(video), **video}
        self._encoded.append({**arrays, **_stored(features, self._dtype), "frame_time": frame_time})


def _of_captions(
    model: RetrievalModel, captions: Sequence[str], tokens: Tokenized, dtype: str
) -> dict[str, np.ndarray]:
    text = model.encode_tokens(tokens)
    words = model.token_strings(captions)
    longest = max(len(word) for row in words for word in row)
    token = np.zeros(text["text_mask"].shape, f"<U{longest}")
    for row, strings in enumerate(words):
        token[row, text["text_mask"][row]] = strings
    features = {"pooled": model.pool_text(text), **text}
    return {"caption": np.array(captions), **_stored(features, dtype), "token": token}


def _stored(features: Features, dtype: str) -> Features:
    """Masks stay bool."""
    return {
        name: array if array.dtype == bool else array.astype(dtype)
        for name, array in features.items()
    }


def _about(model: RetrievalModel) -> str:
    """What a file says about its model. Not where it was: files are given to others."""
    about = {
        "version": drl_jax.__version__,
        "model": model.fingerprint,
        "interaction": model.config.model.interaction,
    }
    return json.dumps(about)


def _progress(pending: Sequence[tuple[Path, range]], total: int, unit: str) -> tqdm:
    left = sum(len(numbers) for _, numbers in pending)
    return tqdm(desc="embedding", total=total, initial=total - left, unit=unit, disable=not left)
