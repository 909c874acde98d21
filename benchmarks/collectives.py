"""Bytes that a training step moves between devices, from its compiled HLO and by a formula.

    python -m benchmarks.collectives [--devices=1,2,8,64] [--batch=1024] [--record]

ViT-B/32, WTI + CDCR, float32, replicated parameters. The step gathers the video features, and
reduces their gradient and that of the parameters (`formula`). It is compiled for simulated CPU
devices and not run. Needs jax, flax, optax and numpy only.
"""

from collections.abc import Sequence

import jax

from benchmarks.hlo import collective_bytes
from benchmarks.measure import arguments, positive_int, positive_ints, report
from benchmarks.memory import FRAMES, compile_step
from drl_jax.config import ModelConfig
from drl_jax.models.drl import param_shapes
from drl_jax.runtime.sharding import make_layout


def formula(config: ModelConfig, pairs: int) -> dict[str, int]:
    """Expected bytes of the results on each device, for any number of devices above 1.

    Args:
      config: the model.
      pairs: pairs of the global batch.

    Returns:
      `gathered`: frame features, masks and weights of all pairs; `reduced`: gradients of these
      features and weights, and of all parameters.
    """
    shapes = param_shapes(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    features, weights = pairs * FRAMES * config.backbone.embed_dim, pairs * FRAMES
    return {
        "gathered": 4 * features + 4 * weights + weights,
        "reduced": 4 * (features + weights + parameters),
    }


def measure(config: ModelConfig, pairs: int, devices: int) -> dict:
    """Compiles the step for a number of devices and counts the bytes of its collectives."""
    layout = make_layout(jax.devices()[:devices])
    compiled = compile_step(config, pairs, 0, layout)
    return {
        "devices": devices,
        "global_batch": pairs,
        **moved(compiled.as_text(), config, pairs, devices),
    }


def moved(hlo: str, config: ModelConfig, pairs: int, devices: int) -> dict[str, float]:
    """Megabytes that the collectives of a compiled step move, beside the formula."""
    counts = collective_bytes(hlo)
    expected = formula(config, pairs) if devices > 1 else {"gathered": 0, "reduced": 0}
    gathered = counts.pop("all-gather", 0)
    reduced = counts.pop("all-reduce", 0) + counts.pop("reduce-scatter", 0) * devices
    return {
        "gathered_mb": round(gathered / 1e6, 2),
        "formula_gathered_mb": round(expected["gathered"] / 1e6, 2),
        "reduced_mb": round(reduced / 1e6, 2),
        "formula_reduced_mb": round(expected["reduced"] / 1e6, 2),
        "other_mb": round(sum(counts.values()) / 1e6, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each number of devices."""
    options = arguments(
        *("collectives", __doc__),
        ("devices", positive_ints, "1,2,4,8,16,32,64", "numbers of simulated devices"),
        ("batch", positive_int, 1024, "pairs of the global batch"),
    ).parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    rows = [measure(ModelConfig(), options.batch, devices) for devices in options.devices]
    report(rows, options)


if __name__ == "__main__":
    main()
