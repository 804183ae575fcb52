"""YAML files and command-line overrides -> one plain mapping that knows where each value was written.

Owns reading: YAML 1.2's idea of a number and a boolean, duplicate keys, `base:`, `section.key=value`, and the
file and line of every value. Knows nothing of what the keys mean; that is `trainer.config`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import Problem, UserError

KeyPath = tuple[str | int, ...]


@dataclass
class Source:
    """A mapping as written, and where: `origins[("optim", "lr")] == "configs/digits.yaml:12"`."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Returns where `path`, or the nearest enclosing key that was written down, stands."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars.

    YAML 1.1 reads `no` as false (so `precision: no` breaks), `1e-3` as a string, `010` as 8 and `1:30` as 90.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _firsts = [c for c in _first if c != "\0"] + ([""] if "\0" in _first else [])
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _firsts)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML would read 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _construct(loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath, file: str, source: Source) -> Any:
    """Turns a node into plain Python and records the line of every key and list item below `path`."""
    line = node.start_mark.line + 1
    if path not in source.origins:
        source.origins[path] = f"{file}:{line}"
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, key_line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise UserError(Problem("a key must be plain text", ".".join(map(str, path)), f"{file}:{key_line}"))
            if key in first_lines:
                dotted = ".".join(map(str, (*path, key)))
                message = f"duplicate key; it is already set on line {first_lines[key]}"
                raise UserError(Problem(message, dotted, f"{file}:{key_line}"))
            first_lines[key] = key_line
        loader.flatten_mapping(node)
        mapping = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            source.origins[(*path, key)] = f"{file}:{key_node.start_mark.line + 1}"
            mapping[key] = _construct(loader, value_node, (*path, key), file, source)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, i), file, source) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _parse(text: str, file: str) -> tuple[Any, Source]:
    """Parses one YAML document; syntax errors become one line with the file and line."""
    source = Source()
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        value = None if node is None else _construct(loader, node, (), file, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        origin = f"{file}:{mark.line + 1}" if mark else file
        raise UserError(Problem(f"not valid YAML: {error.problem or error.context}", "", origin)) from None
    except RecursionError:
        raise UserError(Problem("not valid YAML: an alias inside what it names", "", file)) from None
    except (yaml.YAMLError, ValueError) as error:  # e.g. a control character, a number past all limits
        raise UserError(Problem(f"not valid YAML: {' '.join(str(error).split())}", "", file)) from None
    finally:
        loader.dispose()
    return value, source


def _merge(under: Source, over: Source) -> Source:
    """Lays `over` on `under`: mappings merge key by key, everything else is replaced whole.

    A mapping whose `name` changes drops the `args` below it: they belong to another component.
    """
    merged = Source(dict(under.values), {**under.origins})

    def lay(target: dict[str, Any], values: dict[str, Any], path: KeyPath) -> None:
        if "name" in values and "name" in target and values["name"] != target["name"] and "args" in target:
            forget((*path, "args"))
            del target["args"]
        for key, value in values.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                target[key] = dict(target[key])
                lay(target[key], value, here)
            else:
                forget(here)
                target[key] = value

    def forget(path: KeyPath) -> None:
        for known in [p for p in merged.origins if p[: len(path)] == path]:
            del merged.origins[known]

    lay(merged.values, over.values, ())
    # A section that exists below keeps its own line; what the upper layer wrote gets the upper layer's.
    merged.origins.update({p: o for p, o in over.origins.items() if p})
    return merged


def read_file(file: str, _above: tuple[Path, ...] = ()) -> Source:
    """Reads a config file on top of the file its `base:` names, if any (relative to the file itself).

    Raises:
        UserError: the file is missing, not YAML, not a mapping, or is its own base.
    """
    path = Path(file)
    if path.resolve() in _above:
        chain = " -> ".join(p.name for p in (*_above, path))
        raise UserError(Problem(f"files build on each other in a circle: {chain}", "base", file))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(Problem(f"cannot read this config file: {reason}", "", file)) from None
    value, source = _parse(text, file)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UserError(Problem("a config file holds `section:` lines at its top level", "", f"{file}:1"))
    base = value.pop("base", None)
    source.values = value
    if base is None:
        return source
    if not isinstance(base, str):
        raise UserError(Problem("names one YAML file", "base", source.origin(("base",))))
    try:
        under = read_file(str(path.parent / base), (*_above, path.resolve()))
    except UserError as error:
        if len(error.problems) == 1 and error.problems[0].message.startswith("cannot read"):
            message = f"cannot read '{path.parent / base}'"
            raise UserError(Problem(message, "base", source.origin(("base",)))) from None
        raise
    return _merge(under, source)


def read(file: str, overrides: Sequence[str] = ()) -> Source:
    """Reads `file` and lays `section.key=value` overrides on it, in order; values are YAML.

    Raises:
        UserError: as `read_file`, or an override without `=`, without a key, or whose value is not YAML.
    """
    source = read_file(file)
    given = Source()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"command line: '{override}' is not of the form section.key=value")
        value, _ = _parse(text, "command line")
        for key in reversed(keys):
            value = {key: value}
        path: KeyPath = tuple(keys)
        new = {path[:n]: "command line" for n in range(1, len(path)) if path[:n] not in source.origins}
        given = _merge(given, Source(value, {**new, path: "command line"}))
    # All at once: whether a name comes before or after the args that belong to it makes no difference.
    return _merge(source, given)
