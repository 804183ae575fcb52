"""Bad input: exit 2, one line per problem with its place, nothing lost, no traceback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import Train, WriteConfig, tiny_config


class Case(NamedTuple):
    """A mistake, and what must be said of it: a dotted path and a part of the message."""

    name: str
    changes: dict[str, Any]
    path: str
    message: str


def component(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args}


CASES = [
    # the shape of the file
    Case("misspelt section", {"modle": {}}, "modle", "did you mean 'model'"),
    Case("misspelt key", {"optim__learning_rate": 1.0}, "optim.learning_rate", "valid keys: name, args, lr"),
    Case("misspelt nested key", {"data__evals": {}}, "data.evals", "did you mean 'eval'"),
    Case("unknown key in component", {"model__arg": {}}, "model.arg", "did you mean 'args'"),
    Case("missing section", {"model": None}, "model", "must be a section"),
    Case("missing key", {"optim": {"name": "sgd"}}, "optim.lr", "required, but not set"),
    Case("section is a number", {"train": 3}, "train", "must be a section"),
    Case("list where a mapping belongs", {"run": ["a"]}, "run", "must be a section"),
    Case("mapping where a list belongs", {"tracking__trackers": {"wandb": 1}}, "tracking.trackers", "must be a list"),
    # types and ranges
    Case("text for a number", {"train__batch_size": "many"}, "train.batch_size", "valid integer (got 'many')"),
    Case("quoted number", {"train__batch_size": "12"}, "train.batch_size", "valid integer (got '12')"),
    Case("boolean for a number", {"optim__lr": True}, "optim.lr", "valid number (got True)"),
    Case("fraction of a step", {"train__batch_size": 1.5}, "train.batch_size", "valid integer"),
    Case("number for text", {"run__name": 3}, "run.name", "write quotes around it"),
    Case("negative batch", {"train__batch_size": -4}, "train.batch_size", "greater than or equal to 1 (got -4)"),
    Case("zero learning rate", {"optim__lr": 0}, "optim.lr", "greater than 0"),
    Case("infinite learning rate", {"optim__lr": float("inf")}, "optim.lr", "finite"),
    Case("negative workers", {"data__workers": -1}, "data.workers", "greater than or equal to 0"),
    Case("negative clipping", {"optim__clip_norm": -1.0}, "optim.clip_norm", "greater than 0"),
    Case("run name with a slash", {"run__name": "a/b"}, "run.name", "match pattern"),
    Case("unknown precision", {"precision": "bf61"}, "precision", "did you mean 'bf16'"),
    Case("unknown tracker", {"tracking__trackers": ["wandbb"]}, "tracking.trackers.0", "did you mean 'wandb'"),
    Case("unknown interval", {"eval__every": "2 weeks"}, "eval.every", "write a number of steps"),
    Case("zero interval", {"log__every": 0}, "log.every", "at least 1"),
    Case("unknown resume", {"checkpoint__resume": "maybe"}, "checkpoint.resume", "must be 'auto' or 'never'"),
    # between keys
    Case("both steps and epochs", {"train__steps": 5}, "train", "either steps or epochs, not both"),
    Case("neither steps nor epochs", {"train__epochs": None}, "train", "set steps or epochs"),
    Case(
        "mean and std differ in length",
        {"data__normalize": {"mean": [0.5], "std": [0.5, 0.5]}},
        "data.normalize",
        "mean has 1 channels and std has 2",
    ),
    Case("warm-up longer than the run", {"schedule": {"warmup": "2 epochs"}}, "schedule.warmup", "in a run of 10"),
    Case("drop_last leaves nothing", {"train__batch_size": 61, "data__drop_last": True}, "data.drop_last", "nothing"),
    Case(
        "batch that cannot be split",
        {"train__micro_batch_size": 5},
        "train.micro_batch_size",
        "nearest sizes: 4 and 6, or train.batch_size 10 and 15",
    ),
    # components
    Case("unknown model", {"model": component("resnet81")}, "model.name", "did you mean 'resnet18'"),
    Case("unknown data set", {"data__train": component("CIFAR11")}, "data.train.name", "did you mean 'CIFAR10'"),
    Case("unknown optimizer", {"optim__name": "adamww"}, "optim.name", "did you mean 'adamw'"),
    Case("unknown schedule", {"schedule": {"name": "cosin"}}, "schedule.name", "did you mean 'cosine'"),
    Case("unknown task", {"task": {"name": "clasification"}}, "task.name", "did you mean 'classification'"),
    Case("unknown loss", {"task": {"loss": component("crossentropy")}}, "task.loss.name", "mean 'cross_entropy'"),
    Case(
        "unknown transform",
        {"data__transforms": {"train": [component("RandomCorp")]}},
        "data.transforms.train.0.name",
        "did you mean 'RandomCrop'",
    ),
    Case("no such module", {"model": component("no_such_package.models:Net")}, "model.name", "no module 'no_such_pack"),
    Case("no such attribute", {"model": component("vectors:Vektors")}, "model.name", "did you mean 'Vectors'"),
    Case("half an import path", {"model": component("vectors:")}, "model.name", "package.module:attribute"),
    Case("module that raises", {"model": component("broken_module:Net")}, "model.name", "RuntimeError: this module"),
    Case("component that raises", {"model": component("vectors:refuses")}, "model", "two of these do not go together"),
    Case("not a model", {"model": component("vectors:not_a_model")}, "model.name", "not a torch.nn.Module"),
    Case("not a task", {"task": {"name": "vectors:NotATask"}}, "task.name", "not a subclass"),
    Case("unknown argument", {"model__args__dropuot": 0.1}, "model.args.dropuot", "did you mean 'dropout'"),
    Case("missing argument", {"data__train": component("vectors:Vectors")}, "data.train.args", "needs the argument"),
    Case(
        "argument of torchvision's", {"model": component("resnet18", widht=3)}, "model", "unexpected keyword argument"
    ),
    Case("lr in args", {"optim__args": {"lr": 0.1}}, "optim.args.lr", "set it as optim.lr"),
    Case(
        "decay where there is none",
        {"optim": {"name": "Rprop", "lr": 1.0, "weight_decay": 0.1}},
        "optim.weight_decay",
        "no",
    ),
    Case("optimizer refuses", {"optim__args": {"betas": [2.0, 0.9]}}, "optim", "Invalid beta"),
    Case(
        "bad label smoothing", {"task": {"loss": component("cross_entropy", label_smoothing=2)}}, "task.loss", "0 and"
    ),
    Case("no such weights file", {"model__weights": "none.pt"}, "model.weights", "no such file"),
    # data
    Case("no such folder", {"data__train": component("image_folder", root="nowhere")}, "data.train", "no such folder"),
    Case("no such saved file", {"data__train": component("torch_file", path="no.pt")}, "data.train", "no such file"),
    Case("no index", {"data__train": component("vectors:Streaming")}, "data.train", "__len__ and __getitem__"),
    Case("empty data", {"data__train": component("vectors:Vectors", length=0)}, "data.train", "is empty"),
    Case("wrong split", {"data__train": component("digits", split="test")}, "data.train", "'train' or 'eval'"),
    Case(
        "label out of range", {"data__train": component("vectors:BadLabel", length=60)}, "data.train", "7 has label 3"
    ),
    Case("shapes differ", {"data__train": component("vectors:BadShape", length=60)}, "data.train", "differ in shape"),
    Case("file gone", {"data__train": component("vectors:MissingFile", length=60)}, "data.train", "'seven.npy'"),
    Case("too few classes", {"model__args__num_classes": 2}, "model.args.num_classes", "data.train has 3"),
    Case("dict keys", {"data__train": component("vectors:Dicts", length=60)}, "task", "vector, kind, index"),
    Case("no such metric", {"checkpoint__best": {"metric": "f1", "mode": "max"}}, "checkpoint.best.metric", "accuracy"),
    Case("unwritable run folder", {"run__dir": "/dev/null/run"}, "run.dir", "cannot write to"),
    Case(
        "best without evaluation",
        {"data__eval": None, "checkpoint": {"best": {"metric": "loss", "mode": "min"}}},
        "checkpoint.best",
        "without data.eval",
    ),
    Case("seed too large", {"run__seed": 2**64}, "run.seed", "less than 4294967296"),
    Case(
        "schedule that cannot be computed", {"schedule": component("cosine", min_ratio="abc")}, "schedule", "TypeError"
    ),
    Case("schedule that gives nothing", {"schedule": component("vectors:no_schedule")}, "schedule", "TypeError"),
    Case(
        "length that is no number", {"data__train": component("vectors:Vectors", length="abc")}, "data.train", "length"
    ),
    Case(
        "shape that is none",
        {"data__train": component("synthetic", num_samples=9, shape=[3, -2])},
        "data.train",
        "shape",
    ),
    Case("too few logits", {"model": component("torch.nn:Linear", in_features=8, out_features=2)}, "model", "2 logits"),
    Case(
        "one logit", {"model": component("torch.nn:Linear", in_features=8, out_features=1)}, "model", "(batch, classes)"
    ),
    Case(
        "class weights",
        {"task": {"loss": component("cross_entropy", weight=[1.0])}},
        "task.loss.args.weight",
        "1 class",
    ),
    Case(
        "a sum for a loss",
        {"task": {"loss": component("torch.nn:CrossEntropyLoss", reduction="sum")}},
        "task.loss.args.reduction",
        "not a sum",
    ),
    Case(
        "a loss to train",
        {"task": {"loss": component("torch.nn:Bilinear", in1_features=3, in2_features=1, out_features=1)}},
        "task.loss",
        "only the model is trained",
    ),
    Case(
        "a task without a loss",
        {"task": {"name": "regression:Regression", "loss": component("cross_entropy")}},
        "task.loss",
        "takes no loss",
    ),
    Case(
        "normalising what is no image", {"data__normalize": {"mean": [0.5], "std": [1.0]}}, "data.normalize", "images"
    ),
    Case(
        "transforms of numpy arrays",
        {
            "data__train": component("vectors:Arrays", length=60),
            "data__transforms": {"train": [component("RandomHorizontalFlip")]},
        },
        "data.train",
        "numpy arrays",
    ),
    Case(
        "transforms of data on the device",
        {
            "data": {
                "train": component("synthetic", num_samples=9, shape=[8]),
                "transforms": {"train": [component("Resize", size=3)]},
            }
        },
        "data.transforms.train",
        "made on the device",
    ),
    Case("fp8 on a CPU", {"precision": "fp8"}, "precision", "needs an NVIDIA GPU"),
    Case("an unknown precision", {"precision": "fp4"}, "precision", "(got 'fp4')"),
    Case("short weights in long sums", {"model__dtype": "bfloat16"}, "model.dtype", "need precision: bf16"),
    Case("a mode of nothing", {"model__compile_mode": "max-autotune"}, "model", "compile_mode needs compile"),
    Case("compile without blocks", {"model__compile": "blocks"}, "model.compile", "no repeated blocks"),
    Case("an unknown kind of compile", {"model__compile": True}, "model.compile", "(got True)"),
    Case(
        "no fused kernel", {"optim__name": "RAdam", "optim__implementation": "fused"}, "optim.implementation", "fused"
    ),
    Case(
        "fused as an argument", {"optim__args": {"fused": True}}, "optim.args.fused", "set it as optim.implementation"
    ),
    Case(
        "checkpointing without blocks", {"memory": {"checkpointing": "full"}}, "memory.checkpointing", "memory.blocks"
    ),
    Case(
        "blocks that are not there",
        {"memory": {"checkpointing": "full", "blocks": ["layer.*"]}},
        "memory.blocks",
        "did you mean 'layers",
    ),
    Case("blocks of nothing", {"memory": {"blocks": ["layers.*"]}}, "memory.blocks", "has no effect without"),
    Case("a budget of nothing", {"memory": {"budget": 0.5}}, "memory", "budget needs checkpointing: auto"),
    Case("more than all", {"memory": {"target": "110%"}}, "memory.target", "write a share such as 90%"),
    Case("a target of nothing", {"memory": {"target": 0}}, "memory.target", "write a share such as 90%"),
    Case("bytes without a unit", {"memory": {"target": "20"}}, "memory.target", "20GiB (got '20')"),
    Case(
        "a static graph that accumulates",
        {"parallel": {"static_graph": True}, "train__micro_batch_size": 6},
        "parallel.static_graph",
        "accumulat",
    ),
    Case(
        "a static graph that varies",
        {"parallel": {"static_graph": True, "find_unused_parameters": True}},
        "parallel",
        "unset find_unused_parameters",
    ),
    Case("an unknown batch", {"train__micro_batch_size": "most"}, "train.micro_batch_size", "must be auto, or a whole"),
    Case(
        "one sample for BatchNorm",
        {
            "model": component("vectors_model:Normed", dropout=0.1),
            "data__train": component("vectors:Vectors", length=25),
        },
        "data.drop_last",
        "more than one sample",
    ),
]


def assert_one_line(err: str, origin: str, path: str, message: str) -> None:
    """Asserts that stderr is one problem, of the form `error: file:line: path: message`."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert re.match(rf"error: {origin}: {re.escape(path)}: ", lines[0]), lines[0]
    assert message in lines[0], lines[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_config(case: Case, train: Train, write_config: WriteConfig) -> None:
    if case.name == "fp8 on a CPU" and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    file = write_config(**case.changes)
    code, _, err = train("--config", file)
    assert code == 2
    assert_one_line(err, rf"{re.escape(str(file))}:\d+", case.path, case.message)


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(FILES) >= 40


FILES: dict[str, tuple[str, str]] = {
    "not YAML": ("run: {name: x", r"{file}:1: not valid YAML: "),
    "a tab": ("run:\n\tname: x\n", r"{file}:2: not valid YAML: "),
    "a list": ("- run\n", r"{file}:1: a config file holds"),
    "duplicate key": ("run: {{name: x}}\noptim:\n  lr: 1\n  lr: 2\n", r"{file}:4: optim.lr: duplicate key; .* line 3"),
    "no such base": ("base: none.yaml\n", r"{file}:1: base: cannot read '.*none.yaml'"),
    "its own base": ("base: bad.yaml\n", r".*bad.yaml: base: files build on each other in a circle"),
    "a key that is a list": ("? [a, b]\n: 1\n", r"{file}:1: a key must be plain text"),
    "an alias of itself": ("a: &a {{b: *a}}\n", r"{file}: not valid YAML: an alias inside what it names"),
    "base is a list": ("base: [a, b]\n", r"{file}:1: base: names one YAML file"),
}


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, train: Train, tmp_path: Path) -> None:
    text, expected = FILES[name]
    file = tmp_path / "bad.yaml"
    file.write_text(text.replace("{{", "{").replace("}}", "}"))
    code, _, err = train("--config", file)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert re.match("error: " + expected.replace("{file}", re.escape(str(file))), err), err


