"""Memory, kernels, collectives and a roofline of the training step on H100s, without a GPU.

    python -m benchmarks.gpu_program [--models=32,16] [--runs=1x128,8x2048/128] [--fsdp=0,1]
        [--remat=none,dots,full] [--attention=auto,xla] [--record]

XLA compiles for a GPU that is not there: what it holds in memory, which kernels it calls and what
it sends between devices can be read. Times are estimates, a roofline: each kernel takes as long as
its bytes at 85 % of the bandwidth or its FLOPs at 75 % of the peak, and 2 us to start. Needs `pip
install "jax[cuda12]"`, flax, optax and ml_collections in a virtual environment of their own (3 GB),
and no GPU.
"""

import argparse
import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before JAX is imported. Without a driver, the CUDA plugin refuses to start unless told otherwise;
# autotuning needs a device, and Triton's matrix products need autotuning.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu,cuda"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


import jax
import jax.numpy as jnp

from benchmarks.hlo import collective_bytes, collective_counts, kernels
from benchmarks.measure import arguments, names, report
from benchmarks.train_step import backbones
from drl_jax.config import (
    ATTENTION,
    REMAT,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from drl_jax.runtime.cli import positive_int, run_command
from drl_jax.runtime.errors import UserError, one_line
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.training.flops import peak_flops, train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state, make_train_step

_WORDS, _FRAMES = 32, 12
_NAME = "NVIDIA H100 80GB HBM3"
_DEVICE = Path(__file__).parent / "devices" / "h100.txtpb"
_RUNS = "1x128,1x512,1x1024/128,8x128,8x2048/128"
# Of an H100 SXM: bytes a second and the share of the peak that a kernel reaches, seconds that one
# takes to start; bytes a second that an all-reduce sends through NVLink.
_BANDWIDTH, _FRACTION, _LAUNCH, _LINK = 0.85 * 3.35e12, 0.75, 2e-6, 0.8 * 450e9


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
            f"this JAX cannot compile for a GPU ({one_line(error)}); in a new virtual environment,"
            ' run: pip install "jax[cuda12]" flax optax'
        ) from error
    return make_layout(topology.devices, fsdp=fsdp)


