"""Moments of films that are made of clips: how many captions find theirs, and how exactly.

    python -m benchmarks.moments [KIND ...] [--workdir=runs/shapes] [--fps=1,2,4] [--record]

Makes films of 128 test clips of `shapes` (`benchmarks.films`), samples and encodes them as an index
does, and asks the captions of 100 clips. Where each clip is, is known. `clip` is the share of the
captions whose best moment has its middle in the right clip; `iou3` and `iou5`, those whose best
moment has this IoU with it; `top5` are those of which one of the first five moments has IoU 0.5.
`coarse` are the stored windows alone, `true` the right spans in the place of windows.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.films import KINDS, Film, make_film, read_clips, write_film
from benchmarks.measure import arguments, positive_ints, report, table
from drl_jax.data.long_video import sample_video
from drl_jax.data.pictures import to_form
from drl_jax.data.video_file import open_video
from drl_jax.models.interactions import Features
from drl_jax.pretrained.model import RetrievalModel, load
from drl_jax.runtime.cli import run_command
from drl_jax.search import refine as refinement
from drl_jax.search.encoding import bank_of, bank_similarity, quantize
from drl_jax.search.refine import REFINE, Candidate, Part, refine
from drl_jax.search.windows import find_spans, windows_of

_CLIPS, _QUERIES, _TOP = 128, 100, 5
Spans = list[tuple[float, float]]


class IndexedFilm:
    """One film as an index stores it, in memory."""

    def __init__(self, model: RetrievalModel, path: Path, fps: float, bank: Features):
        frames: list[np.ndarray] = []
        start = time.perf_counter()
        with open_video(path) as video:
            self.video = sample_video(video, model.frame_form, frames.append, fps)
        self.seconds = time.perf_counter() - start
        self._model = model
        self.windows = windows_of(self.video, model.config.data.max_frames)
        image_feat = model.encode_frames(np.stack(frames))
        self._features = model.encode_frame_windows(image_feat, [w.frames for w in self.windows])
        self._scale = bank_similarity(model, bank, self._features)
        stored = quantize({"image_feat": image_feat}, "bfloat16")["image_feat"]
        self._film = refinement.Film(self.video.times, self.windows, stored)
        self.nbytes = stored.nbytes

    def scores(self, text: Features) -> np.ndarray:
        """Of all stored windows: float32 [Q, W]."""
        return self._model.similarity(text, self._features)

    def moments(self, text: Features, scores: np.ndarray) -> Spans:
        """The best moments of one sentence."""
        order = np.argsort(-scores, kind="stable")[:REFINE]
        candidates = [Candidate(self._film, int(n), float(scores[n])) for n in order]
        windows, scores = list(self.windows), scores.copy()
        refined = refine(self._model, [Part(text, 1.0)], candidates)
        for number, (window, score) in zip(order, refined, strict=True):
            windows[number], scores[number] = window, score
        deviation = float(self._scale[int(scores.argmax()), 1])
        spans = find_spans(windows, scores, _TOP, deviation)
        return [(span.start, span.end) for span in spans]


def measure(
    model: RetrievalModel, kind: str, film: Film, captions: Sequence[str], rates: Sequence[int]
) -> list[dict]:
    """Asks the captions of the parts of a film, sampled at each of the rates."""
    queries = film.parts[:_QUERIES]
    truth = [(start, end) for _, start, end in queries]
    text = model.encode_text([captions[number] for number, _, _ in queries])
    bank = model.encode_text(bank_of(model.config))
    minutes = len(film.frames) / film.fps / 60
    true = _metrics(_best_parts(model, film, text), truth)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_film(path, film)
        for fps in rates:
            indexed = IndexedFilm(model, path, fps, bank)
            scores = indexed.scores(text)
            start = time.perf_counter()
            found = [
                indexed.moments({name: array[[number]] for name, array in text.items()}, row)
                for number, row in enumerate(scores)
            ]
            seconds = (time.perf_counter() - start) / len(scores)
            coarse = _metrics([[indexed.windows[row.argmax()][:2]] for row in scores], truth)
            rows.append(
                {"film": kind, "fps": fps, "minutes": round(minutes, 1)}
                | {"shots": len(indexed.video.shots), "frames": len(indexed.video.times)}
                | {"windows": len(indexed.windows)}
                | _metrics(found, truth)
                | {f"coarse_{name}": coarse[name] for name in ("clip", "iou5")}
                | {f"true_{name}": true[name] for name in ("clip", "iou5")}
                | {"sampling_s_an_hour": round(indexed.seconds * 60 / minutes, 1)}
                | {"mb_an_hour": round(indexed.nbytes * 60 / minutes / 1e6, 2)}
                | {"query_ms": round(1e3 * seconds, 1)}
            )
    return rows


def _best_parts(model: RetrievalModel, film: Film, text: Features) -> list[Spans]:
    """What is found if the spans of the clips are known."""
    most, fps = model.config.data.max_frames, film.fps
    frames = np.stack([to_form(frame, model.frame_form) for frame in film.frames])
    windows = [
        np.linspace(start * fps, end * fps - 1, most).round().astype(int)
        for _, start, end in film.parts
    ]
    similarity = model.similarity(text, model.encode_windows(frames, windows))
    return [[film.parts[number][1:] for number in np.argsort(-row)[:_TOP]] for row in similarity]


def _metrics(found: list[Spans], truth: Spans) -> dict[str, float]:
    """Percentages of the queries; see the module."""
    pairs = list(zip(found, truth, strict=True))

    def percent(values: list[bool]) -> float:
        return round(100 * float(np.mean(values)), 1)

    return {
        "clip": percent([true[0] <= sum(spans[0]) / 2 <= true[1] for spans, true in pairs]),
        "iou3": percent([overlap(spans[0], true) >= 0.3 for spans, true in pairs]),
        "iou5": percent([overlap(spans[0], true) >= 0.5 for spans, true in pairs]),
        "top5": percent([any(overlap(s, true) >= 0.5 for s in spans) for spans, true in pairs]),
    }


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two spans."""
    shared = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / ((one[1] - one[0]) + (other[1] - other[0]) - shared)


def main() -> int:
    parser = arguments("moments", __doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--workdir", default="runs/shapes", help="run, or file of weights")
    videos = Path("data/source/shapes_full/videos/test")
    parser.add_argument("--videos", type=Path, default=videos, help="clips of a split, drawn")
    parser.add_argument("--fps", type=positive_ints, default=[1, 2, 4], help="frames a second")
    options = parser.parse_args()
    if unknown := sorted(set(options.kinds) - set(KINDS)):
        parser.error(f"a film is {', '.join(KINDS)}, not {unknown[0]}")

    def work() -> None:
        model = load(options.workdir)
        clips = read_clips(options.videos, _CLIPS)
        captions = [clip.caption for clip in clips]
        rows = []
        for kind in options.kinds:
            rows += measure(model, kind, make_film(kind, clips), captions, options.fps)
            print(table(rows[-len(options.fps) :]), flush=True)
        report(rows, options, split=options.videos.name, clips=len(clips))

    return run_command(parser.prog, work)


if __name__ == "__main__":
    raise SystemExit(main())
