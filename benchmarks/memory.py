"""Memory of a compiled training step on one device, by global batch and number of devices.

    python -m benchmarks.memory [--batches=128,512,2048,8192,16384] [--devices=1,8] [--record]

ViT-B/32, bfloat16, WTI + CDCR, microbatches, similarity blocks and rematerialised layers. Nothing
runs: the step is compiled for fake CPU devices and its buffers are counted. Needs jax, flax, optax
and numpy only.
"""

import jax
import jax.numpy as jnp

from benchmarks.measure import arguments, report
from drl_jax.config import LossConfig, ModelConfig, OptimConfig
from drl_jax.sharding import Layout, make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import abstract_state
from drl_jax.training.train_step import make_train_step

WORDS, FRAMES = 32, 12


def abstract_batch(config: ModelConfig, pairs: int, layout: Layout) -> dict:
    size = config.clip.image_resolution

    def array(shape: tuple, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=layout.rows)

    return {
        "text_ids": array((WORDS,), jnp.int32),
        "text_mask": array((WORDS,), jnp.bool_),
        "frames": array((FRAMES, size, size, 3), jnp.uint8),
        "frame_mask": array((FRAMES,), jnp.bool_),
    }


def compile_step(
    config: ModelConfig, pairs: int, microbatch: int, layout: Layout
) -> jax.stages.Compiled:
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    step = make_train_step(config, LossConfig(), tx, layout, microbatch=microbatch)
    state = abstract_state(config, tx, layout)
    return step.lower(state, abstract_batch(config, pairs, layout)).compile()


def measure(pairs: int, devices: int, microbatch: int, block: int) -> dict:
    """Bytes on one device."""
    config = ModelConfig(dtype="bfloat16", remat=True, similarity_block=block)
    layout = make_layout(jax.devices()[:devices])
    memory = compile_step(config, pairs, microbatch * devices, layout).memory_analysis()
    return {
        "devices": devices,
        "global_batch": pairs,
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporary_mb_per_pair": round(memory.temp_size_in_bytes / 1e6 / (pairs / devices), 2),
    }


def main() -> None:
    parser = arguments("memory", __doc__.splitlines()[0])
    parser.add_argument("--batches", default="128,512,2048,8192,16384")
    parser.add_argument("--devices", default="1,8")
    parser.add_argument("--microbatch", type=int, default=64, help="pairs at a time on a device")
    parser.add_argument("--similarity_block", type=int, default=64)
    options = parser.parse_args()
    counts = [int(count) for count in options.devices.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(counts))
    rows = [
        measure(int(pairs), devices, options.microbatch, options.similarity_block)
        for devices in counts
        for pairs in options.batches.split(",")
    ]
    settings = {"microbatch_per_device": options.microbatch}
    report(rows, options, similarity_block=options.similarity_block, **settings)


if __name__ == "__main__":
    main()
