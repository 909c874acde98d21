"""Encodes images on CPUs with OpenVINO, faster than XLA: several times in bfloat16.

OpenVINO's front end reads the program that JAX traces. It knows no loops and no calls, so these are
written out first.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend import core
from tqdm import tqdm

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, model_definition
from drl_jax.models.programs import written_out
from drl_jax.runtime.errors import UserError, one_line

# Images of one program, whose shapes are fixed; several run at a time.
_IMAGES = 8


def choose_encoder(asked: str, recorded: str | None = None) -> str:
    """Resolves `auto` of ENCODERS: what was `recorded`, or openvino on CPUs, if it is installed."""
    if asked != "auto" or recorded is not None or jax.default_backend() != "cpu":
        return (recorded or "jax") if asked == "auto" else asked
    try:
        _import_openvino()
    except ImportError:
        return "jax"
    return "openvino"


def _import_openvino() -> Any:
    # An import otherwise reports itself to the vendor, from a fork of this process.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class OpenVINOImages:
    """The image tower of a model, compiled by OpenVINO at the first call.

    It computes in the dtype of the model: features of float32 agree with JAX's to 1e-5 of their
    norm; for bfloat16, OpenVINO rounds elsewhere. A CPU without bfloat16 may compute in float32.
    """

    def __init__(self, model: ModelConfig, params: Params):
        """Raises a UserError if OpenVINO is not installed."""
        self._model, self._params = model, params
        try:
            _import_openvino()
        except ImportError as error:
            raise UserError(
                f"encoder=openvino needs OpenVINO ({one_line(error)}): pip install"
                " 'drl_jax[cpu]', or give encoder=jax"
            ) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, S, S, 3], maybe of a memory map -> features float32 [N, D], as `encode_image`.

        Raises a UserError if OpenVINO cannot take the tower.
        """
        features = np.empty((len(images), self._model.backbone.embed_dim), np.float32)

        def store(request: Any, start: int) -> None:
            part = features[start : start + _IMAGES]
            part[:] = request.get_output_tensor(0).data[: len(part)]

        queue = self._queue
        queue.set_callback(store)
        with tqdm(total=len(images), desc="encoding frames", leave=False, disable=None) as progress:
            for start in range(0, len(images), _IMAGES):
                part = images[start : start + _IMAGES]
                batch = np.zeros((_IMAGES, *part.shape[1:]), np.uint8)
                batch[: len(part)] = part
                queue.start_async({0: batch}, start)
                progress.update(len(part))
            queue.wait_all()
        return features

    @functools.cached_property
    def _queue(self) -> Any:
        openvino = _import_openvino()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.jax.jaxpr_decoder import JaxprPythonDecoder

        hints = {
            "INFERENCE_PRECISION_HINT": "bf16" if self._model.dtype == "bfloat16" else "f32",
            # A program on each of several threads: no one waits where others decode.
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        try:
            front_end = FrontEndManager().load_by_framework("jax")
            decoder = JaxprPythonDecoder(_trace(self._model, self._params))
            program = front_end.convert(front_end.load(decoder))
            return openvino.AsyncInferQueue(openvino.Core().compile_model(program, "CPU", hints))
        except Exception as error:  # The base of those of OpenVINO, which come from C++.
            raise UserError(
                f"OpenVINO {openvino.__version__} cannot take the image tower of the model"
                f" ({one_line(error)}); give encoder=jax"
            ) from error


def _trace(model: ModelConfig, params: Params) -> core.ClosedJaxpr:
    """The image tower in float32 with its parameters: uint8 [_IMAGES, S, S, 3] -> [_IMAGES, D]."""
    definition = model_definition(dataclasses.replace(model, dtype="float32"))
    visual = jax.tree.map(lambda x: np.asarray(x, np.float32), params["backbone"]["visual"])
    params = {**params, "backbone": {**params["backbone"], "visual": visual}}
    size = model.backbone.image_resolution
    images = jax.ShapeDtypeStruct((_IMAGES, size, size, 3), np.uint8)

    def encode(images: jax.Array) -> jax.Array:
        return nnx.merge(definition, params).backbone.encode_image(images, np.ones(_IMAGES, bool))

    traced = jax.make_jaxpr(encode)(images)
    return jax.make_jaxpr(functools.partial(written_out, traced.jaxpr, traced.consts))(images)