def test_missing_file(train: Train) -> None:
    code, _, err = train("--config", "none.yaml")
    assert (code, err) == (2, "error: none.yaml: cannot read this config file: No such file or directory\n")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "command line: 'optim.lr' is not of the form section.key=value"),
        ("=3", "command line: '=3' is not of the form section.key=value"),
        ("optim.lr=[1", "command line:1: not valid YAML: "),
        ("optim.lr=fast", "command line: optim.lr: must be a valid number (got 'fast')"),
        ("optimm.lr=1", "command line: optimm: unknown key; did you mean 'optim'?"),
    ],
)
def test_override(override: str, expected: str, train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(), override)
    assert code == 2
    assert err.startswith(f"error: {expected}")
    assert len(err.splitlines()) == 1


def test_every_mistake_is_told_at_once(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(optim__lr=-1, train__batch_size=0, modle={}))
    assert code == 2
    assert len(err.splitlines()) == 3


def test_bug_in_user_code_is_a_traceback(train: Train, write_config: WriteConfig) -> None:
    code, _, err = train("--config", write_config(data__train=component("vectors:Buggy", length=60)))
    assert code == 1
    assert "a bug of the user's" in err
    assert "while reading sample" in err


RESUMES: dict[str, tuple[dict[str, Any], str, str]] = {
    "another model": ({"model__name": "small_cnn"}, "model.name", "mlp in the checkpoint, vectors_model:Linear now;"),
    "another size of model": ({"model__args__hidden": [32]}, "model.args.hidden", "[16] in the checkpoint, [32] now"),
    "another optimizer": ({"optim__name": "sgd"}, "optim.name", "adamw in the checkpoint, sgd now"),
    "another batch size": ({"train__batch_size": 20}, "train.batch_size", "12 in the checkpoint, 20 now"),
    "another seed": ({"run__seed": 1}, "run.seed", "0 in the checkpoint, 1 now"),
    "other data": ({"data__train__args__length": 48}, "data.train.args.length", "60 in the checkpoint, 48 now"),
    "not wanted": ({"checkpoint__resume": "never"}, "checkpoint.resume", "already holds a run"),
}


@pytest.mark.parametrize("name", RESUMES)
def test_resume(name: str, train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    changes, path, message = RESUMES[name]
    assert train("--config", write_config()).code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")}
    file = write_config(train__epochs=3, **changes)
    if name == "another model":
        config = tiny_config(tmp_path / "run", train__epochs=3)
        config["model"] = {"name": "vectors_model:Linear"}
        file.write_text(yaml.safe_dump(config))
    code, _, err = train("--config", file)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert re.search(rf"error: .*: {re.escape(path)}: ", err), err
    assert message in err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")} == before
