"""Time, FLOP/s and memory of one training step.

    python -m benchmarks.train_step [--models=32,16] [--dtypes=float32,bfloat16] [--batches=4,8]
    python -m benchmarks.train_step --models=shapes --batches=96 --frames=4 --words=24
    python -m benchmarks.train_step --trained=all,heads,stored

`fraction_of_matmul` is the step's FLOP/s divided by that of a large matrix product of the same
dtype, which is measured after every step, for other programs may slow the machine down at any time:
the median of these ratios. `peak_memory_gb` is the peak of the process, including earlier rows.
The record also has the rates of JAX and, where it is installed, of PyTorch.
Needs jax, flax, optax and numpy only; the model `shapes` also needs ml_collections.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    arguments,
    matmul_rate,
    matmul_rates,
    names,
    peak_memory,
    positive_int,
    positive_ints,
    report,
    step_columns,
)
from drl_jax.config import (
    REMAT,
    BackboneConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from drl_jax.hub.releases import PUBLISHED
from drl_jax.runtime.resources import keep_freed_memory
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.flops import train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import create_state, make_train_step
from drl_jax.training.trainable import Trainable

# What a step trains: everything, or the heads, whose features may be stored.
_HEADS = "temporal,interaction,logit_scale"
TRAINED = {"all": "", "heads": _HEADS, "stored": _HEADS}


def backbones(text: str) -> dict[str, BackboneConfig]:
    """Parses `--models`: `shapes`, patch sizes of ViT-B and names of published towers."""
    found = {}
    for model in names(text):
        if model == "shapes":
            from data_prep.dataset_config import SHAPES_BACKBONE

            found[model] = SHAPES_BACKBONE
        elif model in PUBLISHED:
            found[model] = PUBLISHED[model].backbone
        else:
            found[f"ViT-B/{model}"] = BackboneConfig(vision_patch_size=positive_int(model))
    return found


def step_flags() -> list[tuple]:
    """The flags of the sizes of a batch and of the number of steps, for `arguments`."""
    return [
        ("batches", positive_ints, "4", "pairs of the global batch, e.g. 4,8"),
        ("frames", positive_int, 12, "frames per video"),
        ("words", positive_int, 32, "tokens per text"),
        ("steps", positive_int, 5, "timed steps, after a warm-up"),
    ]


def measure(
    name: str,
    config: ModelConfig,
    batch: int,
    microbatch: int,
    trained: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Compiles and times the training step on random input; `trained` is one of TRAINED."""
    frames, words = options.frames, options.words
    layout, stored = make_layout(), trained == "stored"
    optim = OptimConfig(trainable=TRAINED[trained])
    trainable, tx = Trainable.of(optim), make_optimizer(optim, total_steps=1000)
    state = create_state(config, tx, seed=0, layout=layout)
    rng = np.random.default_rng(0)
    size = config.backbone.image_resolution
    arrays = {
        "text_ids": rng.integers(0, config.backbone.vocab_size, (batch, words)).astype(np.int32),
        "text_mask": np.ones((batch, words), bool),
        "frames": rng.integers(0, 256, (batch, frames, size, size, 3)).astype(np.uint8),
        "frame_mask": np.ones((batch, frames), bool),
    }
    if stored:
        for array, rows in (("text_ids", 1 + words), ("frames", frames)):
            shape = (batch, rows, config.backbone.embed_dim)
            arrays[array] = rng.standard_normal(shape).astype(jnp.bfloat16)
    data = layout.put_batch(arrays)
    start = time.perf_counter()
    step = make_train_step(
        config,
        LossConfig(),
        tx,
        layout,
        microbatch=microbatch,
        norms_every=TrainConfig().log_every,
        trainable=trainable,
    )
    step = step.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start

    def run() -> None:
        nonlocal state
        state, scalars = step(state, data)
        jax.block_until_ready((state, scalars))

    columns = step_columns(
        run,
        lambda: matmul_rate(config.dtype, repeats=2) * jax.device_count(),
        train_step_flops(config, LossConfig(), batch, frames, words, trainable, stored),
        batch,
        options.steps,
    )
    return {
        "model": name,
        "trained": trained,
        "dtype": config.dtype,
        "batch": batch,
        "microbatch": microbatch,
        "remat": config.remat,
        **columns,
        "compile_seconds": round(compile_seconds, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each combination of model, dtype and batch."""
    towers = f"patch sizes of ViT-B (32,16), shapes, and names of towers: {', '.join(PUBLISHED)}"
    parser = arguments(
        *("train_step", __doc__),
        ("models", backbones, "32", towers),
        ("dtypes", names, "float32", "dtypes, e.g. float32,bfloat16"),
        *step_flags(),
        ("trained", names, "all", f"of {', '.join(TRAINED)}, e.g. all,stored"),
        ("microbatch", int, 0, "pairs encoded at a time; 0: all"),
        ("remat", names, ModelConfig.remat, f"of {', '.join(REMAT)}, e.g. none,dots"),
        ("scan_unroll", positive_int, ModelConfig.scan_unroll, "layers per iteration of the scan"),
    )
    options = parser.parse_args(argv)
    keep_freed_memory()
    rows = []
    for name, dtype, batch, remat, trained in itertools.product(
        options.models, options.dtypes, options.batches, options.remat, options.trained
    ):
        backbone, unroll = options.models[name], options.scan_unroll
        config = ModelConfig(backbone=backbone, dtype=dtype, remat=remat, scan_unroll=unroll)
        microbatch = options.microbatch if options.microbatch < batch else 0
        rows.append(measure(name, config, batch, microbatch, trained, options))
    fields = ("frames", "words", "scan_unroll")
    settings = {field: getattr(options, field) for field in fields}
    report(rows, options, **settings, matmul_gflops=matmul_rates())


if __name__ == "__main__":
    main()
