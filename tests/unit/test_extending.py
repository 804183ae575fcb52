"""Every block of docs/extending.md, put together as a reader would, trains and gives what the page says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Train
from run_results import losses, summary, weights

pytestmark = pytest.mark.unit

BLOCKS = re.findall(
    r"```(?:python|yaml)\n# (\S+)\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.DOTALL
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "sizes.py").write_text("\n\n".join(text for name, text in BLOCKS if name == "sizes.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("sizes", None)


@pytest.mark.parametrize("text", [text for name, text in BLOCKS if name == "sizes.yaml"])
def test_its_runs_finish(text: str, folder: Path, train: Train) -> None:
    (folder / "sizes.yaml").write_text(text)
    done = train("--config", "sizes.yaml", "run.dir=run", "tracking.trackers=[]", "log.every=1")
    assert done.code == 0, done.err
    learnt = list(losses(folder / "run").values())
    assert sum(learnt[-4:]) < 0.5 * sum(learnt[:4])  # the last and the first epoch
    if "eval:" not in text:
        return
    metrics = summary(folder / "run")["metrics"]
    sizes = sys.modules["sizes"]
    model, data = sizes.model(64), sizes.Sizes(20)
    model.load_state_dict(weights(folder / "run", 80))
    batch = [torch.stack(part) for part in zip(*(data[i] for i in range(20)), strict=True)]
    errors = sizes.Size().errors(model(batch[0]), batch).detach().abs()
    assert metrics["eval/measured"] == 15
    assert metrics["eval/rmse"] == pytest.approx(float((errors.square().sum() / 15).sqrt()))
    assert metrics["eval/median_error"] == pytest.approx(float(errors.sort().values[10]))
    assert metrics["eval/mean_error"] == pytest.approx(float(errors.mean()))
    (shown,) = (folder / "run" / "eval").glob("step-*/samples.json")
    assert json.loads(shown.read_text())[3]["target"] == "nan"


def test_what_is_too_large_is_refused(folder: Path, train: Train) -> None:
    (folder / "sizes.yaml").write_text([text for name, text in BLOCKS if name == "sizes.yaml"][-1])
    done = train("--config", "sizes.yaml", "run.dir=run", "task.args.largest=0.5", "tracking.trackers=[]")
    assert done.code == 2
    assert re.search(r"data\.train: sample \d+ has size .*, more than 0\.5", done.err)
