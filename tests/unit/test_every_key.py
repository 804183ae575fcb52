"""Every key of a config has a test that fails where the key is ignored; `tests/support/keys.yaml` names it."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import ignoring
import pytest
import yaml
from conftest import REPOSITORY, SUPPORT, nightly

TESTS = REPOSITORY / "tests"
TEST_OF: dict[str, str] = yaml.safe_load((SUPPORT / "keys.yaml").read_text())


@functools.cache
def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """Returns the test functions of a file by name, those of classes as `Class::name`."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found.update({prefix + each.name: each for each in inner if isinstance(each, ast.FunctionDef)})
    return found


def test_every_key_has_a_test_and_no_test_a_key_that_is_gone() -> None:
    assert list(TEST_OF) == ignoring.all_keys()


@pytest.mark.parametrize("key", TEST_OF)
def test_the_test_runs_every_day_and_its_file_writes_the_key(key: str) -> None:
    file, _, name = TEST_OF[key].partition("::")
    decorators = functions(TESTS / file)[name].decorator_list
    assert "nightly" not in map(ast.unparse, decorators)
    assert key.split(".")[-1] in (TESTS / file).read_text()


def test_what_is_checked_sees_the_key_and_what_runs_does_not(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "{run: {name: x}, data: {train: {name: a}, augment: {erase: 0.5, erase_with: noise}}, model: {name: b},"
        " optim: {lr: 0.5}, train: {steps: 3, batch_size: 4}}"
    )
    script = (
        "from trainer.config import load_config; c = load_config('x.yaml')\n"
        "print(c.data.augment.erase, c.data.augment.erase_with, c.data.train.name, c.optim.lr, c.train.steps)"
    )

    def read(key: str) -> list[str]:
        path = os.pathsep.join([str(REPOSITORY), str(SUPPORT)])
        variables = {**os.environ, "PYTHONPATH": path, ignoring.VARIABLE: key}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert read("") == ["0.5", "noise", "a", "0.5", "3"]
    assert read("data.augment.erase") == ["0.0", "noise", "a", "0.5", "3"]  # which no check has refused
    assert read("data.train.name") == ["0.5", "noise", "a-ignored", "0.5", "3"]
    assert read("optim.lr") == ["0.5", "noise", "a", "0.25", "3"]
    assert read("train.steps") == ["0.5", "noise", "a", "0.5", "4"]


@nightly
@pytest.mark.timeout(7200)
def test_the_tests_fail_without_their_keys() -> None:
    pairs = [f"{key}=tests/{node}" for key, node in TEST_OF.items()]
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "prove_keys.py"), *pairs], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert [line for line in done.stdout.splitlines() if not line.startswith("proven")] == []
    assert done.stdout.count("proven") == len(pairs)
