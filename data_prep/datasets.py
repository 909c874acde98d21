"""The datasets that can be built: every `data_prep/NAME/NAME_dataset_builder.py`."""

import importlib
from pathlib import Path

from data_prep.retrieval_builder import RetrievalBuilder


def dataset_names() -> list[str]:
    files = Path(__file__).parent.glob("*/*_dataset_builder.py")
    return sorted(path.parent.name for path in files)


def builder_class(name: str) -> type[RetrievalBuilder]:
    """The builder of a dataset of `dataset_names`."""
    return importlib.import_module(f"data_prep.{name}.{name}_dataset_builder").Builder
