"""Subcommands of `python -m drl_jax.search`; `__main__.py` has their flags."""

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from drl_jax.data.frame_form import FrameForm
from drl_jax.model_flags import model_of_flags
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import CallPool
from drl_jax.search import CANDIDATES, MOMENTS
from drl_jax.search.candidates import CandidateSearch
from drl_jax.search.explain import format_timestamp
from drl_jax.search.explain_file import explain_file
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.hits import Hit
from drl_jax.search.hubness import Correction
from drl_jax.search.index_commands import index_videos, join_shards, read_lines
from drl_jax.search.pictures import open_picture
from drl_jax.search.prompt import format_hits, run_prompt
from drl_jax.search.query import Query, encode_video_file
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.session import Searcher, SearchSession
from drl_jax.search.snapshot import IndexSnapshot


def _query(options: argparse.Namespace) -> None:
    _check_query(options)
    queries = list(options.query)
    if options.queries:
        queries += read_lines(options.queries)
    session = _session(options)
    if options.hubness and not options.json:
        print(f"ranked with --hubness={options.hubness}; the scores are those without it")
    if options.video and options.sentences:
        _rank_sentences(options, session)
    elif not _is_plain(options):
        _answer_query(options, session, queries)
    elif _has_engine(options):
        with contextlib.closing(_candidates_of(options, session)) as engine:
            engine.check()
            _answer_sentences(options, queries, session.model, engine)
    else:
        _answer_sentences(options, queries, session.model, session)


def _check_query(options: argparse.Namespace) -> None:
    """Checks which flags go together."""
    if options.sentences and not options.video:
        raise UserError("--sentences needs --video: it ranks sentences for a video")
    if options.sentences and (options.query or options.queries):
        raise UserError("--sentences ranks the sentences of its file; give no other ones")
    if _has_engine(options) and not _is_plain(options):
        raise UserError(
            f"--engine={options.engine} answers sentences only, among all videos; omit it"
        )
    if options.hubness and (options.video or options.picture or options.like or options.without):
        raise UserError(
            "--hubness ranks sentences; omit it with --video, --picture, --like or --without"
        )
    if options.without and not (options.query or options.picture or options.like or options.video):
        raise UserError("--without needs something to look for, e.g. a sentence")


def _is_plain(options: argparse.Namespace) -> bool:
    """Whether the queries are sentences among all videos, which every engine answers."""
    others = (options.video, options.picture, options.like, options.without, _filters(options))
    return not any(others) and options.moments == MOMENTS


def _filters(options: argparse.Namespace) -> Filters:
    days = {
        name: parse_day(f"--{name}", text)
        for name in ("since", "until")
        if (text := getattr(options, name))
    }
    return Filters(
        folder=options.folder,
        name=options.name,
        min_length=options.min_length,
        max_length=options.max_length,
        only=tuple(options.only),
        **days,
    )


def _answer_query(
    options: argparse.Namespace, session: SearchSession, sentences: Sequence[str]
) -> None:
    """Answers queries that are not plain."""
    snapshot = session.snapshot()
    filters = _filters(options)
    videos = snapshot.filtered(filters) if filters else None
    if videos is not None and not videos:
        raise UserError(f"none of the {len(snapshot.videos)} videos passes the filters")
    rest = Query(
        without=options.without,
        picture=_picture(options.picture, session.model.frame_form) if options.picture else b"",
        # Decoded once for all sentences.
        video=encode_video_file(session.model, options.video) if options.video else None,
        like=_moment(snapshot, options.like) if options.like else None,
    )
    for sentence in sentences or [""]:
        query = dataclasses.replace(rest, sentence=sentence)
        name = sentence or str(options.video or options.picture or options.like)
        hits = snapshot.answer(query, options.top, videos, moments=options.moments)
        _print_hits(name, hits, options.json)


def _moment(snapshot: IndexSnapshot, text: str) -> tuple[IndexedVideo, float]:
    """Reads PATH@SECONDS."""
    path, _, seconds = text.rpartition("@")
    video = snapshot.video_at(path)
    if video is None:
        raise UserError(f"--like={text}: the index has no video {path!r}; write PATH@SECONDS")
    try:
        time = float(seconds)
    except ValueError:
        time = -1.0
    end = max(window.end for window in video.windows)
    if not 0 <= time <= end:
        raise UserError(f"--like={text}: {path} has the seconds 0 to {end:.1f}")
    return video, time


def _picture(path: Path, form: FrameForm) -> bytes:
    with contextlib.closing(CallPool(1)) as pool:
        return open_picture(pool, path, form)


def _answer_sentences(
    options: argparse.Namespace, queries: list[str], model: RetrievalModel, searcher: Searcher
) -> None:
    if not queries:
        run_prompt(searcher, _captions(options, model), options.top)
        return
    for sentence, hits in zip(queries, searcher.search(queries, options.top), strict=True):
        _print_hits(sentence, hits, options.json)


