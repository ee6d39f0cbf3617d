"""YAML <-> frozen settings: one decorator, one loader that tells all mistakes at once, one writer."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from raycluster.config.errors import ConfigError, booleans_for_numbers, format_value, invalid, plain
from raycluster.types import UserError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, dataclasses.field))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that checks types and bounds and refuses unknown keys.

    Bounds stand beside the field: ``lr: Annotated[float, Field(gt=0)] = 0.05``. What concerns several fields is checked
    in ``__post_init__``, which raises UserError.
    """
    config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    return typing.cast("type[T]", pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls))


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """The settings in a YAML file, changed by ``section.key=value`` overrides.

    path: None starts from nothing, so that the overrides and defaults are the whole configuration.
    Raises UserError naming every mistake at once.
    """
    if path is None:
        return parse(cls, "", overrides, source="the command line")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}: {_nearby(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}; give a readable YAML file in UTF-8") from error
    return parse(cls, text, overrides, source=str(path))


def parse(cls: type[T], text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> T:
    """The settings in a YAML text, see ``load``. source: what error messages call the text."""
    tree, config_errors = _read_yaml(text, source)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{source}: seen {format_value(tree)}; wanted a mapping of sections such as `seed: 0`")
    for override in overrides:
        config_errors += _override(tree, override)
    return from_tree(cls, tree, source=source, config_errors=config_errors)


def from_tree(cls: type[T], tree: dict[str, Any], *, source: str, config_errors: Sequence[ConfigError] = ()) -> T:
    """The settings in dicts, lists and scalars, see ``load``. config_errors: to tell together with those found here."""
    config_errors = [*config_errors, *booleans_for_numbers(cls, tree)]
    try:
        config = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        config_errors += invalid(cls, tree, error)
    if config_errors:
        lines = "\n".join(f"  {config_error}" for config_error in config_errors)
        raise UserError(f"{source}: {len(config_errors)} mistake{'s' * (len(config_errors) > 1)}\n{lines}")
    return config


def dump(config: Any) -> str:
    """The complete settings as YAML, defaults included, in the order of the fields: ``parse(cls, dump(x)) == x``."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number and remembers keys given twice."""

    duplicates: list[ConfigError]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                wanted = f"each key once (lines {lines[key.value]} and {line})"
                self.duplicates.append(
                    ConfigError(str(key.value), "the same key twice", wanted, "remove one of the lines")
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


# YAML 1.1 demands a dot and a signed exponent; people write 1e-3 and 5e5.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str, source: str) -> tuple[Any, list[ConfigError]]:
    loader = _Loader(text)
    loader.duplicates = []
    try:
        tree = loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return tree, loader.duplicates


def _override(tree: dict[str, Any], override: str) -> list[ConfigError]:
    """Set one ``section.key=value`` in the tree."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(re.fullmatch(r"\w+", key) for key in keys):
        return [
            ConfigError(override, "an override of another form", "section.key=value", "for instance training.lr=0.1")
        ]
    for depth, key in enumerate(keys[:-1], 1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            parent = ".".join(keys[:depth])
            return [
                ConfigError(
                    path, f"{parent} = {format_value(tree)}", f"{parent} to be a section", f"set {parent} itself"
                )
            ]
    try:
        value, config_errors = _read_yaml(text, override) if text else ("", [])
    except UserError:
        return [ConfigError(path, text, "a value in YAML", "quote it, for instance key='\"a: b\"'")]
    tree[keys[-1]] = value
    return config_errors


def _nearby(path: Path) -> str:
    names = sorted(str(file) for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f"there are {', '.join(names[:10])}" if names else "give the path of a YAML file"
