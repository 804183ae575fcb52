"""Every key of a config has a test that fails where the key is ignored; `tests/support/keys.yaml` names it."""

from __future__ import annotations

import ast
import functools
import os
import re
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
def marks(file: Path) -> dict[str, str]:
    """Returns the source of the marks of each test function, with those of its class and module.

    Functions are under their names, those of classes under `Class::name`.
    """
    body = ast.parse(file.read_text()).body
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    of_module = [ast.unparse(node.value) for node in assigned if "pytestmark" in map(ast.unparse, node.targets)]
    found = {}
    for node in body:
        of_class = [ast.unparse(mark) for mark in node.decorator_list] if isinstance(node, ast.ClassDef) else []
        inside, prefix = (node.body, f"{node.name}::") if isinstance(node, ast.ClassDef) else ([node], "")
        for each in inside:
            if isinstance(each, ast.FunctionDef):
                own = [ast.unparse(mark) for mark in each.decorator_list]
                found[prefix + each.name] = "\n".join(of_module + of_class + own)
    return found


def source(file: Path) -> str:
    """Returns a test file with what it imports from beside the tiers, which has configs that several files use."""
    text = file.read_text()
    beside = [TESTS / f"{name}.py" for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return "\n".join([text, *(helper.read_text() for helper in beside if helper.exists())])


def writes(text: str, key: str) -> bool:
    """Tells whether a test file writes a key: with dots, with `__`, or its name and that of its section."""
    words = key.split(".")
    return key in text or "__".join(words) in text or all(re.search(rf"\b{w}\b", text) for w in words[-2:])


def test_every_key_has_a_test_and_no_test_a_key_that_is_gone() -> None:
    assert list(TEST_OF) == ignoring.all_keys()


@pytest.mark.parametrize("key", TEST_OF)
def test_the_test_runs_every_day_and_its_file_writes_the_key(key: str) -> None:
    file, _, name = TEST_OF[key].partition("::")
    found = marks(TESTS / file)[name]
    # Of `few` cases some run every day; only by those are keys proven.
    assert not re.search(r"\bnightly\b|\bNIGHTLY\b", found)
    assert writes(source(TESTS / file), key)


def test_marks_of_classes_and_modules_count_and_sections_are_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("pytestmark = nightly\n@slow\nclass TestIt:\n    @few\n    def test_a(self): ...\n")
    assert marks(file) == {"TestIt::test_a": "nightly\nslow\nfew"}
    assert not writes("name: x, training: y", "data.train.name")
    assert writes("train: {name: x}", "data.train.name")
    assert writes("data__train__name=1", "data.train.name")


def test_what_is_checked_sees_the_key_and_what_runs_does_not(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "{run: {name: x}, data: {train: {name: a}, augment: {erase: 0.5, erase_with: noise}}, model: {name: b},"
        " optim: {lr: 0.5}, train: {steps: 3, batch_size: 4}}"
    )
    script = (
        "from trainer.config import load_config; c = load_config('x.yaml')\n"
        "print(c.data.augment.erase, c.data.augment.erase_with, c.data.train.name, c.optim.lr, c.train.steps)"
    )

    def read(key: str, by: str = "a script") -> list[str]:
        path = os.pathsep.join([str(REPOSITORY), str(SUPPORT)])
        variables = {**os.environ, "PYTHONPATH": path, ignoring.VARIABLE: key}
        command = [sys.executable, "-c", f"exec(compile({script!r}, {by!r}, 'exec'))"]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert read("") == ["0.5", "noise", "a", "0.5", "3"]
    assert read("data.augment.erase") == ["0.0", "noise", "a", "0.5", "3"]  # which no check has refused
    assert read("data.train.name") == ["0.5", "noise", "a-ignored", "0.5", "3"]
    assert read("optim.lr") == ["0.5", "noise", "a", "0.25", "3"]
    assert read("train.steps") == ["0.5", "noise", "a", "0.5", "4"]
    assert read("train.steps", by=__file__) == read("")  # what a test writes is there for it


@nightly
@pytest.mark.timeout(7200)
def test_the_tests_fail_without_their_keys() -> None:
    command = [sys.executable, str(SUPPORT / "prove_keys.py")]
    *lines, total = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in lines if not line.startswith("proven ")] == []
    assert total == f"{len(TEST_OF)} of {len(TEST_OF)} are proven"
