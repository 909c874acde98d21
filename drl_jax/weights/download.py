"""Downloads weights: OpenAI's CLIP to a directory, or a repository of the Hub to its cache.

python -m drl_jax.weights.download ViT-B/32 --out=weights
python -m drl_jax.weights.download hf-hub:ORG/NAME
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.hub import openai, repository
from drl_jax.runtime.cli import Parser, run_command
from drl_jax.weights.source import weights_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    name = "drl_jax.weights.download"
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(f"python -m {name}", description=__doc__, formatter_class=layout)
    choices = f"{', '.join(openai.MODELS)} or {repository.PREFIX}ORG/NAME"
    parser.add_argument("model", metavar="MODEL", help=f"{choices}[@REVISION]")
    out = "directory for a file of OpenAI's (weights)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    options = parser.parse_args(arguments)
    model, is_hub = options.model, repository.is_hub_name(options.model)
    if model not in openai.MODELS and not is_hub:
        parser.error(f"argument MODEL: {model!r} is not {choices}")
    if is_hub and options.out:
        parser.error("--out is for OpenAI's files; HF_HOME moves the cache of the Hub")

    def work() -> None:
        if is_hub:
            path = weights_path(model)
            init = f"{model.partition('@')[0]}@{repository.resolved_revision(path)}"
        else:
            url = openai.url_of(model)
            init = path = (options.out or Path("weights")) / url.rsplit("/", 1)[1]
            openai.download(url, openai.MODELS[model], path)
        print(f"{path}; train with --config.model.init={init}")

    kept = "the partial download is kept; rerun the command to continue"
    return run_command(name, work, on_interrupt=kept)


if __name__ == "__main__":
    sys.exit(main())
