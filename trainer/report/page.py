"""The page of one run: which sections it has, and what is in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.advice.measured import line
from trainer.report import charts, evaluation
from trainer.report.attempts import address, status_chip, timeline, wall_time
from trainer.report.charts import TIME_PARTS, Chart
from trainer.report.parts import (
    UNKNOWN,
    Html,
    duration,
    figure,
    gain,
    join,
    link,
    moment,
    number,
    page,
    percent,
    safe,
    section,
    table,
    tag,
)
from trainer.report.reading import Advice, Run, as_number
from trainer.units import counted

_MOST_LINKS = 100
_MOST_LISTED = 12  # ranks or samples of a bad step


def run_page(run: Run, start: Path) -> str:
    """Returns the page of a run.

    Args:
        run: what is known of it.
        start: folder of the page, from which its links go out.
    """
    end = max(run.curves.last_step or 0, run.step or 0)
    curves, best = run.curves, run.summary.get("best") if isinstance(run.summary.get("best"), dict) else None
    num_ranks = max(curves.ranks.num_ranks, int(run.number("num_processes") or 0))
    drawn = Drawn()
    split = charts.time_split(curves, end)
    sections = [
        section("advice", "What to change", *map(advice_card, run.advice, map(str, range(len(run.advice))))),
        section("training", "Training", drawn.grid(charts.training(curves, end, run.goals, best))),
        section("time", "Where the time goes", time_split(run, drawn.wide(split) if split is not None else None)),
        section("speed", "Throughput", drawn.grid(charts.throughput(curves, end, num_ranks))),
        section("memory", "Memory", drawn.grid(charts.memory(curves, end))),
        section("ranks", "Ranks", slowest_rank(run), drawn.grid(charts.ranks(curves.ranks, curves, end))),
        section("system", "Machines", drawn.grid(charts.system(curves, end))),
        section("attempts", "Attempts", timeline(run, start), wall_time(goodput_seconds(run))),
        section("trouble", "Bad steps and rollbacks", trouble(run)),
        predictions(run, drawn),
        section("config", "Config and environment", config_text(run), environment(run)),
        section("files", "Files", files(run, start)),
    ]
    body = join((header(run), navigation(sections), tag("main", *sections)))
    return page(f"{run.name}: {run.status}", body, drawn.specs)


class Drawn:
    """The charts of a page, as they are placed in it."""

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def grid(self, found: Sequence[Chart]) -> Html:
        """Returns charts side by side."""
        return tag("div", *map(self.wide, found), class_="grid") if found else Html("")

    def wide(self, chart: Chart) -> Html:
        """Returns one chart, as wide as its place."""
        self.specs.append(chart.spec())
        return figure(chart.identity, chart.title)


def navigation(sections: Sequence[Html]) -> Html:
    """Returns links to the sections that there are."""
    found = [re.match(r'<section id="([a-z]+)"><h2>(.*?)</h2>', content) for content in sections]
    links = [tag("a", Html(match[2]), href=f"#{match[1]}") for match in found if match is not None]
    return tag("nav", *links, aria_label="Sections")


# ---- the head ------------------------------------------------------------------------------------------------


def header(run: Run) -> Html:
    """Returns name, status and the figures that everybody asks for."""
    heading = tag("div", tag("h1", run.name), status_chip(run.status), class_="heading")
    lines = [tag("p", _subtitle(run), class_="subtitle")]
    if notes := _of_config(run, "tracking", "wandb", "notes"):
        lines.append(tag("p", notes, class_="notes"))
    error = run.summary.get("error")
    if run.status == "failed" and isinstance(error, str):
        lines.append(tag("p", error, class_="error"))
    elif run.status in ("running", "killed"):
        known = f"No end is written down; last seen {moment(run.last_seen)}, at step {number(run.step)}."
        lines.append(tag("p", known, class_="error"))
    elif run.status == "stopped" and run.summary.get("stopped_by"):
        lines.append(tag("p", f"Stopped by {run.summary['stopped_by']}.", class_="subtitle"))
    figures = [
        tag("div", tag("dt", name), tag("dd", value, " ", tag("small", more) if more else ""))
        for name, value, more in key_figures(run)
        if value != UNKNOWN
    ]
    return tag("header", heading, *lines, tag("dl", *figures, class_="figures"))


def _subtitle(run: Run) -> str:
    took = run.last_seen - run.started if run.started is not None and run.last_seen is not None else None
    model = _of_config(run, "model", "name")
    parts = [
        model and f"model {model}",
        device(run),
        f"started {moment(run.started)}" if run.started is not None else "",
        f"{duration(took)} from start to end" if took is not None else "",
    ]
    return " · ".join(str(part) for part in parts if part)


def _of_config(run: Run, *keys: str) -> Any:
    value: Any = run.config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def device(run: Run) -> str:
    """Returns how many devices of which kind."""
    ranks = run.number("num_processes") or as_number(run.environment.get("num_processes"))
    name = run.environment.get("device")
    if ranks is None or not isinstance(name, str):
        return str(name or "")
    return (
        f"{ranks:g} CPU process{'' if ranks == 1 else 'es'}"
        if name == "cpu"
        else f"{ranks:g} \N{MULTIPLICATION SIGN} {name}"
    )


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Returns the figures of a run: name, value, and what else there is to say."""
    best, metrics, total = run.summary.get("best"), run.summary.get("metrics"), run.number("total_steps")
    epoch, speed, peak = run.number("epoch"), run.number("samples_per_second"), run.number("peak_memory_bytes")
    speeds = run.curves.get("train/samples_per_second")
    early = ", stopped early" if run.summary.get("stopped_early") else ""
    figures = [
        ("step", number(run.step), f"of {number(total)}{early}" if total else ""),
        ("epoch", number(epoch if epoch is not None else run.curves.last_epoch), ""),
    ]
    if isinstance(best, dict) and (value := as_number(best.get("value"))) is not None:
        figures.append((f"best {best.get('metric')}", number(value), f"at step {number(as_number(best.get('step')))}"))
    if isinstance(metrics, dict):
        for name, value in list(metrics.items())[:3]:
            figures.append((f"{str(name).removeprefix('eval/')}, last", number(as_number(value)), ""))
    elif loss := run.curves.get("train/loss"):
        figures.append(("train loss", number(loss.last), ""))
    return [
        *figures,
        ("samples/s", number(speed if speed is not None else speeds.mean if speeds is not None else None), ""),
        ("MFU", percent(run.number("mfu")), ""),
        ("goodput", percent(run.goodput), f"in {counted(len(run.attempts), 'attempt')}" if run.attempts else ""),
        ("peak memory", f"{peak / 2**30:.2f} GiB" if peak else UNKNOWN, ""),
    ]


