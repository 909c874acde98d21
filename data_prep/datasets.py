"""Registry of the datasets that can be built: every `data_prep/NAME/NAME_dataset_builder.py`."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.shapes import scenes, stills

if TYPE_CHECKING:
    from data_prep.retrieval_builder import RetrievalBuilder

# Datasets that the build draws, with their numbers of train, val and test videos by `--size`.
DRAWN = {"shapes": scenes.SIZES, "shapes_stills": stills.SIZES}


def dataset_names() -> list[str]:
    """Names of all datasets, without importing their builders."""
    files = Path(__file__).parent.glob("*/*_dataset_builder.py")
    return sorted(path.parent.name for path in files)


def builder_class(name: str) -> "type[RetrievalBuilder]":
    """Imports the builder of one of `dataset_names()`."""
    return importlib.import_module(f"data_prep.{name}.{name}_dataset_builder").Builder
