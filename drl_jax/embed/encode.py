"""Writes the embeddings of captions and of videos to files."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from drl_jax.data.video_file import VIDEO_SUFFIXES
from drl_jax.embed.files import SHARD_SIZE, Output, open_output
from drl_jax.models.interactions import Features
from drl_jax.models.tokenizers.base import warn_of_cut
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import json_sha256
from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search.encoding import encode_reads
from drl_jax.search.query import sampling_of
from drl_jax.search.reading import (
    FrameSampling,
    VideoRead,
    file_of,
    find_videos,
    read_video,
    read_whole_video,
)

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
    """Writes the features of captions, none blank; after an interruption, the same call continues.

    Raises:
      UserError: a file cannot be written, or exists and is of another origin.
    """
    max_words, listed = model.config.data.max_words, json_sha256(list(captions))
    made_with = _made_with(model, dtype) | {"list of captions": listed, "max_words": max_words}
    encoded = cut = 0
    with (
        open_output(out, made_with, len(captions), shard_size) as output,
        _progress(output, len(captions), "caption") as progress,
    ):
        for file, numbers in output.pending().items():
            part = captions[numbers.start : numbers.stop]
            tokens = model.tokenize(part)
            text = model.encode_tokens(tokens)
            words = model.token_strings(part)
            features = _stored(_pooled(model, model.pool_text, text) | text, dtype)
            arrays = {"caption": np.array(part), **features}
            found = np.array(list(chain.from_iterable(words)))
            arrays["token"] = np.zeros(text["text_mask"].shape, found.dtype)
            arrays["token"][text["text_mask"]] = found
            output.write(file, arrays, {}, is_finished=True)
            encoded, cut = encoded + len(part), cut + int(tokens.is_cut.sum())
            progress.update(len(part))
    warn_of_cut(cut, encoded, max_words)
    return output


def embed_videos(
    model: RetrievalModel,
    folder: Path,
    out: Path,
    *,
    windows: bool = False,
    timeout: float = 300.0,
    dtype: str = "float32",
    shard_size: int = SHARD_SIZE,
) -> Output:
    """As `embed_captions`, of the videos below a folder.

    Decoding a video may take `timeout` seconds, and one more for each MB of its file. With
    `windows`, a row is a window of a video, as in a search index.

    Raises:
      UserError: there is no video; or a file cannot be written, or exists and is of another origin.
    """
    if not folder.is_dir():
        raise UserError(f"no directory {folder}; name the folder of the videos")
    unusable: dict[str, str] = {}
    found = list(find_videos(folder, timeout, unusable))
    if not found:
        raise UserError(f"no video in {folder} (looked for {' '.join(VIDEO_SUFFIXES)})")
    listed = json_sha256([(video.path, video.size, video.mtime_ns) for video in found])
    made_with = _made_with(model, dtype) | {"list of videos": listed, "--windows": windows}
    made_with["--encoder"] = model.encoder
    sampling = sampling_of(model)
    if not windows:
        data = model.config.data
        sampling = FrameSampling(model.frame_form, data.max_frames, clock=data.frame_clock)
    with (
        open_output(out, made_with, len(found), shard_size) as output,
        temporary_directory() as spool,
    ):
        output.unreadable |= unusable
        pending = output.pending()
        videos = [found[number] for numbers in pending.values() for number in numbers]
        paths = [file_of(folder, video.path) for video in videos]
        if windows:
            calls = [
                (path, frozenset(), sampling, spool / f"{number}.frames")
                for number, path in enumerate(paths)
            ]
        else:
            calls = [(path, sampling) for path in paths]
        timeouts = [video.allowed for video in videos]
        read = read_video if windows else read_whole_video
        reads = map_in_processes(read, calls, timeout=timeouts, ahead=_AHEAD)
        with contextlib.closing(reads), _progress(output, len(found), "video") as progress:
            for file, numbers in pending.items():
                paths = [found[number].path for number in numbers]
                results = zip(paths, islice(reads, len(paths)), strict=True)
                output.write(file, *_of_file(model, results, dtype, windows, progress))
    return output


def _of_file(
    model: RetrievalModel,
    results: Iterable[tuple[str, VideoRead | WorkerFailure]],
    dtype: str,
    windows: bool,
    progress: tqdm,
) -> tuple[Features, dict[str, str], bool]:
    """The arguments of `Output.write`, of the paths of videos and what was read of them."""
    unreadable: dict[str, str] = {}
    waiting: list[tuple[str, VideoRead]] = []
    parts: list[Features] = []
    is_finished = True
    for path, read in results:
        if isinstance(read, WorkerFailure):
            unreadable[path] = read.reason
            # The next run tries again what failed for a reason that may pass.
            is_finished &= not read.is_passing
        elif read.error:
            unreadable[path] = read.error
        else:
            waiting.append((path, read))
        if sum(len(read.windows) for _, read in waiting) >= model.config.eval.batch_size:
            parts.append(_of_videos(model, waiting, dtype, windows))
            waiting = []
        progress.update()
    if waiting:
        parts.append(_of_videos(model, waiting, dtype, windows))
    if not parts:
        # A file without rows has the arrays of a black frame, cut.
        one_frame = {"window.frames": [[0]], "window.span": [[0.0, 0.0]], "frame.time": [0.0]}
        black = np.zeros((1, *model.frame_form.shape), np.uint8)
        read = VideoRead(arrays={k: np.array(v) for k, v in one_frame.items()}, frames=black)
        none = _of_videos(model, [("", read)], dtype, windows)
        parts = [{name: array[:0] for name, array in none.items()}]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return arrays, unreadable, is_finished


def _of_videos(
    model: RetrievalModel, reads: Sequence[tuple[str, VideoRead]], dtype: str, windows: bool
) -> Features:
    """Encodes videos that were read, each with its path."""
    video, _ = encode_reads(model, [read for _, read in reads])
    for _, read in reads:
        if read.spooled is not None:
            read.spooled.unlink(missing_ok=True)
    rows = [(path, read, window) for path, read in reads for window in read.windows]
    # Not a number where there is no frame.
    frame_time = np.full(video["frame_mask"].shape, np.nan, np.float32)
    for row, (_, read, window) in enumerate(rows):
        frame_time[row, : len(window)] = read.arrays["frame.time"][list(window)]
    arrays = {"video_id": np.array([path for path, _, _ in rows])}
    if windows:
        spans = np.concatenate([read.arrays["window.span"] for _, read in reads])
        arrays["start"], arrays["end"] = spans.astype(np.float32).T
    features = _pooled(model, model.pool_videos, video) | video
    return {**arrays, **_stored(features, dtype), "frame_time": frame_time}


def _pooled(
    model: RetrievalModel, pool: Callable[[Features], np.ndarray], of: Features
) -> Features:
    """One vector of each item, if the interaction has them."""
    return {"pooled": pool(of)} if model.interaction.HAS_POOLED else {}


def _stored(features: Features, dtype: str) -> Features:
    """Masks stay bool."""
    return {name: a if a.dtype == bool else a.astype(dtype) for name, a in features.items()}


def _made_with(model: RetrievalModel, dtype: str) -> dict[str, Any]:
    # Not where the model was: files are given to others.
    interaction = model.config.model.interaction
    return {"model": model.fingerprint, "interaction": interaction, "--dtype": dtype}


def _progress(output: Output, total: int, unit: str) -> tqdm:
    left = sum(map(len, output.pending().values()))
    return tqdm(desc="embedding", total=total, initial=total - left, unit=unit, disable=not left)