# ---- sections --------------------------------------------------------------------------------------------------


def advice_card(advice: Advice, identity: str) -> Html:
    """Returns a piece of advice with the lines to copy."""
    parts = [tag("p", with_code(advice.text))]
    if advice.settings:
        source = f"advice-{identity}"
        text = "\n".join(line({key: value}) for key, value in advice.settings.items())
        button = tag("button", "copy", type="button", data_copy=source)
        parts.append(tag("div", tag("code", text, id=source), button, class_="setting"))
    if advice.gain is not None:
        parts.append(tag("span", gain(advice.gain), class_="gain"))
    return tag("article", *parts, class_="advice")


def with_code(text: str) -> Html:
    """Returns a text in which what stands between backticks is code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # one of them stands alone
        return safe(text)
    return join(tag("code", piece) if i % 2 else piece for i, piece in enumerate(pieces))


def average_split(run: Run) -> dict[str, float]:
    """Returns the shares of the time over the whole run.

    Exact after a single attempt; else those of all reports, by the time that each is about.
    """
    if run.time_split and len(run.attempts) == 1 and run.status not in ("running", "killed"):
        return run.time_split
    found = {key.removeprefix("time/"): run.curves.by_key[key] for key in run.curves.keys("time/")}
    sums = {part: curve.over_time() for part, curve in found.items()}
    whole = max((seconds for _, seconds in sums.values()), default=0.0)
    if whole > 0:
        return {part: value_seconds / whole for part, (value_seconds, _) in sums.items()}
    return {part: curve.mean or 0.0 for part, curve in found.items()} or run.time_split  # no record has a time


def time_split(run: Run, chart: Html | None) -> Html:
    """Returns the chart of the time split beside the table of its averages."""
    shares = {part: share for part, share in average_split(run).items() if share >= 0.0005}
    if not shares:
        return Html("")
    order = [part for part in TIME_PARTS if part in shares] + [part for part in shares if part not in TIME_PARTS]
    rows = []
    for part in sorted(order, key=lambda part: -shares[part]):
        colour = f"t-{part}" if part in TIME_PARTS else "t-other"
        name = TIME_PARTS.get(part, part.replace("_", " "))
        rows.append([join((tag("i", class_="key", style=f"--colour:var(--{colour})"), name)), percent(shares[part])])
    beside = tag("div", tag("h3", "Average over the run"), table(["part", "share"], rows, numeric=(1,)))
    return tag("div", chart or "", beside, class_="beside")


def goodput_seconds(run: Run) -> Mapping[str, float]:
    """Returns the wall time of the run by part; empty where no summary tells of all attempts."""
    if run.status in ("running", "killed"):
        return {}
    seconds = run.summary.get("goodput_seconds")
    return {part: value for part, value in seconds.items() if as_number(value)} if isinstance(seconds, dict) else {}


def slowest_rank(run: Run) -> Html:
    """Returns a line that names the slowest rank, where ranks differ."""
    ranks = run.curves.ranks
    columns = ranks.columns("seconds_to_exchange")
    if columns is None or ranks.num_ranks < 2:
        return Html("")
    sums, nums = np.nansum(columns, axis=0), np.maximum((~np.isnan(columns)).sum(axis=0), 1)
    means = sums / nums
    slowest = int(means.argmax())
    others = float(np.delete(means, slowest).mean())
    host = f" on {ranks.hosts[slowest]}" if slowest < len(ranks.hosts) else ""
    more = f", {means[slowest] / others - 1:.0%} more than the others" if others > 0 else ""
    text = f"Slowest over the run: rank {slowest}{host}, {means[slowest]:.3g} s to the exchange{more}."
    waits = run.curves.get("train/straggler_wait")
    if waits is not None and waits.mean is not None:
        text += f" Waiting for the slowest rank took {percent(waits.mean)} of a step."
    return tag("p", text, class_="fact")


def trouble(run: Run) -> Html:
    """Returns which steps had bad numbers, and what else was lost on the way."""
    facts = []
    for key, what in (
        ("num_rollbacks", "rollback"),
        ("bad_steps", "bad step"),
        ("skipped_steps", "skipped step"),
        ("skipped_samples", "unreadable sample"),
    ):
        if count := run.number(key):
            facts.append(counted(int(count), what))
    avoided = run.summary.get("avoided_steps")
    if isinstance(avoided, list) and avoided:
        facts.append(f"left out after a rollback: step {', '.join(map(str, avoided[:20]))}")
    rows = [
        [entry.get("step", UNKNOWN), *(_short_list(entry.get(key)) for key in ("message", "ranks", "samples"))]
        for entry in run.bad_steps
    ]
    shown = table(["step", "what was wrong", "ranks", "samples"], rows, class_="medium") if rows else ""
    if not facts and not rows:
        return Html("")
    return join((tag("p", "; ".join(facts) + ".", class_="fact") if facts else "", shown))


def _short_list(value: Any) -> str:
    if not isinstance(value, list):
        return UNKNOWN if value is None else str(value)[:300]
    return ", ".join(str(entry)[:80] for entry in value[:_MOST_LISTED]) + (", …" if len(value) > _MOST_LISTED else "")


def predictions(run: Run, drawn: Drawn) -> Html:
    """Returns the predictions and the confusion matrix of the newest evaluation that left any."""
    if run.evaluation is None:
        return Html("")
    shown, matrix = evaluation.confusion(run.evaluation)
    drawn.specs += [chart.spec() for chart in matrix]
    note = f"Evaluation at step {int(run.evaluation.name.removeprefix('step-')):,}."
    return section("predictions", "Predictions", evaluation.samples(run.evaluation), shown, note=note)


def config_text(run: Run) -> Html:
    """Returns the config as it was resolved."""
    if not run.config_text.strip():
        return Html("")
    return tag("details", tag("summary", "config.yaml"), tag("pre", tag("code", run.config_text), tabindex="0"))


def environment(run: Run) -> Html:
    """Returns where and with what the newest attempt ran."""
    rows = []
    for key, value in run.environment.items():
        if key == "command" and isinstance(value, list):
            rows.append(["command", tag("code", shlex.join(map(str, value)))])
        elif isinstance(value, dict):
            shown = ", ".join(f"{name} {version}" for name, version in value.items() if version is not None)
            rows.append([key.replace("_", " "), shown])
        elif value is not None:
            rows.append([key.replace("_", " "), value])
    return tag("details", tag("summary", "environment"), table([], rows)) if rows else Html("")


def files(run: Run, start: Path) -> Html:
    """Returns links to what lies beside the page."""
    names = ("metrics.jsonl", "ranks.jsonl", "summary.json", "attempts.json", "config.yaml", "environment.json")
    groups = {
        "records": [run.folder / name for name in names if (run.folder / name).is_file()],
        "checkpoints": run.checkpoints,
        "logs": run.logs,
        "profiles": run.profiles,
        "faults": [folder for folder in [run.folder / "faults"] if folder.is_dir()],
    }
    rows: list[list[object]] = [
        [name, join(_with_commas([link(address(path, start), path.name) for path in paths[-_MOST_LINKS:]]))]
        for name, paths in groups.items()
        if paths
    ]
    where = _of_config(run, "checkpoint", "dir")
    if not run.checkpoints and isinstance(where, str):
        rows.append(["checkpoints", tag("code", where)])
    return table([], rows) if rows else Html("")


def _with_commas(links: Sequence[Html]) -> list[Html]:
    return [Html(", ") if i % 2 else links[i // 2] for i in range(2 * len(links) - 1)]
