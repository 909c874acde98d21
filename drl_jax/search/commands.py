"""Subcommands of `python -m drl_jax.search`; `__main__.py` has their flags."""

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from drl_jax.model_flags import model_of_flags, required_model
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError, printable
from drl_jax.runtime.lock import temporary_directory
from drl_jax.runtime.worker_pool import CallPool
from drl_jax.search.encoding import Correction
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.hits import Hit, explain, format_timestamp
from drl_jax.search.index_file import Part, join
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.query import Query, encode_sentences, encode_video_file, sampling_of
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.reading import frames_of, open_picture, read_video
from drl_jax.search.session import Index, rank_sentences
from drl_jax.search.update import IndexReport, parse_shard, update_index

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster

# Missing shards that are named.
_SHOWN = 20


# ---------------------------------------------------------------------- indexing


def _index(options: argparse.Namespace) -> None:
    if options.shard is not None:
        parse_shard(options.shard)
    with _cluster(options.ray) as cluster:
        model = required_model(options)
        report = update_index(
            model,
            options.videos,
            options.index,
            storage=options.storage,
            fps=options.fps,
            timeout=options.timeout,
            prune=options.prune,
            bank=_bank_captions(options.bank, model) if options.bank else (),
            only=options.only,
            shard=options.shard,
            cluster=cluster,
        )
    print(_format_report(report, options.index, options.storage))
    if report.unavailable:
        raise UserError(
            f"{len(report.unavailable)} files could not be read, which may pass; rerun the command"
            " to try them again"
        )


def _cluster(address: str | None) -> "contextlib.AbstractContextManager[RayCluster | None]":
    """The cluster that `--ray` names, if any."""
    if not address:
        return contextlib.nullcontext()
    from drl_jax.runtime.cluster import connect  # Ray is optional.

    return connect(address)


def _bank_captions(bank: str, model: RetrievalModel) -> list[str]:
    """Captions of the training split of a model's dataset, or of a file."""
    if bank != "train":
        return read_lines(Path(bank))
    # The libraries of datasets take half a second to import, and a query needs none.
    from drl_jax.data.batches import load_split
    from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
    from drl_jax.runs.evaluate_run import draw_bank

    try:
        train = load_split(VideoDataset(dataset_dir(model.config)), "train", model.config.data)
    except DatasetError as error:
        raise UserError(f"--bank=train: {error}; --bank=FILE reads one caption per line") from error
    return [caption for caption in draw_bank(train, None).captions if caption.strip()]


def _format_report(report: IndexReport, directory: Path, storage: str) -> str:
    lines = [
        f"{directory}: {report.added} added, {report.changed} changed, {report.moved} moved,"
        f" {report.removed} removed, {report.unchanged} unchanged; {report.windows} windows take"
        f" {report.nbytes / 1e6:.1f} MB ({storage})"
    ]
    for reasons, title in (
        (report.bad, "files cannot be searched"),
        (report.unavailable, "files could not be read this time"),
    ):
        if reasons:
            lines.append(f"{len(reasons)} {title}:")
            lines += [f"  {printable(path)}: {reason}" for path, reason in reasons.items()]
    return "\n".join(lines)


def _join(options: argparse.Namespace) -> None:
    parts = join(options.index, options.shards)
    files, windows = (sum(map(count, parts)) for count in (Part.videos, Part.windows))
    print(f"{options.index}: {len(parts)} shards, {files} files and {windows} windows, open as one")
    given = {shard for part in parts if (shard := part.header.get("shard"))}
    counts = sorted({int(shard.partition("/")[2]) for shard in given})
    wanted = [f"{number}/{count}" for count in counts for number in range(count)]
    if missing := [shard for shard in wanted if shard not in given]:
        rest = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        print(f"shards that were not given: {' '.join(missing[:_SHOWN])}{rest}")


# ---------------------------------------------------------------------- queries


def _query(options: argparse.Namespace) -> None:
    _check_query(options)
    sentences = options.query + (read_lines(options.queries) if options.queries else [])
    index = _open(options)
    if options.hubness and not options.json:
        print(f"ranked with --hubness={options.hubness}; the scores are those without it")
    if options.sentences:
        _rank_sentences(options, index.model)
        return
    query = Query(
        without=options.without,
        picture=_picture(options.picture, index.model) if options.picture else b"",
        # Decoded once for all sentences.
        video=encode_video_file(index.model, options.video) if options.video else None,
        like=_moment(index, options.like) if options.like else None,
    )
    has_sentences_only = query == Query()
    names = sentences or [str(options.video or options.picture or options.like)]
    search = functools.partial(
        index.search, top=options.top, filters=_filters(options), moments=options.moments
    )
    if has_sentences_only and not sentences:
        _ask(search)
    elif has_sentences_only:
        _print(options, names, search(sentences))
    else:
        queries = [dataclasses.replace(query, sentence=text) for text in sentences or [""]]
        _print(options, names, map(search, queries))