class Run(NamedTuple):
    """Where a step runs: on `devices`, `batch` pairs on each, encoded `microbatch` at a time."""

    devices: int
    batch: int
    microbatch: int = 0

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Reads DEVICESxBATCH or DEVICESxBATCH/MICROBATCH."""
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:/(\d+))?", text)):
            raise argparse.ArgumentTypeError(f"{text!r} is not DEVICESxBATCH[/MICROBATCH]")
        run = cls(*(int(part or 0) for part in match.groups()))
        if run.microbatch and run.batch % run.microbatch:
            raise argparse.ArgumentTypeError(f"{text!r}: MICROBATCH does not divide BATCH")
        return run


def runs(text: str) -> list[Run]:
    """Argument type: runs, separated by commas."""
    return [Run.parse(part) for part in names(text)]


def switches(text: str) -> list[bool]:
    """Argument type: 0 and 1, separated by commas."""
    return [bool(("0", "1").index(part)) for part in names(text)]


def compile_step(
    config: ModelConfig, pairs: int, microbatch: int, layout: Layout
) -> jax.stages.Compiled:
    """Compiles the training step of a global batch, `microbatch` pairs at a time (0: all)."""
    size = config.backbone.image_resolution

    def array(*shape: int, dtype: Any = jnp.bool_) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=layout.batch_sharded)

    batch = {
        "text_ids": array(_WORDS, dtype=jnp.int32),
        "text_mask": array(_WORDS),
        "frames": array(_FRAMES, size, size, 3, dtype=jnp.uint8),
        "frame_mask": array(_FRAMES),
    }
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    settings = {"microbatch": microbatch, "norms_every": TrainConfig.log_every}
    step = make_train_step(config, LossConfig(), tx, layout, **settings)
    return step.lower(abstract_state(config, tx, layout), batch).compile()


def roofline(hlo: str, devices: int) -> dict[str, Any]:
    """Kernels, bytes, FLOPs and estimated milliseconds of a program, by kind of kernel."""
    found: dict[str, dict[str, float]] = {}
    for kernel in kernels(hlo):
        row = found.setdefault(kernel.kind, {"kernels": 0, "gb": 0, "tflop": 0, "ms": 0})
        rate = _FRACTION * peak_flops(_NAME, kernel.dtype)
        seconds = max(kernel.bytes / _BANDWIDTH, kernel.flops / rate) + _LAUNCH
        for column, value in (("gb", kernel.bytes / 1e9), ("tflop", kernel.flops / 1e12)):
            row[column] += value
        row["kernels"] += 1
        row["ms"] += 1e3 * seconds
    columns = ("kernels", "gb", "tflop", "ms")
    total = {column: sum(row[column] for row in found.values()) for column in columns}
    # A ring sends each byte of an all-reduce twice, and the result of a reduce-scatter is a part of
    # what is sent. What hides behind kernels is not known.
    times = {"all-reduce": 2, "reduce-scatter": devices}
    sent = sum(size * times.get(kind, 1) for kind, size in collective_bytes(hlo).items())
    sent *= (devices - 1) / devices
    rows = {"all": total, **dict(sorted(found.items()))}
    return {
        "estimated": {kind: {k: round(v, 2) for k, v in row.items()} for kind, row in rows.items()},
        "collectives_ms": round(1e3 * sent / _LINK, 2),
    }


def measure(name: str, config: ModelConfig, run: Run, *, fsdp: bool) -> dict[str, Any]:
    """Compiles a step and reads its memory, kernels and collectives."""
    layout = h100_layout(run.devices, fsdp=fsdp)
    pairs = run.batch * run.devices
    compiled = compile_step(config, pairs, run.microbatch * run.devices, layout)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    estimate = roofline(text, run.devices)
    flops = train_step_flops(config, LossConfig(), pairs, _FRAMES, _WORDS)
    seconds = (estimate["estimated"]["all"]["ms"] + estimate["collectives_ms"]) / 1e3
    return {
        "model": name,
        "remat": config.remat,
        "attention": config.attention,
        **run._asdict(),
        "fsdp": fsdp,
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        **estimate,
        "mfu": round(flops / seconds / run.devices / peak_flops(_NAME, config.dtype), 3),
        "moved_mb": {k: round(n / 1e6, 2) for k, n in collective_bytes(text).items()},
        "collectives": collective_counts(text),
    }


def work(options: Any) -> None:
    rows = []
    for (name, backbone), remat, attention, run, fsdp in itertools.product(
        options.models.items(), options.remat, options.attention, options.runs, options.fsdp
    ):
        if fsdp and run.devices == 1:
            continue
        if layers := options.layers:
            backbone = dataclasses.replace(backbone, vision_layers=layers, text_layers=layers)
        choices = {"dtype": "bfloat16", "remat": remat, "attention": attention}
        heads = {"temporal_layers": layers or ModelConfig.temporal_layers}
        config = ModelConfig(backbone=backbone, **heads, **choices)
        rows.append(measure(name, config, run, fsdp=fsdp))
        print(rows[-1], flush=True)
    report(rows, options, device="NVIDIA H100 80GB, not present")


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles each combination."""
    options = arguments(
        *("gpu_program", __doc__),
        ("models", backbones, "32", "of ViT-B"),
        ("runs", runs, _RUNS, "DEVICESxBATCH/MICROBATCH, pairs on each device"),
        ("layers", positive_int, 0, "of each tower; 0: all"),
        ("fsdp", switches, "0", "0,1: replicated parameters, and sharded ones on several devices"),
        ("remat", names, ModelConfig.remat, f"of {', '.join(REMAT)}"),
        ("attention", names, ModelConfig.attention, f"of {', '.join(ATTENTION)}"),
    ).parse_args(argv)
    return run_command("benchmarks.gpu_program", lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