def _rank_sentences(options: argparse.Namespace, session: SearchSession) -> None:
    ranked = session.rank_sentences(options.video, read_lines(options.sentences))[: options.top]
    if options.json:
        found = [{"score": round(score, 6), "sentence": text} for score, text in ranked]
        print(json.dumps({"video": str(options.video), "sentences": found}))
    else:
        print("\n".join(f"{score:8.4f}  {text}" for score, text in ranked))


def _print_hits(query: str, hits: Sequence[Hit], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"query": query, "hits": [hit.to_json() for hit in hits]}))
    else:
        print(f"{query}\n{format_hits(hits)}")


def _export(options: argparse.Namespace) -> None:
    session = _session(options)
    with contextlib.closing(_candidate_search(options, session)) as engine:
        report = engine.export()
    print(
        f"{report.collection}: {report.sent} windows sent, {report.deleted} deleted,"
        f" {report.unchanged} unchanged"
    )


def _recall(options: argparse.Namespace) -> None:
    session = _session(options)
    queries, windows = read_lines(options.queries), session.snapshot().videos.windows
    with contextlib.closing(_candidate_search(options, session)) as engine:
        from drl_jax.search.recall import measure_recall

        engine.check()
        counts = [count for count in options.candidates if count <= windows]
        if not counts:
            raise UserError(f"the index has {windows} windows; ask for fewer candidates")
        rows = measure_recall(engine, queries, counts, options.top)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    print(f"{windows} windows, {len(queries)} queries, milliseconds per query")
    print(f"candidates  recall@{options.top:<3} engine  rerank   exact")
    for row in rows:
        times = (row.engine_seconds, row.rerank_seconds, row.exact_seconds)
        print(
            f"{row.candidates:10}  {100 * row.recall:9.1f}  "
            + "  ".join(f"{1e3 * t:6.1f}" for t in times)
        )


def _candidate_search(
    options: argparse.Namespace, session: SearchSession, candidates: int = CANDIDATES
) -> CandidateSearch:
    return CandidateSearch(
        session, url=options.url, collection=options.collection, candidates=candidates
    )


def _candidates_of(options: argparse.Namespace, session: SearchSession) -> CandidateSearch:
    """With the number of candidates of --candidates."""
    return _candidate_search(options, session, options.candidates)


def _has_engine(options: argparse.Namespace) -> bool:
    """Whether sentences are found among candidates; checks the flags of that."""
    if options.engine == "exact" and (options.url or options.collection):
        raise UserError("--url and --collection need --engine=qdrant")
    return options.engine != "exact"


def _serve(options: argparse.Namespace) -> None:
    # The other commands need no server.
    from drl_jax.search.serve import serve

    model = model_of_flags(options)
    serve(
        options.index,
        model,
        host=options.host,
        port=options.port,
        top=options.top,
        max_upload=options.max_upload,
        correction=_correction(options),
        engine=functools.partial(_candidates_of, options) if _has_engine(options) else None,
        allowed_hosts=options.allowed_hosts,
        needs_token=not options.no_token,
    )


def _explain(options: argparse.Namespace) -> None:
    # The other commands need no matplotlib.
    from drl_jax.search.figure import save_figure

    model, path = model_of_flags(options), options.video
    if options.index is not None:
        session = SearchSession(options.index, model)
        model = session.model
        path = path if path.exists() else session.snapshot().folder / path
    if model is None:
        raise UserError("name the model with --index=DIR, --workdir=RUN or --weights=FILE")
    found = explain_file(model, path, options.query)
    title = f"“{options.query}”  {found.score:.4f}\n{path.name}"
    save_figure(options.out, found.explanation, found.frames, title)
    start, end, peak = map(
        format_timestamp, (found.window.start, found.window.end, found.explanation.moment)
    )
    print(f"{found.score:.4f}, best moment {peak} (of {start} to {end}): {options.out}")


def _session(options: argparse.Namespace) -> SearchSession:
    return SearchSession(options.index, model_of_flags(options), _correction(options))


def _correction(options: argparse.Namespace) -> Correction | None:
    return Correction.parse(options.hubness) if options.hubness else None


def _captions(options: argparse.Namespace, model: RetrievalModel) -> list[str]:
    """Captions for the prompt's `i`: those of a file, or of the test split of the model's run."""
    if options.captions:
        return read_lines(options.captions)
    from drl_jax.data.batches import load_split
    from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir

    config = model.config
    try:
        return load_split(VideoDataset(dataset_dir(config)), "test", config.data).caption_pairs()[1]
    except DatasetError:
        return []


COMMANDS = {
    "index": index_videos,
    "join": join_shards,
    "query": _query,
    "export": _export,
    "recall": _recall,
    "serve": _serve,
    "explain": _explain,
}
