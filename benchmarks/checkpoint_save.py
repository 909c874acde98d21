"""Seconds to save a checkpoint, and to compute its checksums.

    python -m benchmarks.checkpoint_save [--saves=3] [--record]

ViT-B/32 with its optimiser state (2 GB), saved to a temporary directory. Needs jax, flax, optax,
numpy and orbax-checkpoint.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, positive_int, report
from drl_jax.config import ModelConfig, OptimConfig
from drl_jax.models.drl import param_shapes
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.checksums import summarise
from drl_jax.runtime.allocator import keep_freed_memory
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import state_from_params


def measure(saves: int) -> dict:
    """Saves `saves` checkpoints after one that warms up."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(ModelConfig())
    )
    state = state_from_params(params, make_optimizer(OptimConfig(), 10), make_layout())
    # Moments of a real run do not compress to nothing.
    state = state._replace(opt_state=jax.tree.map(_noise, state.opt_state))
    checksum_seconds, save_seconds = [], []
    with tempfile.TemporaryDirectory() as directory, Checkpoints(Path(directory)) as checkpoints:
        for step in range(1, saves + 2):
            state = state._replace(step=jnp.int32(step))
            start = time.perf_counter()
            summarise((state.params, state.opt_state))
            checksum_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoints.save(state)
            checkpoints.wait()
            save_seconds.append(time.perf_counter() - start)
    checksum, save = (statistics.median(times[1:]) for times in (checksum_seconds, save_seconds))
    return {
        "gigabytes": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9, 2),
        "save_seconds": round(save, 2),
        "checksum_seconds": round(checksum, 3),
        "checksum_share": round(checksum / save, 3),
    }


def _noise(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = arguments("checkpoint_save", __doc__.splitlines()[0])
    parser.add_argument("--saves", type=positive_int, default=3, help="timed saves (%(default)s)")
    options = parser.parse_args(argv)
    keep_freed_memory()
    report([measure(options.saves)], options)


if __name__ == "__main__":
    main()
