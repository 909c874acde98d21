"""Package rules: which package may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A package or module of drl_jax imports only itself and what stands before it here.
ORDER = (
    *("runtime", "config", "config_fields", "sharding"),
    *("models", "data", "weights"),
    *("training", "evaluation", "runs"),
    *("pretrained", "model_flags", "report", "search", "embeddings"),
    *("train", "evaluate", "compare", "convert", "embed"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "drl_jax").rglob("*.py"))
    if path != ROOT / "drl_jax" / "__init__.py"
}

# They import Ray, and no other module imports them before it needs a cluster.
RAY_MODULES = {
    *("drl_jax.runtime.ray_connection", "drl_jax.runtime.ray_cluster", "drl_jax.runtime.ray_map"),
}


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def package_of(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_a_place():
    assert {package_of(module) for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_only_lower_ones(package):
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for module, path in MODULES.items():
        if package_of(module) == package:
            used = {package_of(name) for name in imports(path) if name.startswith("drl_jax.")}
            assert used <= allowed, f"{module} imports {used - allowed}"


def test_the_package_needs_nothing_built_on_it():
    for module, path in MODULES.items():
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"data_prep", "configs", "tests", "benchmarks"}, module


def test_optional_and_heavy_libraries_are_imported_by_few_modules():
    users = {
        library: {
            module
            for module, path in MODULES.items()
            if library in {name.split(".")[0] for name in imports(path)}
        }
        for library in (
            *("orbax", "clu", "huggingface_hub", "tensorflow", "torch"),
            *("tokenizers", "sentencepiece", "pyarrow", "ray"),
        )
    }
    assert users == {
        "orbax": {"drl_jax.runs.checkpoint_files", "drl_jax.runs.checkpoints"},
        "clu": {"drl_jax.runs.log_files"},
        "huggingface_hub": {"drl_jax.weights.hub"},
        "tensorflow": set(),
        "torch": set(),
        "pyarrow": {
            *("drl_jax.data.description_files", "drl_jax.embeddings.formats"),
            *("drl_jax.search.filters", "drl_jax.search.segments"),
        },
        "ray": {"drl_jax.runtime.cluster", *RAY_MODULES},
        "tokenizers": {"drl_jax.models.tokenizers.files"},
        "sentencepiece": {"drl_jax.models.tokenizers.files"},
    }


def test_ray_is_imported_on_demand():
    files = {**MODULES, **{str(path): path for path in (ROOT / "data_prep").rglob("*.py")}}
    for module, path in files.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and module not in RAY_MODULES:
                assert node.module not in RAY_MODULES, module
