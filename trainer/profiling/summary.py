"""`python -m trainer profile RUN_DIR`: what the profiles of all ranks of a run say together. Imports no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError, one_line, one_line_text
from trainer.profiling.finding import TRACE, look_into
from trainer.profiling.kinds import KINDS
from trainer.profiling.tables import format_seconds, kernel_lines, memory_lines
from trainer.units import counted, format_bytes

_KERNELS = "kernels.json"
_NUM_KERNELS = 15
_NUM_HOLDERS = 5
_NUM_DIFFERENCES = 3
_WORTH_NAMING = 0.02  # of a step
_NAME_WIDTH = 100

Record = Mapping[str, Any]


def summarise(run_dir: Path) -> dict[str, Any]:
    """Returns what the profiles in a run folder say, for JSON; times in seconds, means over ranks.

    A trace that nobody has looked into yet is looked into now.

    Raises:
        UserError: there are none, or none can be read.
    """
    folder = run_dir / "profile"
    records, problems = _records(run_dir, folder)
    files = sorted(file.name for file in folder.glob("rank-*.*"))
    return {"folder": str(folder), "files": files, "problems": problems, **combine(records)}


def combine(records: Sequence[Record]) -> dict[str, Any]:
    """Returns what ranks say together, each of them as it wrote it in `rank-N.kernels.json`."""
    first = records[0]
    return {
        "num_ranks": first["num_ranks"],
        "torch": first["torch"],
        "kinds_are_of": first["kinds_are_of"],
        "kinds": _means(records, "kind_seconds"),
        "places": _means(records, "place_seconds"),
        "kernels": _all_kernels(records),
        "differences": _differences(records),
        "ranks": [{**record, "kernels": record["kernels"][:_NUM_KERNELS]} for record in records],
    }


def _records(run_dir: Path, folder: Path) -> tuple[list[Record], list[str]]:
    """Returns what ranks wrote, or their traces say, and what cannot be read."""
    names = [file.name for ending in (TRACE, _KERNELS) for file in folder.glob(f"rank-*.{ending}")]
    ranks = _numbers(names)
    if not ranks:
        if not run_dir.is_dir():
            raise UserError(f"'{run_dir}' is not a run folder: there is no such folder")
        raise UserError(f"'{run_dir}' holds no profile; train with profile.steps=[10,15], or other steps")
    records: list[Record] = []
    problems = []
    for rank in ranks:
        file = folder / f"rank-{rank}.{_KERNELS}"
        try:
            if file.exists():
                records.append(json.loads(file.read_text(encoding="utf-8")))
            else:
                file = folder / f"rank-{rank}.{TRACE}"
                records.append(look_into(file))
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = one_line_text(error) if isinstance(error, OSError | ValueError) else one_line(error)
            problems.append(f"'{file}' cannot be read: {why}")
    if not records:
        raise UserError(problems[0])
    return records, problems


def _step_seconds(record: Record) -> float:
    return record["traced_seconds"] / len(record["step_seconds"])


def _per_step(record: Record, key: str, name: str) -> float:
    return record[key].get(name, 0.0) / len(record["step_seconds"])


def _means(records: Sequence[Record], key: str) -> dict[str, dict[str, float]]:
    """Returns the seconds per step and the share of a step by name, means over ranks, the largest first."""
    names = {name for record in records for name in record[key]}
    rows = {}
    for name in names:
        seconds = [_per_step(record, key, name) for record in records]
        shares = [value / _step_seconds(record) for value, record in zip(seconds, records, strict=True)]
        rows[name] = {"seconds_per_step": sum(seconds) / len(records), "share": sum(shares) / len(records)}
    return dict(sorted(rows.items(), key=lambda item: -item[1]["share"]))


def _all_kernels(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the kernels, or operators, that took the longest on all ranks together."""
    calls: dict[tuple[str, str], int] = defaultdict(int)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for record in records:
        for row in record["kernels"]:
            calls[row["name"], row["kind"]] += row["calls"]
            seconds[row["name"], row["kind"]] += row["seconds"]
    whole = sum(sum(record["kind_seconds"].values()) for record in records)
    rows = sorted(seconds.items(), key=lambda item: -item[1])[:_NUM_KERNELS]
    return [
        {
            "name": key[0],
            "kind": key[1],
            "calls": calls[key],
            "seconds": value,
            "mean_seconds": value / calls[key],
            "share": value / whole if whole else 0.0,
        }
        for key, value in rows
    ]


