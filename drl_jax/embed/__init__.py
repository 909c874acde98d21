"""Files of the features of videos and captions."""

import numbers
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax import CallableModule
from drl_jax.runtime.errors import UserError, as_path, check_count

if TYPE_CHECKING:
    from drl_jax.embed.files import Output
    from drl_jax.pretrained.model import RetrievalModel


def embed(
    model: "RetrievalModel",
    out: str | os.PathLike,
    *,
    videos: str | os.PathLike | None = None,
    captions: str | os.PathLike | Sequence[str] | None = None,
    windows: bool = False,
    dtype: str = "float32",
    shard_size: int = 1000,
    timeout: float = 300.0,
) -> "Output":
    """Writes the features of videos, or of captions, to files; see docs/embeddings.md.

    After an interruption, the same call continues.

    Args:
      model: which encodes.
      out: NAME.npz or NAME.parquet, or NAME-00000-of-00012.npz and so on for several files.
      videos: a folder, searched recursively.
      captions: a file of captions, or captions.
      windows: whether a row is a window of a video, not a video.
      dtype: of the features, "float32" or "float16".
      shard_size: videos or captions of a file.
      timeout: seconds for decoding a video, and one more for each MB.

    Returns:
      The files, the number of their rows, and by path why videos are `unreadable`.

    Raises:
      UserError: there is no video or caption, or a file cannot be written or is of another origin.
    """
    from drl_jax.embed.encode import embed_captions, embed_videos
    from drl_jax.embed.files import DTYPES, check_out, read_captions
    from drl_jax.pretrained.inputs import captions_of
    from drl_jax.pretrained.model import check_model

    out, stored = as_path(out, "out"), {"dtype": dtype, "shard_size": shard_size}
    check_model(model, "embed")
    check_count(shard_size, "shard_size")
    if not isinstance(timeout, numbers.Real) or isinstance(timeout, bool) or not timeout > 0:
        raise UserError(f"timeout is a positive number of seconds, not {timeout!r}")
    if (videos is None) == (captions is None):
        raise UserError("give videos or captions, one of them")
    check_out(out)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: choose {' or '.join(DTYPES)}")
    if videos is not None:
        folder = as_path(videos, "videos, a folder")
        return embed_videos(model, folder, out, windows=bool(windows), timeout=timeout, **stored)
    if windows:
        raise UserError("windows are parts of videos; omit it with captions")
    is_file = isinstance(captions, str | os.PathLike)
    listed = read_captions(Path(captions)) if is_file else captions_of(captions)
    return embed_captions(model, listed, out, **stored)


sys.modules[__name__].__class__ = CallableModule
