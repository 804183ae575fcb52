"""The tables in docs/ are those of the committed results, and what is linked exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from benchmarks import checkpoint, digits, faults, feed, memory, soak, startup, switches, telemetry
from trainer.config import load_config

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
TABLES = [
    found
    for page in DOCS
    for found in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
]
MAKERS = {
    "chaos-cpu": faults.chaos_table,
    "checkpoint-cpu": checkpoint.table,
    "digits-accuracy": digits.table,
    "faults-cpu": faults.table,
    "feed-cpu": feed.table,
    "memory-cpu": memory.table,
    "soak-cpu": soak.table,
    "startup-cpu": startup.table,
    "switches-cpu": switches.table,
    "telemetry-cpu": telemetry.table,
}


def test_the_digits_accuracy_is_told_as_measured() -> None:
    result = json.loads((REPOSITORY / "benchmarks" / "results" / "digits-accuracy.json").read_text())
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


@pytest.mark.parametrize(("file", "text"), TABLES)
def test_tables_are_those_of_the_results(file: str, text: str) -> None:
    assert text == MAKERS[Path(file).stem](json.loads((REPOSITORY / file).read_text()))


def test_every_result_has_a_table() -> None:
    results = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "benchmarks" / "results").glob("*.json")}
    assert {file for file, _ in TABLES} == results
    assert {Path(file).stem for file in results} == set(MAKERS)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_linked_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`(tests/[a-z_/]+\.py)`", text):
        assert (REPOSITORY / name).exists(), name
