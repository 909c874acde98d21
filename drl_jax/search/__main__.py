"""Search your own videos with a sentence.

python -m drl_jax.search index --workdir=RUN --videos=DIR --index=DIR
python -m drl_jax.search query --index=DIR "a dog catches a ball" --top=5
python -m drl_jax.search serve --index=DIR
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from drl_jax import pretrained as models
from drl_jax.data.batches import load_split
from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
from drl_jax.pretrained import SearchModel
from drl_jax.runtime.cli import cache_compilations
from drl_jax.runtime.errors import UserError, report_errors
from drl_jax.search.explain import clock
from drl_jax.search.explain import explain as explain_pair
from drl_jax.search.indexing import IndexReport, update_index
from drl_jax.search.prompt import format_hits, run_prompt
from drl_jax.search.session import Searcher, SearchSession
from drl_jax.search.store import STORAGES


def index(options: argparse.Namespace) -> int:
    """Makes an index or brings it up to date."""
    model = _named_model(options)
    if model is None:
        raise UserError("name the model with --workdir=RUN or --weights=FILE")
    report = update_index(
        model, options.videos, options.index, storage=options.storage, timeout=options.timeout
    )
    print(describe(report, options.index, options.storage))
    return 0


def describe(report: IndexReport, directory: Path, storage: str) -> str:
    """An index's report for a person."""
    lines = [
        f"{directory}: {report.added} added, {report.changed} changed, {report.removed} removed,"
        f" {report.unchanged} unchanged; features take {report.nbytes / 1e6:.1f} MB ({storage})"
    ]
    if report.bad:
        lines.append(f"{len(report.bad)} files cannot be searched:")
        lines += [f"  {path}: {reason}" for path, reason in report.bad.items()]
    return "\n".join(lines)


def query(options: argparse.Namespace) -> int:
    """Answers queries, or asks for them."""
    if options.sentences and not options.video:
        raise UserError("--sentences goes with --video: which of them describes it best?")
    queries = list(options.query)
    if options.queries:
        queries += _lines(options.queries)
    if queries and options.video:
        raise UserError("give sentences or --video as the query, not both")
    if options.engine == "exact" and (options.url or options.collection):
        raise UserError("--url and --collection go with --engine=qdrant")
    if options.video and options.engine != "exact":
        raise UserError(f"--engine={options.engine} answers sentences; leave it out with --video")
    session = SearchSession(options.index, _named_model(options))
    if options.engine == "qdrant":
        with _qdrant(options, session, candidates=options.candidates) as searcher:
            searcher.check()
            return _answer_sentences(options, queries, session, searcher)
    if options.video and options.sentences:
        ranked = session.rank_sentences(options.video, _lines(options.sentences))[: options.top]
        if options.json:
            found = [{"score": round(score, 6), "sentence": text} for score, text in ranked]
            print(json.dumps({"video": str(options.video), "sentences": found}))
        else:
            print("\n".join(f"{score:8.4f}  {text}" for score, text in ranked))
    elif options.video:
        hits = session.search_by_video(options.video, options.top)
        _print_hits(str(options.video), hits, options.json)
    else:
        return _answer_sentences(options, queries, session, session)
    return 0


def _answer_sentences(
    options: argparse.Namespace, queries: list[str], session: SearchSession, searcher: Searcher
) -> int:
    """Answers the queries, or asks for some."""
    if not queries:
        run_prompt(searcher, _captions(options, session), options.top)
        return 0
    for sentence, hits in zip(queries, searcher.search(queries, options.top), strict=True):
        _print_hits(sentence, hits, options.json)
    return 0


def export(options: argparse.Namespace) -> int:
    """Writes the frames' vectors to Qdrant, or brings what is there up to date."""
    session = SearchSession(options.index, _named_model(options))
    with _qdrant(options, session) as engine:
        report = engine.export()
    print(
        f"{report.collection}: {report.sent} videos sent, {report.deleted} deleted,"
        f" {report.unchanged} unchanged"
    )
    return 0


def recall(options: argparse.Namespace) -> int:
    """Tells how much of the exact answer the engine's candidates hold, and what each way takes."""
    session = SearchSession(options.index, _named_model(options))
    queries = _lines(options.queries)
    with _qdrant(options, session) as engine:
        engine.check()
        counts = [count for count in options.candidates if count <= len(session.videos)]
        if not counts:
            raise UserError(f"the index has {len(session.videos)} videos; ask for fewer candidates")
        rows = engine.recall(queries, counts, options.top)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    print(f"{len(session.videos)} videos, {len(queries)} queries, milliseconds a query")
    print(f"candidates  recall@{options.top:<3} engine  rerank   exact")
    for row in rows:
        times = (row.engine_seconds, row.rerank_seconds, row.exact_seconds)
        print(
            f"{row.candidates:10}  {100 * row.recall:9.1f}  "
            + "  ".join(f"{1e3 * t:6.1f}" for t in times)
        )
    return 0


def _qdrant(options: argparse.Namespace, session: SearchSession, **more: int) -> Any:
    try:
        from drl_jax.search.qdrant import QdrantSearch
    except ImportError as error:
        raise UserError("Qdrant's client is not here: pip install qdrant-client") from error
    engine = QdrantSearch(session, url=options.url, collection=options.collection, **more)
    return contextlib.closing(engine)


