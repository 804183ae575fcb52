"""The README's configs load, its targets exist, and what it says of exit codes is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer import cli
from trainer.config import load_config

README = (REPOSITORY / "README.md").read_text()
CONFIGS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_load(text: str, tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(CONFIGS[0])
    is_part = "run:" not in text
    (tmp_path / "readme.yaml").write_text("base: whole.yaml\n" * is_part + text)
    load_config(str(tmp_path / "readme.yaml"))


def test_there_are_configs() -> None:
    assert len(CONFIGS) == 6


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text()))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_the_error_shown_is_the_one_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cifar.yaml").write_text(CONFIGS[0].replace("lr: 0.1", "lrr: 0.1, lr: 0.1"))
    assert cli.train(["--config", str(tmp_path / "cifar.yaml")]) == 2
    (shown,) = re.findall(r"`error: cifar\.yaml:(.*?)`", README)
    assert capsys.readouterr().err == f"error: {tmp_path}/cifar.yaml:{shown}\n"


def test_files_that_are_linked_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / link).exists(), link
