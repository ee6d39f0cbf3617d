"""Imports point downwards through the layers, which are the folders; only `distributed` imports Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up; the folders of one layer do not import each other.
LAYERS = [
    ["types", "seeding", "events"],
    ["config"],
    ["io"],
    ["runtime"],
    ["data", "models"],
    ["features"],
    ["clustering"],
    ["training"],
    ["methods", "evaluation"],
    ["run"],
    ["monitoring"],
    ["sweep"],
    ["distributed"],
    ["api", "cli"],
    [""],
]
MAX_ROOT_MODULES = 8
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
TORCH_FREE = ("types", "seeding", "events", "config", "io", "runtime", "data", "cli")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "raycluster").rglob("*.py"))
}


def package(module: str) -> str:
    """The folder, or module of the root, that a module belongs to: raycluster.data.epoch_plan lies in data."""
    return f"{module}.".split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Everything that a file imports, also inside functions and by a string that names a module of the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in MODULES else str(node.module) for name in inner}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("raycluster."):
            yield node.value.rstrip(".")  # as in import_module(f"raycluster.models.{name}")


GRAPH = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    for imported in GRAPH[module] - {"raycluster"}:
        above, below = LAYER[package(module)], LAYER[package(imported)]
        assert below <= above, f"{module} imports {imported}, which lies in a higher layer"
        same = package(module) == package(imported)
        assert below < above or same, f"{module} imports {imported}: folders of one layer do not import each other"


@pytest.mark.parametrize("module", MODULES)
def test_only_distributed_imports_ray(module: str) -> None:
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(MODULES[module]))
    assert not uses_ray or package(module) == "distributed", f"{module} imports ray; only raycluster/distributed may"


def test_no_cycles() -> None:
    list(TopologicalSorter(GRAPH).static_order())


def test_a_package_imports_no_development_dependency() -> None:
    development = {"pytest", "hypothesis", "moto", "psutil", "jobs", "benchmarks", "chaos", "tests"}
    for module, path in MODULES.items():
        found = {name.split(".")[0] for name in imports(path)} & development
        assert not found, f"{module} imports {', '.join(found)}, which only developers have"


def loaded_by(modules: list[str], library: str) -> str:
    """Import the modules in a fresh interpreter; the first that brings the library along, "" if none does."""
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    if {library!r} in sys.modules:\n"
        "        sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr.strip()


def test_algorithms_import_without_ray() -> None:
    assert loaded_by([module for module in MODULES if package(module) != "distributed"], "ray") == ""


def test_data_tasks_import_without_torch() -> None:
    assert loaded_by([module for module in MODULES if package(module) in TORCH_FREE], "torch") == ""


def test_few_modules_lie_in_the_root() -> None:
    assert len(list((ROOT / "raycluster").glob("*.py"))) <= MAX_ROOT_MODULES


def test_no_names_that_say_nothing() -> None:
    forbidden = {"utils", "helpers", "common", "misc"}
    assert not [module for module in MODULES if forbidden & set(module.split("."))]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_hold_no_logic(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, f"{path.name}: move logic into the package"
