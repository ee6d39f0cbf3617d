"""What is wrong with a configuration, told so that it can be mended: where, what was seen and wanted, the remedy."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError

from raycluster.config.registry import PluginField, did_you_mean

Location = tuple[int | str, ...]


class ConfigError(NamedTuple):
    """One thing to mend.

    path: dotted. seen: the value, None where there is none. wanted, remedy: for people; wanted is empty where the
    remedy says it all.
    """

    path: str
    seen: str | None
    wanted: str
    remedy: str = ""

    def __str__(self) -> str:
        if not self.wanted:
            return f"{self.path}: {self.remedy}"
        seen = "missing" if self.seen is None else f"seen {self.seen}"
        return f"{self.path}: {seen}; wanted {self.wanted}" + (f"; {self.remedy}" if self.remedy else "")


def invalid(cls: type[Any], tree: dict[str, Any], error: ValidationError) -> list[ConfigError]:
    """One mistake per path; what the members of a union wanted is joined by "or", unless one of them tells more."""
    found: dict[str, ConfigError] = {}
    for item in error.errors(include_url=False):
        config_error = _config_error(cls, tree, typing.cast("dict[str, Any]", item))
        if config_error.path in found:
            first = found[config_error.path]
            wanted = " or ".join(filter(None, (first.wanted, config_error.wanted)))
            config_error = first._replace(wanted=wanted)
        found[config_error.path] = config_error
    return [
        config_error for path, config_error in found.items() if not any(other.startswith(f"{path}.") for other in found)
    ]


def _config_error(cls: type[Any], tree: dict[str, Any], item: dict[str, Any]) -> ConfigError:
    location, seen, section = _walk(cls, tree, item["loc"])
    path = ".".join(map(str, location)) or "configuration"
    fields = {field.name: field for field in dataclasses.fields(section)} if section else {}
    key = str(location[-1]) if location else ""
    if item["type"] == "value_error":
        return ConfigError(path, None, "", item["msg"].removeprefix("Value error, "))
    wanted = re.sub(r"^Input should be |, unable to parse.*$", "", item["msg"])
    wanted = wanted.replace("a valid integer", "an integer").replace("a valid ", "a ")
    if item["type"] == "unexpected_keyword_argument":
        hint = did_you_mean(key, list(fields)) or "; remove it"
        return ConfigError(
            path, format_value(seen), f"one of the settings {', '.join(fields)}", hint.removeprefix("; ")
        )
    if item["type"] in ("missing", "missing_argument"):
        example = f"add it to the file or give {path}=..."
        return ConfigError(path, None, _meaning(section, key) or "a value, it has no default", example)
    if item["type"] == "dataclass_type":
        wanted = "a section of settings (key: value)"
    default = fields[key].default if key in fields else dataclasses.MISSING
    usable = isinstance(default, (bool, int, float, str))
    return ConfigError(
        path, format_value(seen), wanted, f"leave it out for the default {format_value(default)}" if usable else ""
    )


def _walk(cls: type[Any], tree: Any, location: Location) -> tuple[Location, Any, type[Any] | None]:
    """Follow pydantic's location: (the part that is a path of the file, its value, the class with its last key).

    Locations also name members of unions and steps of validation, which mean nothing to a user.
    """
    hint: Any = cls
    section: type[Any] | None = None
    path: Location = ()
    for key in location:
        known = _section_class(hint, tree)
        is_key = isinstance(tree, dict) and key in tree
        is_item = isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree)
        hints = typing.get_type_hints(known, include_extras=True) if known else {}
        if not (is_key or is_item or key in hints):
            continue
        path, section = (*path, key), known
        tree = tree[key] if is_key or is_item else None
        hint = hints.get(str(key), hint if is_item else None)
    return path, tree, section


def _section_class(hint: Any, value: Any) -> type[Any] | None:
    """The settings class that a type hint means for a value: a dataclass, or one found through ``PluginField``."""
    for part in _members(hint):
        if isinstance(part, PluginField):
            return part.settings_class(value)
    classes = [part for part in _members(hint) if isinstance(part, type) and dataclasses.is_dataclass(part)]
    return classes[0] if classes else None


def _members(hint: Any) -> Iterator[Any]:
    """The hint itself and everything it is made of: members of unions, arguments, annotations."""
    yield hint
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
        yield from _members(hint.__origin__)
    elif isinstance(hint, types.UnionType) or get_origin(hint) is not None:
        for argument in get_args(hint):
            yield from _members(argument)


def booleans_for_numbers(cls: type[Any], tree: dict[str, Any]) -> Iterator[ConfigError]:
    """``epochs: true`` would quietly become 1; YAML also reads ``yes`` and ``on`` so."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for key, value in tree.items():
        members = list(_members(hints.get(key)))
        accepted = any(member is bool or member is value for member in members)
        if isinstance(value, bool) and not accepted and any(member is int or member is float for member in members):
            yield ConfigError(str(key), format_value(value), "a number", "write digits")
        section = _section_class(hints.get(key), value) if isinstance(value, dict) else None
        for config_error in booleans_for_numbers(section, value) if section else ():
            yield config_error._replace(path=f"{key}.{config_error.path}")


def _meaning(section: type[Any] | None, key: str) -> str:
    """What the docstring of the section says about a field: its sentence ``key: meaning.``"""
    text = " ".join((section.__doc__ or "").split()) if section else ""
    match = re.search(rf"(?:^|\. ){re.escape(key)}: (.+?)\.?(?:$|(?<=\.) )", text)
    return match[1] if match else ""


def format_value(value: Any) -> str:
    """A value as the user would write it, on one short line."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value: Any) -> Any:
    """Settings as what YAML knows: dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value
