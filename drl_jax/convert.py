"""Converts weights between the reference's files and runs.

python -m drl_jax.convert ViT-B-32.pt runs/clip        (a file to a run)
python -m drl_jax.convert runs/msrvtt drl.safetensors  (a run's checkpoint to a file)
python -m drl_jax.convert adapter.safetensors runs/adapted --base=ViT-B-32.pt
python -m drl_jax.convert interpolate A B OUT.safetensors --alpha=0.5  ((1 - alpha) A + alpha B)

`python -m drl_jax.export` makes programs for other runtimes: StableHLO and ONNX.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.hub.installed import NAMES
from drl_jax.runtime.cli import (
    FILE_FLAGS,
    Parser,
    add_file_flags,
    add_plugin_flag,
    fraction,
    run_command,
)
from drl_jax.runtime.errors import UserError


def _parser() -> Parser:
    parser = Parser(
        "python -m drl_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = (
        "a file of towers (docs/weights.md), a DRL checkpoint, an exported run, the name of"
        f" installed weights ({', '.join(NAMES)}), hf-hub:ORG/NAME; or a run"
    )
    add = parser.add_argument
    add("source", metavar="IN", help=source)
    add("target", type=Path, metavar="OUT", help="directory of the new run; or NAME.safetensors")
    add("--checkpoint", default="best", help="of a run: best, latest or a step (%(default)s)")
    interaction = "for a file without interaction parameters (%(default)s)"
    add("--interaction", choices=("dp", "ti"), default="dp", help=interaction)
    add_file_flags(parser, "of a file: ")
    dtype = "of the tensors of an exported run (float32)"
    add("--dtype", choices=("float32", "float16"), help=dtype)
    towers = "export the towers without the heads, under their publisher's names"
    add("--clip_only", action="store_true", help=towers)
    add("--adapter", choices=("drl", "peft"), help=(
        "export what was trained without its base: drl, a file; peft, a folder as Hugging Face's"
        " library reads, without the heads"
    ))  # fmt: skip
    base = "of an adapter, or a folder of PEFT: the weights that it belongs to (the file says them)"
    add("--base", default="", help=base)
    add_plugin_flag(parser)
    return parser


def _interpolate(arguments: Sequence[str]) -> int:
    parser = Parser("python -m drl_jax.convert interpolate", description="Mixes two models.")
    add = parser.add_argument
    add("start", metavar="A", help="a file of weights or a run")
    add("end", metavar="B", help="another; parameters that A does not have are those of B")
    add("target", metavar="OUT", type=Path, help="NAME.safetensors")
    add("--alpha", type=fraction, required=True, help="0: A, 1: B")
    add_plugin_flag(parser)
    options = parser.parse_args(arguments)

    def work() -> None:
        from drl_jax.runs.interpolation import interpolate
        from drl_jax.runtime.plugins import load_plugins

        load_plugins(options.plugin)
        if options.target.suffix != ".safetensors":
            raise UserError(f"models are mixed into a file NAME.safetensors, not {options.target}")
        interpolate(options.start, options.end, options.target, options.alpha)
        print(f"wrote {options.target}: {1 - options.alpha:g} A + {options.alpha:g} B")

    return run_command("drl_jax.convert", work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["interpolate"]:
        return _interpolate(given[1:])
    options = _parser().parse_args(given)
    source, target = options.source, options.target

    def work() -> None:
        from drl_jax.runs.adapter_files import export_adapter, import_adapter, is_adapter
        from drl_jax.runs.run_params import export_weights, import_weights
        from drl_jax.runtime.plugins import load_plugins
        from drl_jax.runtime.resources import cache_compilations
        from drl_jax.weights.source import is_weights

        cache_compilations()
        load_plugins(options.plugin)
        described = {name: getattr(options, name) for name in FILE_FLAGS}
        is_file = is_adapter(source)
        if options.base and not is_file:
            raise UserError(f"--base is that of an adapter, and {source} has none")
        is_run = not is_file and not is_weights(source)
        if not is_run and (options.clip_only or options.dtype or options.adapter):
            flags = "--dtype, --clip_only and --adapter"
            raise UserError(f"{flags} export a run, and {source} is none")
        if options.adapter and (options.clip_only or options.dtype):
            raise UserError("--dtype and --clip_only are of a whole model, not of --adapter")
        if is_file:
            import_adapter(Path(source), target, options.base, options.interaction, **described)
            print(f"wrote {target}: the base with the adapters of {source}")
            return
        if not is_run:
            config, towers = import_weights(source, target, options.interaction, **described)
            model = config.model
            print(f"{source}: {towers}")
            print(f"wrote {target}: interaction {model.interaction}, agg_module {model.agg_module}")
            return
        if any(described.values()):
            flags = ", ".join(f"--{name}" for name in FILE_FLAGS)
            raise UserError(f"{flags} describe a file, and {source} is a run")
        if target.suffix != ".safetensors" and options.adapter != "peft":
            raise UserError(f"a run is exported to a file NAME.safetensors, not {target}")
        form = {"dtype": options.dtype or "float32", "clip_only": options.clip_only}
        if options.adapter:
            as_peft = options.adapter == "peft"
            step = export_adapter(Path(source), target, options.checkpoint, as_peft=as_peft)
        else:
            step = export_weights(Path(source), target, options.checkpoint, **form)
        print(f"wrote {target}: checkpoint {step} of {source}")

    return run_command("drl_jax.convert", work)


if __name__ == "__main__":
    sys.exit(main())
