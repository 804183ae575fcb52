"""Every figure in docs/ comes from a committed result: tables and pictures are made of them, prose repeats tables."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from benchmarks import document, registry
from benchmarks.registry import BENCHMARKS, DOCS, RESULTS, Benchmark, Result, all_results

PAGES = sorted(DOCS.glob("*.md"))
README = REPOSITORY / "README.md"
THERE = [benchmark for benchmark in BENCHMARKS if importlib.util.find_spec(benchmark.module)]
COMMITTED = [result for result in all_results() if result.file.exists()]
DRAWN = [result for result in COMMITTED if result.benchmark.has_plot]

# Speeds and ratios. What follows "at least" or "at most" is a bar, not a figure.
FIGURE = re.compile(
    r"(?P<bar>at (?:least|most) )?\b(?P<number>\d[\d,]*(?:\.\d+)?)(?: times\b|x as\b|% (?:faster|slower)\b| ?ms\b"
    r"| (?:images|samples|steps)/s)|ratio of (?P<ratio>\d+\.\d+)"
)
SPEED = re.compile(r"\d ?(?:ms\b|images/s|samples/s|steps/s)")


def by_name(thing: Benchmark | Result | Path) -> str:
    return thing.stem if isinstance(thing, Result) else thing.name


def prose(text: str) -> str:
    """Returns a text without its generated blocks, code, examples in quotation marks and tables."""
    for pattern in (document.BLOCK.pattern, r"```.*?```", r"`[^`]*`", r'"[^"]*"'):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("    ", "|")))


def figures(text: str) -> Iterator[str]:
    """Yields the speeds and ratios that prose gives, apart from bars."""
    for match in FIGURE.finditer(text):
        if not match["bar"]:
            yield (match["number"] or match["ratio"]).replace(",", "")


def numbers(text: str) -> set[float]:
    """Returns the numbers in the cells of generated tables, and in the lines of bars below them."""
    blocks = [match["text"] for match in document.BLOCK.finditer(text)]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(("|", "- "))]
    return {float(number) for line in lines for number in re.findall(r"\d+(?:\.\d+)?", line.replace(",", ""))}


def invented(text: str, known: set[float]) -> list[str]:
    """Returns the figures that no table has, to as many digits as prose gives."""
    found = []
    for figure in figures(prose(text)):
        digits = len(figure.partition(".")[2])
        if float(figure) not in {round(number, digits) for number in known}:
            found.append(figure)
    return found


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_writing_a_page_anew_changes_nothing(page: Path) -> None:
    assert document.rewritten(page) == page.read_text(), "python -m benchmarks.document"


@pytest.mark.parametrize("result", DRAWN, ids=by_name)
def test_drawing_a_result_anew_changes_nothing(result: Result, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    if f"Matplotlib v{matplotlib.__version__}" not in result.picture.read_text():
        pytest.skip("drawn with another version of matplotlib")
    assert document.draw(result, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == result.picture.read_bytes()


def test_every_result_is_registered_and_every_picture_is_one_of_a_result() -> None:
    assert {path.name for path in RESULTS.glob("*.json")} == {result.file.name for result in COMMITTED}
    assert {path.name for path in (DOCS / "images").glob("*.svg")} == {result.picture.name for result in DRAWN}
    assert len({result.stem for result in all_results()}) == len(all_results())


@pytest.mark.parametrize("benchmark", THERE, ids=by_name)
def test_every_result_has_one_block_at_its_place(benchmark: Benchmark) -> None:
    for result in benchmark.results.values():
        comment = f"<!-- table: {result.file.relative_to(REPOSITORY)} -->"
        assert [page.name for page in PAGES for _ in range(page.read_text().count(comment))] == [benchmark.page]
    headings = re.findall(r"^#+ (.*)$", (DOCS / benchmark.page).read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert benchmark.place.partition("#")[2] in {"", *anchors}


@pytest.mark.parametrize("result", [r for r in COMMITTED if r.benchmark.module != "launch"], ids=by_name)
def test_a_benchmark_takes_the_arguments_of_its_suites(result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    """With those of each, it prints a committed table; `launch` is no benchmark, and has tests of its own."""
    benchmark = result.benchmark
    module = importlib.import_module(benchmark.module)
    main = importlib.import_module(f"{benchmark.module}.__main__").main if hasattr(module, "__path__") else module.main
    table = benchmark.makers()[0](document.read(result))
    for arguments in benchmark.suites.values():
        assert main([*arguments, *benchmark.quick, "--markdown", "--json", str(result.file)]) == 0
        assert capsys.readouterr().out == table


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The result of a benchmark, somewhere else, and not there yet."""
    monkeypatch.setattr(registry, "RESULTS", tmp_path)
    monkeypatch.setattr(document, "REPOSITORY", tmp_path)
    return next(benchmark for benchmark in BENCHMARKS if benchmark.name == "digits").results["cpu"]


