"""Pictures and clips that the page asks for, made in processes with a time limit."""

import collections
import contextlib
import threading
from pathlib import Path

from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure
from drl_jax.search.addresses import BadRequest, format_clock
from drl_jax.search.clips import MAX_CLIP, read_picture, write_clip
from drl_jax.search.rows import IndexedVideo

# Seconds that one picture or clip may take.
_PICTURE_SECONDS, _CLIP_SECONDS = 10.0, 60.0
_WORKERS = 2
# Clips that are kept: a browser asks for parts of one again and again.
_KEPT_CLIPS = 8


class Media:
    """Makes pictures and clips; safe to use from several threads."""

    def __init__(self) -> None:
        self._pool = CallPool(_WORKERS)
        self._files = contextlib.ExitStack()
        self._folder = self._files.enter_context(temporary_directory())
        self._clips: collections.OrderedDict[tuple, Path] = collections.OrderedDict()
        self._made = 0
        self._making_clip = threading.Lock()

    def picture(self, path: Path, time: float) -> bytes:
        """A JPEG file with the frame of an unchanged file at a time, seconds.

        Raises:
          BadRequest: it cannot be decoded in time.
        """
        picture = self._pool.call(read_picture, path, time, timeout=_PICTURE_SECONDS)
        if isinstance(picture, WorkerFailure):
            raise BadRequest(f"no picture can be read ({picture.reason})", 422)
        return picture

    def clip(self, path: Path, video: IndexedVideo, start: float, end: float) -> Path:
        """An mp4 file with a part of an unchanged file; kept until newer ones replace it.

        Args:
          path: of the file.
          video: the file in the index.
          start: seconds.
          end: seconds.

        Raises:
          BadRequest: the part is empty, too long or not in the video, or it cannot be made in time.
        """
        length = video.length
        if not 0 <= start < end or start >= length:
            raise BadRequest(
                f"a clip from {start:g} to {end:g} s is not in the video, which has {length:.1f} s"
            )
        if end - start > MAX_CLIP:
            raise BadRequest(
                f"a clip has at most {MAX_CLIP:g} s, not {format_clock(end - start)};"
                " choose a later start or an earlier end"
            )
        key = (video.path, video.sha256, start, end)
        with self._making_clip:
            if key not in self._clips:
                self._clips[key] = self._make_clip(path, start, end)
            self._clips.move_to_end(key)
            while len(self._clips) > _KEPT_CLIPS:
                self._clips.popitem(last=False)[1].unlink(missing_ok=True)
            return self._clips[key]

    def _make_clip(self, path: Path, start: float, end: float) -> Path:
        self._made += 1
        out = self._folder / f"{self._made}.mp4"
        made = self._pool.call(write_clip, path, start, end, out, timeout=_CLIP_SECONDS)
        if isinstance(made, WorkerFailure):
            out.unlink(missing_ok=True)
            raise BadRequest(f"the clip cannot be made ({made.reason})", 422)
        return out

    def close(self) -> None:
        """Ends the processes and deletes the clips."""
        self._pool.close()
        self._files.close()
