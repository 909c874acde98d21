"""A module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The floors of the house, from the ground up.
FLOORS = (
    ("errors",),
    (
        "ops",
        "tokenizer",
        "metrics",
        "config",
        "sharding",
        "video",
        "command",
        "distributed",
        "interrupt",
        "processes",
    ),
    (
        "models.layers",
        "models.interaction",
        "losses",
        "optim",
        "data.records",
        "data.frames",
        "data.batches",
    ),
    ("models.clip", "models.temporal"),
    ("models.drl", "weights.torch_file", "weights.names", "weights.load"),
    ("state", "steps", "checkpoint", "embedding", "evaluation", "workdir"),
    (
        "train",
        "evaluate",
        "convert",
        "search.reading",
        "search.store",
        "search.model",
        "search.engine",
        "search.explain",
        "search.figure",
        "search.indexing",
        "search.session",
        "search.prompt",
        "search.qdrant",
        "search.serve",
        "search.__main__",
    ),
)
FLOOR_OF = {f"drl_jax.{room}": floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Inside a floor, an import goes from a room to one that stands before it in the list.
ORDER_OF = {f"drl_jax.{room}": place for rooms in FLOORS for place, room in enumerate(rooms)}


def modules(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_a_floor():
    assert set(modules("drl_jax")) == set(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_imports_go_down(module):
    for imported in imports(modules("drl_jax")[module]) & set(FLOOR_OF):
        here = (FLOOR_OF[module], ORDER_OF[module])
        there = (FLOOR_OF[imported], ORDER_OF[imported])
        assert there < here, f"{module} imports {imported}, which is not below it"


def test_the_package_needs_nothing_built_on_it():
    for module, path in modules("drl_jax").items():
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"data_prep", "configs", "tests", "benchmarks"}, module


def test_only_training_may_import_tensorflow():
    for module, path in modules("drl_jax").items():
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow"}, module
        assert module == "drl_jax.train" or "clu" not in roots, module
