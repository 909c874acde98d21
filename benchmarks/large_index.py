"""Large indexes: opening one, adding one video to it, updating all of it, and their memory.

    python -m benchmarks.large_index [--sizes=1000,100000,1000000] [--directory=DIR] [--record]

An index of N made-up entries: empty files below a folder, one window of 12 frames x 512 each, as
ViT-B/32 stores them (bfloat16). It is opened by a process of its own, which then answers queries.
One small video is added to it, changed and removed with `--only`, by a model with a tiny tower. At
last the whole index is compared with its folder, where nothing has changed. A million entries take
13 GB of disk and a million empty files, which are deleted at the end.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np

from benchmarks.measure import arguments, positive_ints, report
from drl_jax.config import BackboneConfig, Config, DataConfig, ModelConfig
from drl_jax.evaluation.embedder import Embedder
from drl_jax.models.drl import init_params
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import BANK_ARRAY, bank_of
from drl_jax.search.filters import Filters
from drl_jax.search.indexing import update_index
from drl_jax.search.part import IndexPart
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.session import SearchSession
from drl_jax.search.windows import Window
from drl_jax.search.writer import IndexWriter
from drl_jax.sharding import make_layout

FRAMES, WIDTH = 12, 512
# Entries that are written at a time, and files of a folder.
_BATCH, _FOLDER = 5000, 1000
_SIDE = 32


def model() -> RetrievalModel:
    """A model whose features have the size of those of ViT-B/32."""
    backbone = BackboneConfig(
        embed_dim=WIDTH,
        image_resolution=_SIDE,
        vision_layers=1,
        vision_width=64,
        vision_heads=2,
        vision_patch_size=16,
        text_layers=1,
        text_width=64,
        text_heads=2,
    )
    config = Config(
        data=DataConfig(dataset="none", max_frames=FRAMES),
        model=ModelConfig(backbone=backbone, agg_module="none"),
    )
    layout = make_layout()
    params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(0))
    params = jax.device_put(params, layout.replicated)
    embedder = Embedder(config, layout, keep_tokens=True)
    return RetrievalModel(config, params, layout, {"weights": "random"}, "random", embedder)


def make_index(model: RetrievalModel, size: int, root: Path) -> None:
    """Writes `size` empty files and an index of them, with random features."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (FRAMES, _SIDE, _SIDE, 3), np.uint8) for _ in range(16)]
    features = {name: np.asarray(a) for name, a in model.encode_videos(frames).items()}
    features[BANK_ARRAY] = np.tile(np.float32([0.1, 0.05]), (16, 1))
    times = tuple(float(second) for second in range(FRAMES))
    window = Window(0.0, float(FRAMES), tuple(range(FRAMES)))
    with IndexWriter(root / "index") as writer:
        writer.update_header(
            source=model.source,
            fingerprint=model.fingerprint,
            videos=str((root / "videos").resolve()),
            storage="bfloat16",
            bank=bank_of(model.config),
        )
        for first in range(0, size, _BATCH):
            videos = []
            for number in range(first, min(first + _BATCH, size)):
                path = f"{number // _FOLDER:04}/video_{number:07}.mp4"
                file = root / "videos" / path
                if number % _FOLDER == 0:
                    file.parent.mkdir(parents=True)
                file.touch()
                mtime_ns = file.stat().st_mtime_ns
                videos.append(
                    IndexedVideo(
                        *(path, 0, mtime_ns, f"{number:064x}"),
                        times=times,
                        windows=(window,),
                        duration=float(FRAMES),
                    )
                )
            rows = np.arange(len(videos)) % 16
            writer.put(videos, {name: array[rows] for name, array in features.items()}, {})


def write_video(path: Path, seed: int) -> None:
    """Writes a video of two seconds."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(4), options={"preset": "ultrafast"})
        stream.width = stream.height = 64
        for _ in range(8):
            picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


class Memory:
    """A context manager that measures how much memory a block takes at most, `gigabytes`.

    Without the pages of mapped files, which the system takes back where others need the memory.
    """

    def __enter__(self) -> "Memory":
        self._before = self._peak = _own_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self.gigabytes = round((max(self._peak, _own_memory()) - self._before) / 1e9, 3)

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._peak = max(self._peak, _own_memory())


def _own_memory() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


class Times:
    """Seconds of calls: the wall time, and the CPU time of this thread.

    On a machine that others use, too, the second is what an idle one would take.
    """

    def __init__(self) -> None:
        self._taken: dict[str, list[tuple[float, float]]] = {}

    def call(self, name: str, function: Callable[[], Any]) -> Any:
        """Calls a function."""
        wall, cpu = time.perf_counter(), time.thread_time()
        result = function()
        taken = time.perf_counter() - wall, time.thread_time() - cpu
        self._taken.setdefault(name, []).append(taken)
        return result

    def row(self) -> dict[str, float]:
        """Means of the last two calls, or of one."""
        row = {}
        for name, taken in self._taken.items():
            wall, cpu = np.mean(taken[-2:], axis=0)
            row |= {name: round(float(wall), 3), f"{name}_cpu": round(float(cpu), 3)}
        return row


def opened(index: Path) -> dict:
    """Opens an index and asks for something, in this process."""
    encoder, times = model(), Times()
    text = encoder.encode_text(["a dog"])
    with Memory() as memory:
        snapshot = times.call("open", lambda: SearchSession(index, encoder)).snapshot()
    times.call("first_query", lambda: snapshot.best_videos(text, 10))
    times.call("query", lambda: snapshot.best_videos(text, 10))
    filters = Filters(name="77", min_length=5)
    times.call("first_filter", lambda: snapshot.filtered(filters))
    times.call("filter", lambda: snapshot.filtered(filters))
    times.call("check", snapshot.check.wait)
    times.call("open_again", lambda: IndexPart(index, (), encoder))
    return {**times.row(), "open_gb": memory.gigabytes}


def updated(encoder: RetrievalModel, root: Path, times: Times) -> None:
    """Adds, changes and removes one video with `--only`, and compares all."""
    index, videos = root / "index", root / "videos"

    def update() -> None:
        update_index(encoder, videos, index, only=["new.mp4"])

    # The first call of each compiles.
    for repeat in range(3):
        write_video(videos / "new.mp4", 2 * repeat)
        times.call("add", update)
        write_video(videos / "new.mp4", 2 * repeat + 1)
        times.call("change", update)
        (videos / "new.mp4").unlink()
        times.call("remove", update)


def measure(size: int, directory: Path | None) -> dict:
    encoder = model()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="large_index_", dir=directory))
    try:
        times = Times()
        times.call("make", lambda: make_index(encoder, size, root))
        command = [sys.executable, "-m", "benchmarks.large_index", f"--open={root / 'index'}"]
        asked = subprocess.run(command, check=True, capture_output=True, text=True)
        updated(encoder, root, times)
        with Memory() as memory:
            times.call("update_all", lambda: update_index(encoder, root / "videos", root / "index"))
        found = json.loads(asked.stdout.splitlines()[-1])
        return {"videos": size, **found, **times.row(), "update_all_gb": memory.gigabytes}
    finally:
        shutil.rmtree(root)


def main() -> None:
    parser = arguments("large_index", __doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        type=positive_ints,
        default="1000,100000,1000000",
        help="numbers of videos (%(default)s)",
    )
    parser.add_argument("--directory", type=Path, help="where to write (default: temporary files)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(opened(options.open)))
        return
    report([measure(size, options.directory) for size in options.sizes], options)


if __name__ == "__main__":
    main()