def measured(**changes: Any) -> str:
    told = {"hardware": "2 cores", "versions": {"torch": "2"}, "command": "python -m benchmarks.digits"}
    return json.dumps({**told, "accuracy": [98.0, 99.0], "mean": 98.5, **changes})


def test_what_was_not_measured_says_so_and_how_to(result: Result, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- table: digits-cpu.json -->\nold\n<!-- end -->\nAfter.\n")
    assert "Not measured yet; `python -m benchmarks --suite cpu --only digits`." in document.rewritten(page)
    result.file.write_text(measured())
    text = document.rewritten(page)
    assert text.startswith("Before.\n<!-- table: digits-cpu.json -->\n| seed | 0 | 1 | mean |")
    assert text.endswith("2 cores; torch 2; `python -m benchmarks.digits`.\n<!-- end -->\nAfter.\n")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quick": True}, "nothing was measured"),
        ({"settings": {"tiny": True}}, "nothing was measured"),
        ({"settings": {"keep_loaded": True}}, "other load"),
    ],
    ids=["quick", "tiny", "loaded"],
)
def test_what_is_no_measurement_is_no_source(result: Result, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    result.file.write_text(measured(**changes))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: digits-cpu.json -->\n<!-- end -->\n")
    with pytest.raises(document.NoSource, match=why):
        document.rewritten(page)
    page.write_text("<!-- table: other.json -->\n<!-- end -->\n")
    with pytest.raises(document.NoSource, match=r"other\.json is no result"):
        document.rewritten(page)


def test_tables_of_figures_are_made_of_results() -> None:
    for page in [*PAGES, README]:
        rest = re.sub(document.BLOCK.pattern, "", page.read_text(), flags=re.DOTALL)
        rows = [line for line in rest.splitlines() if line.startswith("|")]
        assert not [row for row in rows if SPEED.search(row)], page.name
        assert not (rows and page.name == "performance.md")


def test_figures_in_prose_are_those_of_the_tables() -> None:
    """In docs/performance.md those of the same section, in the README those of any table."""
    everywhere: set[float] = set()
    for page in PAGES:
        everywhere |= numbers(page.read_text())
    assert invented(README.read_text(), everywhere) == []
    for section in (DOCS / "performance.md").read_text().split("\n## "):
        assert invented(section, numbers(section)) == [], section[:40]


def test_an_invented_figure_is_found() -> None:
    block = "<!-- table: a.json -->\n| `x` | 1055 | 2.44 |\n<!-- end -->\n"
    text = f"{block}2.44 times, 2.4 times and 1,055 images/s; at least 7 times. `8 ms`\n| 9 ms |\n"
    assert invented(text, numbers(text)) == []
    more = "2.5 times, 31 ms, a ratio of 0.99, 12% faster"
    assert invented(text + more, numbers(text)) == ["2.5", "31", "0.99", "12"]
