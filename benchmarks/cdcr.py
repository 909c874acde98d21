"""CDCR 3 as a matrix product against the reference's [N, D, D] tensor: time and memory.

    python -m benchmarks.cdcr --batch=128

Forward and backward, float32. Each way runs in a process of its own, whose peak resident memory is
reported beside that of the idle process. Needs jax, flax and optax only.
"""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, peak_memory, report
from drl_jax.models.ops import l2_normalize
from drl_jax.training import losses


def tensor_correlation(own, partner, mask, weight):
    """What the reference computes: the outer product of every row, contracted with the weights."""
    channels = own.shape[-1]
    mask, weight = mask.reshape(-1), weight.reshape(-1)
    own = losses.masked_standardize(own.reshape(-1, channels), mask)
    partner = losses.masked_standardize(partner.reshape(-1, channels), mask)
    # A barrier, or XLA finds the matrix product by itself.
    products = jax.lax.optimization_barrier(own[:, :, None] * partner[:, None, :])
    return jnp.einsum("ncd,n->cd", products, weight)


def measure(way: str, batch: int, words: int, frames: int, width: int, repeats: int) -> dict:
    """Seconds of a forward and backward pass, and peak memory of this process."""
    if way == "tensor":
        losses._cross_correlation = tensor_correlation
    rng = np.random.default_rng(0)

    def features(length):
        return l2_normalize(jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32))

    def side(name, feat, length):
        even = jnp.full((batch, length), 1 / length)
        mask = jnp.ones((batch, length), bool)
        return {f"{name}_feat": feat, f"{name}_mask": mask, f"{name}_weight": even}

    def loss(text_feat, frame_feat):
        text, video = side("text", text_feat, words), side("frame", frame_feat, frames)
        key = jax.random.key(0)
        return losses.cdcr_loss(text, video, key, cdcr=3, alpha1=0.11, alpha2=0.06)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    arrays = features(words), features(frames)
    idle = peak_memory() / 1e9
    value, _ = jax.block_until_ready(step(*arrays))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        seconds.append(time.perf_counter() - start)
    return {
        "loss": float(value),
        "seconds": round(min(seconds), 4),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "idle_memory_gb": round(idle, 2),
    }


def main() -> None:
    parser = arguments("cdcr", __doc__.splitlines()[0])
    sizes = {"batch": 128, "words": 32, "frames": 12, "width": 512, "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=("product", "tensor"), help="measure one, here")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in sizes}
    if options.way:
        print(json.dumps(measure(options.way, **sizes)))
        return
    rows = []
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    for way in ("product", "tensor"):
        command = [sys.executable, "-m", "benchmarks.cdcr", *flags, f"--way={way}"]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"way": way, **json.loads(finished.stdout)})
    report(rows, options, **sizes)


if __name__ == "__main__":
    main()
