"""Exports a model to programs with its weights inside, which run without drl_jax.

python -m drl_jax.export runs/msrvtt --format=onnx --out=msrvtt_onnx

`python -m drl_jax.convert` exports weights alone.
"""

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from drl_jax.runtime.cli import FILE_FLAGS, Parser, add_file_flags, run_command
from drl_jax.runtime.errors import UserError, one_line

if TYPE_CHECKING:
    import jax

    from drl_jax.pretrained.model import RetrievalModel

FORMATS = ("stablehlo", "onnx")
# Of ONNX's operators: the newest version that the tested onnxruntime implements in full.
_OPSET = 23

Shapes = dict[str, "jax.ShapeDtypeStruct"]


class Program(NamedTuple):
    """A function of named arrays, whose first axes have the sizes A (texts) and B (videos)."""

    name: str
    function: Callable[..., dict[str, "jax.Array"]]  # of keyword arguments
    inputs: Shapes
    outputs: Shapes


def export(model: "RetrievalModel", directory: Path, format: str, *, rerank: bool = False) -> None:
    """Writes three programs and `model.json`, which describes them, to a new directory.

    - `text`: text_ids int32 [A, L], text_mask bool [A, L] -> the interaction's arrays of the texts.
    - `video`: frames uint8 [B, F, S, S, 3], frame_mask bool [B, F] -> those of the videos.
    - `similarity`: all these arrays -> similarity float32 [A, B].
    - `reranked`: these and the similarity -> reranked float32 [A, B], with `rerank`.

    A and B are any numbers, L is `data.max_words` and F `data.max_frames`. Programs compute in
    float32, and normalise pixels themselves.

    Args:
      directory: is empty or does not exist; its parent exists.
      format: "stablehlo", for CPUs and CUDA, which `jax.export.deserialize` reads; or "onnx".
      rerank: writes the program of the reranker of the model, too.

    Raises:
      UserError: another format, a directory with files, a package or a reranker that is missing, or
        a model that the format cannot take. Nothing is written then.
    """
    from drl_jax.runtime.files import publishing, write_json

    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}, but {', '.join(FORMATS)}")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty directory; name a new one")
    if not directory.absolute().parent.is_dir():
        raise UserError(f"{directory}: there is no directory {directory.absolute().parent}")
    write = _onnx_writer() if format == "onnx" else _write_stablehlo
    with publishing(directory) as unfinished:
        described = {}
        for program in _programs(model, rerank=rerank):
            file = f"{program.name}.{format}"
            write(program, unfinished / file)
            ends = {"inputs": program.inputs, "outputs": program.outputs}
            described[program.name] = {"file": file} | {
                end: {
                    name: {"dtype": str(array.dtype), "shape": [_dimension(d) for d in array.shape]}
                    for name, array in arrays.items()
                }
                for end, arrays in ends.items()
            }
        about = {"format": format, **_about(model), "programs": described}
        write_json(unfinished / "model.json", about)


