"""Weighted token-wise similarity of all captions with all videos: time, memory, arithmetic rate.

    python -m benchmarks.similarity [--sizes=1000,2000] [--record]

Sets what evaluation runs (blocks of videos) against the plain product of everything with
everything. 32 words, 12 frames, 512 channels, float32. Needs jax, flax and numpy only.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, matmul_rate, report, seconds
from drl_jax.config import EvalConfig, ModelConfig
from drl_jax.models.interaction import over_video_blocks, weighted_token_wise
from drl_jax.models.ops import l2_normalize

WORDS, FRAMES, WIDTH = 32, 12, 512


def plain(text: dict, video: dict) -> jax.Array:
    """The formula as it is written: one product [A, B, L, F], masked, maximised."""
    sim = jnp.einsum("ald,bfd->ablf", text["text_feat"], video["frame_feat"])
    sim = sim * text["text_mask"][:, None, :, None] * video["frame_mask"][None, :, None, :]
    t2v = jnp.einsum("abl,al->ab", sim.max(axis=3), text["text_weight"])
    v2t = jnp.einsum("abf,bf->ab", sim.max(axis=2), video["frame_weight"])
    return (t2v + v2t) / 2


def blocks(text: dict, video: dict) -> jax.Array:
    block = ModelConfig().similarity_block
    return over_video_blocks(lambda v, _: weighted_token_wise(**text, **v), video, None, block)


def side(name: str, count: int, length: int, seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(1, length + 1, (count, 1))
    feat = jnp.asarray(rng.normal(size=(count, length, WIDTH)), jnp.float32)
    return {
        f"{name}_feat": l2_normalize(feat),
        f"{name}_mask": jnp.asarray(mask),
        f"{name}_weight": jnp.asarray(mask / mask.sum(1, keepdims=True), jnp.float32),
    }


def measure(way: str, size: int) -> dict:
    """Captions go in blocks of `eval.text_block`, as in evaluation; for `plain`, all at once."""
    text, video = side("text", size, WORDS, 0), side("frame", size, FRAMES, 1)
    rows = size if way == "plain" else min(size, EvalConfig().text_block)
    part = {name: array[:rows] for name, array in text.items()}
    step = jax.jit(plain if way == "plain" else blocks).lower(part, video).compile()
    calls = -(-size // rows)
    taken = seconds(step, part, video, repeats=2 if size > 2000 else 3) * calls
    # Rows that the last block repeats cost time and are no result.
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


def main() -> None:
    parser = arguments("similarity", __doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1000,2000", help="captions (= videos), for each run")
    parser.add_argument("--plain_up_to", type=int, default=2000, help="its product fills memory")
    options = parser.parse_args()
    rows = []
    for size in map(int, options.sizes.split(",")):
        ways = ("plain", "blocks") if size <= options.plain_up_to else ("blocks",)
        rows += [measure(way, size) for way in ways]
    report(rows, options, matmul_gflops=round(matmul_rate() / 1e9, 1))


if __name__ == "__main__":
    main()
