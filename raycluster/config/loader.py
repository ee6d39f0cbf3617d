"""YAML <-> frozen settings: a class decorator, a loader that reports all errors together, and a writer."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from raycluster.config.errors import (
    MAX_SHOWN,
    ConfigError,
    booleans_for_numbers,
    format_value,
    invalid,
    plain,
    report,
)
from raycluster.config.yaml_tree import MAX_DEPTH, read_tree
from raycluster.types import UserError

T = TypeVar("T")

NonEmpty = Annotated[str, Field(min_length=1)]
"""Text that may not be empty, such as a path: an unset shell variable gives ``run.dir=``."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed as ``raycluster.seeding`` takes it."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, dataclasses.field))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that validates types and bounds and forbids unknown keys.

    Bounds stand beside the field: ``lr: Annotated[float, Field(gt=0)] = 0.05``. Constraints between fields are checked
    in ``__post_init__``, which raises UserError.
    """
    config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    return typing.cast("type[T]", pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls))


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """The settings in a YAML file, changed by ``section.key=value`` overrides.

    path: None for overrides and defaults only. Raises UserError naming all errors.
    """
    if path is None:
        return parse(cls, "", overrides, source="the command line")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}: {_alternatives(Path(path))}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"cannot read the configuration {path}: {error}; give a readable YAML file in UTF-8") from error
    return parse(cls, text, overrides, source=str(path))


def parse(cls: type[T], text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> T:
    """The settings in a YAML text, see ``load``. source: the name of the text in error messages."""
    tree, config_errors = read_tree(text)
    unreadable = tree is None and bool(config_errors)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{source}: seen {format_value(tree)}; wanted a mapping of sections such as `seed: 0`")
    for override in overrides:
        config_errors += _override(tree, override)
    if unreadable:
        raise UserError(report(source, config_errors))
    return from_tree(cls, tree, source=source, config_errors=config_errors)


def from_tree(cls: type[T], tree: dict[str, Any], *, source: str, config_errors: Sequence[ConfigError] = ()) -> T:
    """The settings in dicts, lists and scalars, see ``load``. config_errors: to report together with those found."""
    config_errors = [*config_errors, *booleans_for_numbers(cls, tree)]
    try:
        config = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        known = {config_error.path for config_error in config_errors}
        config_errors += [config_error for config_error in invalid(cls, tree, error) if config_error.path not in known]
    if config_errors:
        raise UserError(report(source, config_errors))
    return config


def dump(config: Any) -> str:
    """The complete settings as YAML, defaults included, in the order of the fields: ``parse(cls, dump(x)) == x``."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def _override(tree: dict[str, Any], override: str) -> list[ConfigError]:
    """Set one ``section.key=value`` in the tree."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) > MAX_DEPTH or not all(re.fullmatch(r"\w+", key) for key in keys):
        seen, remedy = "an override of another form", "for instance training.lr=0.1"
        return [ConfigError(_excerpt(override), seen, "section.key=value", remedy)]
    for depth, key in enumerate(keys[:-1], 1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            parent = ".".join(keys[:depth])
            seen = f"{parent} = {format_value(tree)}"
            return [ConfigError(path, seen, f"{parent} to be a section", f"set {parent} itself")]
    value, config_errors = read_tree(text, path) if text else ("", [])
    if any(not error.wanted for error in config_errors):  # a syntax error
        return [ConfigError(path, _excerpt(text), "a value in YAML", "quote it, for instance key='\"a: b\"'")]
    tree[keys[-1]] = value
    return config_errors


def _excerpt(text: str) -> str:
    return text if text.isprintable() and len(text) <= MAX_SHOWN else format_value(text)


def _alternatives(path: Path) -> str:
    """Which configuration may be meant: files of a similar name in the folder of the path and below configs/."""
    files = {*path.parent.glob("*.y*ml"), *Path("configs").rglob("*.y*ml")}
    stems = {str(file): file.stem for file in sorted(files) if not file.name.startswith(".")}
    close = get_close_matches(path.stem, set(stems.values()), n=3)
    if close:
        return f"did you mean {' or '.join(name for name in stems if stems[name] in close)}?"
    return f"there are {', '.join([*stems][:10])}" if stems else "give the path of a YAML file"
