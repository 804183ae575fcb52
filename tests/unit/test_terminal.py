"""What a person at a terminal sees."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from conftest import Train, WriteConfig

from trainer.terminal import ProgressDisplay, clock, report_text

REPORT = {
    "train/loss": 0.12345,
    "train/lr": 0.001,
    "train/grad_norm": 1.5,
    "train/samples_per_second": 12345.6,
    "train/mfu": 0.417,
    "time/data_wait": 0.031,
    "memory/peak_gib": 3.0,
}


def test_a_report_in_a_line() -> None:
    shown = report_text(REPORT, seconds_left=3723)
    assert shown == "loss 0.1235  lr 0.001  grad norm 1.5  12,346 samples/s  MFU 42%  data wait 3%  ETA 1:02:03"
    few = {"train/loss": 2.0, "train/lr": 1.0, "train/samples_per_second": 3.21, "train/tokens_per_second": 6574.0}
    assert report_text(few, None) == "loss 2  lr 1  3.21 samples/s  6,574 tokens/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (11525, "3:12:05"), (266400, "3d 2:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(logging.INFO, "lockstep")
    display = ProgressDisplay(total_steps=100, first_step=20)
    display.show(60, 1.5, REPORT)
    display.show(60, 1.5, {"eval/accuracy": 0.5})
    display.close()
    last = terminal.getvalue().split("\r")[-1]
    assert " 60%|" in last
    assert "60/100" in last
    assert "loss 0.1235" in last
    assert "data wait 3%" in last
    assert "ETA 0:00" in last
    assert [record.getMessage() for record in caplog.records] == ["step 60/100  epoch 1.50  eval/accuracy 0.5"]


def test_a_bar_of_a_run_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    display = ProgressDisplay(total_steps=100, first_step=20)
    display.show(60, 1.5, REPORT)
    display.ends_at(60)
    display.close()
    last = terminal.getvalue().split("\r")[-1]
    assert "100%|" in last
    assert "60/60" in last


def test_lines_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    display = ProgressDisplay(total_steps=100, first_step=20)
    display.show(20, 0.5, {**REPORT, "train/grad_norm": 2.0})  # nothing is known of the time that is left
    display.show(60, 1.5, REPORT)
    display.close()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("step 20/100  epoch 0.50  loss 0.1235")
    assert "ETA" not in first
    assert "ETA 0:0" in second


def test_the_banner_says_in_ten_lines_what_runs(train: Train, write_config: WriteConfig) -> None:
    changes = {"train": {"steps": 4, "batch_size": 12, "micro_batch_size": 4}}
    done = train("--config", write_config(model__args__dropout=0.0, **changes))
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line[:10].strip() in _NAMES]
    assert [line[:10].strip() for line in lines] == _NAMES
    shown = {line[:10].strip(): line[11:] for line in lines}
    assert shown["run"] == "tiny, from the start"
    assert shown["model"] == "mlp, 195 parameters"
    assert shown["device"] == "1 x cpu, alone"
    assert shown["precision"] == "float32, not compiled"
    assert shown["batch"] == "12 = 1 processes x 4 x 3 micro-batches"
    assert shown["length"] == "4 steps, 5 per epoch, 60 samples"
    assert shown["memory"].endswith("per process, checkpointing none, not planned")
    assert shown["feed"] == "host, loaded in the training process"
    again = train("--config", write_config(model__args__dropout=0.0, **{**changes, "train__steps": 6}))
    assert "run        tiny, goes on from step 4\n" in again.out


_NAMES = ["run", "model", "task", "device", "precision", "batch", "length", "memory", "feed", "run folder"]