def _differences(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns in what ranks differ most, per step: a place of the host, or a kind of GPU work."""
    if len(records) < 2:
        return []
    keys = ["place_seconds", *(["kind_seconds"] if records[0]["kinds_are_of"] == "gpu" else [])]
    found = []
    for key in keys:
        for name in {name for record in records for name in record[key]}:
            seconds = [_per_step(record, key, name) for record in records]
            longest, shortest = max(seconds), min(seconds)
            found.append(
                {
                    "of": "host" if key == "place_seconds" else "gpu",
                    "name": name,
                    "longest_seconds": longest,
                    "longest_rank": records[seconds.index(longest)]["rank"],
                    "shortest_seconds": shortest,
                    "shortest_rank": records[seconds.index(shortest)]["rank"],
                }
            )
    step = max(map(_step_seconds, records))
    found = [row for row in found if row["longest_seconds"] - row["shortest_seconds"] > _WORTH_NAMING * step]
    found.sort(key=lambda row: row["shortest_seconds"] - row["longest_seconds"])
    return found[:_NUM_DIFFERENCES]


def summary_text(summary: Mapping[str, Any]) -> str:
    """Returns a summary as a person reads it."""
    ranks = summary["ranks"]
    is_gpu = summary["kinds_are_of"] == "gpu"
    title = f"{counted(len(ranks), 'rank')}, torch {summary['torch']}"
    if len(ranks) < summary["num_ranks"]:
        title += f"; profiles of {summary['num_ranks'] - len(ranks)} more are not in this folder, or cannot be read"
    about_ranks = [line for record in ranks for line in _rank_lines(record)]
    sections = [[title, *summary.get("problems", []), *about_ranks]]
    if is_gpu:
        sections.append(_gpu_lines(ranks))
    kinds = summary["kinds"]
    labels = {kind: KINDS[kind] for kind in KINDS if kind in kinds}
    what = "time of GPU kernels, by kind" if is_gpu else "time of the main thread, by kind"
    sections.append(_split_lines(what, ranks, "kind_seconds", kinds, labels))
    places = summary["places"]
    what = "time of the main thread, by its place in the loop"
    sections.append(_split_lines(what, ranks, "place_seconds", places, {name: name for name in places}))
    what = "GPU kernels" if is_gpu else "CPU operators, time of their own"
    sections.append([f"most time: {what}", *kernel_lines(summary["kernels"], _NAME_WIDTH)])
    with_memory = [record for record in ranks if record["memory"] is not None]
    if with_memory:
        record = max(with_memory, key=lambda record: record["memory"]["peak_bytes"])
        lines = memory_lines(record["memory"], _NUM_HOLDERS)
        sections.append([f"memory of rank {record['rank']}: {lines[0]}", *lines[1:]])
    if len(ranks) > 1:
        sections.append(_difference_lines(summary))
    sections.append(_file_lines(summary))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _rank_lines(record: Record) -> list[str]:
    seconds = {int(step): value for step, value in record["step_seconds"].items()}
    slowest = max(seconds, key=lambda step: seconds[step])
    steps = record["steps"]
    line = f"rank {record['rank']} ({record['device']}, {record['host']}): steps {steps[0]} to {steps[-1]}"
    line += f" in {format_seconds(record['traced_seconds'])}, {format_seconds(_step_seconds(record))} a step"
    if len(seconds) > 1:
        line += f", the slowest {slowest}: {format_seconds(seconds[slowest])}"
    lines = [line]
    if not record["is_warmed_up"]:
        lines.append(f"  step {steps[0]} was the first of its process: its time has start-up in it")
    if record["given_up"] is not None:
        lines.append(f"  step {record['given_up']} was given up half-way")
    return lines


def _gpu_lines(ranks: Sequence[Record]) -> list[str]:
    """Says how much of the time GPUs had nothing to do, and when."""
    ranks = [record for record in ranks if record["gpu"] is not None]
    idle = [record["gpu"]["idle_share"] for record in ranks]
    alone = sum(record["gpu"]["communication_alone_share"] for record in ranks) / len(ranks)
    most = ranks[idle.index(max(idle))]
    lines = [f"the GPU was idle {sum(idle) / len(idle):.0%} of the traced steps"]
    if len(ranks) > 1:
        least = ranks[idle.index(min(idle))]
        lines[0] += f" (from {min(idle):.0%} on rank {least['rank']} to {max(idle):.0%} on rank {most['rank']})"
    if any("communication" in record["kind_seconds"] for record in ranks):
        lines[0] += f", and did nothing but communicate {alone:.0%} of them"
    waits = sum(record["gpu"]["host_waits_seconds"] / record["traced_seconds"] for record in ranks) / len(ranks)
    lines.append(f"the host waited for it {waits:.0%} of the time")
    gaps = most["gpu"]["gaps"]
    if gaps:
        lines.append(f"the longest gaps of rank {most['rank']}:")
    for gap in gaps:
        where = f"step {gap['step']}, the host in '{gap['host_in']}'" if gap["host_in"] else "between two steps"
        then = f", then {_short(gap['before'])}" if gap["before"] else ""
        lines.append(f"{format_seconds(gap['seconds']):>12}  at {gap['at_seconds']:.4f} s: {where}{then}")
    return lines


def _split_lines(
    title: str, ranks: Sequence[Record], key: str, means: Mapping[str, Any], labels: Mapping[str, str]
) -> list[str]:
    """Returns a table of shares of a step: of one rank, or the mean of several and the extremes."""
    width = max(map(len, labels.values()), default=0)
    head = f"{title:<{width + 2}}" if len(title) > width + 2 else title
    lines = [f"{head} (share of a step, per step)"]
    for name, label in labels.items():
        row = means[name]
        line = f"  {label:<{width}} {row['share']:>6.1%} {format_seconds(row['seconds_per_step']):>10}"
        if len(ranks) > 1:
            seconds = [_per_step(record, key, name) for record in ranks]
            for extreme in (min(seconds), max(seconds)):
                line += f"   {format_seconds(extreme):>10} (rank {ranks[seconds.index(extreme)]['rank']})"
        lines.append(line)
    if len(ranks) > 1:
        lines[0] += ": mean; least; most"
    return lines


def _difference_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = ["differences between ranks, per step"]
    for row in summary["differences"]:
        where = f"in '{row['name']}'" if row["of"] == "host" else f"of GPU time for {KINDS[row['name']]}"
        longest, shortest = format_seconds(row["longest_seconds"]), format_seconds(row["shortest_seconds"])
        lines.append(f"  rank {row['longest_rank']}: {longest} {where}, rank {row['shortest_rank']}: {shortest}")
    if not summary["differences"]:
        lines.append(f"  none of more than {_WORTH_NAMING:.0%} of a step")
    peaks = [(record["memory"]["peak_bytes"], record["rank"]) for record in summary["ranks"] if record["memory"]]
    if peaks:
        (least, its_rank), (most, other_rank) = min(peaks), max(peaks)
        text = f"  peak memory: {format_bytes(least)} (rank {its_rank}) to {format_bytes(most)} (rank {other_rank})"
        lines.append(text)
    return lines


def _file_lines(summary: Mapping[str, Any]) -> list[str]:
    endings: dict[str, str] = {
        ".trace.json.gz": "open it at https://ui.perfetto.dev",
        ".memory.pickle": "drop it on https://pytorch.org/memory_viz",
        ".memory.json": "every allocation",
        ".kernels.json": "all of the above of one rank",
        ".kernels.txt": "its kernels, to read",
    }
    lines = [f"files in {summary['folder']}"]
    for ending, what in endings.items():
        numbers = _numbers(name for name in summary["files"] if name.endswith(ending))
        if numbers:
            which = f"N = {', '.join(map(str, numbers))}" if len(numbers) <= 4 else f"{len(numbers)} of them"
            lines.append(f"  rank-N{ending:<16} {what} ({which})")
    return lines


def _numbers(names: Iterable[str]) -> list[int]:
    found = (name.removeprefix("rank-").partition(".")[0] for name in names)
    return sorted({int(number) for number in found if number.isdigit()})


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
