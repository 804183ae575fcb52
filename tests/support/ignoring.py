"""Makes a process read its config as if one key had not been written: a test that needs the key then fails.

Owns only how a key is ignored. What is checked while a config is read sees the values as written, so a refusal alone
does not show that a key is used; nor does a config that is printed, or looked at by a test itself. Every process that
has `tests/support` on its path and the variable `LOCKSTEP_TEST_IGNORED_KEY` in its environment ignores that key
(`sitecustomize.py`).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

VARIABLE = "LOCKSTEP_TEST_IGNORED_KEY"
_TESTS = f"{Path(__file__).resolve().parents[1]}{os.sep}"


def all_keys() -> list[str]:
    """Returns the dotted path of every setting of a config, in the order of its sections."""
    from trainer.config import Config, _section_inside
    from trainer.config_values import Section

    def settings(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inside = _section_inside(field.annotation)
            yield from [prefix + name] if inside is None else settings(inside, f"{prefix}{name}.")

    return list(settings(Config, ""))


def ignore(key: str) -> None:
    """Lets all configs of this process give the default of `key`, or another value where it has to be set."""
    from pydantic import BaseModel

    from trainer import config
    from trainer.config_values import Component, Section

    *parents, name = key.split(".")
    section: type[Section] = config.Config
    holder, held = section, name
    for parent in parents:
        inside = config._section_inside(section.model_fields[parent].annotation)
        assert inside is not None, key
        holder, held, section = section, parent, inside
    field = section.model_fields[name]

    def ignored(value: object) -> object:
        return _another(key, value) if field.is_required() else field.get_default(call_default_factory=True)

    def without(part: Any) -> Any:
        """Ignores the key in a component, or in each of several."""
        if isinstance(part, Component):
            return part.model_copy(update={name: ignored(getattr(part, name))})
        if isinstance(part, dict):
            return {label: without(inner) for label, inner in part.items()}
        return tuple(map(without, part)) if isinstance(part, tuple) else part

    checks = {f.__code__ for f in (config.load_config, BaseModel.__init__, BaseModel.model_validate.__func__)}  # type: ignore[attr-defined]
    if section is Component:  # the class of several sections
        _change(holder, held, without, checks)
    elif key == "train.steps" or key == "train.epochs":  # one of them is set
        _change(section, name, lambda value: None if value is None else value + 1, checks)
    else:
        _change(section, name, ignored, checks)


def _another(key: str, value: Any) -> Any:
    """Returns a value that the user has not written, of the same kind."""
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    if isinstance(value, tuple):
        return tuple(number / 2 for number in value)
    if key.endswith(".mode"):
        return "max" if value == "min" else "min"
    if key.endswith(".metric"):
        return "samples_per_s"
    return f"{value}-ignored"


def _change(section: type, attribute: str, change: Callable[[Any], Any], checks: set[CodeType]) -> None:
    """Lets reads of an attribute of a section give what `change` makes of it.

    Not those of tests, nor those while a config is checked.
    """

    def read(self: object, name: str) -> object:
        value = object.__getattribute__(self, name)
        if name != attribute:
            return value
        frame = sys._getframe(1)
        if frame.f_code.co_filename.startswith(_TESTS):
            return value
        while frame is not None:
            if frame.f_code in checks:
                return value
            frame = frame.f_back  # type: ignore[assignment]
        return change(value)

    section.__getattribute__ = read  # type: ignore[method-assign,assignment]


class _Hook(importlib.abc.MetaPathFinder):
    """Ignores the key as soon as the config's module is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "trainer.config":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_ignore(module: ModuleType) -> None:
            load(module)
            ignore(os.environ[VARIABLE])

        spec.loader.exec_module = load_and_ignore  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Ignores the key that the environment names once this process has a config."""
    if "trainer.config" in sys.modules:
        ignore(os.environ[VARIABLE])
    else:
        sys.meta_path.insert(0, _Hook())
