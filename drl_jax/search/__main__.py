"""Searches your own videos with a sentence.

python -m drl_jax.search FOLDER [FOLDER ...] ["a dog catches a ball"]
python -m drl_jax.search index --workdir=RUN --videos=DIR --index=DIR
python -m drl_jax.search query --index=DIR "a dog catches a ball" --top=5
python -m drl_jax.search serve --index=DIR
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from drl_jax.pretrained.flags import add_encoder_flag, add_model_flags
from drl_jax.runtime.cli import (
    Parser,
    add_plugin_flag,
    add_ray_flag,
    positive_int,
    positive_seconds,
    run_command,
)
from drl_jax.runtime.plugins import load_plugins
from drl_jax.search import CANDIDATES, ENGINES, MOMENTS, REFINE, SCAN_FROM, STORAGES


def _parser() -> Parser:
    text = (
        f"{__doc__.splitlines()[0]} FOLDER [FOLDER ...] [SENTENCE] indexes folders, and answers the"
        " sentence or serves the search page: see FOLDER --help. The commands do one thing each."
    )
    parser = Parser("python -m drl_jax.search", description=text)
    what = "FOLDER | COMMAND"
    commands = parser.add_subparsers(dest="command", required=True, metavar=what)

    def add_command(name: str, text: str, *parents: Parser) -> Parser:
        return commands.add_parser(name, parents=parents, help=text, description=text)

    model, index, output, hubness, engine = (Parser("", add_help=False) for _ in range(5))
    add_model_flags(model)
    index.add_argument("--index", type=Path, required=True, help="directory of the index")
    output.add_argument("--json", action="store_true", help="print JSON, one value per line")
    _add_engine_flags(hubness, engine)
    answering = (model, index, hubness, engine)

    text = "create or update the index of a folder of videos"
    _add_index_flags(add_command("index", text, model, index))
    join = add_command("join", "write an index that opens several others as one", index)
    join.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="an index to join")
    _add_query_flags(add_command("query", "answer queries, or ask for them", *answering, output))
    _add_serve_flags(add_command("serve", "serve the search page", *answering))
    text = "write the vectors of an index to Qdrant, or update them"
    add_command("export", text, model, index, hubness)
    text = "measure how much of the exact answer the candidates contain, and the times"
    _add_recall_flags(add_command("recall", text, model, index, hubness, output))
    text = "list videos that show the same, also scaled, compressed or mirrored"
    add_plugin_flag(add_command("duplicates", text, index, output))
    add_command("mcp", "let agents search, by the Model Context Protocol", *answering)
    text = "draw how the words and frames of one pair contribute to its score"
    _add_explain_flags(add_command("explain", text, model))
    return parser


def _folder_parser() -> Parser:
    """The parser of FOLDER ..., which is index, query and serve in one."""
    text = "Indexes folders of videos; answers a sentence, or serves the search page."
    parser = Parser("drl_jax search", description=text)
    add = parser.add_argument
    add("words", nargs="+", metavar="FOLDER", help="folders of videos, and then a sentence or none")
    text = "directory of the index (one in ~/.local/share/drl_jax for these folders)"
    add("--index", type=Path, help=text)
    text = (
        "of a new index: general, large, multilingual, fast; a run, a file of weights, ViT-B/32,"
        " hf-hub:ORG/NAME (general on CPUs, large on GPUs)"
    )
    add("--model", default="", help=text)
    add("--yes", action="store_true", help="agree to download the model")
    add("--json", action="store_true", help="print the answer to a sentence as JSON")
    add("--text", action="store_true", help="look for its words in transcripts, too")
    add("--no_browser", action="store_true", help="open no browser")
    add_plugin_flag(parser)
    _add_serve_flags(parser)
    return parser


def _add_engine_flags(hubness: Parser, engine: Parser) -> None:
    hubness.add_argument("--url", default="", help="of a Qdrant server, for --engine=qdrant")
    text = (
        "rank sentences without hubs, in an index with a --bank: is:BETA or nnn:K:W (is means"
        " is:20, nnn means nnn:128:0.75)"
    )
    hubness.add_argument("--hubness", default="", metavar="is|nnn", help=text)
    text = (
        "exact compares all windows; scan first compares one vector of each; auto scans above"
        f" {SCAN_FROM:,} windows; qdrant finds candidates of sentences (%(default)s)"
    )
    engine.add_argument("--engine", choices=ENGINES, default="auto", help=text)
    text = "windows that a scan or qdrant finds, to be compared exactly (%(default)s)"
    engine.add_argument("--candidates", type=positive_int, default=CANDIDATES, help=text)
    text = "windows that a query makes to find where moments start; 0: none (%(default)s)"
    count = _within(int, 0, 10_000)
    more = "videos that the reranker of the run orders anew, of sentences; 0: none (%(default)s)"
    engine.add_argument("--rerank", type=count, default=0, metavar="N", help=more)
    engine.add_argument("--refine", type=count, default=REFINE, metavar="N", help=text)


def _add_index_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--videos", type=Path, required=True, help="folder of the videos, searched recursively")
    add_encoder_flag(parser)
    add("--storage", choices=STORAGES, default=STORAGES[0], help="of features (%(default)s)")
    text = "frames a second that are stored of files of several windows, 1 to 4 (%(default)g)"
    add("--fps", type=_within(float, 1, 4), default=1.0, help=text)
    text = "seconds for decoding a video, and one more for each MB (%(default)s)"
    add("--timeout", type=positive_seconds, default=300.0, help=text)
    add("--prune", action="store_true", help="remove files that are gone also if most of them are")
    text = "of a new index: captions for --hubness, of the run's training data or one per line"
    add("--bank", default="", metavar="train|FILE", help=text)
    text = "only this file of the folder, however large the index is; repeatable"
    add("--only", action="append", default=[], metavar="PATH", help=text)
    text = "of a new index: only a part of the files, chosen by their paths, from 0/16 to 15/16"
    add("--shard", metavar="NUMBER/COUNT", help=text)
    add("--watch", action="store_true", help="stay, and update the index when files change")
    add_ray_flag(parser, "decode on")


def _add_query_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("query", nargs="*", help="sentences; without any, they are asked for")
    add("--queries", type=Path, help="file with one sentence per line")
    add("--video", type=Path, help="a video file as the query, or a part of it")
    add("--picture", type=Path, help="an image file as the query, or a part of it")
    add("--like", metavar="PATH@SECONDS", help="a moment of an indexed video as the query")
    add("--without", default="", metavar="SENTENCE", help="what is not seen, beside another query")
    add("--folder", default="", help="only videos below this folder of the index")
    add("--name", default="", help="only videos whose name has this, or matches *")
    add("--min_length", type=float, default=0.0, help="seconds at least")
    add("--max_length", type=float, default=math.inf, help="seconds at most")
    add("--since", default="", metavar="YYYY-MM-DD", help="changed then or later")
    add("--until", default="", metavar="YYYY-MM-DD", help="changed then or earlier")
    add("--only", action="append", default=[], metavar="PATH", help="only this video; repeatable")
    text = "look for the words of a sentence in transcripts, too (.srt, .vtt, .json)"
    add("--text", action="store_true", help=text)
    add("--sentences", type=Path, help="file of sentences to rank for --video")
    add("--top", type=positive_int, default=5, help="hits per query (%(default)s)")
    add("--moments", type=positive_int, default=MOMENTS, help="moments per hit (%(default)s)")


def _add_serve_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--allowed_hosts", default="", metavar="NAME,...", help="other names of this server")
    add("--no_token", action="store_true", help="answer also other machines that send no token")
    add(
        "--port",
        type=_within(int, 0, 65_535),
        default=8000,
        help="0 chooses a free one (%(default)s)",
    )
    text = "path of the page, for a proxy: with /videos it is http://HOST/videos/"
    add("--root_path", default="", metavar="PATH", help=text)
    add("--watch", action="store_true", help="update the index when files of its folders change")
    add("--top", type=positive_int, default=12, help="hits per query (%(default)s)")
    text = "of a video that is sent as a query, at most (%(default)s)"
    add("--max_upload", type=positive_int, default=500, metavar="MB", help=text)
    # Called with the address of the page.
    parser.set_defaults(on_start=None)


def _add_recall_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--queries", type=Path, required=True, help="file with one sentence per line")
    add("--engine", choices=("scan", "qdrant"), default="scan", help="(%(default)s)")
    counts = [20, 50, 100, 200, 500, 1000]
    add("--candidates", type=_positive_ints, default=counts, metavar="20,50,...", help="to compare")
    add("--top", type=positive_int, default=10, help="exact hits to look for (%(default)s)")


def _add_explain_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--index", type=Path, help="directory of an index, for its model")
    add("--query", required=True, help="a sentence")
    add("--video", type=Path, required=True, help="a video file, or its path in the index")
    add("--out", type=Path, required=True, help="figure: .png, .svg or .pdf")


def _positive_ints(text: str) -> list[int]:
    return [positive_int(number) for number in text.split(",")]


def _within(kind: type[int] | type[float], least: int, most: float) -> Callable[[str], float]:
    """The type of an argument: a number from `least` to `most`."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"must be a number from {least} to {most}, not {text!r}")

    return read


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    words, parser = sys.argv[1:] if arguments is None else list(arguments), _parser()
    # A word that is a command is the command: a folder of this name is written ./query.
    has_folder = bool(words) and words[0] not in ("-h", "--help", *_commands(parser))
    # Flags may stand before, between and behind folders and a sentence.
    parse = _folder_parser().parse_intermixed_args if has_folder else parser.parse_args
    options = parse(words)

    def work() -> None:
        from drl_jax.runtime.resources import cache_compilations

        cache_compilations()
        load_plugins(getattr(options, "plugin", []))
        if has_folder:
            from drl_jax.search.folders import search_folders

            search_folders(options)
        else:
            from drl_jax.search.commands import COMMANDS

            COMMANDS[options.command](options)

    is_kept = has_folder or options.command == "index"
    kept = "the index is kept; rerun the command to continue" if is_kept else ""
    return run_command("drl_jax.search", work, on_interrupt=kept)


def _commands(parser: Parser) -> Sequence[str]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(commands.choices)


if __name__ == "__main__":
    sys.exit(main())
