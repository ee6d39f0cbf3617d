"""The layout of a run directory is written down once."""

from __future__ import annotations

import ast
from pathlib import Path

from raycluster.io.run_paths import RunPaths

PACKAGE = Path(__file__).parents[2] / "raycluster"
NAMES = {name for name in dir(RunPaths) if isinstance(getattr(RunPaths, name), property)} - {"best_rerun"}


def basenames() -> set[str]:
    paths = RunPaths("run")
    return {getattr(paths, name).removeprefix("run/") for name in NAMES} | {"trials", "evaluation", "best-again"}


def joined(tree: ast.AST) -> set[str]:
    """Texts that a module passes to a function `join` of a module, or appends to a text with a slash."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
        elif isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant):
            found.add(str(node.right.value).lstrip("/"))
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            found |= {part.lstrip("/") for part in parts if isinstance(part, str) and part.startswith("/")}
    return found


def test_no_other_module_joins_the_paths_of_a_run_directory() -> None:
    # `prepare` writes a data set, whose folder is no run directory.
    exempt = {PACKAGE / "io" / "run_paths.py", PACKAGE / "distributed" / "prepare.py"}
    for path in sorted(set(PACKAGE.rglob("*.py")) - exempt):
        names = joined(ast.parse(path.read_text(encoding="utf-8"))) & basenames()
        assert not names, f"{path}: {', '.join(sorted(names))}; use RunPaths"


def test_options_of_a_uri_stay_at_its_end() -> None:
    paths = RunPaths("s3://bucket/run?region=eu-west-1")
    assert paths.config == "s3://bucket/run/config.yaml?region=eu-west-1"
    assert paths.trial("007").metrics == "s3://bucket/run/trials/007/metrics.jsonl?region=eu-west-1"
    assert paths.evaluation("abc").manifest == "s3://bucket/run/evaluation/abc/manifest.parquet?region=eu-west-1"
