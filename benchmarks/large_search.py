"""Large indexes: opening, adding, and what a sentence costs, exactly and by a scan.

    python -m benchmarks.large_search --videos=100000 --directory=DIR [--record]

An index of made-up videos of one window, 12 frames x 512 as ViT-B/32 has them (bfloat16), whose
features are clustered as real ones are (`clustered.py`): 14 kB a video. 128 sentences are compared
with all windows, and with the 500 that a scan of one 8-bit vector of each finds. A process of its
own opens the index, and one small video is added. Then 32 sentences are asked of its server, one
after the other and at once.
"""

import argparse
import concurrent.futures
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.clustered import FRAMES, WIDTH, make_clusters, make_gallery, make_sentences
from benchmarks.films import Film, write_film
from benchmarks.measure import arguments, matmul_rate, report
from drl_jax.config import BackboneConfig, Config, DataConfig, ModelConfig
from drl_jax.evaluation.embedder import Embedder
from drl_jax.models.drl import init_params
from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.cli import positive_int
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.encoding import bank_of, dequantize, quantize
from drl_jax.search.engine import Part, SearchEngine
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.segments import VideoRecord
from drl_jax.search.update import update_index

_SENTENCES, _TOGETHER, _CANDIDATES, _TOP = 128, 32, 500, 10
_SEGMENT = 2**16  # Videos.


