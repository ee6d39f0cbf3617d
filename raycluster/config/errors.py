"""Errors of a configuration: the path, the value seen, the value wanted, and the remedy."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError

from raycluster.config.registry import PluginField, did_you_mean

Location = tuple[int | str, ...]

MAX_SHOWN = 80  # characters of a value
MAX_REPORTED = 50  # errors of one source
_MAX_EXAMINED = 500
_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


class ConfigError(NamedTuple):
    """One error.

    path: dotted. seen: the value, None where there is none. wanted: what is valid, empty where the remedy suffices.
    remedy: what to change.
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


_hints = typing.cast(
    "Callable[[type[Any]], dict[str, Any]]", cache(partial(typing.get_type_hints, include_extras=True))
)
"""Type hints of a settings class; their evaluation dominates the time of a validation."""


def report(source: str, config_errors: Sequence[ConfigError | str]) -> str:
    """All errors of a source as one message; at most ``MAX_REPORTED`` are listed."""
    count = len(config_errors)
    lines = [f"  {config_error}" for config_error in config_errors[:MAX_REPORTED]]
    lines += [f"  and {count - MAX_REPORTED} more"] * (count > MAX_REPORTED)
    return "\n".join([f"{source}: {count} error{'s' * (count > 1)}", *lines])


def invalid(cls: type[Any], tree: dict[str, Any], error: ValidationError) -> list[ConfigError]:
    """The errors that validation found, one per path: alternatives of a union are joined by "or"."""
    found: dict[str, ConfigError] = {}
    for item in islice(error.errors(include_url=False), _MAX_EXAMINED):
        config_error = _config_error(cls, tree, typing.cast("dict[str, Any]", item))
        if config_error.path in found:
            first = found[config_error.path]
            wanted = " or ".join(filter(None, (first.wanted, config_error.wanted)))
            config_error = first._replace(wanted=wanted)
        found[config_error.path] = config_error
    parents = {path[: dot.start()] for path in found for dot in re.finditer(r"\.", path)}
    return [config_error for path, config_error in found.items() if path not in parents]


def _config_error(cls: type[Any], tree: dict[str, Any], item: dict[str, Any]) -> ConfigError:
    location, seen, section = _walk(cls, tree, item["loc"])
    path = ".".join(map(str, location)) or "configuration"
    key = str(location[-1]) if location else ""
    kind = item["type"]
    if kind == "value_error":
        return ConfigError(path, None, "", item["msg"].removeprefix("Value error, "))
    if kind == "unexpected_keyword_argument":
        names = [field.name for field in dataclasses.fields(section)] if section else []
        wanted = f"one of the settings {', '.join(names)}"
        return ConfigError(path, format_value(seen), wanted, _rename(cls, tree, key, names))
    if kind in ("missing", "missing_argument"):
        example = f"add it to the file or give {path}=..."
        return ConfigError(path, None, _meaning(section, key) or "a value, it has no default", example)
    return ConfigError(path, format_value(seen), _expected(item), _use_instead(item, section, key))


def _expected(item: dict[str, Any]) -> str:
    """What a value should be, by pydantic's error."""
    if item["type"] == "dataclass_type":
        return "a section of settings (key: value)"
    if item["type"] == "string_too_short":
        return "text that is not empty"
    wanted = re.sub(r"^Input should be |, unable to parse.*$", "", item["msg"])
    return wanted.replace("a valid integer", "an integer").replace("a valid ", "a ")


def _use_instead(item: dict[str, Any], section: type[Any] | None, key: str) -> str:
    """The remedy for a value of the wrong kind. A value out of bounds gets none: its bound says what to change."""
    default = (
        next((field.default for field in dataclasses.fields(section) if field.name == key), None) if section else None
    )
    if item["type"] == "string_too_short":
        return (
            "give null for none"
            if default is None and section and _is_optional(section, key)
            else ("is a shell variable unset?")
        )
    if item["type"] == "string_type":
        return "quote it if it is text"
    if item["type"] in _OUT_OF_BOUNDS or not isinstance(default, (bool, int, float, str)):
        return ""
    return f"leave it out for the default {format_value(default)}"


def _is_optional(section: type[Any], key: str) -> bool:
    return type(None) in _members(_hints(section)[key])


