"""Every kind of fault once, and what it costs: the suite of faults, run for its figures.

`python -m benchmarks.faults --json FILE` runs `tests/dist/test_faults_dist.py` and keeps what each case measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.commands import new_parser, show_again
from benchmarks.telling import describe, markdown_table, origin, publish
from benchmarks.tested import run_tests

_SUITE = "tests/dist/test_faults_dist.py"


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    rows = [["fault", "ranks", "exit code", "seconds", "lost"], ["---", *["---:"] * 4]]
    for case in result["cases"]:
        seconds = "goes on" if case["seconds"] is None else f"{case['seconds']:.1f}"
        rows.append([case["name"], str(case["ranks"]), str(case["code"]), seconds, str(case["lost"])])
    return markdown_table(rows, origin(result))


def chaos_table(result: Mapping[str, Any]) -> str:
    """Returns what `python -m launch chaos --json FILE` wrote as a Markdown table."""
    rows = [
        ["fault", "times", "seconds until it trains again, mean and most", "steps made again, mean and most"],
        ["---", *["---:"] * 3],
    ]
    for action, sums in result["by_action"].items():
        mean, most = sums["back_after_mean"], sums["back_after_max"]
        back = "-" if mean is None else f"{mean:.1f}, {most:.1f}"
        again = f"{sums['steps_again_mean']:.0f}, {sums['steps_again_max']:.0f}"
        rows.append([action, str(sums["count"]), back, again])
    runs = result["runs"]
    for name, run in (("under faults", runs["chaos"]), ("in peace", runs["quiet"])):
        rows.append([f"goodput {name}", "", f"{run['goodput']:.1%} in {run['num_attempts']} attempts", ""])
    rows.append([f"the same at step {result['step']:,}, bit for bit", "", "yes" if result["same"] else "NO", ""])
    return markdown_table(rows, [f"{result['minutes']:.0f} minutes on {result['processes']} ranks", *origin(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the suite: 0 where every case is as it must be."""
    parser = new_parser("benchmarks.faults", __doc__)
    parser.add_argument("--only", metavar="EXPRESSION", help="of pytest's -k: some cases")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    environment = describe("benchmarks.faults", arguments, ["accelerate"])
    code, figures = run_tests([_SUITE], "LOCKSTEP_FAULTS_JSON", options.only)
    if figures is None:
        return code or 1
    publish({"environment": environment, **figures}, table, options.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
