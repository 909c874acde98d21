"""Numbers that the PyTorch reference computed, in the folder DRL_GOLDEN (`golden/README.md`)."""

import functools
import json
import os
from pathlib import Path

import numpy as np

from drl_jax.weights.description import describe
from drl_jax.weights.weights_file import Weights

GOLDEN = Path(os.environ.get("DRL_GOLDEN", Path(__file__).parents[1] / "golden"))
SPEC = json.loads((GOLDEN / "cases.json").read_text())


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def clip_state() -> dict[str, np.ndarray]:
    return {f"clip.{name}": tensor for name, tensor in load("clip").items()}


@functools.cache
def clip_weights() -> Weights:
    """The golden CLIP as `read_weights` reads OpenAI's archive of it."""
    return Weights(clip_state(), describe("clip", load("clip"), release="openai"))


def case_state(case: dict) -> dict[str, np.ndarray]:
    """The initial parameters of a case, by the reference's names."""
    clip, heads = clip_state(), load("heads")
    state = dict(clip)
    for parameter, source in case["copied_from_clip"].items():
        state[parameter] = clip[f"clip.{source}"]
    prefix = f"arch{case['wti_arch']}."
    for name, tensor in heads.items():
        state.setdefault(name.removeprefix(prefix), tensor)
    return state
