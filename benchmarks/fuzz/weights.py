"""Foreign weights in every format that is read: both zip formats, the legacy one, safetensors."""

import collections
import hashlib
import io
import json
import pickletools
import shutil
from pathlib import Path
from random import Random

import jax
import numpy as np
from safetensors.numpy import save_file

from benchmarks.fuzz.damage import FAILURE, UNDETECTABLE, Damage, damage_file, damage_tree
from drl_jax.models.drl import param_shapes
from drl_jax.runs.weights_writer import save_weights
from drl_jax.weights.load import config_of_weights, params_from_state
from drl_jax.weights.weights_file import read_weights

_GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
_ARCHIVES = ("clip_torchscript.pt", "clip_legacy.pt", "drl_wti_seqtransf.bin")
_FOREIGN, _EXPORTED = "clip.safetensors", "exported.safetensors"


def prepare(root: Path) -> None:
    """Copies the reference's files, and writes a foreign and an exported safetensors file."""
    for name in (*_ARCHIVES, _FOREIGN, _EXPORTED):
        (root / "subjects" / name).mkdir(parents=True)
    for name in _ARCHIVES:
        shutil.copy(_GOLDEN / name, root / "subjects" / name)
    clip = read_weights(_GOLDEN / "clip_legacy.pt", "openai").state
    foreign = {name.removeprefix("clip."): np.asarray(tensor) for name, tensor in clip.items()}
    save_file(foreign, root / "subjects" / _FOREIGN / _FOREIGN)
    weights = read_weights(_GOLDEN / "drl_wti_seqtransf.bin")
    config = config_of_weights(weights)
    params = params_from_state(weights.state, param_shapes(config.model))
    save_weights(root / "subjects" / _EXPORTED / _EXPORTED, params, config)


def damage(root: Path, name: str, directory: Path, random: Random) -> Damage:
    """Damages bytes, or the header of a safetensors file as JSON."""
    path, original = directory / name, (root / "subjects" / name / name).read_bytes()
    if path.suffix == ".safetensors" and random.random() < 0.3:
        what = _damage_header(path, random)
    else:
        what = damage_file(path, random)
    if name == _EXPORTED or not path.exists():
        return Damage(what, FAILURE)
    undetectable = _only_data(original, path.read_bytes(), name)
    return Damage(what, UNDETECTABLE if undetectable else FAILURE)


def _damage_header(path: Path, random: Random) -> str:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    tree, what = damage_tree(json.loads(data[8:end]), random)
    header = json.dumps(tree).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return f"header {what}"


def _only_data(original: bytes, damaged: bytes, name: str) -> bool:
    """Whether only values of tensors changed, in a format without checksums."""
    file = io.BytesIO(original)
    if name.endswith(".safetensors"):
        file.seek(8 + int.from_bytes(original[:8], "little"))
    elif name == "clip_legacy.pt":
        # Magic number, protocol, system, content and keys of the storages.
        for _ in range(5):
            collections.deque(pickletools.genops(file), maxlen=0)
    else:
        return False
    start = file.tell()
    return len(original) == len(damaged) and original[:start] == damaged[:start]


def read(root: Path, name: str, directory: Path) -> str:
    """Digest of the parameters that a model gets from the file, and its configuration."""
    del root
    # An exported file says what it is.
    weights = read_weights(directory / name, "" if name == _EXPORTED else "openai")
    weights.verify()
    config = config_of_weights(weights)
    shapes = param_shapes(config.model)
    # As `initial_params`, which also compiles the initialisation of the heads that CLIP lacks.
    if not weights.has_heads:
        shapes = {"backbone": shapes["backbone"]}
    params = params_from_state(weights.state, shapes)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return f"{digest.hexdigest()} {config}"
