"""Imports go one way: a package takes from the floors below it, and no two modules wait for each other."""

import ast
from graphlib import TopologicalSorter

from tests import ROOT

FLOORS = (
    {"types", "paths", "deprecated"},
    {"checks", "layouts"},
    {"checkpoints"},
    {"transfers", "objectives", "models", "data", "runs"},
    {"training"},
    {"study"},
    {"commands"},
)
HEIGHT = {package: number for number, floor in enumerate(FLOORS) for package in floor}


def imports(path):
    """The modules that a file takes from, those of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    for path in sorted((ROOT / "merge_jax").rglob("*.py")):
        if not path.stem.startswith("__"):  # A package lists what it offers, the root what all do.
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def test_a_package_takes_from_the_floors_below():
    wrong = set()
    for module, path in files():
        package = module.split(".")[1]
        for name in imports(path):
            root, *rest = name.split(".")
            other = rest[0] if root == "merge_jax" and rest else None
            if root in ("experiments", "tests", "benchmarks") or (
                other in HEIGHT and other != package and HEIGHT[other] >= HEIGHT[package]
            ):
                wrong.add(f"{module} takes from {name}")
    assert wrong == set()


# What reads a model's computation knows no method; a refit starts from an alignment; learned adapters need neither.
TRANSFERS = {"channels": (), "alignment": ("channels",), "fitted": ("channels", "alignment"), "adapters": ()}


def test_transfers_are_built_on_each_other():
    wrong = set()
    for module, path in files():
        root, *rest = module.split(".")
        if (root, rest[0]) != ("merge_jax", "transfers"):
            continue
        allowed = {rest[1], *TRANSFERS.get(rest[1], ())}
        for name in imports(path):
            *parents, package = name.split(".")[:3]
            if parents == ["merge_jax", "transfers"] and package in TRANSFERS.keys() - allowed:
                wrong.add(f"{module} takes from {name}")
    assert wrong == set()


def test_every_package_has_a_floor():
    assert {module.split(".")[1] for module, _ in files()} == set(HEIGHT)


def test_no_circles():
    modules = {**dict(files()), **{f"benchmarks.{path.stem}": path for path in (ROOT / "benchmarks").glob("*.py")}}
    graph = {module: set(imports(path)) & set(modules) for module, path in modules.items()}
    list(TopologicalSorter(graph).static_order())  # Raises on a circle, and names it.
