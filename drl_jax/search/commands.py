"""Subcommands of `python -m drl_jax.search`; `__main__.py` has their flags."""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from drl_jax.pretrained.flags import model_of_flags, required_model
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.cluster import connect
from drl_jax.runtime.errors import UserError, printable
from drl_jax.runtime.lock import temporary_directory
from drl_jax.search import watch
from drl_jax.search.addresses import moment_of
from drl_jax.search.encoding import Correction
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.hits import explain, format_timestamp
from drl_jax.search.index_file import IndexPart, join, recorded_encoder
from drl_jax.search.query import (
    Query,
    encode_sentences,
    encode_video_file,
    read_picture,
    sampling_of,
)
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.reading import file_of, frames_of, read_video
from drl_jax.search.session import Index
from drl_jax.search.update import parse_shard, update_index


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _index(options: argparse.Namespace) -> None:
    if options.shard is not None:
        parse_shard(options.shard)
    if options.watch:
        watch.watchfiles()  # It is there.
        if options.only:
            raise UserError("--watch follows the whole folder; omit --only")
    given = _given(options, "storage", "fps", "timeout", "prune", "only", "shard")
    with connect(options.ray) if options.ray else contextlib.nullcontext() as cluster:
        recorded = recorded_encoder(options.index)
        model = required_model(options).with_encoder(options.encoder, recorded)
        print(f"frames are encoded by {model.encoder} in {model.config.model.dtype}")
        given["bank"] = _bank_captions(options.bank, model) if options.bank else ()
        update = functools.partial(
            update_index, model, directory=options.index, cluster=cluster, **given
        )
        report = update(options.videos)
        print(f"{options.index}: {report}", flush=True)
        if options.watch:
            watch.follow(
                lambda folder, only: update(folder, only=only, shows_progress=False),
                [options.videos],
                threading.Event(),
            )
    if report.unavailable:
        line = f"could not be read, which may pass: {', '.join(report.unavailable)}"
        raise UserError(f"{line}; rerun the command to try again")


def _bank_captions(bank: str, model: RetrievalModel) -> list[str]:
    if bank != "train":
        return _read_lines(Path(bank))
    # The libraries of datasets take half a second to import, and a query needs none.
    from drl_jax.data.batches import load_split
    from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
    from drl_jax.runs.evaluate_run import draw_bank

    try:
        train = load_split(VideoDataset(dataset_dir(model.config)), "train", model.config.data)
    except DatasetError as error:
        raise UserError(f"--bank=train: {error}; --bank=FILE reads one caption per line") from error
    return [caption for caption in draw_bank(train, None).captions if caption.strip()]


def _join(options: argparse.Namespace) -> None:
    parts = join(options.index, options.shards)
    files, windows = (sum(map(count, parts)) for count in (IndexPart.videos, IndexPart.windows))
    print(f"{options.index}: {len(parts)} shards, {files} files and {windows} windows, open as one")
    given = {shard for part in parts if (shard := part.header.get("shard"))}
    counts = sorted({int(shard.partition("/")[2]) for shard in given})
    wanted = [f"{number}/{count}" for count in counts for number in range(count)]
    if missing := [shard for shard in wanted if shard not in given]:
        print(f"shards that were not given: {' '.join(missing)}")


