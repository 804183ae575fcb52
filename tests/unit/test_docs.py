"""Configs in docs/ load, and what is linked exists; figures are the business of test_document.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer.config import load_config

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
    """Each a whole config, or parts of the README's first."""
    whole = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "whole.yaml").write_text(whole)
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        is_part = "run:" not in text and "base:" not in text
        text = text.replace("base: configs", f"base: {REPOSITORY}/configs")
        (tmp_path / "part.yaml").write_text("base: whole.yaml\n" * is_part + text)
        load_config(str(tmp_path / "part.yaml"))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_linked_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`(tests/[a-z_/]+\.py)`", text):
        assert (REPOSITORY / name).exists(), name
