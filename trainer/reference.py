"""The reference of all config keys, docs/config.md, written from the typed models.

Owns how types, limits and defaults are put into words. What a key means is its description in the `config*` files.
Imports no torch.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.components import BUILT_INS, Kind
from trainer.config import Config
from trainer.config_values import Amount, Component, Interval, Minutes, NodeRange, Section, TimeSpan

_HEAD = """\
# Config reference

Every key of a config file, from the typed models that read it: `make reference` writes this page. How a file is put
together, from a base and overrides, is [below](#how-a-file-is-read); editors complete and check it with
[configs/schema.json](../configs/schema.json), and `train.py --config FILE --print-config` prints all keys of a run.

"""

_KINDS_OF_VALUES = """\
## Kinds of values

| kind | how it is written |
|---|---|
| component | `{name: ..., args: {...}}`; `name` is a built-in's short name, or `package.module:attribute` |
| interval | optimizer steps such as `200`, or passes over the training data such as `5 epochs` |
| minutes | `10 minutes` |
| time | seconds such as `90`, or `90 seconds`, `10 minutes`, `1 hour` |
| amount | a share such as `90%` or `0.9`, or bytes such as `20GiB` |
| machines | `4`, or a range such as `'1:4'` |
| pattern | of names, as in a shell: `layer1.*` |

## How a file is read

- `base: other.yaml` builds on another file, relative to this one. Sections are merged key by key; lists are replaced.
- `section.key=value` on the command line wins over the files. The value is YAML: `'data.eval={name: digits}'`.
- Another `name` drops the `args` beside it; the rest of its section stays, such as `model.weights` and
  `optim.rest`. `null` unsets what a base has set.
- `train.batch_size` is global. Each device's share and the accumulation come from it, from `train.micro_batch_size`
  (the most that one device holds) and from the number of processes; a split that does not work is refused with the
  nearest sizes that do. BatchNorm sees one device's micro-batch at a time, as under DDP everywhere; for models with it,
  and only for them, the split matters to the optimisation.
- A mistake is one line with file, line, dotted path and the nearest valid name, and exit code 2.

"""

# What a component is looked up as, by its path.
_COMPONENTS: dict[str, Kind] = {
    "data.train": "data set",
    "data.eval": "data set",
    "data.transforms.train": "transform",
    "data.transforms.eval": "transform",
    "model": "model",
    "task": "task",
    "task.loss": "loss",
    "task.metrics": "metric",
    "task.teacher": "model",
    "optim": "optimizer",
    "optim.rest": "optimizer",
    "schedule": "schedule",
}
_LIBRARIES: dict[Kind, str] = {
    "data set": "every class of `torchvision.datasets`",
    "transform": "every class of `torchvision.transforms.v2`",
    "model": "every name of `torchvision.models`, `timm:NAME`, classes of transformers such as "
    "`transformers:AutoModelForCausalLM.from_pretrained`",
    "optimizer": "every class of `torch.optim` but LBFGS and SparseAdam",
    "metric": "classes of torchmetrics, by import path",
}
_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true`, `false`",
    type(None): "`null`",
    Any: "anything",
    Interval: "interval",
    Minutes: "minutes",
    TimeSpan: "time",
    NodeRange: "machines",
    Amount: "amount",
}


def reference_text() -> str:
    """Returns docs/config.md."""
    top = {name: field for name, field in Config.model_fields.items() if _section(field.annotation) is None}
    sections = "".join(_section_text(path, section, field) for path, section, field in _sections(Config))
    return _HEAD + _KINDS_OF_VALUES + f"## Top level\n\n{_table('', top)}\n" + sections.removesuffix("\n")


def _sections(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section], FieldInfo]]:
    """Yields all sections that have a heading, in the order of the file, with the field that each is."""
    for name, field in section.model_fields.items():
        inside = _section(field.annotation)
        if inside is not None:
            yield prefix + name, inside, field
            yield from _sections(inside, f"{prefix}{name}.")


def _section(annotation: Any) -> type[Section] | None:
    """Returns the section that a key is. A bare component is a value, and so are lists and mappings of these."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return None if annotation is Component else annotation
    is_optional = get_origin(annotation) in (Union, types.UnionType)
    found = [_section(inside) for inside in get_args(annotation)] if is_optional else []
    return next((section for section in found if section is not None), None)


def _section_text(path: str, section: type[Section], field: FieldInfo) -> str:
    text = f"{'#' * (2 + path.count('.'))} `{path}`\n\n{_one_line(section.__doc__ or '')}\n\n"
    if field.default is None:
        text += "Default: `null`, which turns all of it off.\n\n"
    if path in _COMPONENTS:
        text += f"A component. {_names(_COMPONENTS[path])}\n\n"
    keys = {name: key for name, key in section.model_fields.items() if _section(key.annotation) is None}
    return text + (f"{_table(f'{path}.', keys)}\n" if keys else "")


def _table(prefix: str, keys: Mapping[str, FieldInfo]) -> str:
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in keys.items():
        path = prefix + name
        assert field.description, path
        meaning = _one_line(field.description)
        if path in _COMPONENTS:
            meaning += f" {_names(_COMPONENTS[path])}"
        value = _type(field.annotation, field.metadata)
        cells = (f"`{path}`", value, _default(field), meaning.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _names(kind: Kind) -> str:
    """Returns what a component's name may be, besides an import path."""
    names = [f"`{name}`" for name in BUILT_INS[kind]]
    return f"Built in: {', '.join([*names, *([_LIBRARIES[kind]] if kind in _LIBRARIES else [])])}."


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Returns an annotation in words; `metadata` holds its limits."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0], [*inside[1:], *metadata])
    if origin in (Union, types.UnionType):
        return ", ".join(dict.fromkeys(_type(part, metadata) for part in inside))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin is tuple:
        several = ", ".join(_type(part, []) for part in inside if part is not Ellipsis)
        return f"list of: {several}" if Ellipsis in inside else f"list: {several}"
    if origin is dict:
        return f"mapping of names to: {_type(inside[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "component"
    return _WORDS[annotation] + (_limits(metadata) if annotation in (int, float) else "")


def _limits(metadata: list[Any]) -> str:
    limits = {}
    for part in metadata:
        for limit in part.metadata if isinstance(part, FieldInfo) else [part]:
            for kind, name in (("Ge", "at least"), ("Gt", "above"), ("Le", "at most"), ("Lt", "below")):
                if isinstance(limit, getattr(annotated_types, kind)):
                    limits[name] = getattr(limit, kind.lower())
    return "".join(f" {name} {value}" for name, value in limits.items())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool) or value is None:
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())
