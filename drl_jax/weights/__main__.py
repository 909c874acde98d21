"""Says what a file of weights is, and whether it would load, without loading it.

python -m drl_jax.weights FILE|FOLDER|hf-hub:ORG/NAME
"""

import argparse
import sys
from collections.abc import Sequence

from drl_jax.runtime.cli import Parser, add_file_flags, run_command
from drl_jax.runtime.errors import printable


def _print(source: str, release: str, weights_key: str, tokenizer: str) -> None:
    from drl_jax.weights.description import UNSTATED
    from drl_jax.weights.errors import WeightsError
    from drl_jax.weights.load import check_state, config_of_weights, state_and_shapes
    from drl_jax.weights.weights_file import read_weights

    unstated = None
    try:
        weights = read_weights(source, release, weights_key)
    except WeightsError as error:
        if UNSTATED not in str(error):
            raise
        # The rest is the same for any activation.
        weights, unstated = read_weights(source, "openai", weights_key), error
    weights = weights._replace(tokenizer=tokenizer or weights.tokenizer)
    contents, description = weights.contents, weights.description
    backbone, model = description.backbone, config_of_weights(weights).model
    size = _bytes(sum(path.stat().st_size for path in contents.files))
    print(f"{contents.files[0]}: {contents.form}, {len(contents.tensors)} tensors, {size}")
    of_tower = "{} layers of {} channels in {} heads".format
    image = of_tower(backbone.vision_layers, backbone.vision_width, backbone.vision_heads)
    text = of_tower(backbone.text_layers, backbone.text_width, backbone.text_heads)
    pixels = f"{backbone.image_resolution} pixels ({backbone.resize}, {backbone.interpolation})"
    activation = ", captions ".join(filter(None, (backbone.activation, backbone.text_activation)))
    usual = "of CLIP" if backbone.text_cleaning == "clip" else "none beside the file"
    heads = f"interaction {model.interaction}, temporal head {model.agg_module}"
    for label, words in (
        ("family", f"{backbone.family}, {description.names}"),
        ("images", f"{image}; {pixels} in patches of {backbone.vision_patch_size}"),
        ("captions", f"{text}; {backbone.context_length} positions, {backbone.vocab_size} tokens"),
        ("activation", "not stated" if unstated else f"{activation} ({description.source})"),
        ("tokenizer", f"{weights.tokenizer or usual}; cleaning {backbone.text_cleaning}"),
        ("heads", heads if weights.has_heads else "none"),
        ("licence", "" if unstated else description.licence or "not stated by the file"),
        *(("note", note) for note in description.notes),
    ):
        print(f"{label:<10} {printable(words)}")
    if unstated is not None:
        raise unstated
    state, shapes = state_and_shapes(model, weights)
    count = sum(state[name].size for entry in check_state(state, shapes) for name in entry.names)
    print(f"loads      {count / 1e6:.1f} M parameters, {_bytes(4 * count)} in float32")


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 if the weights load."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m drl_jax.weights", description=__doc__, formatter_class=layout)
    parser.add_argument("source", metavar="WEIGHTS", help="a file, a folder or hf-hub:ORG/NAME")
    add_file_flags(parser)
    given = vars(parser.parse_args(arguments))
    return run_command("drl_jax.weights", lambda: _print(**given))


if __name__ == "__main__":
    sys.exit(main())