def _query(options: argparse.Namespace) -> None:
    if options.sentences and not options.video:
        raise UserError("--sentences needs --video: it ranks sentences for a video")
    if options.sentences and (options.query or options.queries):
        raise UserError("--sentences ranks the sentences of its file; give no other ones")
    others = options.video or options.picture or options.like
    if options.text and (options.sentences or (others and not (options.query or options.queries))):
        raise UserError("--text looks for the words of a sentence; give one")
    if options.hubness and (others or options.without):
        raise UserError(
            "--hubness ranks sentences; omit it with --video, --picture, --like or --without"
        )
    sentences = options.query + (_read_lines(options.queries) if options.queries else [])
    index = _open(options)
    if options.hubness and not options.json:
        print(f"ranked with --hubness={options.hubness}; the scores are those without it")
    if options.sentences:
        _rank_sentences(options, index.model)
        return
    query = Query(
        without=options.without,
        # Decoded once for all sentences.
        picture=read_picture(index.model, options.picture) if options.picture else b"",
        video=encode_video_file(index.model, options.video) if options.video else None,
        like=moment_of(index.state(), options.like) if options.like else None,
    )
    given = _given(options, "top", "moments", "text")
    search = functools.partial(index.search, filters=_filters(options), **given)
    if query != Query():
        queries = [dataclasses.replace(query, sentence=text) for text in sentences or [""]]
        print_answers(options, index, sentences or [str(others)], map(search, queries))
    elif sentences:
        print_answers(options, index, sentences, search(sentences))
    else:
        about = index.model.about
        print(f"{about['name']} knows {about['knows']}, {about['languages']}")
        with contextlib.suppress(EOFError):
            while sentence := input("sentence (an empty line ends): ").strip():
                try:
                    print(f"{sentence}\n{search(sentence)}")
                except UserError as error:
                    print(error)


def _filters(options: argparse.Namespace) -> Filters:
    given = _given(options, "folder", "name", "min_length", "max_length")
    days = {name: text for name, text in _given(options, "since", "until").items() if text}
    given |= {name: parse_day(f"--{name}", text) for name, text in days.items()}
    return Filters(only=tuple(options.only), **given)


def print_answers(
    options: argparse.Namespace, index: Index, names: Sequence[str], found: Iterable[list[Any]]
) -> None:
    """Prints the hits of queries with these names, or with `--json` an object for each of them."""
    for name, hits in zip(names, found, strict=True):
        took = getattr(hits, "rerank_ms", None)
        if options.json:
            answer = {"model": index.model.about, "query": name}
            answer |= {} if took is None else {"rerank_ms": round(took, 1)}
            print(json.dumps({**answer, "hits": [hit.to_json() for hit in hits]}))
        else:
            reranked = "" if took is None else f"  (reranked in {took:.0f} ms)"
            print(f"{name}{reranked}\n{hits}")


def _rank_sentences(options: argparse.Namespace, model: RetrievalModel) -> None:
    sentences = _read_lines(options.sentences)
    video = model.encode_videos([options.video])
    scores = model.similarity(model.encode_text(sentences), video)[:, 0]
    best = np.argsort(-scores, kind="stable")[: options.top]
    ranked = [(float(scores[row]), sentences[row]) for row in best]
    if options.json:
        found = [{"score": round(score, 6), "sentence": text} for score, text in ranked]
        print(json.dumps({"video": str(options.video), "sentences": found}))
    else:
        print("\n".join(f"{score:8.4f}  {text}" for score, text in ranked))


def _export(options: argparse.Namespace) -> None:
    from drl_jax.search.qdrant import Qdrant

    search_options = _search_options(options)
    index = Index(options.index, model_of_flags(options), search_options)
    engine = Qdrant(options.url, search_options.correction)
    sent, deleted, unchanged = engine.export(index.state())
    print(f"{sent} windows sent, {deleted} deleted, {unchanged} unchanged")


def _recall(options: argparse.Namespace) -> None:
    index = _open(options)
    rows = measure_recall(index, _read_lines(options.queries), options.candidates, options.top)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{len(index.state().gallery)} windows, milliseconds per query")
    print(f"candidates  recall@{options.top:<3}   find  compare   exact")
    for count, recall, *seconds in map(dict.values, rows):
        print(f"{count:10}  {100 * recall:9.1f}  {'  '.join(f'{1e3 * s:6.1f}' for s in seconds)}")


