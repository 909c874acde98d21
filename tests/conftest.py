"""Shared fixtures. Tests run on 8 fake CPU devices, or on what JAX_PLATFORMS names."""

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Tests compile far more than they compute.
CHEAP = ["--xla_backend_optimization_level=0"]
# A flag that jaxlib does not know ends the process; 0.12 does not know this one.
if jax.__version_info__ < (0, 11):
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(CHEAP))

# Tests, in all workers of pytest-xdist, and the commands they run share one cache of compiled
# programs, also of those that compile quickly. It is not the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="drl_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

from support.commands import TINY, run_module
from support.runs import make_run, tiny_shapes_config

import drl_jax
from drl_jax.config import BackboneConfig, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from drl_jax.evaluation import embedder
from drl_jax.models.drl import init_params
from drl_jax.runs import train_run
from drl_jax.runs.weights_writer import save_weights
from drl_jax.runtime.resources import cache_compilations
from drl_jax.runtime.sharding import Layout
from drl_jax.search import session
from drl_jax.search.engine import SearchEngine

cache_compilations()


def share_programs() -> None:
    """A program is traced once for each configuration, not once for each run, index or evaluator.

    Tests open many of them in one process, a user one.
    """
    for module, name in (
        (train_run, "make_optimizer"),
        (train_run, "make_train_step"),
        (embedder, "make_embed_steps"),
    ):
        setattr(module, name, functools.cache(getattr(module, name)))
    compiled = SearchEngine._compiled

    @functools.cache
    def shared(config: ModelConfig, layout: Layout, block: int, top: int, is_one: bool) -> Callable:
        return compiled(SearchEngine(config, None), layout, block, top, is_one)

    def of_engine(engine: SearchEngine, layout: Layout, block: int, top: int, is_one: bool):
        return shared(engine._config, layout, block, top, is_one)

    SearchEngine._compiled = of_engine


share_programs()


# Files that take longest. They start first, so that both workers finish at about the same time.
SLOW_FILES = (
    *("train", "recovery", "steps", "distributed", "reference_parity", "search_updates"),
    *("ray_build", "ray_index", "families", "search_page", "search_watch", "towers"),
    *("weights", "search", "plugins"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return SLOW_FILES.index(name) if name in SLOW_FILES else len(SLOW_FILES)

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def patient_queries(monkeypatch):
    """An open index shows an update to the next query, also on a busy machine."""
    monkeypatch.setattr(session, "_PATIENCE", 60)


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """A model that compiles in about a second."""
    backbone = BackboneConfig(
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
    return ModelConfig(backbone=backbone, temporal_layers=3)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A path that the first worker of pytest-xdist makes, and that all of them use."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    path = root / name
    with (root / "made_once.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = root / f"unfinished_{name}"
            make(unfinished)
            unfinished.rename(path)
    return path


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory) -> Path:
    """A data directory with the small `shapes` dataset, built by its command. Not to be changed."""

    def build(data_dir: Path) -> None:
        run_module("data_prep.build", "shapes", f"--data_dir={data_dir}", "--size=smoke")

    return made_once(tmp_path_factory, "shapes_data", build)


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


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """Initial weights of `configs/shapes.py:smoke` with TINY.

    Runs that start from them do not compile the model's initialisation again, which takes seconds.
    """

    def save(path: Path) -> None:
        config = tiny_shapes_config()
        params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(0))
        save_weights(path, params, config)

    return made_once(tmp_path_factory, "tiny.safetensors", save)


@pytest.fixture(scope="session")
def tiny_arguments(shapes_data, tiny_weights) -> Callable[..., tuple[str, ...]]:
    """Makes the arguments of `drl_jax.train` for a run of 12 steps in a directory."""

    def make(workdir: Path, *extra: str) -> tuple[str, ...]:
        return (
            "--config=configs/shapes.py:smoke",
            f"--workdir={workdir}",
            f"--config.data.data_dir={shapes_data}",
            *TINY,
            f"--config.model.init={tiny_weights}",
            *extra,
        )

    return make


@pytest.fixture(scope="session")
def search_run(shapes_config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("search") / "run"
    make_run(workdir, shapes_config)
    return workdir


@pytest.fixture(scope="session")
def search_model(search_run) -> drl_jax.RetrievalModel:
    return drl_jax.load(search_run)


@pytest.fixture(scope="session")
def test_videos(shapes_data) -> Path:
    """The 32 mp4 files of the test split of the small `shapes`."""
    return shapes_data / "source" / "shapes_smoke" / "videos" / "test"


@pytest.fixture(scope="module")
def browser():
    """Chromium. Of a module: while it is open, other tests cannot run an event loop."""
    from playwright.sync_api import sync_playwright
    from support.browser import CHROMIUM, CHROMIUM_FLAGS

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()
