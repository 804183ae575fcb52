"""`python -m benchmarks`: all of a suite runs whatever fails, and what failed is said; the benchmarks are stubs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks.registry import RESULTS, Benchmark

STUB = """
import json, os, sys
file = sys.argv[sys.argv.index("--json") + 1]
what = sys.argv[1]
print("working", file=sys.stderr)
if what == "breaks":
    sys.exit("ValueError: no such thing")
entries = [{"model": "a", "problem": None}, {"model": "b", "problem": "No GPU", "is_left_out": True}]
if what == "lacks":
    entries.append({"model": "a", "name": "peer", "problem": "No module named 'peer'"})
json.dump({"arguments": sys.argv[1:], "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "entries": entries}, open(file, "w"))
sys.exit(1 if what == "fails" else 0)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results; the registry has stubs."""
    (tmp_path / "stub_benchmark.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def stub(name: str, module: str = "stub_benchmark") -> Benchmark:
        return Benchmark(name, module, "something", "nobody", "page.md", {"cpu": (name, suite.SCRATCH)})

    stubs = [stub("works"), stub("breaks"), stub("absent", "no_such_module"), stub("lacks"), stub("fails")]
    monkeypatch.setattr(suite, "BENCHMARKS", stubs)
    return tmp_path / "results"


def test_all_run_and_what_failed_is_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--suite", "cpu", "--json", str(folder)]) == 1
    said = capfd.readouterr()
    assert said.out.splitlines()[-4:] == [
        "breaks: exit code 1, and no result: ValueError: no such thing",
        "absent: not installed: no_such_module",
        "lacks: a peer: No module named 'peer'",
        "fails: exit code 1: working",
    ]
    assert "[1/5] works: something\n[1/5] works: done after " in said.out
    assert said.err.count("working\n") == 4
    assert sorted(file.name for file in folder.iterdir()) == ["fails-cpu.json", "lacks-cpu.json", "works-cpu.json"]
    result = json.loads((folder / "works-cpu.json").read_text())
    scratch = Path(result["arguments"][1])
    assert scratch.name == "scratch"
    assert not scratch.exists()
    assert result["arguments"][2:] == ["--json", str(folder / "works-cpu.json")]
    assert result["gpus"] == ""
    assert "quick" not in result


def test_a_quick_run_is_marked_and_only_some_can_be_asked_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--suite", "cpu", "--quick", "--only", "works", "--json", str(folder)]) == 0
    assert "[1/1] works: done" in capfd.readouterr().out
    result = json.loads((folder / "works-cpu.json").read_text())
    assert result["quick"]
    assert "--tiny" in result["arguments"]


def test_a_result_that_was_there_before_is_not_taken_for_a_new_one(folder: Path) -> None:
    folder.mkdir()
    (folder / "breaks-cpu.json").write_text("{}")
    assert suite.main(["--suite", "cpu", "--only", "breaks", "--json", str(folder)]) == 1
    assert (folder / "breaks-cpu.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "cpu", "--only", "nothing"], "nothing is not in the suite cpu, which has: works, breaks"),
        (["--suite", "cpu", "--quick", "--json", str(RESULTS)], "--quick must not write over measured results"),
        (["--suite", "tpu"], "invalid choice"),
    ],
)
def test_what_is_asked_for_must_be_there(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        suite.main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_the_gpu_suite_needs_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main(["--suite", "gpu"]) == 2
    assert capsys.readouterr().err == "there is no CUDA GPU here; --suite cpu needs none\n"