def _check_query(options: argparse.Namespace) -> None:
    """Checks which flags go together."""
    sentences, others = options.query or options.queries, (options.picture, options.like)
    if options.sentences and not options.video:
        raise UserError("--sentences needs --video: it ranks sentences for a video")
    if options.sentences and sentences:
        raise UserError("--sentences ranks the sentences of its file; give no other ones")
    if options.hubness and (options.video or any(others) or options.without):
        raise UserError(
            "--hubness ranks sentences; omit it with --video, --picture, --like or --without"
        )
    if options.without and not (sentences or options.video or any(others)):
        raise UserError("--without needs something to look for, e.g. a sentence")


def _filters(options: argparse.Namespace) -> Filters:
    names = ("folder", "name", "min_length", "max_length")
    days = {
        name: parse_day(f"--{name}", text)
        for name in ("since", "until")
        if (text := getattr(options, name))
    }
    given = {name: getattr(options, name) for name in names}
    return Filters(only=tuple(options.only), **given, **days)


def _moment(index: Index, text: str) -> tuple[IndexedVideo, float]:
    """Reads PATH@SECONDS."""
    path, _, seconds = text.rpartition("@")
    video = index.state().video_at(path)
    if video is None:
        raise UserError(f"--like={text}: the index has no video {path!r}; write PATH@SECONDS")
    try:
        time = float(seconds)
    except ValueError:
        time = -1.0
    if not 0 <= time <= video.duration:
        raise UserError(f"--like={text}: {path} has the seconds 0 to {video.duration:.1f}")
    return video, time


def _picture(path: Path, model: RetrievalModel) -> bytes:
    with contextlib.closing(CallPool(1)) as pool:
        return open_picture(pool, path, model.frame_form)


def _print(options: argparse.Namespace, names: Sequence[str], found: Iterable[list[Hit]]) -> None:
    for name, hits in zip(names, found, strict=True):
        if options.json:
            print(json.dumps({"query": name, "hits": [hit.to_json() for hit in hits]}))
        else:
            print(f"{name}\n{format_hits(hits)}")


def _ask(search: Callable[[str], list[Hit]]) -> None:
    """Answers the lines of the standard input, to an empty one or its end."""
    with contextlib.suppress(EOFError):
        while sentence := input("sentence (an empty line ends): ").strip():
            try:
                print(f"{sentence}\n{format_hits(search(sentence))}")
            except UserError as error:
                print(error)


def _rank_sentences(options: argparse.Namespace, model: RetrievalModel) -> None:
    ranked = rank_sentences(model, options.video, read_lines(options.sentences))[: options.top]
    if options.json:
        found = [{"score": round(score, 6), "sentence": text} for score, text in ranked]
        print(json.dumps({"video": str(options.video), "sentences": found}))
    else:
        print("\n".join(f"{score:8.4f}  {text}" for score, text in ranked))


