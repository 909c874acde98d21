"""Time, FLOP/s and memory of the weighted token-wise similarity of all captions and videos.

    python -m benchmarks.similarity [--sizes=1000,2000] [--record]

Compares the blockwise computation of the evaluation with a direct implementation of the formula. 32
tokens per caption, 12 frames per video, 512 channels, float32. Needs jax, flax, optax and numpy
only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, matmul_rate, positive_int, positive_ints, report, seconds
from drl_jax.config import EvalConfig, ModelConfig
from drl_jax.models.interactions import Arrays
from drl_jax.models.interactions.base import similarity_in_blocks
from drl_jax.models.interactions.token_wise import weighted_token_wise
from drl_jax.models.ops import l2_normalize
from drl_jax.runtime.sharding import make_layout

WORDS, FRAMES, WIDTH = 32, 12, 512


def plain(text: Arrays, video: Arrays) -> jax.Array:
    """Similarity [A, B] from all token similarities at once, [A, B, L, F]."""
    sim = jnp.einsum("ald,bfd->ablf", text["text_unit"], video["frame_unit"])
    sim = sim * text["text_mask"][:, None, :, None] * video["frame_mask"][None, :, None, :]
    t2v = jnp.einsum("abl,al->ab", sim.max(axis=3), text["text_weight"])
    v2t = jnp.einsum("abf,bf->ab", sim.max(axis=2), video["frame_weight"])
    return (t2v + v2t) / 2


def blocks(text: Arrays, video: Arrays) -> jax.Array:
    """Similarity [A, B], computed in blocks of videos as in the evaluation."""
    block = ModelConfig.similarity_block
    return similarity_in_blocks(lambda v, _: weighted_token_wise(text, v), video, None, block)


def random_arrays(name: str, count: int, length: int, seed: int) -> Arrays:
    """Arrays of `wti` for texts (name "text") or videos ("frame") of random length."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(1, length + 1, (count, 1))
    feat = jnp.asarray(rng.normal(size=(count, length, WIDTH)), jnp.float32)
    return {
        f"{name}_unit": l2_normalize(feat),
        f"{name}_mask": jnp.asarray(mask),
        f"{name}_weight": jnp.asarray(mask / mask.sum(1, keepdims=True), jnp.float32),
    }


def measure(way: str, size: int) -> dict:
    """Measures the similarity of `size` captions with `size` videos: in "blocks" of captions as in
    the evaluation, or "plain", all at once."""
    text = random_arrays("text", size, WORDS, seed=0)
    video = random_arrays("frame", size, FRAMES, seed=1)
    rows = size if way == "plain" else min(size, EvalConfig.text_block)
    part = {name: array[:rows] for name, array in text.items()}
    layout = make_layout(jax.local_devices()[:1])
    compare = layout.on_mesh(plain if way == "plain" else blocks, "float32")
    step = jax.jit(compare).lower(part, video).compile()
    calls = -(-size // rows)
    taken = seconds(step, part, video, repeats=2 if size > 2000 else 3) * calls
    # Without the captions that pad the last block: they take time but are no result.
    flops = 2 * size * size * WORDS * FRAMES * WIDTH
    return {
        "captions": size,
        "videos": size,
        "way": way,
        "seconds": round(taken, 3),
        "gflops_per_second": round(flops / taken / 1e9, 1),
        "fraction_of_matmul": round(flops / taken / matmul_rate(), 3),
        "temporary_gb": round(step.memory_analysis().temp_size_in_bytes / 1e9, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each size both ways."""
    options = arguments(
        *("similarity", __doc__),
        ("sizes", positive_ints, "1000,2000", "numbers of captions, and of videos"),
        ("plain_up_to", positive_int, 2000, "largest size of the formula, which needs much memory"),
    ).parse_args(argv)
    rows = []
    for size in options.sizes:
        ways = ("plain", "blocks") if size <= options.plain_up_to else ("blocks",)
        rows += [measure(way, size) for way in ways]
    report(rows, options, matmul_gflops=round(matmul_rate() / 1e9, 1))


if __name__ == "__main__":
    main()
