"""Package rules: which package may import which."""

import ast
import re

from support.import_graph import (
    ROOT,
    circle,
    imported_names,
    module_graph,
    modules_of,
    part_graph,
)

# A package or module of drl_jax imports only itself and what stands before it here.
ORDER = (
    *("runtime", "config"),
    *("hub", "models", "data", "weights"),
    *("training", "evaluation", "runs"),
    *("pretrained", "report", "search", "embed", "integrations"),
    *("train", "rerank", "evaluate", "compare", "convert", "export", "__main__"),
)
MODULES = modules_of("drl_jax")
PARTS = part_graph(module_graph("drl_jax"))
# Fewer are better.
MOST_PARTS, MOST_ARROWS = 21, 76

# It imports Ray, and no other module imports it before it needs a cluster.
RAY = "drl_jax.runtime.ray_cluster"


def test_every_package_has_a_place():
    assert PARTS.keys() == set(ORDER)


def test_packages_import_only_lower_ones():
    for part, imported in PARTS.items():
        assert imported <= set(ORDER[: ORDER.index(part)]), part


def test_few_packages_with_few_arrows():
    assert len(PARTS) <= MOST_PARTS
    assert sum(map(len, PARTS.values())) <= MOST_ARROWS


def test_modules_do_not_import_in_circles():
    for package in ("drl_jax", "data_prep"):
        modules = module_graph(package)
        assert not circle(modules)
        assert not circle(part_graph(modules))


def test_the_tour_names_files_that_exist():
    for page in ("docs/tour.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        paths = re.findall(r"`((?:drl_jax|data_prep|configs|docs|tests)/[a-z0-9_/.]*)`", text)
        assert paths
        assert not [path for path in paths if not (ROOT / path).exists()], page


def test_ruff_has_one_version():
    wanted = re.search(r"ruff==(\S+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"rev: v{wanted[1]}\n" in hooks


def users(library: str) -> set[str]:
    """The modules that import a library or package."""
    return {
        module
        for module, path in MODULES.items()
        if library in {name.split(".")[0] for name in imported_names(path)}
    }


def test_optional_and_heavy_libraries_are_imported_by_few_modules():
    expected = {
        "orbax": {"drl_jax.runs.checkpoint_files", "drl_jax.runs.checkpoints"},
        "clu": {"drl_jax.runs.log_files"},
        "huggingface_hub": {"drl_jax.hub.repository"},
        "tensorflow": set(),
        "torch": set(),
        "pyarrow": {
            *("drl_jax.data.description", "drl_jax.embed.files"),
            *("drl_jax.search.filters", "drl_jax.search.segments"),
        },
        "ray": {RAY},
        "openvino": {"drl_jax.evaluation.openvino_encoder"},
        "jax2onnx": {"drl_jax.export"},
        "mteb": {"drl_jax.integrations.mteb"},
        "datasets": {"drl_jax.integrations.mteb"},
        "tokenizers": {"drl_jax.models.tokenizers.files"},
        "sentencepiece": {"drl_jax.models.tokenizers.files"},
        # What is built on the package.
        **{name: set() for name in ("data_prep", "configs", "tests", "benchmarks")},
    }
    assert {library: users(library) for library in expected} == expected


def test_ray_is_imported_on_demand():
    files = {**MODULES, **{str(path): path for path in (ROOT / "data_prep").rglob("*.py")}}
    for module, path in files.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert not (isinstance(node, ast.ImportFrom) and node.module == RAY), module
