"""Benchmarks: the pictures they run on, the table they write, and one short run. Never how fast anything is."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, nightly
from launching import run
from PIL import Image

from benchmarks import digits, feed
from benchmarks.feed import add_ratios, summarize, table
from benchmarks.feed_entries import Batches, Entry, random_crop
from benchmarks.measure import ENTRIES, Measurement, measure
from benchmarks.pictures import SHAPES, describe_pictures, list_pictures, make_pictures
from benchmarks.rounds import MOST_FOREIGN_CORES, Problem, in_rounds
from benchmarks.telling import goal_text, origin


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage", reason="scikit-image, whose photos the pictures are made of, is not installed")
    return make_pictures(60, folder=tmp_path_factory.mktemp("pictures"))


def test_pictures_have_imagenets_shape_size_and_chroma(pictures: Path) -> None:
    described = describe_pictures(pictures)
    assert described["pictures"] == 60
    assert described["pixels"] == ["500x375"]
    assert 90_000 < described["mean_bytes"] < 110_000
    assert 0.6 < described["share_420"] < 0.9
    assert sorted(folder.name for folder in pictures.iterdir()) == [f"class-{label}" for label in range(10)]
    assert all(len(list(folder.iterdir())) == 6 for folder in pictures.iterdir())


def test_pictures_are_the_same_every_time_and_in_sets_of_any_length(pictures: Path, tmp_path: Path) -> None:
    again = make_pictures(11, folder=tmp_path)
    for file in list_pictures(again):
        assert file.read_bytes() == (pictures / file.relative_to(again)).read_bytes()
    other_seed = make_pictures(1, folder=tmp_path, seed=1)
    assert list_pictures(other_seed)[0].read_bytes() != (pictures / "class-0" / "000000.jpg").read_bytes()


def test_a_complete_set_is_used_again_and_an_incomplete_one_is_never_seen(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(made: int) -> None:
        if made == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pictures(5, folder=tmp_path, progress=fail)
    assert list(tmp_path.iterdir()) == []
    made: list[int] = []
    folder = make_pictures(5, folder=tmp_path, progress=made.append)
    assert make_pictures(5, folder=tmp_path, progress=made.append) == folder
    assert made == [1, 2, 3, 4, 5]


def test_large_pictures(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image, whose photos the pictures are made of, is not installed")
    (file,) = list_pictures(make_pictures(1, "large", tmp_path))
    assert Image.open(io.BytesIO(file.read_bytes())).size == (1600, 1200)
    assert abs(file.stat().st_size / SHAPES["large"].target_bytes - 1) < 0.15


def test_random_crops_lie_inside_and_keep_to_area_and_aspect() -> None:
    draws = random.Random(0)
    for _ in range(2000):
        left, top, width, height = random_crop(draws, 500, 375)
        assert left >= 0 and top >= 0 and left + width <= 500 and top + height <= 375  # noqa: PT018
        assert 0.079 < width * height / (500 * 375) <= 1
        assert 0.74 < width / height < 1.35
    assert random_crop(draws, 1000, 20) == (490, 0, 20, 20)


def _measured(
    name: str, rates: Sequence[float], foreign: float = 0.0, problem: Problem | None = None
) -> dict[str, Any]:
    taken = [Measurement(1000, 1000 / rate, 1100 / rate, foreign) for rate in rates]
    return summarize(ENTRIES[name], taken, problem, keep_loaded=False)


def _result() -> dict[str, Any]:
    entries = [
        _measured("torchvision", [200, 230, 210]),
        _measured("dali", [400, 410, 420]),
        _measured("timm", [], problem=Problem("No module named 'timm'", is_absence=True)),
        _measured("ours", [840], foreign=0.5),
        _measured("ours-all-on-cpu", [840, 1050, 630]),
    ]
    add_ratios(entries)
    return {
        "environment": {
            "cpu": "Chip",
            "cores": 2,
            "python": "3.11",
            "date": "2026-11-23T01:02:03",
            "commit": "a" * 40,
            "command": "python -m benchmarks.feed",
        },
        "settings": {"rounds": 3, "images": 1000, "batch_size": 64, "keep_loaded": False},
        "pictures": {"pictures": 1000, "pixels": ["500x375"], "mean_bytes": 100_400, "share_420": 0.75},
        "entries": entries,
    }


def test_table_shows_medians_ratios_gaps_and_dropped_rounds() -> None:
    result = json.loads(json.dumps(_result()))
    lines = table(result).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:7]}
    assert len({line.count("|") for line in lines[:7]}) == 1
    assert cells["`torchvision`"][:5] == ["float32 CHW, normalised", "210", "200 to 230", "1.00", "0.51"]
    assert cells["`ours-all-on-cpu`"][1:5] == ["840", "630 to 1050", "4.00", "2.05"]
    assert cells["`timm`"][1:3] == ["-", "No module named 'timm'"]
    assert cells["`ours`"][1:3] == ["-", "no quiet round"]
    assert "1 of 10 dropped for other load" in lines[8]
    assert "100 kB on average, 75% of them 4:2:0" in lines[8]


def test_a_round_is_dropped_where_others_used_the_machine() -> None:
    quiet, loaded = Measurement(100, 1, 1, MOST_FOREIGN_CORES), Measurement(100, 2, 2, MOST_FOREIGN_CORES + 0.01)
    dropped = summarize(ENTRIES["ours"], [quiet, loaded], None, keep_loaded=False)
    assert dropped["dropped_rounds"] == 1
    assert [taken["kept"] for taken in dropped["rounds"]] == [True, False]
    assert dropped["images_per_core_second"] == {"median": 100, "min": 100, "max": 100}
    kept = summarize(ENTRIES["ours"], [quiet, loaded], None, keep_loaded=True)
    assert kept["dropped_rounds"] == 0
    assert kept["images_per_core_second"]["median"] == 75


def test_a_measurement_counts_the_cpu_time_of_children_and_closes_its_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import subprocess

    closed = []

    def batches(folder: Path, batch_size: int, seed: int) -> Batches:
        spin = "import time\nwhile True:\n    line = input()\n    end = time.process_time() + 0.2\n"
        spin += "    while time.process_time() < end: pass\n    print(line, flush=True)"
        with subprocess.Popen(
            [sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                while True:
                    child.stdin.write("\n")
                    child.stdout.readline()
                    yield batch_size
            finally:
                child.kill()
                closed.append(True)

    monkeypatch.setitem(ENTRIES, "child", Entry("child", "peer", "nothing", (), batches))
    taken = measure("child", tmp_path, images=10, warm_up=5, batch_size=5, seed=0)
    assert closed == [True]
    assert taken.images == 10
    assert 0.39 < taken.cpu_seconds < 0.6  # two batches of 0.2 s: the warm-up and the start are not in it


@nightly
def test_a_run_measures_and_prints_the_same_table_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result_file = tmp_path / "results" / "feed.json"
    command = [sys.executable, "-m", "benchmarks.feed", "--json", str(result_file)]
    folder = str(pictures.parent)
    options = ["--images", "60", "--rounds", "1", "--only", "torchvision", "ours", "--keep-loaded", "--folder", folder]
    ended = run([*command, *options], REPOSITORY)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(result_file.read_text())
    assert [entry["name"] for entry in result["entries"]] == ["torchvision", "ours"]
    for entry in result["entries"]:
        (taken,) = entry["rounds"]
        assert taken["images"] == 60
        assert taken["cpu_seconds"] > 0
        assert taken["kept"]
        assert entry["images_per_core_second"]["median"] == pytest.approx(60 / taken["cpu_seconds"])
        assert entry["versions"]
    assert result["entries"][0]["ratios"] == {"torchvision": 1.0}
    assert result["pictures"]["pictures"] == 60
    assert result["environment"]["cores"] >= 1
    assert feed.main(["--json", str(result_file), "--markdown"]) == 0
    assert capsys.readouterr().out == ended.stdout
    assert "| `ours` |" in ended.stdout


def test_every_name_has_its_turn_in_every_round_until_it_is_taken_out() -> None:
    names = list("abcdefgh")
    taken = []
    for number, name in in_rounds(names, rounds=3, seed=0):
        taken.append((number, name))
        if (number, name) == (1, "c"):
            names.remove(name)
    orders = [[name for at, name in taken if at == number] for number in range(3)]
    assert [sorted(order) for order in orders] == [list("abcdefgh"), list("abcdefgh"), list("abdefgh")]
    assert len({tuple(order[:3]) for order in orders}) == 3
    assert taken[:8] == list(in_rounds("abcdefgh", rounds=1, seed=0))


def test_the_origin_names_the_gpus_where_they_took_part() -> None:
    told = {"cpu": "Chip", "cores": 64, "python": "3.12", "date": "2026-11-23T01:02:03", "commit": None}
    told |= {"packages": {"torch": "2"}, "command": "python -m benchmarks.feed"}
    gpu = {"name": "GPU X", "memory_gib": 79.2}
    lines = origin({"environment": {**told, "gpu": gpu, "gpus": 2, "cuda": "13.0"}})
    assert lines[:2] == ["2 x GPU X (79.2 GiB), CUDA 13.0", "Chip, 64 cores"]
    assert lines[2:] == ["Python 3.12, torch 2", "2026-11-23, commit unknown", "`python -m benchmarks.feed`"]
    assert origin({"environment": {**told, "gpu": None, "gpus": 0, "cuda": None}})[0] == "Chip, 64 cores, no GPU"
    changed = origin({"environment": {**told, "gpu": None, "uncommitted_changes": True}})
    assert changed[2] == "2026-11-23, commit unknown with uncommitted changes"


@pytest.mark.parametrize(
    ("ratio", "bar", "says"),
    [
        (2.4, {"least": 2.4}, "a to b: 2.400, at least 2.4: met"),
        (2.39, {"least": 2.4}, "a to b: 2.390, at least 2.4: NOT MET"),
        (0.1, {"most": 0.1}, "a to b: 0.100, at most 0.1: met"),
        (0.11, {"most": 0.1}, "a to b: 0.110, at most 0.1: NOT MET"),
        (None, {"most": 0.1}, "a to b: not measured"),
    ],
)
def test_a_bar_is_met_or_not(ratio: float | None, bar: dict[str, float], says: str) -> None:
    assert goal_text("a to b", ratio, **bar) == f"- {says}\n"


def test_digits_are_measured_once_per_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "accuracy", lambda seed, run_dir: 99 + seed / 2)
    assert digits.measure(2) == {"accuracy": [99.0, 99.5], "mean": 99.25}
