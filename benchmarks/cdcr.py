"""Time and memory of CDCR 3 as a matrix product, and as the reference's [N, D, D] tensor.

    python -m benchmarks.cdcr [--batch=128] [--record]

Forward and backward pass in float32. Each variant runs in its own process; its peak memory is
reported beside its memory before the first call. Needs jax, flax, optax and numpy only.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, peak_memory, positive_int, report
from drl_jax.config import LossConfig
from drl_jax.models import ops
from drl_jax.models.interactions import token_wise
from drl_jax.sharding import make_layout
from drl_jax.training.losses import decorrelation_loss


def tensor_outer_product(
    left: jax.Array, right: jax.Array, mask: jax.Array, weight: jax.Array
) -> jax.Array:
    """`ops.weighted_outer_product` as the reference computes it.

    Materialises the outer product of every row, [N, D, D], and sums it with the weights.
    """
    channels = left.shape[-1]
    mask, weight = mask.reshape(-1), weight.reshape(-1)
    left = ops.masked_standardize(left.reshape(-1, channels), mask)
    right = ops.masked_standardize(right.reshape(-1, channels), mask)
    # Without the barrier, XLA rewrites the sum as a matrix product.
    products = jax.lax.optimization_barrier(left[:, :, None] * right[:, None, :])
    return jnp.einsum("ncd,n->cd", products, weight)


VARIANTS = {"product": ops.weighted_outer_product, "tensor": tensor_outer_product}


def measure(way: str, batch: int, words: int, frames: int, width: int, repeats: int) -> dict:
    """Seconds of a forward and backward pass, and peak memory of this process.

    Args:
      way: one of VARIANTS.
      batch: number of pairs.
      words: tokens per text.
      frames: frames per video.
      width: channels.
      repeats: timed calls.
    """
    rng = np.random.default_rng(0)

    def unit_features(length: int) -> jax.Array:
        return ops.l2_normalize(jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32))

    def mask_and_weights(name: str, length: int) -> dict[str, jax.Array]:
        return {
            f"{name}_mask": jnp.ones((batch, length), bool),
            f"{name}_weight": jnp.full((batch, length), 1 / length),
        }

    others = {**mask_and_weights("text", words), **mask_and_weights("frame", frames)}

    def loss(text_unit: jax.Array, frame_unit: jax.Array) -> jax.Array:
        correlation = token_wise.matched_correlation(text_unit, frame_unit, **others, weighted=True)
        return decorrelation_loss(correlation, LossConfig.cdcr_alpha1, alpha2=0.06)

    layout = make_layout(jax.local_devices()[:1])
    step = jax.jit(layout.on_mesh(jax.value_and_grad(loss, (0, 1)), "float32"))
    inputs = unit_features(words), unit_features(frames)
    idle = peak_memory()
    with mock.patch.object(token_wise, "weighted_outer_product", VARIANTS[way]):
        value, _ = jax.block_until_ready(step(*inputs))  # Traces the variant.
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*inputs))
        seconds.append(time.perf_counter() - start)
    return {
        "loss": float(value),
        "seconds": round(min(seconds), 4),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "idle_memory_gb": round(idle / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures one variant (`--way`), or each of them in its own process."""
    parser = arguments("cdcr", __doc__.splitlines()[0])
    sizes = {"batch": 128, "words": 32, "frames": 12, "width": 512, "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=positive_int, default=value, help="%(default)s")
    parser.add_argument("--way", choices=VARIANTS, help="measure one variant in this process")
    options = parser.parse_args(argv)
    sizes = {name: getattr(options, name) for name in sizes}
    if options.way:
        print(json.dumps(measure(options.way, **sizes)))
        return
    rows = []
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    for way in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.cdcr", *flags, f"--way={way}"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"way": way, **json.loads(finished.stdout)})
    report(rows, options, **sizes)


if __name__ == "__main__":
    main()
