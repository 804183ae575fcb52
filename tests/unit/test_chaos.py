"""What chaos plans, what it refuses, and what it makes of what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Train, WriteConfig

from launch.chaos import Settings, draw_events, settings_of_run
from launch.chaos_report import Report, Suffered
from launch.cli import main
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.storage import LocalStorage
from trainer.comparing import checkpoint_differences, logged_differences
from trainer.config import load_config


def test_every_kind_of_fault_comes_before_any_comes_again() -> None:
    events = draw_events(seed=3, seconds=600, every=10, processes=2)
    assert 50 <= len(events) <= 70
    for i in range(0, 42, 6):
        assert len({event.action for event in events[i : i + 6]}) == 6
    assert all(event.in_turn and event.after_seconds and 5 <= event.after_seconds <= 15 for event in events)
    assert {event.rank for event in events} == {0, 1}
    assert len({event.place for event in events}) == 5
    assert all((event.seconds > 0) == (event.action == "delay") for event in events)
    assert draw_events(seed=3, seconds=600, every=10, processes=2) == events
    assert draw_events(seed=4, seconds=600, every=10, processes=2) != events


def test_a_process_that_is_alone_is_not_stopped() -> None:
    events = draw_events(seed=3, seconds=600, every=10, processes=1)
    assert {event.action for event in events} == {"kill", "hang", "delay", "corrupt-checkpoint"}
    assert {event.rank for event in events} == {0}


def test_the_user_s_own_run_is_out_of_reach(write_config: WriteConfig, tmp_path: Path) -> None:
    file = str(write_config(checkpoint={"dir": "s3://bucket/mine", "keep": 1, "resume": "never"}))
    settings = Settings(file, ["optim.lr=0.5", "run.dir=mine"], 2, 1.0, 1.0, 0, tmp_path / "a: b", 7.5)
    config = load_config(file, settings.overrides)
    ours = load_config(file, settings_of_run(config, settings, "quiet"))
    assert ours.run_dir == tmp_path / "a: b" / "quiet"
    assert ours.checkpoint.dir is None
    assert (ours.checkpoint.keep, ours.checkpoint.resume) == (3, "auto")
    assert ours.tracking.trackers == ()
    assert ours.launch.max_restarts == 0
    assert ours.faults.hang_timeout is not None
    assert ours.faults.hang_timeout.seconds == 7.5
    assert ours.optim.lr == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--every", "-1"], "--every must be more than 0"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--json", "nowhere/report.json"], "there is no such folder"),
        (["--folder", "taken"], "it holds something else"),
        (["--folder", "."], "it holds something else"),
        (["optim.lr=fast"], "optim.lr"),
        (["--folder", "outer", "run.dir=outer/chaos"], "the run itself is in it"),
        (["--folder", "outer", "run.dir=outer/quiet/run"], "the run itself is in it"),
    ],
)
def test_bad_usage(
    options: list[str],
    message: str,
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "taken" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    try:
        code = main(["chaos", "--config", str(write_config()), *options])
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_the_table() -> None:
    faults = [
        Suffered("kill", 0, 7, "forward", 100.0, "a", back_after=9.0, steps_again=2),
        Suffered("delay", 1, 9, "optimizer", 150.0, "b"),
        Suffered("kill", 1, 12, "exchange of decisions", 200.0, "c", back_after=11.0, steps_again=5),
    ]
    for fault, again in zip(faults, [2, 0, 5], strict=True):
        fault.steps_again = 0
        fault.lose({7: 5, 9: 9, 12: 8}[fault.step])
        assert fault.steps_again == again
    report = Report("a.yaml", 2, 0, faults=faults, step=30, same=True)
    report.runs["chaos"] = {"goodput": 0.5, "num_attempts": 3, "goodput_seconds": {"train": 30.0, "lost": 40, "x": 0.1}}
    lines = report.table().splitlines()
    assert lines[1].split() == ["kill", "2", "10.0", "s", "11.0", "s", "3.5", "5"]
    assert lines[2].split() == ["delay", "1", "-", "-", "0.0", "0"]
    assert lines[3].split(maxsplit=2)[2] == "goodput 50.0% in 3 attempts: lost work 40 s, steps that counted 30 s"
    assert lines[4] == "step 30 is the same as in peace, bit for bit"
    assert json.loads(report.to_json())["by_action"]["kill"]["back_after_mean"] == 10
    report.same, report.differences = False, [f"tensor {i}" for i in range(12)]
    assert report.table().splitlines()[4:6] == ["step 30 is NOT the same as in peace:", "  tensor 0"]
    assert report.table().endswith("  tensor 9\n  and 2 more\n")
    report.problem = "it gave up"
    assert report.table().splitlines()[-1] == "no comparison: it gave up"


def test_runs_are_compared_bit_for_bit(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    for name, changes in {"a": {}, "b": {}, "c": {"run__seed": 5}, "d": {"train__epochs": 1}}.items():
        assert train("--config", write_config(f"{name}.yaml", run__dir=str(tmp_path / name), **changes)).code == 0
    a, b, c, d = (CheckpointFolder(LocalStorage(tmp_path / name / "checkpoints"), 1).newest() for name in "abcd")
    logs = {name: tmp_path / name / "metrics.jsonl" for name in "abcd"}
    assert checkpoint_differences(a, b) == logged_differences(logs["a"], logs["b"]) == []
    assert checkpoint_differences(a, d) == ["step 10 instead of 5"]
    assert logged_differences(logs["a"], logs["d"]) == ["10 losses are logged instead of 5"]
    found = checkpoint_differences(a, c)
    assert any(f.startswith("tensor model.") for f in found)
    assert any(f.startswith("progress.eval_metrics: ") for f in found)
    assert len(logged_differences(logs["a"], logs["c"])) == 10
    logs["b"].write_text(logs["b"].read_text() + logs["b"].read_text().splitlines()[0] + "\n")
    assert logged_differences(logs["b"], logs["a"]) == ["step 1 is logged twice"]
