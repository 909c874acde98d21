"""Searches your own videos with a sentence.

python -m drl_jax.search index --workdir=RUN --videos=DIR --index=DIR
python -m drl_jax.search query --index=DIR "a dog catches a ball" --top=5
python -m drl_jax.search serve --index=DIR
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.model_flags import add_model_flags
from drl_jax.runtime.cli import Parser, add_ray_flag, positive_int, positive_seconds, run_command
from drl_jax.search import CANDIDATES, ENGINES, MOMENTS, REFINE, SCAN_FROM, STORAGES


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.search", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    model = Parser("", add_help=False)
    add_model_flags(model)
    common = Parser("", add_help=False, parents=[model])
    common.add_argument("--index", type=Path, required=True, help="directory of the index")
    qdrant = Parser("", add_help=False)
    qdrant.add_argument("--url", default="", help="of a Qdrant server, for --engine=qdrant")
    qdrant.add_argument(
        "--hubness",
        default="",
        metavar="is|nnn",
        help="rank sentences without hubs, in an index with a --bank: is:BETA or nnn:K:W (is is"
        " is:20, nnn is nnn:128:0.75)",
    )
    answering = Parser("", add_help=False, parents=[qdrant])
    answering.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="exact compares all windows; scan first compares one vector of each; auto scans above"
        f" {SCAN_FROM:,} windows; qdrant finds candidates of sentences (%(default)s)",
    )
    answering.add_argument(
        "--candidates",
        type=positive_int,
        default=CANDIDATES,
        help="windows that a scan or qdrant finds, to be compared exactly (%(default)s)",
    )
    answering.add_argument(
        "--refine",
        type=_count,
        default=REFINE,
        metavar="N",
        help="windows of long files that a query makes, to find where its moments start; 0: none"
        " (%(default)s)",
    )

    text = "create or update the index of a folder of videos"
    index = commands.add_parser("index", parents=[common], help=text, description=text)
    index.add_argument(
        "--videos", type=Path, required=True, help="folder of the videos, searched recursively"
    )
    index.add_argument(
        "--storage",
        choices=STORAGES,
        default=STORAGES[0],
        help="how features are stored (%(default)s)",
    )
    index.add_argument(
        "--fps",
        type=_frame_rate,
        default=1.0,
        help="frames a second that are stored of files of several windows, 1 to 4: more find where"
        " moments start more exactly (%(default)g)",
    )
    index.add_argument(
        "--timeout",
        type=positive_seconds,
        default=300.0,
        help="seconds for decoding a video, and one more for each MB (%(default)s)",
    )
    index.add_argument(
        "--prune", action="store_true", help="remove files that are gone also if most of them are"
    )

    index.add_argument(
        "--bank",
        default="",
        metavar="train|FILE",
        help="of a new index: captions of other videos, for --hubness: the training captions of"
        " the run, or a file with one per line",
    )
    index.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATH",
        help="only this file of the folder, in a time that does not depend on the size of the"
        " index; repeatable",
    )
    index.add_argument(
        "--shard",
        metavar="NUMBER/COUNT",
        help="of a new index: only a part of the files, chosen by their paths, from 0/16 to 15/16",
    )

    text = "write an index that opens several others as one"
    join = commands.add_parser("join", help=text, description=text)
    join.add_argument("--index", type=Path, required=True, help="directory of the joined index")
    join.add_argument(
        "shards", type=Path, nargs="+", metavar="SHARD", help="directory of an index to join"
    )

    add_ray_flag(index, "decode on")

    text = "answer queries, or prompt for them"
    query = commands.add_parser("query", parents=[common, answering], help=text, description=text)
    query.add_argument("query", nargs="*", help="sentences; without any, a prompt asks for them")
    query.add_argument("--queries", type=Path, help="file with one sentence per line")
    query.add_argument("--video", type=Path, help="a video file as the query, or a part of it")
    query.add_argument("--picture", type=Path, help="an image file as the query, or a part of it")
    query.add_argument(
        "--like", metavar="PATH@SECONDS", help="a moment of an indexed video as the query"
    )
    query.add_argument(
        "--without", default="", metavar="SENTENCE", help="what is not seen, beside another query"
    )
    query.add_argument("--folder", default="", help="only videos below this folder of the index")
    query.add_argument("--name", default="", help="only videos whose name has this, or matches *")
    query.add_argument("--min_length", type=float, default=0.0, help="seconds at least")
    query.add_argument("--max_length", type=float, default=math.inf, help="seconds at most")
    for flag, when in (("--since", "later"), ("--until", "earlier")):
        query.add_argument(flag, default="", metavar="YYYY-MM-DD", help=f"changed then or {when}")
    query.add_argument(
        "--only", action="append", default=[], metavar="PATH", help="only this video; repeatable"
    )
    query.add_argument("--sentences", type=Path, help="file of sentences to rank for --video")
    query.add_argument(
        "--captions",
        type=Path,
        help="file of captions for the prompt's i (default: the test split)",
    )
    query.add_argument("--top", type=positive_int, default=5, help="hits per query (%(default)s)")
    query.add_argument(
        "--moments", type=positive_int, default=MOMENTS, help="moments per hit (%(default)s)"
    )
    query.add_argument("--json", action="store_true", help="print one JSON object per query")

    text = "write the vectors of an index to Qdrant, or update them"
    commands.add_parser("export", parents=[common, qdrant], help=text, description=text)

    text = "measure how much of the exact answer the candidates contain, and the times"
    recall = commands.add_parser("recall", parents=[common, qdrant], help=text, description=text)
    recall.add_argument(
        "--queries", type=Path, required=True, help="file with one sentence per line"
    )
    recall.add_argument(
        "--engine",
        choices=("scan", "qdrant"),
        default="scan",
        help="of the candidates (%(default)s)",
    )
    recall.add_argument(
        "--candidates",
        type=_positive_ints,
        default=[20, 50, 100, 200, 500, 1000],
        metavar="20,50,...",
        help="numbers of candidates",
    )
    recall.add_argument(
        "--top", type=positive_int, default=10, help="exact hits to look for (%(default)s)"
    )
    recall.add_argument("--json", action="store_true", help="print one JSON list")

    text = "list videos that show the same, also scaled, compressed or mirrored"
    duplicates = commands.add_parser("duplicates", help=text, description=text)
    duplicates.add_argument("--index", type=Path, required=True, help="directory of the index")
    duplicates.add_argument("--json", action="store_true", help="print one JSON list")

    text = "serve the search page"
    serve = commands.add_parser("serve", parents=[common, answering], help=text, description=text)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    serve.add_argument(
        "--allowed_hosts",
        default="",
        metavar="NAME,...",
        help="names that lead to this server, besides that of --host",
    )
    serve.add_argument(
        "--no_token",
        action="store_true",
        help="answer whoever reaches a --host that other machines can reach",
    )
    serve.add_argument("--port", type=int, default=8000, help="0 chooses a free one (%(default)s)")
    serve.add_argument("--top", type=positive_int, default=12, help="hits per query (%(default)s)")

    serve.add_argument(
        "--max_upload",
        type=positive_int,
        default=500,
        metavar="MB",
        help="of a video that is sent as a query, at most (%(default)s)",
    )

    text = "draw how the words and frames of one pair contribute to its score"
    explain = commands.add_parser("explain", parents=[model], help=text, description=text)
    explain.add_argument("--index", type=Path, help="directory of an index, for its model")
    explain.add_argument("--query", required=True, help="a sentence")
    explain.add_argument(
        "--video", type=Path, required=True, help="a video file, or its path in the index"
    )
    explain.add_argument("--out", type=Path, required=True, help="figure: .png, .svg or .pdf")
    return parser


def _positive_ints(text: str) -> list[int]:
    return [positive_int(number) for number in text.split(",")]


def _count(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def _frame_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 1 <= rate <= 4:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 4, not {text!r}")
    return rate


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        from drl_jax.runtime.compilation_cache import cache_compilations
        from drl_jax.search.commands import COMMANDS

        cache_compilations()
        COMMANDS[options.command](options)

    kept = "the index is kept; rerun the command to continue" if options.command == "index" else ""
    return run_command("drl_jax.search", work, on_interrupt=kept)


if __name__ == "__main__":
    sys.exit(main())
