"""Writes the features of videos or captions to files.

python -m drl_jax.embed --workdir=RUN --videos=DIR --out=videos.npz
python -m drl_jax.embed --workdir=RUN --captions=FILE --out=captions.parquet
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.embed import embed
from drl_jax.embed.files import DTYPES, SHARD_SIZE, SUFFIXES, check_out, read_captions
from drl_jax.pretrained.flags import add_encoder_flag, add_model_flags, required_model
from drl_jax.runtime.cli import Parser, positive_int, positive_seconds, run_command
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.plugins import load_plugins


def _parser() -> Parser:
    parser = Parser(
        "python -m drl_jax.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_flags(parser)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--videos", type=Path, help="folder of videos, searched recursively")
    file = "file of captions: .txt, .csv, .json or .jsonl"
    inputs.add_argument("--captions", type=Path, help=file)
    add("--out", type=Path, required=True, help=f"the file to write: {', '.join(SUFFIXES)}")
    add_encoder_flag(parser)
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the features (%(default)s)")
    files = "videos or captions per file; more inputs make several files (%(default)s)"
    add("--shard_size", type=positive_int, default=SHARD_SIZE, help=files)
    rows = "a row per window of a video, not per video"
    add("--windows", action="store_true", help=rows)
    seconds = "seconds for decoding a video, and one more for each MB (%(default)s)"
    add("--timeout", type=positive_seconds, default=300.0, help=seconds)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 if a video could not be read."""
    options = _parser().parse_args(arguments)

    def work() -> int:
        from drl_jax.runtime.resources import cache_compilations

        cache_compilations()
        load_plugins(options.plugin)
        # Before a model is loaded.
        check_out(options.out)
        if options.captions and options.windows:
            raise UserError("--windows is of videos; omit it")
        captions = read_captions(options.captions) if options.captions else None
        if captions and options.encoder != "auto":
            raise UserError("--encoder is of videos, JAX encodes captions; omit it")
        model, unit = required_model(options), "windows" if options.windows else "videos"
        if captions:
            unit = "captions"
        else:
            model = model.with_encoder(options.encoder)
            print(f"frames are encoded by {model.encoder} in {model.config.model.dtype}")
        names = ("videos", "windows", "dtype", "shard_size", "timeout")
        given = {name: getattr(options, name) for name in names}
        output = embed(model, options.out, captions=captions, **given)
        if not model.interaction.HAS_POOLED:
            name = model.config.model.interaction
            print(f"the interaction {name} has no pooled vectors: the files have no pooled")
        first, *others = output.files
        where = f"{first} and others" if others else first
        files = f"{len(output.files)} files" if others else "1 file"
        nbytes = sum(file.stat().st_size for file in output.finished)
        print(f"{where}: {output.rows} {unit}, {options.dtype}, {files}, {nbytes / 1e6:.1f} MB")
        if output.unreadable:
            count = len(output.unreadable)
            print(f"drl_jax.embed: {count} videos could not be read:", file=sys.stderr)
            for path, reason in sorted(output.unreadable.items()):
                print(f"  {path}: {reason}", file=sys.stderr)
        return 1 if output.unreadable else 0

    kept = "finished files are kept; rerun the command to continue"
    return run_command("drl_jax.embed", work, on_interrupt=kept)


if __name__ == "__main__":
    sys.exit(main())
