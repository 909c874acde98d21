"""Files of weights in a folder or a repository, told by their names."""

import re
from collections.abc import Iterable
from pathlib import Path

from drl_jax.weights.errors import WeightsFileError, about, read_json, some

# Names of weights, the preferred one first. open_clip's come first: its repositories may have an
# image tower alone under Hugging Face's name.
PREFERRED = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("model.safetensors", "model.safetensors.index.json"),
    *("open_clip_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SUFFIXES = (".safetensors", ".pt")
INDEX, SHARD = ".index.json", re.compile(r"-\d+-of-\d+\.[a-z]+$")
# Hugging Face's preprocessing; newer versions of its library write the second one.
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Files beside weights that describe them, and their tokenizers.
BESIDE = ("open_clip_config.json", "config.json", *PREPROCESSORS, "tokenizer.json", "spiece.model")


def choose_weights(names: Iterable[str]) -> tuple[str, str]:
    """The file of weights among those of a folder, or "" and what is wrong."""
    names = {name for name in names if "/" not in name[:-1]}
    for name in PREFERRED:
        if name in names:
            return name, ""
    parts = sorted(name for name in names if SHARD.search(name) or name.endswith(INDEX))
    files = sorted(name for name in names - set(parts) if name.endswith(SUFFIXES))
    if len(files) == 1:
        return files[0], ""
    if files:
        return "", f"has several files of weights: {some(files)}"
    if parts:
        return "", f"has its weights in parts, without one of their usual lists: {some(parts)}"
    return "", f"has no weights: it has {some(sorted(names)) or 'no files'}"


def file_of_weights(path: Path) -> Path:
    """The file of weights in a folder; another path as it is.

    Raises:
      WeightsFileError: it has none, or several without one of the PREFERRED names.
      Unavailable: it cannot be read.
    """
    with about(path):
        if not path.is_dir():
            return path
        names = [e.name + "/" * e.is_dir() for e in path.iterdir() if not e.name.startswith("._")]
        name, problem = choose_weights(names)
        if "adapter_config.json" in names and not problem:
            raise WeightsFileError(f"has an adapter beside {name}; merge it, or name one file")
        if problem:
            raise WeightsFileError(f"{problem}; name the file")
        return path / name


def files_of(path: Path) -> list[Path]:
    """A file of weights; of a list of parts also the files that it names; errors of `parts_of`."""
    if not path.name.endswith(INDEX):
        return [path]
    return [path, *(path.with_name(name) for name in sorted(set(parts_of(path).values())))]


def parts_of(path: Path) -> dict[str, str]:
    """The file of each tensor, of Hugging Face's list of several files.

    Raises:
      WeightsFileError: the list is damaged, or names files elsewhere.
      Unavailable: it cannot be read.
    """
    files = read_json(path).get("weight_map")
    with about(path):
        if not isinstance(files, dict) or not files:
            raise WeightsFileError('is no list of files of weights: it has no "weight_map"')
        for name in files.values():
            if not isinstance(name, str) or Path(name).name != name or name.endswith(INDEX):
                raise WeightsFileError(f"names {name!r}, which is no file beside it")
    return files
