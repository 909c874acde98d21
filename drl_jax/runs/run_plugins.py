"""Which classes of a user's own a run was made with: copies of their files, and hashes of them."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drl_jax.config import Config
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.runtime.files import replacing
from drl_jax.runtime.plugins import Origin, origin_of

# Of copies, in the directory of a run.
PLUGINS = "plugins"


def _registered(config: Config) -> Iterator[tuple[str, str, Origin]]:
    """Field of ModelConfig, name and origin of each class of a model that is not the package's."""
    model = config.model
    for field, name, registry in (
        ("interaction", model.interaction, INTERACTIONS),
        ("agg_module", model.agg_module, TEMPORAL_HEADS),
        ("backbone.family", model.backbone.family, EXTRACTORS),
    ):
        if (origin := origin_of(registry.get(name))) is not None:
            yield field, name, origin


def describe_plugins(config: Config) -> list[dict[str, str]]:
    """What a manifest says of the registered classes of a model, one object for each.

    `source` is that of a class without a file; `sha256` is of the file or the source.
    """
    return [
        {
            "field": field,
            "name": name,
            "class": origin.qualified_name,
            "file": origin.file,
            "source": "" if origin.file else origin.content.decode(),
            "sha256": hashlib.sha256(origin.content).hexdigest() if origin.content else "",
        }
        for field, name, origin in _registered(config)
    ]


def keep_plugins(workdir: Path, config: Config) -> None:
    """Copies the files of the registered classes of a model into the directory of its run."""
    for _, _, origin in _registered(config):
        copy = workdir / PLUGINS / origin.file
        if origin.file and not (copy.is_file() and copy.read_bytes() == origin.content):
            copy.parent.mkdir(exist_ok=True)
            with replacing(copy) as unfinished:
                unfinished.write_bytes(origin.content)


def changed_plugins(manifest: Mapping[str, Any] | None, config: Config) -> list[str]:
    """The files, or classes without one, of a model that are other versions than a manifest's."""
    here = {(row["field"], row["name"]): row["sha256"] for row in describe_plugins(config)}
    return [
        row["file"] or row["class"]
        for row in (manifest or {}).get("plugins", [])
        if here.get((row["field"], row["name"]), row["sha256"]) != row["sha256"]
    ]


def how_to_open(workdir: Path, manifest: Mapping[str, Any] | None) -> str:
    """What a user needs who opens a run without its classes."""
    for row in (manifest or {}).get("plugins", []):
        if not row["file"]:
            return f"here, the class {row['class']}, whose source is in manifest.json: register it"
    copies = [f"--plugin={copy}" for copy in sorted((workdir / PLUGINS).glob("*.py"))]
    return f"the run's copy, which you should read: {' '.join(copies) or 'none'}"
