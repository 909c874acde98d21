"""Disentangled Representation Learning for text-video retrieval, in JAX/Flax.

    import drl_jax
    model = drl_jax.load("runs/shapes")
    text = model.encode_text(["a red circle moves left"])
    video = model.encode_videos(["clip.mp4"])
    model.similarity(text, video)  # float32 [1, 1]

    index = drl_jax.Index("my_index", model)
    index.add("videos/")
    index.search("a red circle moves left")

`load(path)` opens a model, and `Index(directory, model)` searches videos. `train(config)`,
`evaluate(run)`, `compare(run, run)` and `embed(model, out)` do what the commands
`python -m drl_jax.train` and so on do. docs/api.md describes all of them.
"""

import importlib
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drl_jax.compare import compare
    from drl_jax.embed import embed
    from drl_jax.evaluate import evaluate
    from drl_jax.models.extractors import FeatureExtractor
    from drl_jax.models.registry import (
        register_feature_extractor,
        register_interaction,
        register_temporal_head,
    )
    from drl_jax.pretrained.inputs import Video
    from drl_jax.pretrained.model import RetrievalModel, load
    from drl_jax.runtime.errors import UserError
    from drl_jax.runtime.plugins import register_dataset
    from drl_jax.search.session import Index
    from drl_jax.train import train

__version__ = "0.3.0"
__all__ = [
    "FeatureExtractor",
    "Index",
    "RetrievalModel",
    "UserError",
    "Video",
    "compare",
    "embed",
    "evaluate",
    "load",
    "register_dataset",
    "register_feature_extractor",
    "register_interaction",
    "register_temporal_head",
    "train",
]
# Where the names are; the others are modules of their own, see `CallableModule`.
_MODULES = {
    "FeatureExtractor": "drl_jax.models.extractors",
    "Index": "drl_jax.search.session",
    "RetrievalModel": "drl_jax.pretrained.model",
    "UserError": "drl_jax.runtime.errors",
    "Video": "drl_jax.pretrained.inputs",
    "load": "drl_jax.pretrained.model",
    "register_dataset": "drl_jax.runtime.plugins",
    "register_feature_extractor": "drl_jax.models.registry",
    "register_interaction": "drl_jax.models.registry",
    "register_temporal_head": "drl_jax.models.registry",
}


class CallableModule(types.ModuleType):
    """The module of a command, which is also the function of its name: `drl_jax.train(config)`.

    A function of the package with the name of its module would be gone when that is imported.
    """

    def __call__(self, *arguments: object, **named: object) -> object:
        return self.__wrapped__(*arguments, **named)

    @property
    def __wrapped__(self) -> types.FunctionType:
        """The function; `inspect.signature` finds it here."""
        return vars(self)[self.__name__.rpartition(".")[2]]


def __getattr__(name: str) -> object:
    """Imports the API at its first use: commands import this package and start without jax."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    return importlib.import_module(f"drl_jax.{name}")


def __dir__() -> list[str]:
    """The public API."""
    return ["__version__", *__all__]
