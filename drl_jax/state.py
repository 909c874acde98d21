"""Everything that training changes: step, parameters, optimiser state. Nothing hides elsewhere."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, init_params
from drl_jax.sharding import replicated


class TrainState(NamedTuple):
    step: jax.Array
    params: Params
    opt_state: Any


def create_state(
    config: ModelConfig, tx: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """Fresh state, created on the devices in its final layout."""

    def create() -> TrainState:
        return _state_of(init_params(config, jax.random.key(seed)), tx)

    return jax.jit(create, out_shardings=replicated(mesh))()


def state_from_params(params: Params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step from given parameters."""
    return jax.jit(lambda p: _state_of(p, tx), out_shardings=replicated(mesh))(params)


def _state_of(params: Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Shapes, dtypes and layout of the parameters, without their memory."""
    return _with_layout(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), mesh)


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layout of the whole state, without its memory."""
    params = abstract_params(config, mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return _with_layout(TrainState(step, params, jax.eval_shape(tx.init, params)), mesh)


def _with_layout(tree: Any, mesh: Mesh) -> Any:
    layout = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)
