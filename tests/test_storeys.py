"""Imports point downwards, the rooms of a storey do not know each other, and only one folder knows Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOUNS = {"", "types", "seeding", "config", "naming", "mistakes", "storage", "metrics", "features", "workers", "command"}
NOUNS |= {"events", "decisions", "patience", "lease", "status"}
FOLDERS = [{"data", "models", "clustering"}, {"methods", "training", "evaluation"}]
TORCH_FREE_NOUNS = {"types", "seeding", "config", "storage", "metrics", "command"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "raycluster").rglob("*.py"))
}


def room(module: str) -> str:
    """The folder or top-level file a module belongs to: raycluster.data.plan lies in data."""
    return f"{module}.".split(".")[1]


def storey(module: str) -> int:
    """0 for the nouns at the bottom; what lies at the top level and is no noun is the run itself."""
    name = room(module)
    if name in NOUNS:
        return 0
    by_folder = [number for number, names in enumerate(FOLDERS, 1) if name in names]
    return by_folder[0] if by_folder else 4 if name == "distributed" else 3


def imports(path: Path) -> Iterator[str]:
    """Everything a file imports, also inside functions: dotted names of modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in MODULES else str(node.module) for name in inner}


GRAPH = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    folders = {name for names in FOLDERS for name in names}
    for imported in GRAPH[module]:
        assert storey(imported) <= storey(module), f"{module} imports {imported}, which lies higher"
        siblings = storey(imported) == storey(module) and room(imported) != room(module)
        assert not (siblings and room(module) in folders), (
            f"{module} imports {imported}: rooms of one storey do not know each other"
        )


@pytest.mark.parametrize("module", MODULES)
def test_only_distributed_imports_ray(module: str) -> None:
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(MODULES[module]))
    assert not uses_ray or room(module) == "distributed", f"{module} imports ray; only raycluster/distributed may"


def test_no_cycles() -> None:
    list(TopologicalSorter(GRAPH).static_order())


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
    assert loaded_by([module for module in MODULES if storey(module) < 4], "ray") == ""


def test_data_tasks_import_without_torch() -> None:
    free = [module for module in MODULES if room(module) == "data" or room(module) in TORCH_FREE_NOUNS]
    assert loaded_by(free, "torch") == ""


def test_no_workshop_names() -> None:
    forbidden = {"utils", "helpers", "common", "misc"}
    assert not [module for module in MODULES if forbidden & set(module.split("."))]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_hold_no_logic(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, f"{path.name}: move logic into the package"