def _rename(cls: type[Any], tree: dict[str, Any], key: str, names: Sequence[str]) -> str:
    """The remedy for a key that the section lacks: a setting of this name elsewhere, else one of a similar name."""
    settings: dict[str, list[str]] = {}
    for path in _setting_paths(cls, tree):
        settings.setdefault(path.rpartition(".")[2], []).append(path)
    if key in settings:
        return f"did you mean {' or '.join(settings[key][:3])}?"
    similar = did_you_mean(key, names).removeprefix("; ")
    if similar:
        return similar
    close = get_close_matches(key, settings, n=1, cutoff=0.8)
    return f"did you mean {' or '.join(settings[close[0]][:3])}?" if close else "remove it"


def _setting_paths(cls: type[Any], tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting. tree: chooses the classes of sections that have a name."""
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        value = tree.get(field.name) if isinstance(tree, dict) else None
        section = _section_class(hints[field.name], value)
        if section is None:
            yield f"{prefix}{field.name}"
        else:
            yield from _setting_paths(section, value, f"{prefix}{field.name}.")


def _walk(cls: type[Any], tree: Any, location: Location) -> tuple[Location, Any, type[Any] | None]:
    """Follow pydantic's location: (the part that is a path of the file, its value, the class with its last key).

    Members of unions and steps of validation, which locations also name, are left out.
    """
    hint: Any = cls
    section: type[Any] | None = None
    path: Location = ()
    for key in location:
        known = _section_class(hint, tree)
        is_key = isinstance(tree, dict) and key in tree
        is_item = isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree)
        hints = _hints(known) if known else {}
        if not (is_key or is_item or key in hints):
            continue
        path, section = (*path, key), known
        tree = tree[key] if is_key or is_item else None
        hint = hints.get(str(key), hint if is_item else None)
    return path, tree, section


def _section_class(hint: Any, value: Any) -> type[Any] | None:
    """The settings class of a type hint for a value: a dataclass, or the one that ``PluginField`` finds."""
    for part in _members(hint):
        if isinstance(part, PluginField):
            return part.settings_class(value)
    classes = [part for part in _members(hint) if isinstance(part, type) and dataclasses.is_dataclass(part)]
    return classes[0] if classes else None


def _members(hint: Any) -> Iterator[Any]:
    """The hint and all its parts: members of unions, arguments, annotations."""
    yield hint
    if get_origin(hint) is Annotated:
        yield from hint.__metadata__
        yield from _members(hint.__origin__)
    elif isinstance(hint, types.UnionType) or get_origin(hint) is not None:
        for argument in get_args(hint):
            yield from _members(argument)


def booleans_for_numbers(cls: type[Any], tree: dict[str, Any]) -> Iterator[ConfigError]:
    """Errors of booleans given as numbers, also as ``yes`` and ``on``: pydantic would read ``epochs: true`` as 1."""
    hints = _hints(cls)
    for key, value in tree.items():
        members = list(_members(hints.get(key)))
        accepted = any(member is bool or member is value for member in members)
        if isinstance(value, bool) and not accepted and any(member is int or member is float for member in members):
            yield ConfigError(str(key), format_value(value), "a number", "write digits")
        section = _section_class(hints.get(key), value) if isinstance(value, dict) else None
        for config_error in booleans_for_numbers(section, value) if section else ():
            yield config_error._replace(path=f"{key}.{config_error.path}")


def _meaning(section: type[Any] | None, key: str) -> str:
    """The description of a field in the docstring of its section: the sentence ``key: meaning.``"""
    text = " ".join((section.__doc__ or "").split()) if section else ""
    match = re.search(rf"(?:^|\. ){re.escape(key)}: (.+?)\.?(?:$|(?<=\.) )", text)
    return match[1] if match else ""


def format_value(value: Any) -> str:
    """A value as the user would write it, on one line of at most ``MAX_SHOWN`` characters."""
    text = yaml.safe_dump(plain(_abridged(value)), default_flow_style=True, width=10**6)
    text = text.strip().removesuffix("...").strip()
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _abridged(value: Any, depth: int = 0) -> Any:
    """The value without what would not be shown, so that large ones are formatted quickly."""
    if isinstance(value, str):
        return value[: 2 * MAX_SHOWN]
    if isinstance(value, (dict, list, tuple)) and depth > MAX_SHOWN:
        return "..."
    if isinstance(value, dict):
        return {_abridged(key): _abridged(item, depth + 1) for key, item in islice(value.items(), MAX_SHOWN)}
    if isinstance(value, (list, tuple)):
        return [_abridged(item, depth + 1) for item in value[:MAX_SHOWN]]
    return value


def plain(value: Any) -> Any:
    """Settings as the types of YAML: dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value
