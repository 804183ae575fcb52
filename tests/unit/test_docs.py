"""Configs in docs/ load, the reference is current, and what is linked exists; figures are test_document.py's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer.config import all_keys, load_config
from trainer.reference import reference_text

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))


def test_the_digits_accuracy_is_told_as_measured() -> None:
    result = json.loads((REPOSITORY / "benchmarks" / "results" / "digits-cpu.json").read_text())
    header = (REPOSITORY / "configs" / "digits.yaml").read_text()
    assert result["mean"] >= 99.4
    assert f"{result['mean']:.2f}% eval accuracy" in header
    assert f"({', '.join(f'{value:.2f}' for value in result['accuracy'])})" in header
    assert f"| {result['mean']:.2f}%, mean of 5 seeds |" in (REPOSITORY / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_configs_load(page: Path, tmp_path: Path) -> None:
    """Each a whole config, or parts of one."""
    (tmp_path / "whole.yaml").write_text((REPOSITORY / "configs" / "cifar10_resnet18.yaml").read_text())
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        is_part = "run:" not in text and "base:" not in text
        text = text.replace("base: configs", f"base: {REPOSITORY}/configs")
        (tmp_path / "part.yaml").write_text("base: whole.yaml\n" * is_part + text)
        load_config(str(tmp_path / "part.yaml"))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|configs|trainer|examples|benchmarks)/[\w/]+\.\w+)`", page.read_text()):
        assert (REPOSITORY / name).exists(), name


def test_the_config_reference_is_current() -> None:
    command = "make reference"
    assert (REPOSITORY / "docs" / "config.md").read_text() == reference_text(), f"run: {command}"
    described = re.findall(r"(?m)^(?:#+|\|) `([\w.]+)`", reference_text())
    assert described == list(dict.fromkeys(described))
    sections = set(re.findall(r"(?m)^#+ `([\w.]+)`", reference_text()))
    of_components = {key for key in all_keys() if (above := key.rpartition(".")[0]) and above not in sections}
    assert set(described) == set(all_keys()) - of_components


def test_the_site_is_whole_and_needs_no_other_host(tmp_path: Path) -> None:
    """All links lead somewhere, anchors included: `docs/mkdocs.yml` has these checks, and strict makes them errors."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        "docs/mkdocs.yml",
        "-d",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {file.parent.name: file.read_text() for file in (tmp_path / "site").rglob("index.html")}
    assert {page.stem for page in DOCS} <= set(pages)
    for name, text in pages.items():
        loaded = re.findall(r"<(?:link|script|img)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", text)
        assert not loaded, name
