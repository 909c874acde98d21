"""Moments of films that are made of clips: how many captions find theirs, and how exactly.

    python -m benchmarks.moments [--workdir=runs/shapes] [--hours=10] [--clips=DIR] [--record]

Makes films of the test clips of `shapes`, indexes them and asks the caption of every clip. Where
each clip is, is known. The films are `joined` (256 clips without gaps, in random order),
`joined_pairs` (the same in the order of the files, where a clip is followed by its time reversal:
the last picture of one is the first of the other), `hour` and `hour_fades` (random order, gaps of a
plain colour, hard cuts and cross-fades) and `corpus` (more such hours).

The row `index` is what a search finds: moments of the windows of the index. The other rows have
other windows, with scores of the same model and moments made by the same rule:

- `oracle`: the true times of the clips, each a moment;
- `fixed_clip`, `fixed_12`: windows of a clip's length, and of 12 s, half over the next, no cuts;
- `random`: as many windows as in the index, anywhere, of 1 to 12 s;
- `chance`: the windows of the index in random order, each a moment.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from drl_jax.search.indexing import update_index

from benchmarks.hours import Clip, Film, read_clips, write_files, write_hour, write_joined
from benchmarks.measure import arguments, report, table
from benchmarks.moment_metrics import PREDICTIONS, is_inside, overlaps, summary
from benchmarks.moment_windows import Candidates, other_windows
from drl_jax.pretrained import RetrievalModel, load
from drl_jax.runtime.cli import positive_int, run_command
from drl_jax.search.moments import find_spans
from drl_jax.search.session import SearchSession
from drl_jax.search.windows import Window

# Clips of the film `joined`, and seconds of the others.
_JOINED, _HOUR = 256, 3600


def measure(
    name: str, folder: Path, films: Sequence[Film], clips: Sequence[Clip], model: RetrievalModel
) -> tuple[list[dict], dict]:
    """Indexes films and asks all captions of their clips.

    Returns:
      A row of metrics for each kind of windows, and one about the index.
    """
    session, indexing = _index(name, folder, model)
    captions = list(
        dict.fromkeys(clips[part.clip].caption for film in films for part in film.parts)
    )
    true = {caption: [] for caption in captions}
    for number, film in enumerate(films):
        for part in film.parts:
            true[clips[part.clip].caption].append((number, part.start, part.end))
    truth = [np.array(true[caption]) for caption in captions]
    text = model.encode_text(captions)
    indexed = _indexed(session, films)
    rng = np.random.default_rng(0)
    counts = [len(windows) for windows in indexed.windows]
    kinds = {"index": indexed} | other_windows(films, counts, rng, model)
    rows = []
    for kind, candidates in kinds.items():
        scores = model.similarity(text, candidates.features)
        find = best_windows if kind == "oracle" else best_moments
        rows.append(_row(name, kind, candidates, scores, find, truth))
    shuffled = rng.random((len(captions), sum(counts)))
    rows.append(_row(name, "chance", indexed, shuffled, best_windows, truth))
    return rows, indexing


def _row(
    name: str,
    kind: str,
    candidates: Candidates,
    scores: np.ndarray,
    find: Callable[[list[list[Window]], list[np.ndarray]], np.ndarray],
    truth: list[np.ndarray],
) -> dict:
    edges = np.cumsum([len(windows) for windows in candidates.windows])[:-1]
    found = [find(candidates.windows, np.split(row, edges)) for row in scores]
    counts = {"queries": len(truth), "windows": len(scores[0])}
    return {"film": name, "kind": kind, **counts, **summary(found, truth)}


def best_moments(windows: list[list[Window]], scores: list[np.ndarray]) -> np.ndarray:
    """The best moments of all films, [M, 3] as in `moment_metrics`, made as a search makes them."""
    found = [
        (span.score, film, span.start, span.end)
        for film, (own, values) in enumerate(zip(windows, scores, strict=True))
        for span in find_spans(own, values, PREDICTIONS)
    ]
    return np.array(sorted(found, reverse=True))[:PREDICTIONS, 1:]


def best_windows(windows: list[list[Window]], scores: list[np.ndarray]) -> np.ndarray:
    """The best windows of all films, [M, 3] as in `moment_metrics`."""
    every = [(film, window.start, window.end) for film, own in enumerate(windows) for window in own]
    order = np.argsort(-np.concatenate(scores), kind="stable")[:PREDICTIONS]
    return np.array([every[row] for row in order])


def _index(name: str, folder: Path, model: RetrievalModel) -> tuple[SearchSession, dict]:
    """Indexes the films in a folder, and says what that takes."""
    directory = folder.with_name(f"{folder.name}_index")
    start = time.perf_counter()
    made = update_index(model, folder, directory)
    seconds, hours = time.perf_counter() - start, made.seconds / 3600
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return SearchSession(directory, model), {
        "film": name,
        "hours": round(hours, 3),
        "windows": made.windows,
        "seconds": round(seconds, 1),
        "hours_a_minute": round(hours / seconds * 60, 2),
        "feature_mb_an_hour": round(made.nbytes / hours / 1e6, 2),
        "index_mb_an_hour": round(size / hours / 1e6, 2),
    }


def _indexed(session: SearchSession, films: Sequence[Film]) -> Candidates:
    snapshot = session.snapshot()
    videos = [snapshot.video_at(film.path.name) for film in films]
    return Candidates([list(video.windows) for video in videos], snapshot.stored(videos))


def ask_clips(folder: Path, clips: Path, model: RetrievalModel) -> tuple[list[dict], dict]:
    """Joins the videos of a folder to one film, and asks for each of them by its file."""
    film = folder / "film.mp4"
    files, parts = write_files(film, clips)
    session, indexing = _index("clips", folder, model)
    rows = []
    for file, part in zip(files, parts, strict=True):
        best = session.search_by_video(file, 1)[0].moments[0]
        found, true = np.array([[0, best.start, best.end]]), np.array([[0, part.start, part.end]])
        rows.append(
            {
                "clip": file.name,
                "start": round(part.start, 2),
                "end": round(part.end, 2),
                "found_start": round(best.start, 2),
                "found_end": round(best.end, 2),
                "iou": round(float(overlaps(found, true)[0, 0]), 2),
                "inside": is_inside(found, true),
            }
        )
    return rows, indexing


def _films(
    root: Path, clips: list[Clip], fps: int, hours: int, seed: int
) -> Iterator[tuple[str, Path, list[Film]]]:
    """Makes the films: yields the name, the folder and the films of each task."""

    def folder(name: str) -> Path:
        (root / name).mkdir(parents=True)
        return root / name

    for name, order in (("joined", seed), ("joined_pairs", None)):
        path = folder(name) / "film.mp4"
        parts = write_joined(path, clips[:_JOINED], fps, order)
        yield name, path.parent, [Film(path, parts)]
    for name, fades in (("hour", False), ("hour_fades", True)):
        path = folder(name) / "film.mp4"
        parts = write_hour(path, clips, fps, _HOUR, seed, fades=fades)
        yield name, path.parent, [Film(path, parts)]
    if hours > 1:
        corpus, films = folder("corpus"), []
        for number in range(hours):
            path = corpus / f"film{number}.mp4"
            films.append(Film(path, write_hour(path, clips, fps, _HOUR, seed + 1 + number)))
        yield "corpus", corpus, films


@contextlib.contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    """An empty folder to keep, or one that is deleted."""
    if path is not None:
        path.mkdir(parents=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def main() -> int:
    parser = arguments("moments", __doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", default="runs/shapes", help="run, or file of weights (%(default)s)"
    )
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path("data/source/shapes_full/videos/test"),
        help="clips of one split, as README's first command draws them (%(default)s)",
    )
    parser.add_argument(
        "--hours", type=positive_int, default=10, help="films of the corpus; 1: none (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the films (%(default)s)")
    parser.add_argument("--clips", type=Path, help="folder of any videos: each is asked for")
    parser.add_argument("--save", type=Path, help="new folder that keeps films and indexes")
    options = parser.parse_args()

    def work() -> None:
        model = load(options.workdir)
        clips, fps = read_clips(options.videos)
        rows, indexing, settings = [], [], {}
        with _folder(options.save) as root:
            for name, folder, films in _films(root, clips, fps, options.hours, options.seed):
                found, index = measure(name, folder, films, clips, model)
                rows += found
                indexing.append(index)
            if options.clips:
                (root / "clips").mkdir()
                asked, index = ask_clips(root / "clips", options.clips, model)
                indexing.append(index)
                settings["real_clips"] = asked
                print(table(asked))
        print(table(indexing))
        report(rows, options, split=options.videos.name, indexing=indexing, **settings)

    return run_command(parser.prog, work)


if __name__ == "__main__":
    raise SystemExit(main())
