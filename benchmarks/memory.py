"""Memory per device of a compiled training step, by global batch and number of devices.

    python -m benchmarks.memory [--batches=128,512,2048,8192,16384] [--devices=1,8] [--record]

ViT-B/32, bfloat16, WTI + CDCR, with microbatches, similarity blocks and rematerialised layers. The
step is compiled for simulated CPU devices and not run: the compiler reports the sizes of its
buffers. Needs jax, flax, optax and numpy only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.measure import arguments, positive_ints, report
from drl_jax.config import LossConfig, ModelConfig, OptimConfig
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state, make_train_step

WORDS, FRAMES = 32, 12


def abstract_batch(
    config: ModelConfig, pairs: int, layout: Layout
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch."""
    size = config.backbone.image_resolution

    def array(shape: tuple, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=layout.batch_sharded)

    return {
        "text_ids": array((WORDS,), jnp.int32),
        "text_mask": array((WORDS,), jnp.bool_),
        "frames": array((FRAMES, size, size, 3), jnp.uint8),
        "frame_mask": array((FRAMES,), jnp.bool_),
    }


def compile_step(
    config: ModelConfig, pairs: int, microbatch: int, layout: Layout
) -> jax.stages.Compiled:
    """Compiles the training step without running it.

    Args:
      config: the model.
      pairs: pairs of the global batch.
      microbatch: pairs encoded at a time, over all devices; 0: all.
      layout: mesh and shardings.
    """
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    step = make_train_step(config, LossConfig(), tx, layout, microbatch=microbatch)
    state = abstract_state(config, tx, layout)
    return step.lower(state, abstract_batch(config, pairs, layout)).compile()


def measure(pairs: int, devices: int, microbatch: int, block: int) -> dict:
    """Sizes of the step's buffers on each device.

    Args:
      pairs: pairs of the global batch.
      devices: number of devices.
      microbatch: pairs encoded at a time on each device.
      block: videos compared at a time (`config.model.similarity_block`).
    """
    config = ModelConfig(dtype="bfloat16", remat="full", similarity_block=block)
    layout = make_layout(jax.devices()[:devices])
    memory = compile_step(config, pairs, microbatch * devices, layout).memory_analysis()
    return {
        "devices": devices,
        "global_batch": pairs,
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporary_mb_per_pair": round(memory.temp_size_in_bytes / 1e6 / (pairs / devices), 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each global batch on each number of devices."""
    options = arguments(
        *("memory", __doc__),
        ("batches", positive_ints, "128,512,2048,8192,16384", "pairs of the global batch"),
        ("devices", positive_ints, "1,8", "numbers of simulated devices"),
        ("microbatch", int, 64, "pairs encoded at a time on each device; 0: all"),
        ("similarity_block", int, 64, "videos compared at a time; 0: all"),
    ).parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    rows = [
        measure(pairs, devices, options.microbatch, options.similarity_block)
        for devices in options.devices
        for pairs in options.batches
    ]
    settings = {"microbatch_per_device": options.microbatch}
    report(rows, options, similarity_block=options.similarity_block, **settings)


if __name__ == "__main__":
    main()
