"""Captions and videos as users hold them, read into what a model encodes."""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from PIL import Image

from drl_jax.config import DataConfig
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.pictures import to_form, to_rgb
from drl_jax.data.video import read_timed_frames
from drl_jax.data.video_file import VideoError, VideoFile
from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError, as_path, one_line

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Seconds without an answer of a server.
_PATIENCE = 30.0
# Arrays with such names have an axis of tokens, frames or channels, too.
_WITH_AXES = ("_feat", "_unit", "_mask", "_weight")
_ACCEPTED = (
    "a path, the bytes of a video file, an open file, an array [F, H, W, 3] or [F, 3, H, W], a PIL"
    " image, a list of these pictures, or what read_video returns"
)


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded frames of a video."""

    frames: np.ndarray  # uint8 [F, S, S, 3], F at most the model's `data.max_frames`
    times: tuple[float, ...]  # F seconds from the start of the video

    def __repr__(self) -> str:
        return f"Video of frames {list(np.shape(self.frames))} at {self.times} s"


def items_of(values: Iterable[Any], call: str, what: str) -> Iterator[Any]:
    """Yields the captions or videos that a call was given.

    Raises a UserError if it is one alone, in no order, or a generator that fails.
    """
    if isinstance(values, str | bytes | os.PathLike | Video | Image.Image):
        raise UserError(f"{call} takes a list of {what}s, not one {type(values).__name__}")
    if isinstance(values, Mapping | Set) or hasattr(values, "columns"):
        kind = type(values).__name__
        raise UserError(
            f"{call} takes {what}s in an order, not a {kind}: pass a list or one column"
        )
    shape = list(getattr(values, "shape", ()))
    if len(shape) in (3, 4):
        raise UserError(
            f"{call}: an array {shape} may be one video or many pictures: pass [array]"
            " or list(array)"
        )
    if not (hasattr(values, "__iter__") or hasattr(values, "__getitem__")):
        raise UserError(f"{call} takes a list of {what}s, not {type(values).__name__}")
    try:
        yield from values
    except Exception as error:  # Of the user's generator, or of an array without an axis.
        raise UserError(f"{call}: the {what}s cannot be listed ({one_line(error)})") from error


def captions_of(captions: Iterable[str]) -> list[str]:
    """Captions as a list; UserError if there is none, or one is blank or no string."""
    found = list(items_of(captions, "encode_text", "caption"))
    if not found:
        raise UserError("there is no caption to encode")
    for number, caption in enumerate(found):
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise UserError(f"a caption is a string, not {kind} (caption {number})")
        if not caption.strip():
            raise UserError(f"text {number} is blank; write a sentence")
    return [str(caption) for caption in found]


def features_of(arrays: Any, origin: str, names: Sequence[str] = ()) -> Features:
    """Features as they were encoded: those with some names, or all that are numbers or masks."""
    if not isinstance(arrays, Mapping):
        raise UserError(f"pass the arrays that {origin} returns, not {type(arrays).__name__}")
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"there is no {missing[0]}; pass the arrays that {origin} returns")
    chosen = {name: np.asarray(arrays[name]) for name in names or arrays}
    wrong = {n: chosen.pop(n).dtype for n, a in [*chosen.items()] if a.dtype.kind not in "bfV"}
    if names and wrong:
        name, dtype = wrong.popitem()
        raise UserError(f"{name} is {dtype}; pass what {origin} returns")
    counts = {array.shape[:1] for array in chosen.values()}
    # Those of one name, as text_unit and text_mask, have the same tokens.
    axes = {(n.split("_")[0], a.shape[:2]) for n, a in chosen.items() if n.endswith(_WITH_AXES)}
    are_alike = len(dict(axes)) == len(axes) and all(len(shape) == 2 for _, shape in axes)
    if len(counts) > 1 or not counts.isdisjoint({(), (0,)}) or not are_alike:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in chosen.items())
        raise UserError(f"these are not the arrays that {origin} returns: {shapes}")
    precise = {n: a.astype(np.float32, copy=False) for n, a in chosen.items() if a.dtype != bool}
    return chosen | precise


def read_video(
    video: Any, form: FrameForm, data: DataConfig, *, urls: bool = False, name: str = "the video"
) -> Video:
    """Reads a video from a file, an open file, bytes or an address, or takes pictures.

    Frames are sampled and resized as those of files are. Pictures have no times, so they stand for
    one second each, and evenly spaced ones are taken if there are more than `data.max_frames`.

    Args:
      form: of the frames that the model takes.
      urls: whether a string http://... or https://... is downloaded.
      name: of the video, for messages where it has no path.

    Raises:
      UserError: the video cannot be read, or it is nothing of the kind.
      Unavailable: the operating system refuses to read it.
    """
    if isinstance(video, str) and _ADDRESS.match(video):
        if urls is not True:
            raise UserError(f"{video} is an address; download the file, or pass urls=True")
        with _downloaded(video) as file:
            return _read_file(Path(file.name), form, data, video)
    if isinstance(video, str | os.PathLike):
        return _read_file(as_path(video, name), form, data, str(video))
    if isinstance(video, bytes | bytearray | memoryview):
        return _read_file(_OpenFile(io.BytesIO(video), name), form, data, name)
    if hasattr(video, "read"):
        return _read_file(_OpenFile(video, name), form, data, name)
    pictures = _pictures_of(video, name)
    chosen = range(len(pictures))
    if len(pictures) > data.max_frames:
        chosen = np.linspace(0, len(pictures) - 1, data.max_frames, dtype=int)
    times = video.times if isinstance(video, Video) else chosen
    if len(times) < len(chosen):
        raise UserError(f"{name} has {len(pictures)} frames and {len(times)} times")
    try:
        frames = np.stack([to_form(_rgb(pictures[row], name), form) for row in chosen])
    except VideoError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name} is too large: a frame does not fit in memory") from error
    return Video(frames, tuple(float(times[row]) for row in range(len(frames))))


class _OpenFile:
    """An open file in the place of a path; whoever opened it closes it."""

    def __init__(self, file: BinaryIO, name: str):
        self.path, self._file = name, file
        try:
            if isinstance(file.read(0), str):
                raise UserError(f"{name} is a file of text; open it with mode 'rb'")
            if not (file.seekable() if hasattr(file, "seekable") else False):
                self._file = io.BytesIO(file.read())
        except (ValueError, OSError) as error:  # E.g. it is closed, or not for reading.
            raise UserError(f"{name} cannot be read ({one_line(error)})") from error

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[BinaryIO]:
        self._file.seek(0)
        yield self._file


def _read_file(file: VideoFile, form: FrameForm, data: DataConfig, name: str) -> Video:
    try:
        frames, times = read_timed_frames(file, data.max_frames, form, clock=data.frame_clock)
    except VideoError as error:
        raise UserError(f"{name} {error}") from error
    return Video(frames, tuple(map(float, times)))


@contextlib.contextmanager
def _downloaded(address: str) -> Iterator[BinaryIO]:
    if not address.lower().startswith(("http://", "https://")):
        raise UserError(f"{address}: only http and https addresses are opened")
    with tempfile.NamedTemporaryFile(prefix="drl_jax_") as file:
        try:
            with urllib.request.urlopen(address, timeout=_PATIENCE) as answer:
                shutil.copyfileobj(answer, file)
        # A server may break its protocol in many ways.
        except Exception as error:
            raise UserError(f"{address} cannot be downloaded ({one_line(error)})") from error
        file.flush()
        yield file


def _pictures_of(video: Any, name: str) -> Sequence[Any]:
    """The pictures of a video: PIL images, or arrays [H, W, 3]."""
    if isinstance(video, Image.Image):
        return [video]
    if isinstance(video, list | tuple):
        # Channels of single pictures are told from each other as those of a video.
        pictures = [
            one
            if isinstance(one, Image.Image)
            else _channels_last(_array_of(one, name)[None], name)[0]
            for one in video
        ]
    else:
        array = _array_of(video.frames if isinstance(video, Video) else video, name)
        is_picture = array.ndim == 3 and 3 in (array.shape[0], array.shape[2])
        pictures = _channels_last(array[None] if is_picture else array, name)
    if not len(pictures):
        raise UserError(f"{name} has no frame")
    return pictures


def _array_of(value: Any, name: str) -> np.ndarray:
    """A NumPy array of one of any library."""
    if not hasattr(value, "__array__"):
        raise UserError(f"{name}: there is a {type(value).__name__}; a video is {_ACCEPTED}")
    try:
        if hasattr(value, "detach"):  # A tensor of torch, maybe on another device.
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        return np.asarray(value)
    except Exception as error:  # E.g. of one that is deleted, or traced.
        raise UserError(f"{name} is no array of numbers ({one_line(error)})") from error


def _channels_last(frames: np.ndarray, name: str) -> np.ndarray:
    """[F, H, W, 3] of an array of this shape or [F, 3, H, W]."""
    last, first = (frames.ndim == 4 and frames.shape[axis] == 3 for axis in (3, 1))
    shape = list(frames.shape)
    if first and last:
        raise UserError(
            f"{name} has the shape {shape}, which may be [F, 3, H, W] or [F, H, W, 3]: pass PIL"
            " images, or resize the frames"
        )
    if not (first or last) or 0 in shape[1:]:
        raise UserError(f"{name} has the shape {shape}, not [F, H, W, 3] or [F, 3, H, W]")
    return frames if last else np.moveaxis(frames, 1, 3)


def _rgb(picture: Image.Image | np.ndarray, name: str) -> np.ndarray:
    """A picture as uint8 [H, W, 3]."""
    if isinstance(picture, Image.Image):
        try:
            return np.asarray(to_rgb(picture))
        except Exception as error:  # Pillow reads the file only now.
            raise UserError(f"{name}: a picture cannot be read ({one_line(error)})") from error
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture)
    if not jnp.issubdtype(picture.dtype, np.floating):
        raise UserError(f"{name} has {picture.dtype} frames; pass uint8, or float in [0, 1]")
    picture = np.asarray(picture, np.float32)
    low, high = float(picture.min()), float(picture.max())
    if not (low >= 0 and high <= 1):  # Also where one is not a number.
        raise UserError(
            f"{name} has float frames from {low:g} to {high:g}; pass float in [0, 1], without"
            " normalisation, or uint8"
        )
    return np.round(picture * 255).astype(np.uint8)