def _dimension(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _about(model: "RetrievalModel") -> dict[str, Any]:
    """What a program that calls the exported ones has to know."""
    import drl_jax
    from drl_jax.models.tokenizers import load_tokenizer

    config, backbone = model.config, model.config.model.backbone
    tokenizer = load_tokenizer(config.model)
    return {
        "version": drl_jax.__version__,
        "fingerprint": model.fingerprint,
        "interaction": config.model.interaction,
        "max_words": config.data.max_words,
        "max_frames": config.data.max_frames,
        "tokenizer": {
            "name": Path(config.model.tokenizer).name or "CLIP",
            "sha256": tokenizer.sha256,
            "pad_id": tokenizer.pad_id,
        },
        "frames": {
            **dataclasses.asdict(model.frame_form),
            "clock": config.data.frame_clock,
            "pixel_mean": backbone.pixel_mean,
            "pixel_std": backbone.pixel_std,
        },
    }


# ---------------------------------------------------------------- programs


def _programs(model: "RetrievalModel", *, rerank: bool) -> Iterator[Program]:
    """The programs of a model, traced as for CPUs: those of GPUs fix layouts of arrays."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, use_abstract_mesh

    from drl_jax.models.drl import model_definition
    from drl_jax.models.reranker import reranker_definition
    from drl_jax.runs.reranker_file import read_reranker, reranker_path

    config, data = model.config.model, model.config.data
    definition = model_definition(dataclasses.replace(config, dtype="float32", remat="none"))
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params)
    # Not the axis of `Layout`, over which arrays are split.
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("program",)).abstract_mesh
    texts, videos = model.interaction.TEXT_ARRAYS, model.interaction.VIDEO_ARRAYS

    def encode_text(text_ids, text_mask):
        arrays = nnx.merge(definition, params).encode_text(text_ids, text_mask)
        return {name: arrays[name] for name in texts}

    def encode_video(frames, frame_mask):
        arrays = nnx.merge(definition, params).encode_video(frames, frame_mask)
        return {name: arrays[name] for name in videos}

    def compare(**arrays):
        text, video = ({name: arrays[name] for name in names} for names in (texts, videos))
        # Not in blocks: the number of videos is a symbol.
        return {"similarity": nnx.merge(definition, params).interaction.similarity(text, video)}

    def program(name: str, function: Callable, inputs: Shapes) -> Program:
        @functools.wraps(function)
        def on_mesh(**arrays):
            with use_abstract_mesh(mesh), jax.default_matmul_precision("highest"):
                return function(**arrays)

        return Program(name, on_mesh, inputs, jax.eval_shape(on_mesh, **inputs))

    count_a, count_b = jax.export.symbolic_shape("A, B")
    shape = jax.ShapeDtypeStruct
    rows = (count_a, data.max_words)
    tokens = {"text_ids": shape(rows, np.int32), "text_mask": shape(rows, bool)}
    clips = (count_b, data.max_frames)
    frames = shape((*clips, *model.frame_form.shape), np.uint8)
    text = program("text", encode_text, tokens)
    video = program("video", encode_video, {"frames": frames, "frame_mask": shape(clips, bool)})
    yield from (text, video)
    compared = program("similarity", compare, {**text.outputs, **video.outputs})
    yield compared
    if not rerank:
        return
    file = read_reranker(reranker_path(model.source), model.config, model.params)

    def rerank_all(similarity, **arrays):
        reranker = nnx.merge(reranker_definition(file.config)[0], file.params)
        text, video = ({name: arrays[name] for name in names} for names in (texts, videos))
        change = reranker(text, video) / jnp.exp(reranker.logit_scale[...])
        return {"reranked": similarity + change}

    yield program("reranked", rerank_all, {**compared.inputs, **compared.outputs})


def _write_stablehlo(program: Program, path: Path) -> None:
    import jax

    exported = jax.export.export(jax.jit(program.function), platforms=("cpu", "cuda"))
    path.write_bytes(exported(**program.inputs).serialize())


def _onnx_writer() -> Callable[[Program, Path], None]:
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(
            f"format=onnx needs jax2onnx ({one_line(error)}): pip install 'drl_jax[onnx]'"
        ) from error
    import jax
    from jax.extend import core

    from drl_jax.models.programs import written_out

    def write(program: Program, path: Path) -> None:
        names, specs = list(program.inputs), list(program.inputs.values())
        outputs = list(program.outputs)

        def function(*arrays):
            results = program.function(**dict(zip(names, arrays, strict=True)))
            return tuple(results[name] for name in outputs)

        # jax2onnx would trace functions of its own, which need sizes that are numbers, in the place
        # of JAX's.
        traced = jax.make_jaxpr(function)(*specs)
        traced = jax.make_jaxpr(functools.partial(written_out, traced.jaxpr, traced.consts))(*specs)
        # It reports shapes that it does not know.
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        try:
            to_onnx(
                core.jaxpr_as_fun(traced),
                specs,
                model_name=program.name,
                opset=_OPSET,
                return_mode="file",
                output_path=path,
                input_names=names,
                output_names=outputs,
            )
        except OSError:
            raise
        except Exception as error:  # Of many kinds, for what it does not know.
            raise UserError(
                f"jax2onnx cannot take the program {program.name!r} of the model"
                f" ({one_line(error)}); format=stablehlo takes every model"
            ) from error
        for weights in path.parent.glob(f"{path.name}.data"):
            weights.chmod(path.stat().st_mode)  # It was private.

    return write


# ---------------------------------------------------------------- command


def _parser() -> Parser:
    parser = Parser(
        "python -m drl_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = "a run, a file of weights (docs/weights.md), shapes_clip, hf-hub:ORG/NAME"
    add("model", metavar="MODEL", help=source)
    add("--checkpoint", default="best", help="of a run: best, latest or a step (%(default)s)")
    add_file_flags(parser, "of a file: ")
    formats = "stablehlo, which JAX reads on CPUs and CUDA; or onnx (drl_jax[onnx])"
    add("--format", choices=FORMATS, required=True, help=formats)
    text = "also the program of the model's reranker (docs/rerank.md)"
    add("--rerank", action="store_true", help=text)
    out = "a new directory: text, video and similarity, and model.json, which describes them"
    add("--out", type=Path, metavar="DIR", required=True, help=out)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        from drl_jax.pretrained.model import load

        described = {name: getattr(options, name) for name in FILE_FLAGS}
        model = load(options.model, options.checkpoint, **described)
        export(model, options.out, options.format, rerank=options.rerank)
        nbytes = sum(file.stat().st_size for file in options.out.iterdir())
        print(f"wrote {options.out}: {options.format}, {nbytes / 1e6:.1f} MB")

    return run_command("drl_jax.export", work)


if __name__ == "__main__":
    sys.exit(main())
