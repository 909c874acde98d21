"""The reference's optimiser, BertAdam, as an optax transformation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from drl_jax.config import OptimConfig
from drl_jax.models.linear import ADAPTER
from drl_jax.training.trainable import Trainable

# CLIP bounds exp(logit_scale) by 100.
MAX_LOGIT_SCALE = 4.605170185988092


class BertAdamState(NamedTuple):
    """First and second moments of the gradients."""

    mu: optax.Updates
    nu: optax.Updates


class Averaged(NamedTuple):
    """The state of an optimiser of which the model has an average: `OptimConfig.ema`."""

    iterate: optax.Params  # the trained parameters, at which gradients are
    state: optax.OptState


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch's clip_grad_norm_: multiplies by max_norm / (norm + 1e-6) if that is below 1.

    XLA applies the factor where gradients are used; optax's function writes all of them again.
    """

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda gradient: gradient * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_bert_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without bias correction, which optax.scale_by_adam always applies."""

    def init(params):
        return BertAdamState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, BertAdamState(mu, nu)

    return optax.GradientTransformation(init, update)


def make_schedule(
    base_lr: float, warmup_proportion: float, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
    """BertAdam's `warmup_cosine`: linear warm-up from 0, then a cosine over all steps.

    The cosine starts at step 0, not at the end of warm-up, so the curve is discontinuous there.
    """
    total_steps = max(total_steps, 1)
    # The first step after warm-up, by BertAdam's own comparison of Python floats. The quotient that
    # a compiled program computes in float32 may be on the other side.
    end = max(int(warmup_proportion * total_steps) - 1, 0)
    while end / total_steps < warmup_proportion:
        end += 1

    def schedule(step):
        warmup = step / max(warmup_proportion * total_steps, 1e-9)
        # 0.5 * (1 + cos(pi * step / total_steps)), which in float32 cancels at the last steps.
        cosine = jnp.sin(0.5 * jnp.pi * ((total_steps - step) / total_steps)) ** 2
        return base_lr * jnp.where(step < end, warmup, cosine)

    return schedule


def parameter_group(path: tuple) -> str:
    """`backbone` for the pretrained towers and the temperature, `new` for everything else."""
    is_new = path[0].key != "backbone" or path[-1].key in ADAPTER
    return "new" if is_new else "backbone"


def norms(name: str, tree: optax.Updates) -> dict[str, jax.Array]:
    """L2 norms of a tree like the parameters: `NAME`, `NAME_backbone` and `NAME_new`.

    float32 scalars; a `parameter_group` without parameters is left out.
    """
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        groups.setdefault(parameter_group(path), []).append(leaf)
    by_group = {f"{name}_{group}": optax.tree.norm(leaves) for group, leaves in groups.items()}
    return {name: optax.tree.norm(tree), **by_group}


def decays(path: tuple) -> bool:
    """The reference decays every parameter without `bias` in its name, also LayerNorm's."""
    return "bias" not in path[-1].key


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then BertAdam with the learning rate of each group.

    It takes all parameters, and gradients of the trained ones (`Trainable`), which alone have
    moments and updates. With `config.ema`, updates are those of `Averaged.iterate`.
    """
    trainable = Trainable.of(config)
    lr = {"backbone": config.lr * config.coef_lr, "new": config.lr}

    def by_path(function):
        return lambda params: jax.tree_util.tree_map_with_path(lambda p, _: function(p), params)

    def scaled(base):
        schedule = make_schedule(base, config.warmup_proportion, total_steps)
        return optax.scale_by_learning_rate(schedule)

    chain = optax.chain(
        clip_by_global_norm(config.max_grad_norm),
        scale_by_bert_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=by_path(decays)),
        optax.partition(
            {group: scaled(base) for group, base in lr.items()}, by_path(parameter_group)
        ),
    )

    def init(params):
        trained = trainable.split(params)[0]
        state = chain.init(trained)
        # A copy: an array can be donated once.
        return Averaged(jax.tree.map(jnp.copy, trained), state) if config.ema else state

    def update(grads, state, params):
        if config.ema:
            updates, inner = chain.update(grads, state.state, state.iterate)
            return trainable.scaled(updates, params), Averaged(state.iterate, inner)
        updates, state = chain.update(grads, state, trainable.split(params)[0])
        return trainable.scaled(updates, params), state

    return optax.GradientTransformation(init, update)
