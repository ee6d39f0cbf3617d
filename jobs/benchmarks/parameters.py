"""Parameters of a benchmark: the arguments of its `run`, given as `key=value`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator

from raycluster.config import PluginField, load, settings
from raycluster.config.registry import did_you_mean
from raycluster.types import UserError

Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)]
"""Text that may look like a number, such as `clusters=1000`."""


def find_benchmark(name: str) -> Callable[..., str]:
    """The `run` of a benchmark. Raises UserError listing all benchmarks if there is none of this name."""
    known = PluginField("benchmarks", "run").modules()
    if name not in known:
        raise UserError(f"benchmark: seen {name}; wanted one of {', '.join(known)}{did_you_mean(name, known)}")
    run: Callable[..., str] = import_module(f"benchmarks.{name}").run
    return run


def parse_arguments(run: Callable[..., str], words: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments in `key=value` words. Raises UserError naming all errors."""
    hints = {name: Text if hint is str else hint for name, hint in get_type_hints(run).items() if name != "return"}
    defaults = {
        name: item.default for name, item in signature(run).parameters.items() if item.default is not item.empty
    }
    parameters: Any = settings(type("Parameters", (), {"__annotations__": hints, "__doc__": run.__doc__, **defaults}))
    found = load(parameters, None, words)
    return {name: getattr(found, name) for name in hints}
