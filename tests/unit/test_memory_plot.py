"""Pictures of a simulated step are written in each format, and show what they should."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from trainer.errors import UserError
from trainer.memory.plot import plot_step
from trainer.memory.simulation import StepMemory, simulate_step
from trainer.units import format_bytes


@pytest.fixture(scope="module")
def step() -> StepMemory:
    layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return simulate_step(
        nn.Sequential(*layers),
        lambda model, batch: model(batch).square().mean(),
        lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
        torch.zeros(512, 256),
        clip_norm=True,
    )


def test_png(step: StepMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # other tests import it
    file = tmp_path / "step.PNG"
    plot_step(step, "six layers", 2 * step.peak_bytes, file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "matplotlib.pyplot" not in sys.modules


def test_svg(step: StepMemory, tmp_path: Path) -> None:
    limit = 2 * step.peak_bytes
    for name in ("one.svg", "two.svg"):
        plot_step(step, "costs $5 & <more>", limit, tmp_path / name)
    root = ElementTree.parse(tmp_path / "one.svg").getroot()
    assert root.tag.endswith("svg")
    texts = {text.strip() for text in root.itertext()}
    assert {f"peak {format_bytes(step.peak_bytes)}", f"limit {format_bytes(limit)}", "costs $5 & <more>"} <= texts
    assert {"forward", "backward", "clip", "optimizer", "parameters", "gradients", "activations"} <= texts
    assert "communication" not in texts
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_html(step: StepMemory, tmp_path: Path) -> None:
    file = tmp_path / "step.html"
    plot_step(step, "a <model>", None, file)
    text = file.read_text(encoding="utf-8")
    assert text.count("<svg") == text.count("</svg>") == 1
    assert "<title>a &lt;model&gt;</title>" in text
    assert "<?xml" not in text
    assert not re.search(r"""(src|href)=["'](?!#)""", text)  # nothing is loaded from elsewhere
    assert "limit" not in text
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", text)
    assert rows == [(format_bytes(tensor.num_bytes), tensor.category) for tensor in step.largest]


@pytest.mark.parametrize("name", ["step.pdf", "step", "png"])
def test_another_ending(step: StepMemory, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"must end in \.png, \.svg or \.html"):
        plot_step(step, "", None, tmp_path / name)


@pytest.mark.parametrize("ending", [".png", ".html"])
def test_a_file_that_cannot_be_written(step: StepMemory, tmp_path: Path, ending: str) -> None:
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory"):
        plot_step(step, "", None, tmp_path / "missing" / f"step{ending}")


def test_without_matplotlib(step: StepMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lockstep-trainer[plot]'")):
        plot_step(step, "", None, tmp_path / "step.png")
    assert not any(tmp_path.iterdir())
