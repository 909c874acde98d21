"""Shared fixtures. The tests run on 8 fake CPU devices."""

import atexit
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Tests compile far more than they compute.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# The commands that tests run share what they compile, and leave nothing in the user's cache.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="drl_jax_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from drl_jax.config import ClipConfig, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from drl_jax.pretrained import SearchModel, from_workdir
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.workdir import claim_workdir
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import create_state

ROOT = Path(__file__).resolve().parent.parent
# Flags that make `configs/shapes.py:smoke` a matter of seconds.
TINY = (
    "--config.model.clip.embed_dim=32",
    "--config.model.clip.text_width=32",
    "--config.model.clip.text_heads=2",
    "--config.model.clip.text_layers=1",
    "--config.model.clip.vision_width=32",
    "--config.model.clip.vision_heads=2",
    "--config.model.clip.vision_layers=1",
    "--config.model.temporal_layers=1",
)


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """A model small enough to compile in a second."""
    clip = ClipConfig(
        embed_dim=32,
        image_resolution=64,
        vision_layers=2,
        vision_width=32,
        vision_heads=2,
        vision_patch_size=16,
        text_width=32,
        text_heads=2,
        text_layers=2,
    )
    return ModelConfig(clip=clip, temporal_layers=3)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory) -> Path:
    """A data directory with the small form of `shapes`, built by its command."""
    data_dir = tmp_path_factory.mktemp("data")
    run_module("data_prep.build", "shapes", f"--data_dir={data_dir}", "--size=smoke")
    return data_dir


@pytest.fixture(scope="session")
def shapes_config(shapes_data, tiny_model) -> Config:
    return Config(
        data=DataConfig(
            dataset="shapes",
            data_dir=str(shapes_data),
            train_split="train",
            val_split="val",
            max_words=24,
            max_frames=4,
            storage="raw",
            expand_captions=False,
            num_threads=2,
        ),
        model=tiny_model,
        train=TrainConfig(batch_size=16, epochs=1),
        eval=EvalConfig(batch_size=16, text_block=16),
    )


def make_run(workdir: Path, config: Config, interaction: str = "wti") -> Config:
    """A run with a checkpoint of random parameters, positions large enough for frames to differ."""
    model = dataclasses.replace(config.model, interaction=interaction, position_std=1.0)
    loss = dataclasses.replace(config.loss, cdcr=0)
    config = dataclasses.replace(config, model=model, loss=loss)
    claim_workdir(workdir, config)
    with Checkpoints(workdir) as checkpoints:
        tx = make_optimizer(config.optim, 1)
        checkpoints.save(create_state(config.model, tx, 3, make_layout()))
    return config


@pytest.fixture(scope="session")
def search_run(shapes_config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("search") / "run"
    make_run(workdir, shapes_config)
    return workdir


@pytest.fixture(scope="session")
def search_model(search_run) -> SearchModel:
    return from_workdir(search_run)


@pytest.fixture(scope="session")
def test_videos(shapes_data) -> Path:
    """The 32 mp4 files of the small `shapes`' test split."""
    return shapes_data / "source" / "shapes_smoke" / "videos" / "test"


def run_module(
    module: str, *arguments: str, check: bool = True, env: dict[str, str] | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Runs `python -m module` as a user would, from the repository's root, on one device."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=kwargs.pop("cwd", ROOT),
        env={**os.environ, **(env or {})},
        timeout=600,
        **kwargs,
    )
    if check and finished.returncode:
        raise AssertionError(f"{module} {arguments}: {finished.stdout}\n{finished.stderr}")
    return finished


def error_line(finished: subprocess.CompletedProcess) -> str:
    """The one line that a failed command leaves on stderr; progress bars aside."""
    assert finished.returncode != 0, finished.stdout
    assert "Traceback" not in finished.stderr, finished.stderr
    lines = [line for line in finished.stderr.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not re.search(r"\| \d+/\d+ \[", line)]
    assert len(lines) == 1, finished.stderr
    return lines[0]
