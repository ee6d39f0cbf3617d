"""Every configuration of the repository loads, says in its head what to expect, and survives being written."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from raycluster.config import dump, load, parse
from raycluster.run.state import Config

ROOT = Path(__file__).parents[2]
RUNS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name not in ("search", "cluster")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_loads_and_survives(path: Path) -> None:
    config = load(Config, path)
    again = parse(Config, dump(config))
    assert again == config
    assert dump(again) == dump(config)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_value_is_kept(path: Path) -> None:
    written = yaml.safe_load(dump(load(Config, path)))
    for section, key, value in leaves(yaml.safe_load(path.read_text())):
        kept = written[section][key] if key else written[section]
        assert kept == pytest.approx(value) if isinstance(value, float) else kept == value, f"{section}.{key}"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_says_what_it_gives(path: Path) -> None:
    head = " ".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    for word in ("Expected", "Hardware", f"python jobs/pretrain.py {path.relative_to(ROOT)}"):
        assert word in head, f"the first lines of {path.name} should state {word}"
    assert re.search(r"\b(seconds?|minutes?|hours?|days?)\b", head), (
        f"the first lines of {path.name} should state a time"
    )


def leaves(tree: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(section, key, value) of plain values; the loader may write numbers like 1e-3 and nested views otherwise."""
    return [
        (section, key, value)
        for section, values in tree.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        if not isinstance(value, dict)
    ]
