"""Bytes that one training step moves between devices, from its compiled HLO, beside the formula.

    python -m benchmarks.collectives [--devices=1,2,8,64] [--batch=1024] [--record]

ViT-B/32, WTI + CDCR, float32, parameters whole. The video features are gathered (and their gradient
reduced), the parameters' gradient is reduced: the formula below. Nothing runs; the devices are
fake. Needs jax, flax, optax and numpy only.
"""

import jax

from benchmarks.hlo import collective_bytes
from benchmarks.measure import arguments, report
from benchmarks.memory import FRAMES, compile_step
from drl_jax.config import ModelConfig
from drl_jax.models.drl import init_params
from drl_jax.sharding import make_layout


def formula(config: ModelConfig, pairs: int) -> dict[str, int]:
    """Bytes of the results on one device, whatever their number (above one).

    Gathered: frame features, masks and weights of all pairs. Reduced: their gradient (features and
    weights) and that of every parameter.
    """
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    features, weights = pairs * FRAMES * config.clip.embed_dim, pairs * FRAMES
    return {
        "gathered": 4 * features + 4 * weights + weights,
        "reduced": 4 * (features + weights + parameters),
    }


def measure(config: ModelConfig, pairs: int, devices: int) -> dict:
    layout = make_layout(jax.devices()[:devices])
    moved = collective_bytes(compile_step(config, pairs, 0, layout).as_text())
    expected = formula(config, pairs) if devices > 1 else {"gathered": 0, "reduced": 0}
    gathered = moved.pop("all-gather", 0)
    reduced = moved.pop("all-reduce", 0) + moved.pop("reduce-scatter", 0) * devices
    return {
        "devices": devices,
        "global_batch": pairs,
        "gathered_mb": round(gathered / 1e6, 2),
        "formula_gathered_mb": round(expected["gathered"] / 1e6, 2),
        "reduced_mb": round(reduced / 1e6, 2),
        "formula_reduced_mb": round(expected["reduced"] / 1e6, 2),
        "other_mb": round(sum(moved.values()) / 1e6, 2),
    }


def main() -> None:
    parser = arguments("collectives", __doc__.splitlines()[0])
    parser.add_argument("--devices", default="1,2,4,8,16,32,64")
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    counts = [int(count) for count in options.devices.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(counts))
    rows = [measure(ModelConfig(), options.batch, devices) for devices in counts]
    report(rows, options)


if __name__ == "__main__":
    main()
