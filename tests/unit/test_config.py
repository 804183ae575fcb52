"""Reading YAML, building on a base, overriding, printing, and the schema for editors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import REPOSITORY, Train, WriteConfig
from pydantic import ValidationError

from trainer import yaml_source
from trainer.config import Config, load_config, schema_text
from trainer.config_values import Interval, Section
from trainer.errors import UserError

SHIPPED = sorted(
    file
    for folder in ("configs", "examples")
    for file in (REPOSITORY / folder).rglob("*.yaml")
    if "runs" not in file.parts  # left by someone who tried the example
)


def read(tmp_path: Path, text: str, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return yaml_source.read(str(file), overrides).values


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    values = read(
        tmp_path,
        "a: 1e-3\nb: no\nc: yes\nd: on\ne: 010\nf: 1:30\ng: 2024-01-01\nh: true\ni: 1.\nj: .5\nk: -1.5E+3\n"
        "l: .inf\nm: ~\nn:\no: '1'\np: 12_000\nq: 1e3\nr: +7\ns: 0x10\n",
    )
    assert values == {
        "a": 1e-3,
        "b": "no",
        "c": "yes",
        "d": "on",
        "e": 10,
        "f": "1:30",
        "g": "2024-01-01",
        "h": True,
        "i": 1.0,
        "j": 0.5,
        "k": -1500.0,
        "l": float("inf"),
        "m": None,
        "n": None,
        "o": "1",
        "p": "12_000",
        "q": 1000.0,
        "r": 7,
        "s": "0x10",
    }
    assert isinstance(values["q"], float)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\n")["b"] == {"p": 1, "q": 3}


def test_base_lies_below(tmp_path: Path) -> None:
    (tmp_path / "grand.yaml").write_text("a: 1\nb: {x: 1, y: [1, 2]}\n")
    (tmp_path / "base.yaml").write_text("base: grand.yaml\na: 2\n")
    assert read(tmp_path, "base: base.yaml\nb: {y: [3]}\n") == {"a": 2, "b": {"x": 1, "y": [3]}}


def test_another_name_drops_the_args_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {name: a, args: {p: 1}, weights: w}\n")
    assert read(tmp_path, "base: base.yaml\nmodel: {name: b}\n") == {"model": {"name": "b", "weights": "w"}}
    assert read(tmp_path, "base: base.yaml\nmodel: {name: a}\n")["model"]["args"] == {"p": 1}
    assert read(tmp_path, "base: base.yaml\n", "model.name=b", "model.args.q=2")["model"]["args"] == {"q": 2}


def test_order_of_overrides_makes_no_difference(tmp_path: Path) -> None:
    base, name, arg = "optim: {name: sgd, args: {p: 1}}\n", "optim.name=adamw", "optim.args.q=2"
    for overrides in ([name, arg], [arg, name]):
        assert read(tmp_path, base, *overrides) == {"optim": {"name": "adamw", "args": {"q": 2}}}
    assert read(tmp_path, "task: {args: {p: 1}}\n", "task.name=x") == {"task": {"name": "x", "args": {"p": 1}}}


def test_origins_follow_the_layers(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: 1\nb:\n  x: 1\n  y: 2\n")
    (tmp_path / "x.yaml").write_text("base: base.yaml\nb:\n  y: 3\n")
    source = yaml_source.read(str(tmp_path / "x.yaml"), ["b.z.deep=1"])
    assert source.origin(("a",)).endswith("base.yaml:1")
    assert source.origin(("b", "x")).endswith("base.yaml:3")
    assert source.origin(("b", "y")).endswith("x.yaml:3")
    assert source.origin(("b", "z", "deep", "deeper")) == "command line"


def test_overrides_are_yaml_and_the_last_wins(tmp_path: Path) -> None:
    values = read(tmp_path, "a: {b: 1}\n", "a.b=2", "a.b=1e-3", "a.c=[x, 1]", "d=no", "e=a=b")
    assert values == {"a": {"b": 1e-3, "c": ["x", 1]}, "d": "no", "e": "a=b"}


def test_printed_config_reads_back_equal(write_config: WriteConfig, train: Train, tmp_path: Path) -> None:
    file = write_config(schedule={"name": "cosine", "warmup": "1 epoch"}, eval={"every": 7}, optim__lr=1e-5)
    code, out, _ = train("--config", file, "--print-config", "precision=no")
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    assert load_config(str(tmp_path / "printed.yaml")).model_dump() == load_config(str(file)).model_dump()
    assert yaml.safe_load(out)["eval"]["every"] == 7


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_shipped_config(file: Path) -> None:
    load_config(str(file))
    text = file.read_text()
    jsonschema.validate(yaml_source.read_file(str(file)).values, json.loads(schema_text()))
    if file.parent.name == "configs":
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")


def test_number_of_shipped_configs() -> None:
    assert len(SHIPPED) == 17


def test_committed_schema_is_current() -> None:
    command = "python -m trainer schema > configs/schema.json"
    assert (REPOSITORY / "configs" / "schema.json").read_text() == schema_text(), f"run: {command}"


def test_schema_refuses_what_the_loader_refuses() -> None:
    schema = json.loads(schema_text())
    good = yaml_source.read_file(str(REPOSITORY / "configs" / "digits.yaml")).values
    jsonschema.validate(good, schema)
    for bad in (
        {**good, "modle": {}},
        {**good, "eval": {"every": "2 weeks"}},
        {k: good[k] for k in good if k != "run"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    jsonschema.validate({"base": "digits.yaml", "optim": {"lr": 0.1}}, {**schema, "$defs": _without_required(schema)})


def _without_required(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in d.items() if k != "required"} for name, d in schema["$defs"].items()}


def sections() -> list[type[Section]]:
    found: list[type[Section]] = [Section]
    for section in found:
        found += section.__subclasses__()
    return found[1:]


@pytest.mark.parametrize("section", sections(), ids=lambda s: s.__name__)
def test_every_key_is_described(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_config_is_frozen(write_config: WriteConfig) -> None:
    config = load_config(str(write_config()))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "steps"), [(5, 5), ("5", 5), ("5 steps", 5), ("1 step", 1), ("2 epochs", 14), (" 1  epoch ", 7)]
)
def test_interval(text: object, steps: int) -> None:
    assert Interval.parse(text).steps(7) == steps
    assert Interval.parse(str(Interval.parse(text))) == Interval.parse(text)


@pytest.mark.parametrize("text", ["", "epochs", "-1", "1.5 epochs", 1.0, True, None, "3 days"])
def test_no_interval(text: object) -> None:
    with pytest.raises(ValueError, match="write a number of steps"):
        Interval.parse(text)


def test_nearest_name_is_any_valid_key(tmp_path: Path) -> None:
    """For every section: a typo in a key names that key."""
    for name, field in Config.model_fields.items():
        text = (REPOSITORY / "configs" / "digits.yaml").read_text()
        (tmp_path / "x.yaml").write_text(re.sub(r"(?m)^#.*\n", "", text))
        with pytest.raises(UserError, match=f"did you mean '{name}'"):
            load_config(str(tmp_path / "x.yaml"), [f"{name}x={{}}"])
        assert field.description
