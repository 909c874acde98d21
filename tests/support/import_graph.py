"""The imports between the modules of a package, read from their source.

`python tests/support/import_graph.py [drl_jax]` prints them.
"""

import ast
import functools
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What each module or package imports, by name.
Graph = dict[str, set[str]]


@functools.cache
def imported_names(path: Path) -> frozenset[str]:
    """Absolute names of everything a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def modules_of(package: str) -> dict[str, Path]:
    """The files below a package by the names of their modules, without its own `__init__.py`."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = {path.relative_to(ROOT).with_suffix(""): path for path in paths}
    modules = {".".join(name.parts).removesuffix(".__init__"): path for name, path in names.items()}
    return {name: path for name, path in modules.items() if name != package}


def module_graph(package: str) -> Graph:
    """The modules below a package that each of them imports."""
    modules = modules_of(package)
    return {
        name: set(imported_names(path) & modules.keys()) - {name} for name, path in modules.items()
    }


def part_of(module: str) -> str:
    """The package or loose module directly below the top one: drl_jax.data.video -> data."""
    return module.split(".")[1]


def part_graph(modules: Graph) -> Graph:
    """The same for packages and loose modules."""
    graph: Graph = {part_of(module): set() for module in modules}
    for module, imported in modules.items():
        graph[part_of(module)] |= {part_of(name) for name in imported} - {part_of(module)}
    return graph


def circle(graph: Graph) -> list[str]:
    """Names of which each is imported by the next, the last one the first; empty: no circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def main(package: str = "drl_jax") -> None:
    """Prints what each part imports, and the numbers that `test_packages.py` bounds."""
    modules = module_graph(package)
    parts = part_graph(modules)
    for part in graphlib.TopologicalSorter(parts).static_order():
        print(f"{part:<16} {' '.join(sorted(parts[part]))}")
    print(f"{len(modules)} modules, {sum(map(len, modules.values()))} imports between them")
    print(f"{len(parts)} packages and loose modules, {sum(map(len, parts.values()))} arrows")
    print(f"circles: {' <- '.join(circle(modules)) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