def measure_recall(
    index: Index, sentences: Sequence[str], counts: Sequence[int], top: int
) -> list[dict[str, float]]:
    """Looks for the `top` best windows among numbers of candidates, of the engine or a scan.

    `recall` is the share that is found, 0 to 1. The seconds are the medians of finding the
    candidates of a query, of comparing them exactly, and of comparing all windows.
    """
    state, ranker = index.state(), index.ranker
    queries = encode_sentences(index.model, sentences)
    queries = [queries[0], *queries]  # The first one compiles, and is not counted.
    gallery = ranker.gallery(state, queries[0], None)
    exact, rows = [], []
    for query in queries:
        start = time.perf_counter()
        (best,) = ranker.engine.search(query.parts, gallery, top)
        exact.append((best.slots[:top], time.perf_counter() - start))
    for count in counts:
        times, shares = [], []
        asked = tqdm(zip(queries, exact, strict=True), f"{count} candidates", len(queries))
        for query, (best, seconds) in asked:
            start = time.perf_counter()
            (slots,) = ranker.candidates(state, gallery, [query], count)
            middle = time.perf_counter()
            ranker.engine.search(query.parts, gallery.copied(slots), top)
            times.append((middle - start, time.perf_counter() - middle, seconds))
            shares.append(np.isin(best, slots))
        names = ("scan_seconds", "compare_seconds", "exact_seconds")
        medians = zip(names, np.median(times[1:], axis=0).tolist(), strict=True)
        recall = float(np.concatenate(shares[1:]).mean())
        rows.append({"candidates": count, "recall": recall, **dict(medians)})
    return rows


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

    serve(_open(options), options)


def _mcp(options: argparse.Namespace) -> None:
    from drl_jax.search.api import SearchAPI  # The other commands need no server.
    from drl_jax.search.mcp import serve_tools

    with contextlib.redirect_stdout(sys.stderr):  # Clients read stdout.
        api = SearchAPI(_open(options), 0, 0)
    with contextlib.closing(api):
        serve_tools(api)


def _explain(options: argparse.Namespace) -> None:
    model, path = model_of_flags(options), options.video
    if options.index is not None:
        index = Index(options.index, model)
        model, state = index.model, index.state()
        path = path if path.exists() else file_of(state.folder, str(path))
    if model is None:
        raise UserError("name the model with --index=DIR, --workdir=RUN or --weights=FILE")
    if not model.interaction.HAS_EXPLANATION:
        model.interaction.attribution({}, {})  # Raises what is missing.
    (query,) = encode_sentences(model, [options.query])
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
    figure = explanation.figure(pictures, f"“{options.query}”  {scores[best]:.4f}\n{path.name}")
    try:
        figure.savefig(options.out, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write --out={options.out} ({reason})") from error
    span = (*read.arrays["window.span"][best], explanation.peak())
    start, end, peak = map(format_timestamp, span)
    print(f"{scores[best]:.4f}, best moment {peak} (of {start} to {end}): {options.out}")


def _open(options: argparse.Namespace) -> Index:
    if options.engine != "qdrant" and options.url:
        raise UserError("--url needs --engine=qdrant")
    search_options, ask_engine = _search_options(options), None
    if options.engine == "qdrant":
        from drl_jax.search.qdrant import Qdrant

        ask_engine = Qdrant(options.url, search_options.correction)
    index = Index(options.index, model_of_flags(options), search_options, ask_engine)
    index.state()  # It is there.
    if ask_engine is not None:
        ask_engine.check(index.state())
    return index


def _search_options(options: argparse.Namespace) -> SearchOptions:
    given = _given(options, "engine", "candidates", "refine", "rerank")
    if options.command == "recall":
        given["candidates"] = max(options.candidates)
    correction = Correction.parse(options.hubness) if options.hubness else None
    return SearchOptions(**given, correction=correction)


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as lines of text ({error})") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path} has no lines")
    return found


_ALL = (_index, _join, _query, _export, _recall, _duplicates, _serve, _mcp, _explain)
COMMANDS = {command.__name__.removeprefix("_"): command for command in _ALL}
