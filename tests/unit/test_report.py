"""The run page without a browser: what is read of whole and broken folders, curves, comparison, the command."""

from __future__ import annotations

import html
import itertools
import json
import logging
import math
import random
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Train, WriteConfig
from example_run import make_run

from trainer import cli
from trainer.config import load_config
from trainer.report import Curves, write_page, write_report
from trainer.report.charts import best_point, is_lower_better, system, time_split
from trainer.report.comparison import config_differences, labels
from trainer.report.curves import Curve, RankTable
from trainer.report.page import advice_card, average_split, run_page
from trainer.report.parts import embedded
from trainer.report.reading import Advice, read_run
from trainer.run_folder import RANKS_FILE, RunFolder
from trainer.telemetry.machine import Machine


def page_of(folder: Path) -> str:
    return run_page(read_run(folder), folder)


def charts_of(page: str) -> dict[str, dict[str, Any]]:
    (text,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page)
    return {chart["id"]: chart for chart in json.loads(text)}


def sections_of(page: str) -> list[str]:
    return re.findall(r'<section id="([a-z]+)">', page)


# ---- curves ----------------------------------------------------------------------------------------------------


def test_a_short_curve_is_kept_as_it_is() -> None:
    curve = Curve()
    for step, value in enumerate([3.0, 1.0, math.nan, 2.0, math.inf]):
        curve.add(step, value)
    assert curve.points() == [(0, 3.0), (1, 1.0), (2, None), (3, 2.0), (4, None)]
    assert (curve.mean, curve.last, curve.num_values) == (2.0, 2.0, 3)
    assert (curve.best(highest=True), curve.best(highest=False)) == ((0, 3.0), (1, 1.0))


def test_a_long_curve_keeps_its_extremes_its_mean_and_its_gaps() -> None:
    draw, curve, values = random.Random(0), Curve(), {}
    spikes = {17: 900.0, 40_001: -900.0, 40_003: 901.0, 99_998: -901.0}
    for step in range(100_000):
        value = math.nan if 60_000 <= step < 63_000 else spikes.get(step, draw.random())
        values[step] = value
        curve.add(step, value)
    points = curve.points()
    assert 600 <= len(points) <= 1200
    assert [step for step, _ in points] == sorted(step for step, _ in points)
    assert set(spikes.items()) <= set(points)
    assert all(value is None or value == values[int(step)] for step, value in points)
    assert sum(60_000 <= step < 63_000 and value is None for step, value in points) > 5
    known = [value for value in values.values() if not math.isnan(value)]
    assert curve.num_values == len(known)
    assert curve.mean == pytest.approx(sum(known) / len(known))
    assert curve.best(highest=True) == (40_003, 901.0)
    assert curve.best(highest=False) == (99_998, -901.0)
    means = [value for _, value in curve.means() if value is not None]
    assert len(means) <= 600


