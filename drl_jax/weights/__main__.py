"""Says what a file of weights is, and whether it loads; reads no values of tensors.

python -m drl_jax.weights FILE|FOLDER|hf-hub:ORG/NAME
"""

import argparse
import sys
from collections.abc import Sequence

from drl_jax.runtime.cli import Parser, run_command
from drl_jax.weights import FILE_FLAGS


def _print(source: str, release: str, key: str, tokenizer: str) -> None:
    from drl_jax.models.drl import param_shapes
    from drl_jax.models.tokenizers import check_cleaning
    from drl_jax.weights.load import check_state, config_of_weights
    from drl_jax.weights.weights_file import read_weights

    weights = read_weights(source, release, key)
    if tokenizer:
        weights = weights._replace(tokenizer=tokenizer)
    description, backbone = weights.description, weights.description.backbone
    contents, towers = weights.contents, weights.towers
    assert contents is not None
    assert towers is not None
    size = sum(path.stat().st_size for path in contents.files)
    print(f"{contents.files[0]}: {contents.form}, {len(contents.tensors)} tensors, {_bytes(size)}")
    names = f"names of {towers.form.publisher}"
    print(f"family     {towers.family}, {names}, prefix {towers.prefix[:-1] or 'none'}")
    for tower, label in (("vision", "images"), ("text", "captions")):
        sizes = [getattr(backbone, f"{tower}_{size}") for size in ("layers", "width", "heads")]
        print(f"{label:<10} {sizes[0]} layers of {sizes[1]} channels in {sizes[2]} heads", end="; ")
        if tower == "vision":
            print(
                f"{backbone.image_resolution} pixels ({backbone.resize}, {backbone.interpolation})"
                f" in patches of {backbone.vision_patch_size}"
            )
        else:
            print(f"{backbone.context_length} positions, {backbone.vocab_size} tokens")
    says = "guessed from" if description.is_guessed else "from"
    activations = ", captions ".join(filter(None, (backbone.activation, backbone.text_activation)))
    print(f"activation {activations} ({says} {description.activation_from})")
    config = config_of_weights(weights)
    usual = "of CLIP" if backbone.text_cleaning == "clip" else "none beside the file"
    print(f"tokenizer  {weights.tokenizer or usual}; cleaning {backbone.text_cleaning}")
    heads = f"interaction {config.model.interaction}, temporal head {config.model.agg_module}"
    print(f"heads      {heads if weights.has_heads else 'none'}")
    print(f"licence    {description.licence or 'not stated by the file'}")
    shapes = param_shapes(config.model)
    for note in description.notes:
        print(f"note       {note}")
    state = weights.state
    table = check_state(state, shapes if weights.has_heads else {"backbone": shapes["backbone"]})
    check_cleaning(config.model)
    parameters = sum(state[name].size for entry in table for name in entry.names)
    print(f"loads      {parameters / 1e6:.1f} M parameters, {_bytes(4 * parameters)} in float32")


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 if the weights load."""
    parser = Parser(
        "python -m drl_jax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="WEIGHTS", help="a file, a folder or hf-hub:ORG/NAME")
    for name, what in FILE_FLAGS.items():
        parser.add_argument(f"--{name}", default="", help=what)
    options = parser.parse_args(arguments)

    def work() -> None:
        _print(options.source, options.release, options.weights_key, options.tokenizer)

    return run_command("drl_jax.weights", work)


if __name__ == "__main__":
    sys.exit(main())
