"""Registers interactions, temporal heads and feature extractors of one's own."""

import jax

from drl_jax.models.drl import BACKBONES
from drl_jax.models.extractors import EXTRACTORS, FeatureExtractor
from drl_jax.models.interactions import INTERACTIONS, Interaction
from drl_jax.models.temporal import TEMPORAL_HEADS, TemporalHead
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.plugins import register


def register_interaction(name: str, cls: type[Interaction]) -> None:
    """Makes a class the interaction `name` of `config.model.interaction`.

    A class of the same module and name is replaced, as when a cell of a notebook runs again.

    Raises:
      UserError: `cls` is no subclass of `Interaction`, lacks what each needs, or the name is taken.
    """
    needed = ("encode_text", "encode_video", "similarity", "TEXT_ARRAYS", "VIDEO_ARRAYS")
    _check(cls, Interaction, needed)
    _register("interaction", name, cls, INTERACTIONS)


def register_temporal_head(name: str, cls: type[TemporalHead]) -> None:
    """Makes a class the temporal head `name` of `config.model.agg_module`; else as above.

    Raises:
      UserError: `cls` is no subclass of `TemporalHead`, is not called, or the name is taken.
    """
    _check(cls, TemporalHead, ("__call__",))
    _register("temporal head", name, cls, TEMPORAL_HEADS)


def register_feature_extractor(name: str, cls: type[FeatureExtractor]) -> None:
    """Makes a class the family `name` of `config.model.backbone.family`; else as above.

    Raises:
      UserError: `cls` is no subclass of `FeatureExtractor`, lacks a method or a size, or the name
        is taken.
    """
    _check(cls, FeatureExtractor, ("encode_frames", "encode_tokens"))
    sizes = [getattr(cls, field, None) for field in ("CHANNELS", "IMAGE_SIZE")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{cls.__name__}: CHANNELS and IMAGE_SIZE are positive integers")
    if name in BACKBONES:
        raise UserError(f"{name!r} is a family of towers of drl_jax; choose another name")
    _register("feature extractor", name, cls, EXTRACTORS)


def _check(cls: type, base: type, needed: tuple[str, ...]) -> None:
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise UserError(f"a subclass of {base.__name__} can be registered, not {cls!r}")
    if missing := [name for name in needed if getattr(cls, name) is getattr(base, name)]:
        raise UserError(f"{cls.__name__} does not define {', '.join(missing)}")


def _register(kind: str, name: str, cls: type, registry: dict) -> None:
    if register(kind, name, cls, registry):
        jax.clear_caches()  # Programs are compiled for a configuration, which has the name alone.