def serve(options: argparse.Namespace) -> int:
    """Serves a page to search with, on this machine alone."""
    # Not for the other commands, which need no server.
    from drl_jax.search.serve import serve as serve_page

    serve_page(
        options.index, _named_model(options), host=options.host, port=options.port, top=options.top
    )
    return 0


def explain(options: argparse.Namespace) -> int:
    """Draws why a video has its score for a sentence."""
    from drl_jax.search.figure import save_figure

    model, path = _named_model(options), options.video
    if options.index is not None:
        session = SearchSession(options.index, model)
        model = session.model
        path = path if path.exists() else session.folder / path
    if model is None:
        raise UserError("name the model with --index=DIR, --workdir=RUN or --weights=FILE")
    text, video = model.embed_sentences([options.query]), model.embed_file(path)
    score = model.embedder.similarity(model.params, text, video.features)[0, 0]
    explanation = explain_pair(
        {name: array[0] for name, array in text.items()},
        {name: array[0] for name, array in video.features.items()},
        model.tokens([options.query])[0],
        video.times,
    )
    title = f"“{options.query}”  {score:.4f}\n{path.name}"
    save_figure(options.out, explanation, video.frames, title)
    print(f"{score:.4f}, best moment {clock(explanation.moment)}: {options.out}")
    return 0


def _print_hits(sentence: str, hits: list, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"query": sentence, "hits": [hit.to_json() for hit in hits]}))
    else:
        print(f"{sentence}\n{format_hits(hits)}")


def _named_model(options: argparse.Namespace) -> SearchModel | None:
    if options.workdir and options.weights:
        raise UserError("give --workdir or --weights, not both")
    if options.workdir:
        return models.from_workdir(options.workdir, options.checkpoint)
    return models.from_weights(options.weights) if options.weights else None


def _captions(options: argparse.Namespace, session: SearchSession) -> list[str]:
    """What the prompt's `i` chooses from: a file's lines, or the test captions of the run."""
    if options.captions:
        return _lines(options.captions)
    config = session.model.config
    try:
        return load_split(VideoDataset(dataset_dir(config)), "test", config.data).caption_pairs()[1]
    except DatasetError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as lines of text ({error})") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} has no lines")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("drl_jax.search", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--workdir", type=Path, help="run whose model is used")
    model.add_argument("--checkpoint", default="best", help="of the run: best, latest or a step")
    model.add_argument("--weights", type=Path, help="or a file of weights: CLIP, or a DRL model")
    common = argparse.ArgumentParser(add_help=False, parents=[model])
    common.add_argument("--index", type=Path, required=True, help="directory of the index")
    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument("--url", default="", help="of a Qdrant cluster; embedded without it")
    engine.add_argument("--collection", default="", help="its name, if it is to have another")

    making = commands.add_parser("index", parents=[common], help=index.__doc__)
    making.add_argument("--videos", type=Path, required=True, help="folder, with its subfolders")
    making.add_argument("--storage", choices=STORAGES, default=STORAGES[0], help="of the features")
    making.add_argument("--timeout", type=float, default=300.0, help="seconds for a video")
    making.set_defaults(run=index)

    asking = commands.add_parser("query", parents=[common, engine], help=query.__doc__)
    asking.add_argument("query", nargs="*", help="sentences; none, and you are asked for them")
    asking.add_argument("--queries", type=Path, help="file with a sentence a line")
    asking.add_argument("--video", type=Path, help="a video file as the query")
    asking.add_argument("--sentences", type=Path, help="file of sentences to rank for --video")
    asking.add_argument("--captions", type=Path, help="what the prompt's i chooses from")
    asking.add_argument("--top", type=_positive, default=5, help="hits of a query")
    asking.add_argument("--json", action="store_true", help="one JSON object a query")
    asking.add_argument("--engine", choices=("exact", "qdrant"), default="exact")
    asking.add_argument("--candidates", type=_positive, default=100, help="of the engine")
    asking.set_defaults(run=query)

    exporting = commands.add_parser("export", parents=[common, engine], help=export.__doc__)
    exporting.set_defaults(run=export)

    judging = commands.add_parser("recall", parents=[common, engine], help=recall.__doc__)
    judging.add_argument("--queries", type=Path, required=True, help="file with a sentence a line")
    judging.add_argument(
        "--candidates", type=_numbers, default=[10, 20, 50, 100, 200, 500], help="10,20,50"
    )
    judging.add_argument("--top", type=_positive, default=10, help="of the exact answer")
    judging.add_argument("--json", action="store_true", help="one JSON list")
    judging.set_defaults(run=recall)

    serving = commands.add_parser("serve", parents=[common], help=serve.__doc__)
    serving.add_argument("--host", default="127.0.0.1", help="where to listen: this machine alone")
    serving.add_argument("--port", type=int, default=8000, help="0 finds a free one")
    serving.add_argument("--top", type=_positive, default=5, help="videos of a query")
    serving.set_defaults(run=serve)

    showing = commands.add_parser("explain", parents=[model], help=explain.__doc__)
    showing.add_argument("--index", type=Path, help="whose model is used")
    showing.add_argument("--query", required=True, help="a sentence")
    showing.add_argument("--video", type=Path, required=True, help="file, or its path in the index")
    showing.add_argument("--out", type=Path, required=True, help="figure: .png, .svg or .pdf")
    showing.set_defaults(run=explain)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file that it touches
    cache_compilations()
    return report_errors("drl_jax.search", lambda: options.run(options), "what was indexed is kept")


if __name__ == "__main__":
    sys.exit(main())
