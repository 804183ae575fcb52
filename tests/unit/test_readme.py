"""The README shows the config of examples/photos, targets that exist, and the error that is given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer import cli

README = (REPOSITORY / "README.md").read_text()
(SHOWN,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


def test_the_config_is_that_of_the_example() -> None:
    assert (REPOSITORY / "examples" / "photos" / "photos.yaml").read_text() == SHOWN


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text()))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_the_error_shown_is_the_one_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "photos.yaml"
    file.write_text(SHOWN.replace("lr: 3e-4", "lrr: 3e-4, lr: 3e-4"))
    assert cli.train(["--config", str(file)]) == 2
    (shown,) = re.findall(r"`error: photos\.yaml:(.*?)`", README)
    assert capsys.readouterr().err == f"error: {file}:{shown}\n"
