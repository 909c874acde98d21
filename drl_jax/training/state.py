"""Everything that training changes: step, parameters, optimiser state. Nothing hides elsewhere."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, init_params
from drl_jax.sharding import Layout


class TrainState(NamedTuple):
    step: jax.Array
    params: Params
    opt_state: Any


def create_state(
    config: ModelConfig, tx: optax.GradientTransformation, seed: int, layout: Layout
) -> TrainState:
    """Fresh state, created on the devices in its final layout."""

    def create() -> TrainState:
        return _state_of(init_params(config, jax.random.key(seed)), tx)

    return jax.jit(create, out_shardings=layout.parameters(jax.eval_shape(create)))()


def state_from_params(
    params: Params, tx: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """The state before the first step from given parameters, on the host or on one device."""
    params = jax.device_get(params)

    def create(params: Params) -> TrainState:
        return _state_of(params, tx)

    out = layout.parameters(jax.eval_shape(create, params))
    return jax.jit(create, out_shardings=out)(params)


def _state_of(params: Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_params(config: ModelConfig, layout: Layout) -> Params:
    """Shapes, dtypes and layout of the parameters, without their memory."""
    return _with_layout(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), layout)


def abstract_state(
    config: ModelConfig, tx: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Shapes, dtypes and layout of the whole state, without its memory."""
    params = abstract_params(config, layout)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return _with_layout(TrainState(step, params, jax.eval_shape(tx.init, params)), layout)


def _with_layout(tree: Any, layout: Layout) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.parameter(x.shape)), tree
    )
