"""Disentangled Representation Learning for text-video retrieval, in JAX/Flax.

import drl_jax
model = drl_jax.load("runs/shapes")
text = model.encode_text(["a red circle moves left"])
video = model.encode_videos(["clip.mp4"])
model.similarity(text, video)  # float32 [1, 1]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drl_jax.models.registry import register_interaction, register_temporal_head
    from drl_jax.pretrained.model import RetrievalModel, Video, load
    from drl_jax.runtime.errors import UserError
    from drl_jax.runtime.plugins import register_dataset

__version__ = "0.3.0"
__all__ = [
    "RetrievalModel",
    "UserError",
    "Video",
    "load",
    "register_dataset",
    "register_interaction",
    "register_temporal_head",
]
# Where those are that are not in `pretrained.model`.
_MODULES = {
    "UserError": "runtime.errors",
    "register_dataset": "runtime.plugins",
    "register_interaction": "models.registry",
    "register_temporal_head": "models.registry",
}


def __getattr__(name: str) -> Any:
    """Imports the API at its first use: commands import this package and start without jax."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = _MODULES.get(name, "pretrained.model")
    return getattr(importlib.import_module(f"drl_jax.{module}"), name)


def __dir__() -> list[str]:
    """The public API: docs/api.md describes these names."""
    return ["__version__", *__all__]
