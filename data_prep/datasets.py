"""The datasets that can be built: every `data_prep/NAME/NAME_dataset_builder.py`, and plugins."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.shapes import events, scenes, stills
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.plugins import DATASETS

if TYPE_CHECKING:
    from data_prep.retrieval_builder import RetrievalBuilder

# Datasets that the build draws, with their numbers of train, val and test videos by `--size`.
DRAWN = {"shapes": scenes.SIZES, "shapes_events": events.SIZES, "shapes_stills": stills.SIZES}


def dataset_names() -> list[str]:
    """Names of the datasets of this package, without importing their builders."""
    files = Path(__file__).parent.glob("*/*_dataset_builder.py")
    return sorted(path.parent.name for path in files)


def builder_class(name: str) -> "type[RetrievalBuilder]":
    """Imports the builder of one of `dataset_names()`, or returns that of a plugin.

    Raises:
      UserError: a plugin registered what is no builder, or registered it by the name of another.
    """
    if name in DATASETS:
        from data_prep.retrieval_builder import RetrievalBuilder

        builder = DATASETS[name]
        if name in dataset_names():
            raise UserError(f"the dataset {name!r} exists; register yours by another name")
        if not issubclass(builder, RetrievalBuilder):
            raise UserError(f"{builder.__name__} is no subclass of RetrievalBuilder")
        builder.name = name  # TFDS makes one of the name of the class.
        return builder
    return importlib.import_module(f"data_prep.{name}.{name}_dataset_builder").Builder
