"""Plugins by name: the key `name` of a section is the module that defines the section's class."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class PluginField:
    """Annotation of a section whose class is chosen by its key ``name``: the module that defines the class.

    ``method: Annotated[Method, PluginField("raycluster.methods", "Method")]`` makes ``method: {name: foo}`` an instance
    of ``raycluster.methods.foo.Method``; ``method: foo`` is short for it. An instance is accepted as it is.
    """

    package: str
    attribute: str

    def modules(self) -> list[str]:
        """The available names: modules of the package that define the attribute, found without importing them."""
        return list(_modules(tuple(importlib.import_module(self.package).__path__), self.attribute))

    def settings_class(self, section: Any) -> type[Any] | None:
        """The class that the section names, None where there is no such module."""
        name = section.get("name") if isinstance(section, dict) else section
        if name not in self.modules():
            return None
        return typing.cast("type[Any]", getattr(importlib.import_module(f"{self.package}.{name}"), self.attribute))

    def validate(self, section: Any) -> Any:
        """The section as an instance of its class."""
        if dataclasses.is_dataclass(section) and type(section).__name__ == self.attribute:
            return section
        if isinstance(section, str):
            section = {"name": section}
        if not isinstance(section, dict):
            raise PydanticCustomError("section", "Input should be a section with the key `name`")
        settings_class = self.settings_class(section)
        if settings_class is None:
            details = PydanticCustomError("unknown_name", "{wanted}", {"wanted": self._wanted(section.get("name"))})
            raise ValidationError.from_exception_data("name", [{"type": details, "loc": ("name",), "input": section}])
        return TypeAdapter(settings_class).validate_python(section)

    def _wanted(self, name: object) -> str:
        known = self.modules()
        return f"a name, one of {', '.join(known) or '(none exist)'}{did_you_mean(str(name), known)}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The most similar known word, as the end of a sentence; empty where none is similar."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@cache
def _modules(folders: tuple[str, ...], attribute: str) -> tuple[str, ...]:
    pattern = re.compile(rf"^(class|def) {attribute}\b", re.MULTILINE)
    sources = {module.name: _source(module) for module in pkgutil.iter_modules(folders)}
    return tuple(sorted(name for name, source in sources.items() if pattern.search(source)))


def _source(module: pkgutil.ModuleInfo) -> str:
    spec = module.module_finder.find_spec(module.name, None)
    origin = spec.origin if spec else None
    return Path(origin).read_text(encoding="utf-8") if origin and origin.endswith(".py") else ""