def format_hits(hits: Sequence[Hit]) -> str:
    """Formats hits as text: rank, score and path; then each moment, with its words for the best."""
    lines = []
    # Weak ones are set apart instead of listed as if they were answers.
    for hit in sorted(hits, key=lambda hit: hit.is_weak):
        if hit.is_weak and "weak matches:" not in lines:
            lines.append("weak matches:")
        same = "  (has this picture)" if hit.is_same else ""
        lines.append(f"{hit.rank:4}  {hit.score:.4f}  {printable(str(hit.path))}{same}")
        for moment in hit.moments:
            start, end, peak = map(format_timestamp, (moment.start, moment.end, moment.peak))
            lines.append(f"{'':14}{start} to {end}, best at {peak} ({moment.score:.4f})")
            if moment is hit.moments[0]:
                words = (
                    f"{word} {format_timestamp(time)}"
                    + (f" ({weight:.0%})" if weight >= 0.005 else "")
                    for word, time, _, weight in moment.explanation.matches()
                )
                lines.append(f"{'':14}{'  '.join(words)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- other commands


def _export(options: argparse.Namespace) -> None:
    from drl_jax.search.qdrant import Qdrant

    search_options = _search_options(options)
    index = Index(options.index, model_of_flags(options), search_options)
    report = Qdrant(options.url, search_options.correction).export(index.state())
    print(f"{report.sent} windows sent, {report.deleted} deleted, {report.unchanged} unchanged")


def _recall(options: argparse.Namespace) -> None:
    index = _open(options)
    rows = index.measure_recall(read_lines(options.queries), options.candidates, options.top)
    if options.json:
        print(json.dumps([row._asdict() for row in rows]))
        return
    print(f"{len(index.state().gallery)} windows, milliseconds per query")
    print(f"candidates  recall@{options.top:<3}   find  compare   exact")
    for row in rows:
        times = "  ".join(f"{1e3 * seconds:6.1f}" for seconds in row[2:])
        print(f"{row.candidates:10}  {100 * row.recall:9.1f}  {times}")


def _duplicates(options: argparse.Namespace) -> None:
    from drl_jax.search.duplicates import find_duplicates

    pairs = find_duplicates(Index(options.index).state())
    if options.json:
        print(json.dumps([pair._asdict() for pair in pairs]))
        return
    for pair in pairs:
        mirrored = ", mirrored" if pair.is_mirrored else ""
        print(f"{pair.share:4.0%}{mirrored}  {printable(pair.first)}  {printable(pair.second)}")
    print(f"{len(pairs)} pairs of videos show the same")


def _serve(options: argparse.Namespace) -> None:
    from drl_jax.search.serve import serve  # The other commands need no server.

    names = ("host", "port", "top", "max_upload", "allowed_hosts")
    given = {name: getattr(options, name) for name in names}
    serve(_open(options), needs_token=not options.no_token, **given)


def _explain(options: argparse.Namespace) -> None:
    model, path = model_of_flags(options), options.video
    if options.index is not None:
        index = Index(options.index, model)
        model, path = index.model, path if path.exists() else index.state().folder / path
    if model is None:
        raise UserError("name the model with --index=DIR, --workdir=RUN or --weights=FILE")
    print(f"{draw_pair(model, path, options.query, options.out)}: {options.out}")


def draw_pair(model: RetrievalModel, path: Path, sentence: str, out: Path) -> str:
    """Draws how the words of a sentence and the frames of the best window of a file match.

    Returns:
      The score and the best moment, as text.

    Raises:
      UserError: the file cannot be read, the sentence is blank, or `out` cannot be written.
    """
    from drl_jax.evaluation.figures import interaction_figure  # Others need no matplotlib.

    (query,) = encode_sentences(model, [sentence])
    with temporary_directory() as folder:
        read = read_video(path, (), sampling_of(model), folder / "frames")
        if reason := read.error:
            raise UserError(f"{path} {reason}")
        frames = frames_of(read, model.frame_form)
        windows = model.encode_windows(frames, read.windows)
        scores = model.similarity(query.parts[0].text, windows)[0]
        best = int(scores.argmax())
        chosen = list(read.windows[best])
        times, pictures = read.arrays["frame.time"][chosen], np.array(frames[chosen])
    arrays = {name: array[best] for name, array in windows.items()}
    explanation = explain(model.interaction, query.parts[0], arrays, query.words, times)
    title = f"“{sentence}”  {scores[best]:.4f}\n{path.name}"
    clocks = [format_timestamp(time) for time in times]
    figure = interaction_figure(explanation.attribution, explanation.words, clocks, pictures, title)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write --out={out} ({reason})") from error
    span = (*read.arrays["window.span"][best], explanation.peak)
    start, end, peak = map(format_timestamp, span)
    return f"{scores[best]:.4f}, best moment {peak} (of {start} to {end})"


def _open(options: argparse.Namespace) -> Index:
    """The index of a command that answers queries."""
    if options.engine != "qdrant" and options.url:
        raise UserError("--url needs --engine=qdrant")
    search_options, ask_engine = _search_options(options), None
    if options.engine == "qdrant":
        from drl_jax.search.qdrant import Qdrant

        ask_engine = Qdrant(options.url, search_options.correction)
    index = Index(options.index, model_of_flags(options), search_options, ask_engine)
    if ask_engine is not None:
        ask_engine.check(index.state())
    return index


def _search_options(options: argparse.Namespace) -> SearchOptions:
    names = ("engine", "candidates", "refine")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if options.command == "recall":
        given["candidates"] = max(options.candidates)
    correction = Correction.parse(options.hubness) if options.hubness else None
    return SearchOptions(**given, correction=correction)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
      UserError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as lines of text ({error})") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} has no lines")
    return lines


COMMANDS = {
    "index": _index,
    "join": _join,
    "query": _query,
    "export": _export,
    "recall": _recall,
    "duplicates": _duplicates,
    "serve": _serve,
    "explain": _explain,
}
