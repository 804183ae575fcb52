"""Every command that the pages tell readers to type is typed here: really, or up to where it needs what is not here.

All of them are read by their own parsers, their configs are loaded, and what a launcher would start is printed. The
README's five minutes are run as they stand, only smaller; nightly, so is all else that needs one process and no
network.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, forget_accelerate, nightly
from doc_commands import PAGES, Command, commands_of
from picture_trees import make_class_folders

from launch.cli import main as launch_command
from trainer.cli import main as trainer_command
from trainer.cli import train as train_command

pytestmark = pytest.mark.unit

COMMANDS = [command for page in PAGES for command in commands_of(page)]
# What is not even read here, and why. An entry that no page needs any more fails.
NOT_HERE = {
    "source .venv/bin/activate": "`make install` makes that folder",
    ".venv/bin/pre-commit install": "writes into the clone's .git",
    "docker build": "needs Docker; tests/unit/test_kubernetes.py reads the Dockerfile",
    "wandb sweep": "needs a server; tests/dist/test_sweep.py has a stand-in for it",
    "wandb agent": "needs a server; tests/dist/test_sweep.py has a stand-in for it",
    "wandb sync": "needs W&B's servers; tests/unit/test_wandb_interruptions.py has a stand-in for them",
}
# The parts of launchers that start nothing when asked.
HAVE_DRY_RUN = ("agent", "doctor", "hosts", "kubernetes", "local", "slurm")
VARIABLES = {"R": "0", "HOST": "127.0.0.1", "JOB": "today"}
SMALL = (
    "model.weights=null",
    "schedule.warmup=0",
    "train.epochs=null",
    "train.steps=6",
    "train.batch_size=8",
    "data.workers=0",
    "tracking.trackers=[]",
)
SMALL_PICTURES = (
    *SMALL,
    "data.transforms.train=[{name: RandomResizedCrop, args: {size: 32}}]",
    "data.transforms.eval=[{name: Resize, args: {size: 32}}, {name: CenterCrop, args: {size: 32}}]",
)
SMALL_MODEL = ("model.name=small_cnn", "model.args.in_channels=3")  # ResNet-18 takes long to export


class Understood(Exception):
    """A command's parser has taken its arguments."""


def clone(folder: Path) -> Path:
    """Makes a folder with all that commands name, as a clone has it, and files that pages tell readers to write."""
    folder.mkdir()
    for name in ("train.py", "configs", "launch", "tests", "docs", "benchmarks", "Makefile"):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=shutil.ignore_patterns("runs", "data"))
    make_class_folders(folder, {"flowers/train": 5, "flowers/eval": 2})
    (folder / "examples" / "my-texts").mkdir()
    for name in (f"my-texts/{number}.txt" for number in range(12)):  # ten is the least
        (folder / "examples" / name).write_text(f"A text called {name}.\n" * 200)
    (folder / "digits-pods.yaml").write_text(blocks_of("docs/launch-kubernetes.md", "yaml")[0])
    for block in blocks_of("docs/extending.md", "python"):
        with open(folder / "sizes.py", "a") as file:
            file.write(f"{block}\n\n")
    (folder / "sizes.yaml").write_text(blocks_of("docs/extending.md", "yaml")[0])
    return folder


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("pages") / "clone")


@pytest.fixture(autouse=True)
def _as_typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("my_pkg", "sizes"):
            del sys.modules[name]


def id_of(command: Command) -> str:
    return f"{command.page}:{command.line}"


