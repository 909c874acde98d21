"""Storage of features as bfloat16 or int8."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from drl_jax.models.interactions import Arrays, Features

_FEATURE_SUFFIXES = ("_unit", "_feat")


def quantize(features: Features, storage: str) -> Features:
    """Converts features to the form in which an index stores them.

    int8 stores a scale for each vector (the last axis): `NAME * NAME.scale[..., None]` differs from
    the vector by at most 1/254 of its largest channel.

    Args:
      features: arrays of videos; names of features end in `_unit` or `_feat`.
      storage: one of `drl_jax.search.STORAGES`.

    Returns:
      bfloat16: the bits of features as uint16. int8: features as int8, and float32 `NAME.scale`.
      Other arrays, such as masks and weights, are not changed.
    """
    stored: Features = {}
    for name, array in features.items():
        if not name.endswith(_FEATURE_SUFFIXES) or storage == "float32":
            stored[name] = array
        elif storage == "bfloat16":
            stored[name] = array.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            largest = np.abs(array).max(axis=-1).astype(np.float32)
            scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            stored[name] = np.rint(array / scale[..., None]).astype(np.int8)
            stored[f"{name}.scale"] = scale
    return stored


def float32_of(stored: np.ndarray) -> np.ndarray:
    """Features stored as bfloat16 or float32, as float32; nothing is compiled for their shape."""
    return (
        stored.view(ml_dtypes.bfloat16).astype(np.float32) if stored.dtype == np.uint16 else stored
    )


def dequantize(arrays: dict[str, Any]) -> Arrays:
    """Converts stored arrays (`quantize`) to those that interactions take, features float32."""
    features = {}
    for name, array in arrays.items():
        if name.endswith(".scale"):
            continue
        if array.dtype == jnp.uint16:
            # bfloat16 is the upper half of a float32. XLA's own conversion, and any slice of a
            # bfloat16 array, is ten times slower than this on a CPU.
            bits = jnp.asarray(array).astype(jnp.uint32) << 16
            array = jax.lax.bitcast_convert_type(bits, jnp.float32)
        elif array.dtype == jnp.int8:
            array = array.astype(jnp.float32) * arrays[f"{name}.scale"][..., None]
        features[name] = array
    return features
