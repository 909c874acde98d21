"""Where weights are: in a file, a folder, a repository of the Hub, or installed under a name."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from drl_jax.hub import installed, openai, repository
from drl_jax.hub.recommended import RECOMMENDED
from drl_jax.runtime.files import json_sha256, sha256
from drl_jax.weights.errors import WeightsError, about, read_json, some

# Names of weights, the preferred one first. open_clip's come first: its repositories may have an
# image tower alone under Hugging Face's name.
PREFERRED = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("model.safetensors", "model.safetensors.index.json"),
    *("open_clip_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SUFFIXES = (".safetensors", ".pt")
# Names of lists of parts, and how those of the parts end.
INDEX, SHARD = ".index.json", re.compile(r"-\d+-of-\d+\.[a-z]+$")
# Hugging Face's preprocessing; newer versions of its library write the second one.
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Files beside weights that describe them, and their tokenizers.
_BESIDE = ("open_clip_config.json", "config.json", *PREPROCESSORS, "tokenizer.json", "spiece.model")


def weights_path(source: str | os.PathLike) -> Path:
    """The path of a file of weights, which is downloaded if it has to be.

    Args:
      source: a path of a file, or of a folder that holds one; or, as a string, one of
        `installed.NAMES`, `openai.MODELS` or RECOMMENDED, or a repository `hf-hub:ORG/NAME`, also
        if there is a file or directory of that name.

    Raises:
      WeightsError: a folder has no weights, or several.
      UserError: see `repository.download`, `openai.download` and `installed.path_of`.
    """
    source = resolved(source)
    if repository.is_hub_name(source):
        return repository.download(source, _wanted, _parts)
    if source in installed.NAMES:
        return installed.path_of(source)
    if source in openai.MODELS:
        return openai.cached(source)
    path = Path(source)
    with about(path):
        if not path.is_dir():
            return path
        names = [e.name + "/" * e.is_dir() for e in path.iterdir() if not e.name.startswith("._")]
        name, problem = choose_weights(names)
        if problem:
            raise WeightsError(f"{problem}; name the file")
        if "adapter_config.json" in names:
            raise WeightsError(f"has an adapter beside {name}; merge it, or name one file")
        return path / name


def is_name(source: str | os.PathLike) -> bool:
    """Whether a source of weights is a name that `weights_path` knows, and no path."""
    names = (*installed.NAMES, *openai.MODELS, *RECOMMENDED)
    return repository.is_hub_name(source) or source in names


def resolved(source: str | os.PathLike) -> str | os.PathLike:
    """The source that a name of RECOMMENDED stands for; another one as it is."""
    return RECOMMENDED[source].source if source in RECOMMENDED else source


def is_weights(source: str | os.PathLike) -> bool:
    """Whether a source names weights, and not a directory of a run."""
    folder = Path(source)
    if repository.is_hub_name(source) or not folder.is_dir():
        return True
    with about(folder):
        names = [entry.name for entry in folder.iterdir()]
    return "checkpoints" not in names and bool(choose_weights(names)[0])


def to_download(source: str) -> int | None:
    """Bytes that `weights_path` has to download of a name; None: their number is not known."""
    source = resolved(source)
    if repository.is_hub_name(source):
        return repository.to_download(source, _wanted)
    return None if source in openai.MODELS and not openai.is_cached(source) else 0


def weights_sha256(source: str | os.PathLike) -> str:
    """SHA-256 of a file of weights, or of those of all its parts."""
    path = weights_path(source)
    hashes = {file.name: sha256(file) for file in (path, *_parts(path))}
    return json_sha256(hashes) if len(hashes) > 1 else hashes[path.name]


def choose_weights(names: Iterable[str]) -> tuple[str, str]:
    """The file of weights among those of a folder, or "" and what is wrong."""
    names = {name for name in names if "/" not in name[:-1]}
    parts = sorted(name for name in names if SHARD.search(name) or name.endswith(INDEX))
    files = sorted(name for name in names - set(parts) if name.endswith(SUFFIXES))
    usual = [name for name in PREFERRED if name in names]
    if usual or len(files) == 1:
        return (usual or files)[0], ""
    if files:
        return "", f"has several files of weights: {some(files)}"
    if parts:
        return "", f"has its weights in parts, without one of their usual lists: {some(parts)}"
    return "", f"has no weights: it has {some(sorted(names)) or 'no files'}"


def _wanted(source: str, names: Iterable[str]) -> list[str]:
    """Of the files of a repository, the weights and before them those that belong beside them."""
    names = list(names)
    name, problem = choose_weights(names)
    if problem:
        raise repository.HubError(
            f"{source} {problem}; supported are {', '.join(PREFERRED)} or a single file *"
            f"{' or *'.join(SUFFIXES)}; download the right one with `hf download` and give its path"
        )
    return [*(other for other in _BESIDE if other in names), name]


def _parts(path: Path) -> list[Path]:
    parts = parts_of(path) if path.name.endswith(INDEX) else {}
    return [path.with_name(name) for name in sorted(set(parts.values()))]


def parts_of(path: Path) -> dict[str, str]:
    """The file of each tensor, of Hugging Face's list of several; errors as of `read_json`."""
    files = read_json(path).get("weight_map")
    with about(path):
        if not isinstance(files, dict) or not files:
            raise WeightsError('is no list of files of weights: it has no "weight_map"')
        for name in files.values():
            if not isinstance(name, str) or Path(name).name != name or name.endswith(INDEX):
                raise WeightsError(f"names {name!r}, which is no file beside it")
    return files
