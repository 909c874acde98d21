"""The command `drl_jax`: each of its verbs is a module of the package, `python -m drl_jax.VERB`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from drl_jax import __version__

# What each verb does, and its module.
VERBS = {
    "search": ("search videos with a sentence: drl_jax search FOLDER", "drl_jax.search.__main__"),
    "train": ("fine-tune a model on a built dataset", "drl_jax.train"),
    "evaluate": ("metrics and report of a run", "drl_jax.evaluate"),
    "rerank": ("train a reranker of a run, on stored features", "drl_jax.rerank"),
    "compare": ("two runs on the same queries", "drl_jax.compare"),
    "embed": ("write the features of videos or captions to files", "drl_jax.embed.__main__"),
    "convert": ("exchange weights between files and runs", "drl_jax.convert"),
    "export": ("programs of a model for other runtimes", "drl_jax.export"),
    "weights": ("say what a file of weights is", "drl_jax.weights.__main__"),
    "build": ("decode a dataset for training", "data_prep.build"),
    "check": ("look for faults in a built dataset", "data_prep.check"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit status; 2: there is no such verb."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        lines = [f"  {name:<10}{text}" for name, (text, _) in VERBS.items()]
        usage = "usage: drl_jax VERB ...\n\n{}\n\ndrl_jax VERB --help says more of a verb"
        print(usage.format("\n".join(lines)))
        return 0
    if verb == "--version":
        print(f"drl_jax {__version__}")
        return 0
    if verb not in VERBS:
        (likely,) = difflib.get_close_matches(verb, VERBS, n=1) or [""]
        hint = f" (did you mean {likely}?)" if likely else ""
        print(f"drl_jax: there is no verb {verb!r}{hint}; see drl_jax --help", file=sys.stderr)
        return 2
    return importlib.import_module(VERBS[verb][1]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
