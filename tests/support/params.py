"""Random parameters, without the model's own initialisation, which takes seconds to compile, and
random batches."""

import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.clip import CLIP
from drl_jax.models.drl import Params, param_shapes
from drl_jax.models.towers import INITIAL_LOGIT_BIAS


def openai_shaped_backbone(image_resolution: int) -> BackboneConfig:
    """A small backbone with heads of 64 channels, as OpenAI's CLIP has."""
    return BackboneConfig(
        embed_dim=64,
        image_resolution=image_resolution,
        vision_layers=1,
        vision_width=64,
        vision_heads=1,
        vision_patch_size=16,
        text_width=64,
        text_heads=1,
        text_layers=1,
    )


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, shapes and bits of two state dicts are the same."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def random_batch(pairs: int, words: int, frames: int, size: int) -> dict[str, np.ndarray]:
    """A training batch of a vocabulary of 500 tokens; the first row has no padding."""
    rng = np.random.default_rng(0)
    text_lengths, frame_lengths = rng.integers(3, words + 1, pairs), rng.integers(1, frames, pairs)
    text_lengths[0], frame_lengths[0] = words, frames
    return {
        "text_ids": rng.integers(1, 500, (pairs, words)).astype(np.int32),
        "text_mask": np.arange(words) < text_lengths[:, None],
        "frames": rng.integers(0, 256, (pairs, frames, size, size, 3)).astype(np.uint8),
        "frame_mask": np.arange(frames) < frame_lengths[:, None],
    }


def random_params(config: ModelConfig, seed: int = 0, *, position_std: float = 0.02) -> Params:
    """Parameters at which features, similarities and gradients are of ordinary size.

    Args:
      config: the model.
      seed: of the random numbers.
      position_std: standard deviation of position embeddings; with 1, the order of frames matters
        without training.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [str(entry.key) for entry in path]
        if names[-1] == "logit_scale":
            value = np.full(leaf.shape, CLIP.INITIAL_LOGIT_SCALE)
        elif names[-1] == "logit_bias":
            value = np.full(leaf.shape, INITIAL_LOGIT_BIAS)
        elif names[-1] == "scale":
            value = np.ones(leaf.shape)
        elif names[-1] == "bias":
            value = np.zeros(leaf.shape)
        elif "position" in "/".join(names):
            value = position_std * rng.normal(size=leaf.shape)
        elif names[-1] == "embedding":
            value = 0.02 * rng.normal(size=leaf.shape)
        else:
            value = leaf.shape[-2:][0] ** -0.5 * rng.normal(size=leaf.shape)
        return jnp.asarray(value, jnp.float32)

    shapes = param_shapes(config)
    return jax.tree_util.tree_map_with_path(draw, shapes)