# ---- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=id_of)
def test_it_is_understood(
    command: Command, cloned: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if any(command.text.startswith(known) for known in NOT_HERE):
        return
    monkeypatch.chdir(cloned / command.folder)
    words = [os.path.expandvars(word) for word in command.words]
    if words[0] == "salloc":
        words = words[next(i for i, word in enumerate(words) if word == "python") :]
    check(words, monkeypatch)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a command to its parser, and looks for what it names; fails on a program that it does not know."""
    program, *rest = words
    if program == "make":
        assert set(rest) <= set(re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text()))
    elif program == "pytest":
        files = [word for word in rest if not word.startswith("-")]
        assert files
        assert all(Path(file).exists() for file in files)
    elif program == "pip":
        (extra,) = re.findall(r"^\.\[(\w+)\]$", rest[-1])
        known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert rest[:-1] == ["install", "-e"]
        assert extra in known
    elif program in ("accelerate", "torchrun"):
        script, arguments = launched(program, rest)
        check(["python", script, *arguments], monkeypatch)
    elif program == "python":
        check_python(rest, monkeypatch)
    else:
        pytest.fail(f"nothing is known about {program}: run it here, or say in NOT_HERE why not")


def launched(program: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Returns the script and its arguments that a launcher would start."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(arguments)
    else:
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        options = launch_command_parser().parse_args(arguments[1:])
    return options.training_script, options.training_script_args


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0].endswith("train.py"):
        assert Path(arguments[0]).exists()
        assert train_command([*arguments[1:], "--print-config"]) == 0
        return
    module = arguments[1] if arguments[0] == "-m" else None
    arguments = arguments[2:] if module is not None else arguments
    if module == "launch" and arguments[0] in HAVE_DRY_RUN and arguments[1:2] not in (["status"], ["cancel"]):
        assert launch_command([*arguments, "--dry-run"]) == 0
        return
    monkeypatch.setattr(sys, "argv", arguments if module is None else [module, *arguments])
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stopping_after(getattr(argparse.ArgumentParser, method)))
    if module is None:
        program = partial(runpy.run_path, arguments[0], run_name="__main__")
    else:
        for imported in (module, f"{module}.__main__"):  # runpy warns of one that was imported before
            if "." in imported:
                monkeypatch.delitem(sys.modules, imported, raising=False)
        program = partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    with pytest.raises(Understood):
        program()


def stopping_after(parse: Any) -> Any:
    """Wraps a method of a parser, so that nothing happens after it but in `python -m launch`, which reads on."""

    def parsed(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        options = parse(self, *args, **kwargs)
        if self.prog != "python -m launch":
            file = getattr(options, "config", None)
            assert file is None or Path(file).exists(), file
            raise Understood
        return options

    return parsed


def test_no_reason_is_left_over() -> None:
    for known in NOT_HERE:
        assert any(command.text.startswith(known) for command in COMMANDS), known


def test_no_page_is_passed_over() -> None:
    with_commands = {command.page for command in COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "docs/launch.md", "examples/photos/README.md"} <= with_commands
    mentioned = sum(len(re.findall(r"(?m)^    python ", page.read_text())) for page in PAGES)
    assert sum(command.words[0] == "python" for command in COMMANDS) >= mentioned


# ---- really run ---------------------------------------------------------------------------------------------------


def run(words: list[str], small: tuple[str, ...]) -> int:
    """Runs a command in this process, with settings that make it small; returns its exit code."""
    forget_accelerate()
    program, *rest = words
    if program in ("accelerate", "torchrun"):
        script, arguments = launched(program, rest)
        rest = [script, *arguments]
    if rest[0].endswith("train.py"):
        return train_command([*rest[1:], *small])
    if rest[:2] == ["-m", "trainer"]:
        return trainer_command(rest[2:])
    if rest[:3] == ["-m", "launch", "local"]:  # what each of its processes does; how they start is tests/dist
        start = rest.index("--config")
        processes = rest.index("--processes") if "--processes" in rest else len(rest)
        return train_command([*rest[start:processes], *rest[processes + 2 :], *small])
    return subprocess.run([sys.executable, *rest], check=False).returncode


def test_the_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The README's commands from pictures to a model, then the example's questions to that model."""
    folder = clone(tmp_path / "clone")
    monkeypatch.chdir(folder)
    steps = [command for command in COMMANDS if command.page == "README.md" and "photos" in command.text]
    steps = [command for command in steps if "-m launch" not in command.text]
    assert len(steps) == 4  # prepare, train, evaluate, export
    for command in steps:
        assert run(command.words, (*SMALL_PICTURES, *SMALL_MODEL)) == 0, (command, capfd.readouterr().err)
    assert (folder / "runs" / "photos" / "report.html").exists()
    capfd.readouterr()
    (text,) = blocks_of("examples/photos/README.md", "python")
    (folder / "ask.py").write_text(text.replace("256", "32").replace("224", "32"))
    monkeypatch.setattr(sys, "argv", ["ask.py", str(next((folder / "photos" / "flower").iterdir()))])
    runpy.run_path("ask.py", run_name="__main__")
    assert re.fullmatch(r"\{'china': 0\.\d+, 'flower': 0\.\d+\}\n", capfd.readouterr().out)


EXTRA: Mapping[str, tuple[str, ...]] = {
    "configs/imagenet_resnet50.yaml": (
        "precision=no",
        *SMALL_PICTURES,
        "model.name=resnet18",
        "task.metrics.top5.args={num_classes: 4, top_k: 2}",
    ),
    "examples/photos/photos.yaml": SMALL_PICTURES,
}
RUN_NIGHTLY = [
    command
    for command in COMMANDS
    if re.search(r"\btrain\.py|-m trainer|launch local|/prepare\.py", command.text)
    and "--multi_gpu" not in command.text
    and "--tokenizer" not in command.text  # of transformers' hub
    and "trainer sync" not in command.text  # needs W&B's servers
]


@nightly
@pytest.mark.timeout(1200)
def test_what_one_process_can_do_without_a_network_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = clone(tmp_path / "clone")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    profiled = ("configs/digits.yaml", "profile.steps=[2,3]", *SMALL)
    assert train_command(["--config", *profiled]) == 0
    for name in "ab":
        shutil.copytree("runs/digits", f"runs/{name}")
    for command in RUN_NIGHTLY:
        monkeypatch.chdir(folder / command.folder)
        words = [os.path.expandvars(word).replace("/fast", str(tmp_path)) for word in command.words]
        if "photos/train" in words:
            words[words.index("photos/train")] = "flowers/train"
        config = next((word for word in words if word.endswith(".yaml")), "")
        small = EXTRA.get(config, SMALL)
        if config and "photos" not in config:  # a later command asks for runs/photos
            small = (*small, f"run.dir={tmp_path / 'runs' / command.page / str(command.line)}")
        if "profile.steps" in command.text:
            small = (*small, "train.steps=46")
        assert run(words, small) == 0, (command, capfd.readouterr().err[-2000:])