def test_steps_made_again_replace_the_earlier_ones() -> None:
    curves = Curves()
    for step in (1, 2, 3, 2, 3, 4):
        curves.add({"step": step, "train/loss": 10.0 * step if curves.num_records < 3 else float(step)})
    loss = curves.get("train/loss")
    assert loss is not None
    assert loss.points() == [(1, 10.0), (2, 20.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_ranks_are_averaged_over_stretches() -> None:
    table = RankTable()
    for step in range(1000):
        table.add({"step": step, "seconds_to_exchange": [1.0, 2.0 + step % 2], "hosts": ["a", "b"]})
    columns = table.columns("seconds_to_exchange")
    assert columns is not None
    assert columns.shape[1] == table.num_ranks == 2
    assert 100 < len(columns) == len(table.steps) <= 240
    assert columns[:-1].tolist() == [[1.0, 2.5]] * (len(columns) - 1)
    assert table.steps[-1] == 999
    for broken in ({}, {"step": 1000}, {"step": 1000, "seconds_to_exchange": "x"}, {"step": 1, "peak_gib": [[1], 2]}):
        table.add(broken)
    assert table.steps[-1] == 999
    table.add({"step": 1000, "seconds_to_exchange": [1.0, 1.0, 1.0]})  # more ranks from here on
    assert (table.num_ranks, table.steps) == (3, [1000])


def test_shares_stay_a_whole_where_parts_are_reported_unevenly() -> None:
    curves = Curves()
    for step in range(10, 100, 10):
        late = {"time/communication": 0.25} if step > 50 else {}
        curves.add({"step": step, "time/forward": 0.75 if late else 1.0, **late})
    chart = time_split(curves, 90)
    assert chart is not None
    sums = [sum(values) for values in zip(*(series["y"] for series in chart.data["series"]), strict=True)]
    assert sums == [1.0] * 9


def test_the_best_point_is_what_the_summary_says() -> None:
    curve = Curve()
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
        curve.add(step, value)
    assert best_point(curve, "accuracy", {}) == {"x": 2, "y": 0.9, "isLow": False}
    assert best_point(curve, "loss", {}) == {"x": 1, "y": 0.5, "isLow": True}
    told = {"metric": "accuracy", "step": 1, "value": 0.5}
    assert best_point(curve, "accuracy", {}, told) == {"x": 1, "y": 0.5, "isLow": True}


@pytest.mark.parametrize(
    ("metric", "is_lower"),
    [
        *((name, True) for name in ("loss", "val_loss", "top1_error", "WER", "word-wer", "data/rmse", "bits_per_byte")),
        *((name, False) for name in ("terrain_iou", "cancer_auc", "answer_f1", "power", "fidelity", "accuracy")),
    ],
)
def test_which_metrics_are_better_low(metric: str, is_lower: bool) -> None:
    assert is_lower_better(metric, {}) is is_lower
    assert is_lower_better(metric, {metric: "max"}) is False
    assert is_lower_better(metric, {metric: "min"}) is True


def test_reports_count_by_their_time(tmp_path: Path) -> None:
    """A run of two attempts: of reports every 10 s, of one after 100 s, and the hour in between is nobody's."""
    began = [1000.0, 5000.0]
    times = [1015.0, 1025.0, 5105.0, 5106.0]
    shares = [0.0, 0.0, 0.5, 0.0]
    attempts = [{"started": start, "last_seen": start + 120, "seconds": {"startup": 5.0}} for start in began]
    (tmp_path / "attempts.json").write_text(json.dumps(attempts))
    with open(tmp_path / "metrics.jsonl", "w") as stream:
        for step, (when, share) in enumerate(zip(times, shares, strict=True)):
            late = {"time/data_wait": share} if step > 1 else {}  # earlier reports do not have it at all
            stream.write(json.dumps({"step": step, "time": when, "time/forward": 1 - share, **late}) + "\n")
            stream.write(json.dumps({"step": step, "time": when + 0.5, "eval/loss": 1.0}) + "\n")
    seconds = [10.0, 10.0, 100.0, 1.0]
    expected = sum(a * b for a, b in zip(seconds, shares, strict=True)) / sum(seconds)
    split = average_split(read_run(tmp_path))
    assert split == {"forward": pytest.approx(1 - expected), "data_wait": pytest.approx(expected)}
    curve = Curve()
    for step in range(50_000):  # also of a long one
        curve.add(step, step % 2, 1.0 + step % 2 * 2)
    assert curve.over_time() == (75_000.0, 100_000.0)


def test_figures_of_machines_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that there are: NVML is stood in for."""
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.NVML_TEMPERATURE_GPU = ValueError, 0
    nvml.nvmlInit, nvml.nvmlDeviceGetCount, nvml.nvmlDeviceGetHandleByIndex = lambda: None, lambda: 8, lambda i: i
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=50 + handle)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=20, total=80)
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 300_000
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 60
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    clock = itertools.count()
    monkeypatch.setattr("trainer.telemetry.machine.time.monotonic", lambda: float(next(clock)))
    figures = Machine().sample()
    assert figures is not None
    curves = Curves()
    for step in range(1, 301):
        values = {f"system/{node}/{name}": value for node in range(32) for name, value in figures.items()}
        curves.add({"step": step, **values})
    charts = system(curves, 300)
    titles = {re.sub(r" \(.*", "", chart.title): chart.data for chart in charts}
    assert {title: data["format"] for title, data in titles.items()} == {
        "CPU in use": "percent",
        "Memory in use": "percent",
        "Sent": "MiB/s",
        "Received": "MiB/s",
        "GPU in use": "percent",
        "GPU memory in use": "percent",
        "GPU power": "W",
        "GPU temperature": "°C",
    }
    assert titles["CPU in use"]["rows"] == [f"node {node}" for node in range(32)]
    gpus = titles["GPU in use"]
    assert (gpus["kind"], gpus["rows"][1]) == ("heat", "node 0 GPU 4\N{EN DASH}7")
    assert (gpus["low"], gpus["high"]) == (53, 57)  # of four neighbours the highest
    assert gpus["values"][0][:3] == [53, 57, 53]
    assert len(gpus["x"]) == len(gpus["values"]) <= 240
    assert gpus["x"][-1] == 300
    assert sum(len(embedded(chart.data)) for chart in charts) < 1_000_000


# ---- one run ---------------------------------------------------------------------------------------------------


def test_everything_of_a_run_is_on_its_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", steps=600))
    assert sections_of(page) == [
        *("advice", "training", "time", "speed", "memory", "ranks", "system", "attempts", "trouble", "predictions"),
        *("config", "files"),
    ]
    for shown in (
        *("data.workers=6", "about 26% faster", "rank 2 on node-b", "% more than the others", "1 rollback"),
        *("its process is gone (signal 9)", "the loss of rank 1 is nan", "data:image/png;base64,", "logs/rank-3.log"),
        *("checkpoints/step-00000600", "NVIDIA A100-SXM4-40GB", "07c4a1f4fd0f8d4a3c0ad6ed2a4b6f1cf4b9f1e2", "33.1%"),
        *("momentum: 0.9", "Evaluation at step 600.", "taken for", "'run.name=with spaces'".replace("'", "&#x27;")),
    ):
        assert shown in page, shown
    charts = charts_of(page)
    assert {"loss", "time", "memory", "train-mfu", "ranks-seconds_to_exchange", "system-2", "confusion"} <= set(charts)
    assert None in charts["loss"]["series"][0]["y"]  # a loss that was not finite is a gap
    assert [len(series["y"]) for series in charts["time"]["series"]] == [60] * 9
    assert not re.search(r'(src|href)="(?!data:|#|[a-z]+[./]|[a-z]+")', page)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_lines_of_advice_work_in_a_shell() -> None:
    settings = {"eval.every": "6 epochs", "parallel.reshard_after_forward": False, "data.workers": 4}
    (text,) = re.findall(r"<code id[^>]*>(.*?)</code>", advice_card(Advice("rule", "text", settings, None), "0"), re.S)
    assert shlex.split(html.unescape(text)) == [
        *("eval.every=6 epochs", "parallel.reshard_after_forward=false", "data.workers=4")
    ]


def test_any_file_may_be_missing_or_broken(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", steps=100)
    files = [file for file in whole.rglob("*") if file.is_file() and file.stat().st_size]
    names = sorted(str(file.relative_to(whole)) for file in files if file.suffix != ".png" or file.name == "0.png")
    assert {"faults/attempt-002/first.json", "faults/bad-steps.jsonl", "eval/step-00000100/0.png"} < set(names)
    junk = [b"", b"{", b"\xff\xfe\x00", b"[1, 2]\n", b'{"a": {"b": [null, "x", {}]}}\n', b"[" * 5000]
    for name in names:
        file = whole / name
        content = file.read_bytes()
        for broken in (None, content[: len(content) // 2], *junk):
            if broken is None:
                file.unlink()
            else:
                file.write_bytes(broken)
            assert "<main>" in page_of(whole), (name, broken)
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["summary.json", "attempts.json", "environment.json", "eval/step-00000100/samples.json"]
)
def test_values_of_another_kind_do_no_harm(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", steps=100)
    content = json.loads((run / name).read_text())
    entries = content if isinstance(content, list) else [content]
    wrong = (None, "text", -1e400, [3, None], {"a": "b"})
    changes = [{key: wrong[i % len(wrong)]} for i, key in enumerate(entries[0])]
    changes += [dict.fromkeys(entries[0], value) for value in wrong]
    for change in changes:
        changed = [{**entries[0], **change}, *entries[1:]]
        (run / name).write_text(json.dumps(changed if isinstance(content, list) else changed[0]))
        assert "<main>" in page_of(run), change


def test_a_killed_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=300)
    attempts = json.loads((run / "attempts.json").read_text())
    attempts[-1] |= {"status": "running", "step": 310}
    (run / "attempts.json").write_text(json.dumps(attempts))
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics + '{"step": 400, "train/lo')
    before = page_of(run)  # the summary is of an earlier attempt
    (run / "summary.json").unlink()
    for page in (before, page_of(run)):
        assert "running or killed" in page
        assert re.search(r"No end is written down; last seen 20\d\d-.*, at step 310\.", page)
        assert charts_of(page)["loss"]["series"][0]["x"][-1] == 300
    known = read_run(run)
    assert (known.status, known.step, known.advice) == ("running", 310, [])
    attempts.append({**attempts[-1], "number": 4, "status": "stopped"})
    (run / "attempts.json").write_text(json.dumps(attempts))
    assert [attempt.status for attempt in read_run(run).attempts] == ["killed", "failed", "killed", "stopped"]


def test_a_run_without_a_single_record_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: early}\n")
    page = page_of(tmp_path)
    assert "<h1>early</h1>" in page
    assert charts_of(page) == {}
    assert sections_of(page) == ["config", "files"]


def test_pictures_come_from_the_folder_of_the_evaluation_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=100)
    folder = run / "eval" / "step-00000100"
    (tmp_path / "secret.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "text.png").write_text("no picture")
    (folder / "large.png").write_bytes(b"\x89PNG\r\n" + bytes(300_000))
    names = ["../../../secret.png", str(tmp_path / "secret.png"), "text.png", "large.png", "none.png", 3]
    samples = [{"image": name, "target": "a", "prediction": "a"} for name in names]
    (folder / "samples.json").write_text(json.dumps(samples))
    page = page_of(run)
    assert "data:image" not in page
    assert page.count("no picture") == len(names)


def test_pictures_beside_each_other_are_wide_and_neither_right_nor_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=100)
    folder = run / "eval" / "step-00000100"
    sample = {"image": "0.png", "target": "sky 60%", "prediction": "sky 58%", "num_views": 3}
    (folder / "samples.json").write_text(json.dumps([sample]))
    page = page_of(run)
    (shown,) = re.findall(r'<li class="wide">(.*?)</li>', page)
    assert "is sky 60%" in shown
    assert "<b" not in shown


def test_many_classes_are_a_table_of_what_is_confused_most(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=100)
    counts = [[10 if i == j else 0 for j in range(60)] for i in range(60)]
    counts[7][9], counts[3][2] = 5, 30
    confusion = {"classes": [f"class {i}" for i in range(60)], "counts": counts}
    (run / "eval" / "step-00000100" / "confusion.json").write_text(json.dumps(confusion))
    page = page_of(run)
    assert "confusion" not in charts_of(page)
    shown = re.sub(r"<[^>]+>", " ", page[page.index("Most often confused of 60 classes") :])
    assert re.search(r"class 3 +class 2 +30 +75\.0% +class 7 +class 9 +5 +33\.3% ", shown)


def test_embedded_data_cannot_end_its_script() -> None:
    text = embedded({"</script><!--": ["<script>", "&lt;", math.nan, math.inf, 1 / 3, 2.0, "\u2028"]})
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"</script><!--": ["<script>", "&lt;", None, None, 0.333333, 2, "\u2028"]}


# ---- several runs ----------------------------------------------------------------------------------------------


def test_two_runs_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", steps=200), make_run(tmp_path / "b", "faster", steps=100, lr=0.3, speed=4000)]
    page = write_report(runs, tmp_path / "out" / "both.html").read_text()
    assert sections_of(page) == ["runs", "training", "speed", "time", "config", "advice"]
    assert '<a href="../b">faster</a>' in page
    charts = charts_of(page)
    assert [series["name"] for series in charts["train-loss"]["series"]] == ["photos", "faster"]
    assert {chart["domain"][1] for chart in charts.values()} == {200}
    shown = re.sub(r"<[^>]+>", " ", str(config_differences([read_run(run) for run in runs], ["photos", "faster"])))
    assert shown.split() == ["setting", "photos", "faster", "optim.lr", "0.1", "0.3", "train.steps", "200", "100"]
    assert '<strong class="top">3,760</strong>' in page

    # Of a metric that the config names, it says what is best.
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["checkpoint"] = {"best": {"metric": "accuracy", "mode": "min"}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    charts = charts_of(write_report(runs, tmp_path / "out" / "both.html").read_text())
    assert [series["best"]["isLow"] for series in charts["eval-accuracy"]["series"]] == [True, True]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "y"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("run: {name: same}\n")
    told_apart = [f"same ({folders[0]})", f"same ({folders[1]})", "same (y)"]
    assert labels([read_run(folder) for folder in folders]) == told_apart


# ---- the command, and the end of a run --------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", steps=100)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"
    assert cli.main(["report", "run", "run"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert "2 runs compared" in (tmp_path / "report.html").read_text()
    (tmp_path / "empty").mkdir()
    for arguments, error in (
        (["none"], "'none' is not a run folder: it does not exist"),
        (["run", "empty"], "'empty' is not a run folder: it has no config.yaml, metrics.jsonl or summary.json"),
        (["run", "--output", "empty"], "cannot write 'empty': Is a directory"),
        (["run", "--output", "run/summary.json/x.html"], "cannot write 'run/summary.json/x.html': Not a directory"),
    ):
        assert cli.main(["report", *arguments]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", f"error: {error}\n")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert not list(run.glob(".*"))


def test_every_attempt_ends_with_a_page(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changed = {"train__epochs": 3, "checkpoint": {"allow_changes": ["data.train"]}}
    assert train("--config", write_config()).code == 0
    failed = train("--config", write_config(**changed, data__train__name="vectors:BadLabel"))
    assert (failed.code, "label 3" in failed.err) == (2, True), failed.err
    page = (run / "report.html").read_text()
    assert "✗ failed" in page
    assert "label 3" in page
    assert train("--config", write_config(**changed)).code == 0
    page = (run / "report.html").read_text()
    assert "✓ finished" in page
    assert "in 3 attempts" in page
    assert charts_of(page)["loss"]["series"][0]["x"] == list(range(1, 16))
    assert charts_of(page) == charts_of(page_of(run))  # what was kept on the way is what the files say


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run", steps=100)
    (run / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, "lockstep"):
        write_page(run)
        write_page(tmp_path / "none")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"cannot write '{run}/report.html': ")
    assert "is not a run folder" in second


def test_curves_of_a_run_that_goes_on(write_config: WriteConfig) -> None:
    folder = RunFolder(load_config(str(write_config()), []))
    folder.create()
    for step in (1, 2, 3):
        folder.log({"step": step, "train/loss": float(step)})
        folder.append(RANKS_FILE, {"step": step, "peak_gib": [1.0, 2.0]})
    folder.cut_metrics(2, 2)
    folder.log({"step": 3, "train/loss": 30.0})
    assert folder.curves.by_key["train/loss"].points() == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert folder.curves.ranks.steps == [1, 2]
