"""YAML as a tree of dicts, lists and scalars: bounded in size, all errors collected."""

from __future__ import annotations

import re
from typing import Any

import yaml

from raycluster.config.errors import ConfigError

MAX_CHARACTERS = 200_000
MAX_VALUES = 20_000  # with every alias expanded
MAX_DEPTH = 50
MAX_DIGITS = 100
_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number and leaves dates as text, since no setting is a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # an attribute that PyYAML declares without ClassVar
        first: [resolver for resolver in resolvers if resolver[0] != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level > MAX_DEPTH:  # the time of the scanner is quadratic in the depth
            raise RecursionError
        super().fetch_flow_collection_start(token)


# YAML 1.1 demands a dot and a signed exponent; people write 1e-3 and 5e5.
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_tree(text: str, path: str = "") -> tuple[Any, list[ConfigError]]:
    """The value that a YAML text describes, and its errors: syntax, repeated or compound keys, cycles, excessive size.

    path: dotted prefix of the paths in the errors. The value is None where nothing could be read. Aliases are expanded:
    no two parts of the value share an object.
    """
    if len(text) > MAX_CHARACTERS:
        seen = f"{len(text)} characters"
        return None, [ConfigError(path or "YAML", seen, f"at most {MAX_CHARACTERS}", "remove what is not a setting")]
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        return None, [_syntax_error(path, error)]
    except yaml.YAMLError as error:  # characters that YAML does not allow
        return None, [ConfigError(path or "YAML", None, "", f"not valid YAML: {' '.join(str(error).split())}")]
    except RecursionError:
        return None, [_too_deep(path)]
    builder = _TreeBuilder(loader)
    try:
        return (None if node is None else builder.build(node, path, ())), builder.errors
    except _TooManyValues:
        remedy = "aliases (*name) count each time they are used"
        return None, [*builder.errors, ConfigError(path or "YAML", "more values", f"at most {MAX_VALUES}", remedy)]


def _syntax_error(path: str, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = " ".join(filter(None, (error.context, error.problem)))
    return ConfigError(path or "YAML", None, "", f"not valid YAML: {place}{problem}")


def _too_deep(path: str) -> ConfigError:
    return ConfigError(path or "YAML", "deeper nesting", f"at most {MAX_DEPTH} levels", "remove a level")


class _TooManyValues(Exception):
    """The expanded tree exceeds ``MAX_VALUES``."""


class _TreeBuilder:
    """Converts nodes of the YAML graph; errors: what was found so far."""

    def __init__(self, loader: _Loader) -> None:
        self.errors: list[ConfigError] = []
        self._loader = loader
        self._num_values = 0

    def build(self, node: yaml.Node, path: str, parents: tuple[yaml.Node, ...]) -> Any:
        """The value of a node. path: where it is. parents: the nodes that contain it, from the root."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise _TooManyValues
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node in parents:
            self._add(path, f"a cycle (line {_line(node)})", "a value that does not contain itself", "write it out")
            return None
        if len(parents) >= MAX_DEPTH:
            self.errors.append(_too_deep(path))
            return None
        parents = (*parents, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, parents)
        return [self.build(item, _join(path, str(index)), parents) for index, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("str", "int", "float", "bool", "null", "value"):
            self._add(path, f"a value of the type {node.tag}", "text, a number, a boolean or null", "remove the tag")
            return None
        try:
            if kind == "int" and len(node.value) > MAX_DIGITS:
                raise ValueError("too many digits")
            return self._loader.construct_object(node) if kind != "value" else node.value
        except (ValueError, KeyError):  # such as 0x_ or !!int with text
            seen = node.value if len(node.value) <= MAX_DIGITS else f"{len(node.value)} characters"
            self._add(path, seen, f"a value of the type {kind}", "quote it if it is text")
            return None

    def _mapping(self, node: yaml.MappingNode, path: str, parents: tuple[yaml.Node, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._add(
                    path, f"a key that is a list or mapping (line {_line(key)})", "text as a key", "quote the key"
                )
            elif key.tag == _MERGE:
                merged |= self._merged(value, path, parents)
            else:
                if key.value in lines:
                    wanted = f"each key once (lines {lines[key.value]} and {_line(key)})"
                    self._add(_join(path, key.value), "the same key twice", wanted, "remove one of the lines")
                lines[key.value] = _line(key)
                own[key.value] = self.build(value, _join(path, key.value), parents)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: str, parents: tuple[yaml.Node, ...]) -> dict[str, Any]:
        """The mapping, or list of mappings of which earlier ones take precedence, behind a merge key ``<<``."""
        found = self.build(node, _join(path, "<<"), parents)
        parts = found if isinstance(found, list) else [found]
        if not all(isinstance(part, dict) for part in parts):
            self._add(_join(path, "<<"), f"no mapping (line {_line(node)})", "a mapping to merge", "remove the key")
            return {}
        return {key: value for part in reversed(parts) for key, value in part.items()}

    def _add(self, path: str, seen: str, wanted: str, remedy: str) -> None:
        self.errors.append(ConfigError(path or "YAML", seen, wanted, remedy))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
