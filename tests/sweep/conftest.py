"""A small sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raycluster.config import parse
from raycluster.sweep.config import SweepConfig


@pytest.fixture(scope="session")
def tiny_sweep(tiny_yaml: str) -> Callable[..., SweepConfig]:
    """tiny_sweep(run_dir, search, "sweep.key=value", ...): the tiny run with a search section in YAML."""

    def make(run_dir: Path, search: str, *overrides: str) -> SweepConfig:
        return parse(SweepConfig, tiny_yaml, [f"run.dir={run_dir}", f"search={search}", *overrides])

    return make
