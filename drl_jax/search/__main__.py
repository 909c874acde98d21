"""Search your own videos with a sentence.

python -m drl_jax.search index --workdir=RUN --videos=DIR --index=DIR
python -m drl_jax.search query --index=DIR "a dog catches a ball" --top=5
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from drl_jax.command import cache_compilations
from drl_jax.data.batches import load_split
from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
from drl_jax.errors import UserError, report_errors
from drl_jax.search import model as models
from drl_jax.search.indexing import IndexReport, update_index
from drl_jax.search.model import SearchModel
from drl_jax.search.prompt import format_hits, run_prompt
from drl_jax.search.session import SearchSession
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
    session = SearchSession(options.index, _named_model(options))
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
    elif queries:
        for sentence, hits in zip(queries, session.search(queries, options.top), strict=True):
            _print_hits(sentence, hits, options.json)
    else:
        run_prompt(session, _captions(options, session), options.top)
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
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--index", type=Path, required=True, help="directory of the index")
    common.add_argument("--workdir", type=Path, help="run whose model is used")
    common.add_argument("--checkpoint", default="best", help="of the run: best, latest or a step")
    common.add_argument("--weights", type=Path, help="or a file of weights: CLIP, or a DRL model")

    making = commands.add_parser("index", parents=[common], help=index.__doc__)
    making.add_argument("--videos", type=Path, required=True, help="folder, with its subfolders")
    making.add_argument("--storage", choices=STORAGES, default=STORAGES[0], help="of the features")
    making.add_argument("--timeout", type=float, default=300.0, help="seconds for a video")
    making.set_defaults(run=index)

    asking = commands.add_parser("query", parents=[common], help=query.__doc__)
    asking.add_argument("query", nargs="*", help="sentences; none, and you are asked for them")
    asking.add_argument("--queries", type=Path, help="file with a sentence a line")
    asking.add_argument("--video", type=Path, help="a video file as the query")
    asking.add_argument("--sentences", type=Path, help="file of sentences to rank for --video")
    asking.add_argument("--captions", type=Path, help="what the prompt's i chooses from")
    asking.add_argument("--top", type=_positive, default=5, help="hits of a query")
    asking.add_argument("--json", action="store_true", help="one JSON object a query")
    asking.set_defaults(run=query)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file that it touches
    cache_compilations()
    return report_errors("drl_jax.search", lambda: options.run(options), "what was indexed is kept")


if __name__ == "__main__":
    sys.exit(main())
