"""The flags that name a model, of commands that load one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax.runtime.cli import FILE_FLAGS, Parser, add_file_flags, add_plugin_flag
from drl_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from drl_jax.pretrained.model import RetrievalModel


# What encodes frames.
ENCODERS = ("auto", "jax", "openvino")


def add_encoder_flag(parser: Parser) -> None:
    """Adds `--encoder`."""
    text = (
        "what encodes frames: jax, or openvino, which is faster on CPUs; auto: that of what is"
        " there, or openvino if it is installed and JAX has CPUs only (%(default)s)"
    )
    parser.add_argument("--encoder", choices=ENCODERS, default="auto", help=text)


def add_model_flags(parser: Parser) -> None:
    """Adds `--workdir`, `--checkpoint`, `--weights`, FILE_FLAGS and `--plugin`."""
    add = parser.add_argument
    add("--workdir", type=Path, help="directory of the run with the model")
    add("--checkpoint", default="best", help="of the run: best, latest or a step (%(default)s)")
    file = "instead of a run: a file of weights (docs/weights.md), shapes_clip, hf-hub:ORG/NAME"
    add("--weights", help=file)
    add_file_flags(parser, "of --weights: ")
    add_plugin_flag(parser)


def model_of_flags(options: argparse.Namespace) -> "RetrievalModel | None":
    """Loads the model that the flags name; None: none. Raises UserError if they contradict."""
    if options.workdir and options.weights:
        raise UserError("give --workdir or --weights, not both")
    described = {name: getattr(options, name) for name in FILE_FLAGS}
    if any(described.values()) and not options.weights:
        flags = ", ".join(f"--{name}" for name in FILE_FLAGS)
        raise UserError(f"{flags} describe --weights=FILE; omit them, or give it")
    if not options.workdir and not options.weights:
        return None
    from drl_jax.pretrained.model import load

    if options.workdir:
        return load(options.workdir, options.checkpoint)
    return load(options.weights, **described)


def required_model(options: argparse.Namespace) -> "RetrievalModel":
    """Loads the model that the flags must name, and prints what a file of weights is."""
    model = model_of_flags(options)
    if model is None:
        raise UserError("name the model with --workdir=RUN or --weights=FILE, or --weights=general")
    if model.towers:
        print(f"{options.weights}: {model.towers}")
    return model
