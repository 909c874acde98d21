"""The training step of two layers, compiled for H100s that are not there, against its record."""

import importlib.util
import json
import subprocess
import sys

import pytest
from support.commands import ROOT

RECORD = ROOT / "benchmarks" / "results" / "gpu_program_small_cpu.json"
HAS_PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@pytest.mark.skipif(not HAS_PLUGIN, reason="jax's CUDA plugin is not installed (jax[cuda12])")
def test_the_program_of_a_gpu_moves_no_more_than_its_record(tmp_path):
    """Memory, kernels, their bytes, and bytes between devices, on one device and on eight."""
    flags = ("--layers=2", "--runs=1x128,8x256/128", "--fsdp=0,1")
    command = [sys.executable, "-m", "benchmarks.gpu_program", *flags]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in printed.splitlines() if line.startswith('{"benchmark"'))
    found, recorded = json.loads(line)["rows"], json.loads(RECORD.read_text())["rows"]
    assert len(found) == len(recorded)
    for row, bound in zip(found, recorded, strict=True):
        assert row["temporary_gb"] <= 1.05 * bound["temporary_gb"]
        for column in ("kernels", "gb"):
            assert row["estimated"]["all"][column] <= 1.05 * bound["estimated"]["all"][column]
        moved, most = (sum(r["moved_mb"].values()) for r in (row, bound))
        assert moved <= 1.02 * most
        assert row["collectives"]["blocking"] <= bound["collectives"]["blocking"]
        assert not row["collectives"]["bfloat16_sums"]
