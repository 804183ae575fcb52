"""What following an advice gains, beside what it promised: runs that have a problem, and the same runs without it.

`python -m benchmarks.advice --json FILE` runs the nightly tests of advice and keeps what each case measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.commands import new_parser, show_again
from benchmarks.telling import describe, markdown_table, origin, publish
from benchmarks.tested import run_tests

_SUITES = ("tests/unit/test_advice_runs.py", "tests/dist/test_advice_dist.py")


def table(result: Mapping[str, Any]) -> str:
    """Returns the result as a Markdown table."""
    rows = [["the run", "told to", "promised", "measured", "try"], ["---", "---", "---:", "---:", "---:"]]
    for case in result["cases"]:
        told = ", ".join(f"`{key}={value}`" for key, value in case["settings"].items()) or case["rule"]
        promised = "not known" if case["promised"] is None else f"{case['promised']:+.0%}"
        rows.append([case["run"], told, promised, f"{case['measured']:+.0%}", str(case["try"])])
    what = "of up to three tries, the first that was good: a gain within the margin, or the problem gone"
    return markdown_table(rows, [what, *origin(result)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the tests: 0 where every promise was kept."""
    parser = new_parser("benchmarks.advice", __doc__)
    parser.add_argument("--only", metavar="EXPRESSION", help="of pytest's -k: some cases")
    options = parser.parse_args(arguments)
    if options.markdown:
        return show_again(options.json, table)
    environment = describe("benchmarks.advice", arguments, ["accelerate"], "cpu")
    code, cases = run_tests(_SUITES, "LOCKSTEP_ADVICE_JSON", options.only, nightly=True)
    if cases is None:
        return code or 1
    publish({"environment": environment, "cases": cases}, table, options.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