def model() -> RetrievalModel:
    """A model with random parameters whose features have the size of those of ViT-B/32."""
    backbone = BackboneConfig(
        embed_dim=WIDTH,
        vision_layers=1,
        vision_width=64,
        vision_heads=2,
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


def make_index(encoder: RetrievalModel, videos: int, root: Path) -> float:
    """Writes the index of a gallery, if it is not there; returns the seconds it took."""
    if (root / "index" / "index.json").exists():
        return 0.0
    gallery = make_gallery(root / "gallery", videos)
    start = time.perf_counter()
    with IndexWriter(root / "index") as writer:
        writer.update_header(
            source=encoder.source,
            fingerprint=encoder.fingerprint,
            videos=str((root / "videos").resolve()),
            storage="bfloat16",
            fps=1.0,
            bank=bank_of(encoder.config),
        )
        for first in range(0, videos, _SEGMENT):
            writer.put(list(_records(gallery, first, min(first + _SEGMENT, videos))))
    return time.perf_counter() - start


def _records(gallery: dict[str, np.ndarray], first: int, last: int) -> Iterator[VideoRecord]:
    times = np.arange(float(FRAMES))
    for start in range(first, last, 1024):
        part = {name: array[start : min(start + 1024, last)] for name, array in gallery.items()}
        frames = {name: np.asarray(array) for name, array in dequantize(part).items()}
        part |= quantize({"pooled_unit": TokenWise.video_vectors(frames)}, "int8")
        count = len(part["frame_mask"])
        part["bank_similarity"] = np.tile(np.float32([0.1, 0.05]), (count, 1))
        part["span"] = np.tile([0.0, float(FRAMES)], (count, 1))
        part["frames"] = np.tile(np.arange(FRAMES, dtype=np.int32), (count, 1))
        for row in range(count):
            number = start + row
            yield VideoRecord(
                f"{number // 1000:04}/video_{number:07}.mp4",
                *(10**6, number, f"{number:064x}"),
                duration=float(FRAMES),
                arrays={
                    **{f"window.{name}": array[[row]] for name, array in part.items()},
                    "frame.time": times,
                    "frame.hash": np.full(FRAMES, number, np.uint64),
                    "feature.image_feat": np.zeros((0, WIDTH), np.uint16),
                },
            )


def milliseconds(function: Callable, calls: list) -> dict[str, float]:
    """Median and 95th percentile of the times of calls, after two that compile."""
    for call in calls[:2]:
        function(call)
    taken = []
    for call in calls:
        start = time.perf_counter()
        function(call)
        taken.append(1e3 * (time.perf_counter() - start))
    return {f"p{n}": round(float(np.percentile(taken, n)), 1) for n in (50, 95)}


def ask(encoder: RetrievalModel, videos: int, root: Path) -> dict:
    """What sentences cost, and how many of the exact best are among the candidates."""
    state, gallery = OpenIndex(root / "index", encoder), make_gallery(root / "gallery", videos)
    text, _ = make_sentences(make_clusters(0, videos), gallery, _SENTENCES)
    queries = [{name: array[[row]] for name, array in text.items()} for row in range(_SENTENCES)]
    engine = SearchEngine(encoder.config.model, encoder.params)

    def exact(query: dict) -> np.ndarray:
        return engine.search([Part(query)], state.gallery, _TOP)[0].slots

    def scan(query: dict) -> np.ndarray:
        (slots,) = engine.scan(TokenWise.query_vectors(query), state.gallery, _CANDIDATES)
        return engine.search([Part(query)], state.gallery.copied(slots), _TOP)[0].slots

    few = queries[: 16 if videos > 500_000 else None]
    times = {"exact": milliseconds(exact, few), "scan": milliseconds(scan, queries)}
    found = [len(set(exact(q)[:_TOP]) & set(scan(q)[:_TOP])) for q in few]
    return {
        **{f"{n}_{p}_ms": t for n, of in times.items() for p, t in of.items()},
        "ratio": round(times["exact"]["p50"] / times["scan"]["p50"], 1),
        "recall@10": round(100 * sum(found) / (_TOP * len(few)), 1),
    }


def opened(index: Path) -> dict[str, float]:
    """Seconds for opening an index in this process, again, and for the list of its files."""
    encoder, seconds = model(), []
    for _ in range(2):
        start = time.perf_counter()
        state = OpenIndex(index, encoder)
        seconds.append(time.perf_counter() - start)
        state.close()
    start = time.perf_counter()
    state.videos  # noqa: B018 - The first filter reads it.
    return {"first": seconds[0], "again": seconds[1], "list": time.perf_counter() - start}


def added(encoder: RetrievalModel, root: Path) -> float:
    """Seconds for adding one video of two seconds, without decoding and encoding."""
    rng, taken = np.random.default_rng(0), []
    for number in range(4):
        path = root / "videos" / f"new{number}.mp4"
        write_film(path, Film(rng.integers(0, 256, (8, 64, 64, 3), np.uint8), 4, []))
        update_index(encoder, root / "videos", root / "index", only=[path.name])
        with IndexWriter(root / "index") as writer:
            (file,) = writer.files([path.name])
            record = file.segment.read(file.row)
        start = time.perf_counter()
        with IndexWriter(root / "index") as writer:
            writer.put([record])
            writer.merge(light=True)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def served(root: Path) -> dict:
    """Seconds for 32 sentences over HTTP, one after the other and at once."""
    import uvicorn

    from drl_jax.search.serve import Access, make_app
    from drl_jax.search.session import Index

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = make_app(Index(root / "index", model()), 12, 10, Access("localhost", "127.0.0.1"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/api/search?q=a+dog+runs+to+number+"
    numbers = itertools.count()

    def get(_: int) -> None:
        with urllib.request.urlopen(f"{address}{next(numbers)}") as answer:
            json.load(answer)

    def seconds(run: Callable) -> float:
        start = time.perf_counter()
        list(run(get, range(_TOGETHER)))
        return round(time.perf_counter() - start, 2)

    while not server.started:
        time.sleep(0.01)
    with concurrent.futures.ThreadPoolExecutor(_TOGETHER) as pool:
        for _ in range(3):  # Compiles the shapes of batches.
            seconds(pool.map)
        found = {"http_alone_s": seconds(map), "http_together_s": seconds(pool.map)}
    server.should_exit = True
    thread.join()
    return found


def measure(videos: int, root: Path) -> dict:
    """All of it."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    encoder = model()
    made = make_index(encoder, videos, root)
    command = [sys.executable, "-m", "benchmarks.large_search", f"--open={root / 'index'}"]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    times = json.loads(child.stdout.splitlines()[-1])
    nbytes = sum(path.stat().st_size for path in (root / "index").rglob("*") if path.is_file())
    return {
        "videos": videos,
        "gigabytes": round(nbytes / 1e9, 2),
        "make_s": round(made, 1),
        **{f"open_{name}_s": round(times[name], 3) for name in ("first", "again", "list")},
        **ask(encoder, videos, root),
        "add_s": round(added(encoder, root), 3),
        **served(root),
    }


def main() -> None:
    parser = arguments("large_search", __doc__.splitlines()[0])
    parser.add_argument("--videos", type=positive_int, default=100_000, help="(%(default)s)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir(), "large_search"),
        help="where the index is made, and stays (%(default)s)",
    )
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(opened(options.open)))
        return
    row = measure(options.videos, options.directory / str(options.videos))
    report([row], options, matmul_flops_per_second=round(matmul_rate()))


if __name__ == "__main__":
    main()
