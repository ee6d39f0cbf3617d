"""The documentation names only files, settings, parameters and targets that exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raycluster
from raycluster.config import PluginField
from raycluster.distributed.cluster_files import ClusterSettings
from raycluster.distributed.prepare import PrepareSettings
from raycluster.methods.base import BaseMethod
from raycluster.sweep.config import SweepConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 200
# Words of a command that are no settings of the configuration, by job.
OWN_WORDS = {
    "status.py": {"price"},
    "chaos.py": {"seed", "only", "repeat", "out"},
    "transfer.py": {"labels", "model"},
    "tune.py": {"search"},
    "cluster.py": {field.name for field in dataclasses.fields(ClusterSettings)},
    "prepare.py": {field.name for field in dataclasses.fields(PrepareSettings)},
}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def code(page: Path) -> str:
    """Code blocks and code spans of a page, one per line; commands that span lines are joined."""
    text = page.read_text(encoding="utf-8")
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    indented = re.findall(r"^ {4}.+", text, re.MULTILINE)
    return "\n".join([*FENCE.findall(text), *spans, *indented]).replace("\\\n", " ")


def settings_keys(hint: Any) -> Iterator[str]:
    """Dotted keys below a section, those of every method and model included."""
    arguments = typing.get_args(hint)
    for part in (hint, *arguments):
        if isinstance(part, PluginField):
            for name in part.modules():
                yield from settings_keys(part.settings_class({"name": name}))
        elif isinstance(part, type) and dataclasses.is_dataclass(part):
            hints = typing.get_type_hints(part, include_extras=True)
            for field in dataclasses.fields(part):
                yield field.name
                yield from (f"{field.name}.{key}" for key in settings_keys(hints[field.name]))


KEYS = set(settings_keys(SweepConfig))
SECTIONS = sorted(key for key in KEYS if "." not in key)
SETTING = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})((?:\.[a-z_0-9]+)+)(?![\w/(])")


def settings_named(text: str) -> set[str]:
    return {section + rest for section, rest in SETTING.findall(text)}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead, f"{page.name} links to {dead}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_exist(page: Path) -> None:
    """`foo` and <placeholders> stand for names that a reader chooses."""
    paths = re.findall(r"(?<![\w./-])(?:configs|docs|jobs|raycluster|tests|\.ci)/[\w./*<>-]*", code(page))
    wanted = {path.rstrip(".") for path in paths if "foo" not in path and "<" not in path}
    missing = [path for path in sorted(wanted) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_settings_exist(page: Path) -> None:
    unknown = sorted(settings_named(code(page)) - KEYS)
    assert not unknown, f"{page.name} names the settings {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_words_of_commands_exist(page: Path) -> None:
    for job, line in re.findall(r"python jobs/(\w+\.py)([^\n#&]*)", code(page)):
        given = set(re.findall(r"(?<![\w.{])([a-z_]+)=", line))
        known = benchmark_parameters(line.split()[0]) if job == "benchmark.py" else OWN_WORDS.get(job, set())
        assert given <= known, f"{page.name}: {job} takes {sorted(known)}, not {sorted(given - known)}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    unknown = set(re.findall(r"(?:^|\s)make ([a-z-]+)", code(page), re.MULTILINE)) - targets
    assert not unknown, f"{page.name} names the targets {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_public_functions_exist(page: Path) -> None:
    unknown = set(re.findall(r"\braycluster\.(\w+)\(", code(page))) - set(raycluster.__all__)
    assert not unknown, f"{page.name} calls {sorted(unknown)}"


def test_the_protocol_of_a_method_is_described() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| member |")[2].partition("\n\n")[0]
    described = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert described == {name for name in vars(BaseMethod) if not name.startswith("_")}


def test_every_configuration_of_a_run_is_described() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    paths = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("search", "cluster")]
    assert not [str(path) for path in paths if str(path.relative_to(ROOT)) not in text]


def test_unknown_settings_are_noticed() -> None:
    text = "training.epochs=5 `method.num_heads` views.train.size run.sh jobs/run.py data.md views.cluster method.pca"
    assert settings_named(text) - KEYS == {"run.sh", "data.md", "views.cluster", "method.pca"}


def benchmark_parameters(name: str) -> set[str]:
    """The parameters of a benchmark, read without importing what it compares with."""
    tree = ast.parse((ROOT / "jobs" / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
    run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    return {argument.arg for argument in run.args.args}
