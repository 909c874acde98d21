"""The training state: step, parameters and optimiser state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, abstract_params, init_params
from drl_jax.sharding import Layout


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    step: jax.Array
    params: Params
    opt_state: Any


def create_state(
    config: ModelConfig, tx: optax.GradientTransformation, seed: int, layout: Layout
) -> TrainState:
    """New state with random parameters, created on the devices with its final shardings."""

    def create() -> TrainState:
        return _initial_state(init_params(config, jax.random.key(seed)), tx)

    return jax.jit(create, out_shardings=layout.parameters(jax.eval_shape(create)))()


def state_from_params(
    params: Params, tx: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """The state before the first step, with given parameters on the host or on one device."""
    params = jax.device_get(params)

    def create(params: Params) -> TrainState:
        return _initial_state(params, tx)

    out = layout.parameters(jax.eval_shape(create, params))
    return jax.jit(create, out_shardings=out)(params)


def _initial_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(
    config: ModelConfig, tx: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its memory."""
    params = abstract_params(config, layout)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return layout.abstract(TrainState(step, params, jax.eval_shape(tx.init, params)))
