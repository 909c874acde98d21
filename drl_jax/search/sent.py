"""Pictures and videos that programs send to the server as queries; the last ones are kept."""

import collections
import threading
from pathlib import Path
from typing import Generic, TypeVar

from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.files import sha256
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure
from drl_jax.search.addresses import BadRequest
from drl_jax.search.pictures import open_picture
from drl_jax.search.query import EncodedVideo, encode_read
from drl_jax.search.reading import read_sent_video
from drl_jax.search.video_files import allowed_seconds

# Pictures, and videos, that are kept.
_MOST = 32
# Seconds that decoding a video may take, beside those for its size.
_READ_SECONDS = 60.0

T = TypeVar("T")


class _Kept(Generic[T]):
    """The last values by name, in memory; safe to use from several threads."""

    def __init__(self, what: str):
        self._what = what
        self._values: collections.OrderedDict[str, T] = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, value: T) -> None:
        with self._lock:
            self._values[name] = value
            self._values.move_to_end(name)
            while len(self._values) > _MOST:
                self._values.popitem(last=False)

    def get(self, name: str) -> T:
        with self._lock:
            if name not in self._values:
                raise BadRequest(f"the {self._what} is not known any more; send it again", 404)
            return self._values[name]


class SentQueries:
    """Keeps pictures as frames, and videos as encoded queries."""

    def __init__(self, model: RetrievalModel):
        """Starts no process before the first file.

        Args:
          model: encodes the videos.
        """
        self._model = model
        self._pictures, self._videos = _Kept[bytes]("picture"), _Kept[EncodedVideo]("video")
        # A damaged file may crash or hang its decoder. Pictures do not wait for videos.
        self._picture_reader, self._video_reader = CallPool(1), CallPool(1)
        self._encoding = threading.Lock()  # It uses all cores.

    def add_picture(self, path: Path) -> str:
        """Reads an image file, which may be deleted then; returns its name.

        Raises:
          UserError: see `open_picture`.
        """
        form = self._model.frame_form
        picture = open_picture(self._picture_reader, path, form, "the picture")
        name = sha256(path)[:16]
        self._pictures.add(name, picture)
        return name

    def add_video(self, path: Path) -> str:
        """Reads and encodes a video file, which may be deleted then; returns its name.

        Args:
          path: of the file, in a directory in which other files may be written.

        Raises:
          UserError: it cannot be read, or not in time.
        """
        model = self._model
        read = self._video_reader.call(
            *(read_sent_video, path, (), model.config.data.max_frames, model.frame_form),
            path.with_name("frames"),
            timeout=allowed_seconds(_READ_SECONDS, path.stat().st_size),
        )
        if isinstance(read, WorkerFailure):
            raise BadRequest(f"the video cannot be read ({read.reason})", 422)
        with self._encoding:
            video = encode_read(model, "the video", read)
        name = read.sha256[:16]
        self._videos.add(name, video)
        return name

    def picture(self, name: str) -> bytes:
        """The frame of a picture, as `open_picture` decodes it.

        Raises:
          BadRequest: it is not kept (any more).
        """
        return self._pictures.get(name)

    def video(self, name: str) -> EncodedVideo:
        """A video.

        Raises:
          BadRequest: it is not kept (any more).
        """
        return self._videos.get(name)

    def close(self) -> None:
        """Ends the processes that read files."""
        self._picture_reader.close()
        self._video_reader.close()
