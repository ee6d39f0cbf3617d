"""Private names of Ray: checked once, each loss reported in one line, and Ray's public behaviour in their place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raycluster.distributed.ray_internals import FEATURES, Name

ROOT = Path(__file__).parent.parent.parent
INTERNALS = ROOT / "raycluster" / "distributed" / "ray_internals.py"
NAMES = sorted({name.path: name for feature in FEATURES.values() for name in feature.names}.values(), key=str)
PRIVATE_MODULE = re.compile(r"\bray\.(\w+\.)*(_\w+|core\.generated)")

HIDE = """
import importlib, sys
from raycluster.distributed import ray_internals

def hide(path, mentions):
    module, _, attributes = path.partition(":")
    *parents, last = attributes.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    if mentions:
        def replacement(*args, **kwargs):
            pass
        setattr(owner, last, replacement)
        return
    classes = owner.__mro__ if isinstance(owner, type) else [owner] if last in vars(owner) else type(owner).__mro__
    try:
        for one in classes:
            if last in vars(one):
                delattr(one, last)
    except (TypeError, AttributeError):  # of a compiled class or an enum: hide the class
        delattr(importlib.import_module(module), parents[0])
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'jobs'}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_each_missing_name_is_reported_in_one_line() -> None:
    """Each name is hidden in a child of one fresh process that has Ray imported."""
    code = f"""{HIDE}
import os
import ray.train.torch, ray.data
for feature in ray_internals.FEATURES:
    ray_internals.missing(feature)
ray_internals.missing.cache_clear()
for name in sorted({{name.path: name for f in ray_internals.FEATURES.values() for name in f.names}}.values(), key=str):
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        hide(name.path, name.mentions)
        print("hidden", name.path, file=sys.stderr)
        ray_internals.check()
        ray_internals.check()
        sys.stderr.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    reports = re.split(r"^hidden ", found.stderr, flags=re.MULTILINE)[1:]
    assert len(reports) == len(NAMES)
    for name, report in zip(NAMES, reports, strict=True):
        path, *lines = report.splitlines()
        assert path == name.path
        assert len(lines) == 1 and shown(name) in lines[0], report


def shown(name: Name) -> str:
    return ".".join([name.path.replace(":", "."), *name.mentions])


def test_another_signature_counts_as_missing() -> None:
    changed = Name("ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy.resize", ())
    assert not changed.is_usable()
    path = "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy._count_possible_workers"
    assert Name(path, ("reserved_resources",)).is_usable()
    assert not Name(path, ("resources",)).is_usable() and not Name(path, ()).is_usable()


@pytest.mark.slow
@pytest.mark.ray
def test_an_elastic_run_completes_without_any_private_name(tiny_yaml: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)
    code = f"""{HIDE}
def hidden(path):
    raise AttributeError(path)

if __name__ == "__main__":
    ray_internals.find = hidden
    from raycluster.config import load
    from raycluster.distributed.train.trainer import fit
    from raycluster.run.config import Config
    assert not any(map(ray_internals.available, ray_internals.FEATURES))
    overrides = ["run.dir=" + sys.argv[2], "run.workers={{min: 1, max: 2}}", "training.epochs=1"]
    print(fit(load(Config, sys.argv[1], overrides)))
"""
    found = run(code, str(tmp_path / "tiny.yaml"), str(tmp_path / "run"))
    assert found.returncode == 0, found.stderr
    assert "run directory" in found.stdout and (tmp_path / "run" / "report.json").exists()
    warnings = [line for line in found.stderr.splitlines() if "lacks" in line]
    assert len(warnings) == 1 and all(shown(name) in warnings[0] for name in NAMES)


def test_runs_without_training_workers_import_no_private_module() -> None:
    code = """
import sys
import raycluster.distributed.train.trainer
print([name for name in ("scaling_policy", "failure_policy") if f"raycluster.distributed.train.{name}" in sys.modules])
"""
    assert run(code).stdout.strip() == "[]"


def test_no_other_module_mentions_private_names() -> None:
    attributes = {part for name in NAMES for part in (*name.path.split(":")[1].split("."), *name.mentions)}
    private = sorted(part for part in attributes if part.startswith("_") and not part.startswith("__"))
    assert "_temp_dir" in private and "_stop_timeout" in private
    pattern = re.compile("|".join([PRIVATE_MODULE.pattern, *(rf"\b{part}\b" for part in private)]))
    assert pattern.search(INTERNALS.read_text())
    for path in sorted((ROOT / "raycluster").rglob("*.py")):
        if path != INTERNALS:
            found = pattern.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)}: {found}"
