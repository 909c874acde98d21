"""Memory, kernels and collectives of the training step on H100s, compiled without a GPU.

    python -m benchmarks.gpu_program [--models=32,16] [--remat=none,dots,full] [--record]

XLA compiles for a GPU that is not there: what it holds in memory, which kernels it calls and what
it sends between devices can be read; times cannot. Needs `pip install "jax[cuda12]"`, flax, optax
and ml_collections in a virtual environment of their own (3 GB), and no GPU.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before JAX is imported. Without a driver, the CUDA plugin refuses to start unless told otherwise;
# autotuning needs a device, and Triton's matrix products need autotuning.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu,cuda"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


from benchmarks.hlo import collective_bytes
from benchmarks.measure import arguments, names, positive_ints, report
from benchmarks.memory import compile_step
from benchmarks.train_step import backbones
from drl_jax.config import REMAT, ModelConfig
from drl_jax.runtime.cli import run_command
from drl_jax.runtime.errors import UserError
from drl_jax.sharding import Layout, make_layout

_DEVICE = Path(__file__).parent / "devices" / "h100.txtpb"
_KERNELS = {
    "cublas": r'custom_call_target="__cublas',
    "cudnn": r'custom_call_target="__cudnn',
    "triton": r"__triton",
    "fusion": r" fusion\(",
}


def h100_layout(devices: int, *, fsdp: bool) -> Layout:
    """A mesh of H100s that are not there.

    Raises:
      UserError: the installed JAX cannot compile for a GPU.
    """
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x1x{devices}",
            target_config=_DEVICE.read_text(encoding="utf-8"),
        )
    except Exception as error:
        raise UserError(
            "this JAX cannot compile for a GPU; in a new virtual environment, run: pip install"
            ' "jax[cuda12]" flax optax'
        ) from error
    return make_layout(topology.devices, fsdp=fsdp)


def measure(name: str, config: ModelConfig, run: dict[str, Any]) -> dict[str, Any]:
    """Compiles a step and reads its memory, kernels and collectives.

    Args:
      name: of the model.
      config: the model.
      run: `devices`, `batch` (pairs of the global batch), `microbatch` (pairs encoded at a time on
        each device; 0: all) and `fsdp`.
    """
    layout = h100_layout(run["devices"], fsdp=run["fsdp"])
    compiled = compile_step(config, run["batch"], run["microbatch"] * run["devices"], layout)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved = {kind: round(count / 1e6, 1) for kind, count in collective_bytes(text).items()}
    return {
        "model": name,
        "remat": config.remat,
        **run,
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "kernels": {kind: len(re.findall(pattern, text)) for kind, pattern in _KERNELS.items()},
        "collectives_mb": moved,
        "collectives": collective_counts(text),
    }


def collective_counts(text: str) -> dict[str, int]:
    """Number of collectives in the text of a program by kind, dtype, and whether they overlap."""
    found: Counter[str] = Counter()
    pattern = r"= \(?(\w+)\[[^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\("
    for dtype, kind, start in re.findall(pattern, text):
        found[f"{'asynchronous' if start else 'blocking'} {kind} {dtype}"] += 1
    return dict(found)


def work(options: Any) -> None:
    rows = []
    for name, backbone in options.models.items():
        for remat in options.remat:
            for devices in options.devices:
                for batch in options.batches:
                    config = ModelConfig(backbone=backbone, dtype="bfloat16", remat=remat)
                    run = {
                        "devices": devices,
                        "batch": batch * devices,
                        "microbatch": options.microbatch if options.microbatch < batch else 0,
                        "fsdp": options.fsdp,
                    }
                    rows.append(measure(name, config, run))
                    print(rows[-1], flush=True)
    report(rows, options, device="NVIDIA H100 80GB, not present")


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles each combination."""
    parser = arguments("gpu_program", __doc__.splitlines()[0])
    parser.add_argument("--models", type=backbones, default="32", help="of ViT-B (%(default)s)")
    parser.add_argument(
        "--remat",
        type=names,
        default=ModelConfig.remat,
        help=f"of {', '.join(REMAT)} (%(default)s)",
    )
    parser.add_argument("--devices", type=positive_ints, default="1,8", help="(%(default)s)")
    parser.add_argument(
        "--batches", type=positive_ints, default="128", help="pairs a device (%(default)s)"
    )
    parser.add_argument(
        "--microbatch", type=int, default=0, help="pairs encoded at a time on a device; 0: all"
    )
    parser.add_argument("--fsdp", action="store_true", help="split parameters over the devices")
    options = parser.parse_args(argv)
    return run_command("benchmarks.gpu_program", lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
