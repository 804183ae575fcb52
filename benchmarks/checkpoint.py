"""What a checkpoint costs: Lockstep's against `torch.save`, `accelerator.save_state` and plain DCP `async_save`.

    python -m benchmarks.checkpoint --json benchmarks/results/checkpoint-cpu.json

Saves a ViT-L/16 with AdamW's state (3.65 GB), in rounds, one method after the other in random order. `stall` is how
long training cannot go on; `total` is how long until the checkpoint is there. Ours and DCP's are on the disk by then,
as both sync their files; `torch.save` and `save_state` leave theirs to the system, so the former is measured with a
sync, too.

A step's forward and backward do not change what is saved, so ours copies while they run, and the optimizer's step waits
for the copy. Hence two stalls of ours: `bare`, where the optimizer's step comes at once, and `overlapped`, after a step
that keeps all of torch's threads busy for `--step-seconds`. Both are of a run on its way, which has its memory for the
copy; `first` is the save right after the one step that tells what there is to save. Removing what a method wrote
before is no part of its time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from benchmarks.checkpoint_methods import (
    TINY_MODEL,
    Cost,
    Job,
    Ours,
    add_model_and_folder,
    new_folder,
    plain_dcp,
    save_state,
    torch_save,
    world_of_one,
)
from benchmarks.commands import add_device, add_rounds, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.rounds import MOST_FOREIGN_CORES, in_rounds, is_quiet, load_note
from benchmarks.telling import describe, goal_text, markdown_table, origin, range_text, spread, write

BARE, OVERLAPPED, FIRST = "lockstep, bare", "lockstep, overlapped", "lockstep, first"
TORCH_SAVE, DCP = "torch.save", "DCP async_save"
NAMES = (BARE, OVERLAPPED, FIRST, TORCH_SAVE, "torch.save and fsync", "accelerator.save_state", DCP)


@dataclass(frozen=True)
class Goal:
    """A ratio of medians that must not be larger."""

    what: str
    ours: tuple[str, str]  # name and figure
    peers: tuple[str, str]
    most: float


GOALS = (
    Goal("stall of ours, bare, to torch.save", (BARE, "stall"), (TORCH_SAVE, "total"), 0.1),
    Goal("stall of ours, overlapped, to torch.save", (OVERLAPPED, "stall"), (TORCH_SAVE, "total"), 0.1),
    Goal("total of ours to DCP async_save", (BARE, "total"), (DCP, "total"), 1.2),
)


# ---- rounds ----------------------------------------------------------------------------------------------------


class Rounds:
    """Saves with every method once a round; keeps what each save cost by name.

    Args:
        job: what is saved.
        folder: an empty one on the disk to measure.
        step_seconds: of `overlapped`.
    """

    def __init__(self, job: Job, folder: Path, step_seconds: float) -> None:
        self.costs: dict[str, list[Cost]] = {name: [] for name in NAMES}
        self.warm_ups: dict[str, Cost] = {}  # the first save of each peer in this process
        self._job = job
        self._folder = folder
        self._step_seconds = step_seconds
        accelerator = Accelerator(cpu=job.device.type == "cpu")
        accelerator.prepare(job.model, job.optimizer)
        self._peers: dict[str, Callable[[Path], Cost]] = {
            TORCH_SAVE: lambda path: torch_save(job, path, sync=False),
            "torch.save and fsync": lambda path: torch_save(job, path, sync=True),
            "accelerator.save_state": lambda path: save_state(accelerator, path),
            DCP: lambda path: plain_dcp(job, path),
        }

    def warm_up(self) -> None:
        """Saves once with each peer; ours warms up in every round, since it gives back its memory at its end."""
        for name, save in self._peers.items():
            self.warm_ups[name] = self._measure(f"warm-up: {name}", save)

    def run(self, number: int, seed: int, check: bool) -> None:
        """Saves once with every method, in random order.

        Raises:
            RuntimeError: with `check`, where our checkpoint is not what was saved.
        """
        for _, name in in_rounds(["lockstep", *self._peers], 1, seed + number):
            if name != "lockstep":
                self.costs[name].append(self._measure(f"round {number + 1}: {name}", self._peers[name]))
                continue
            self._run_ours(number, check)

    def _run_ours(self, number: int, check: bool) -> None:
        ours = Ours(self._job, self._folder)
        for name, seconds in ((FIRST, 0.0), (BARE, 0.0), (OVERLAPPED, self._step_seconds)):
            after = ours.check_reads_back if check and name == OVERLAPPED else None
            save = functools.partial(ours.save, step_seconds=seconds)
            self.costs[name].append(self._measure(f"round {number + 1}: {name}", save, after))
        del ours, save, after  # and with them 3.65 GB
        gc.collect()

    def _measure(self, what: str, save: Callable[[Path], Cost], after: Callable[[], None] | None = None) -> Cost:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.sync()  # nobody pays for what another left to be written
        before, started = _foreign_cpu_seconds(), time.perf_counter()
        cost = save(self._folder)
        foreign = (_foreign_cpu_seconds() - before) / (time.perf_counter() - started)
        if after is not None:
            after()
        shutil.rmtree(self._folder)
        cost = Cost(cost.stall, cost.total, max(0.0, foreign))
        sys.stderr.write(
            f"{what}: stall {cost.stall:.3f} s, total {cost.total:.3f} s, "
            f"others kept {cost.foreign_cores:.2f} cores busy\n"
        )
        return cost


def _foreign_cpu_seconds() -> float:
    """Returns how long other processes kept the machine's cores busy outside of the kernel.

    Not as `benchmarks.measure` counts: threads of the kernel write our files, and are not foreign.
    """
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return float(machine.user + getattr(machine, "nice", 0.0) - own.user - own.children_user)


# ---- JSON and table ----------------------------------------------------------------------------------------------


def summarize(rounds: Rounds, keep_loaded: bool) -> list[dict[str, Any]]:
    """Returns what the JSON says about every method."""
    entries = []
    for name, costs in rounds.costs.items():
        kept = [is_quiet(cost, keep_loaded) for cost in costs]
        quiet = [cost for cost, k in zip(costs, kept, strict=True) if k]
        warm_up = rounds.warm_ups.get(name)
        entries.append(
            {
                "name": name,
                "stall": spread([cost.stall for cost in quiet]),
                "total": spread([cost.total for cost in quiet]),
                "dropped_rounds": kept.count(False),
                "warm_up": None if warm_up is None else asdict(warm_up),
                "rounds": [{**asdict(cost), "kept": k} for cost, k in zip(costs, kept, strict=True)],
            }
        )
    return entries


def compare(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns every bar with its ratio; None where there was no quiet round."""
    by_name = {entry["name"]: entry for entry in entries}
    found = []
    for bar in GOALS:
        ours, peers = (by_name[name][figure] for name, figure in (bar.ours, bar.peers))
        ratio = ours["median"] / peers["median"] if ours and peers else None
        is_met = ratio is not None and ratio <= bar.most
        found.append({"what": bar.what, "ratio": ratio, "most": bar.most, "is_met": is_met})
    return found


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, the bars, and a line about what it was measured on."""
    settings, entries = result["settings"], result["entries"]
    rows = [["", "stall, s", "min to max", "total, s", "min to max"], ["---", *["---:"] * 4]]
    for entry in entries:
        rows.append([f"`{entry['name']}`", *_cells(entry["stall"]), *_cells(entry["total"])])
    notes = [
        f"{settings['model']} with AdamW, {result['bytes'] / 1e9:.2f} GB, on {settings['device']}",
        f"overlapped: with a step of {settings['step_seconds']:g} s",
        f"median of {settings['rounds']} rounds in random order",
        load_note(entries, settings["keep_loaded"]),
        *origin(result),
    ]
    goals = [goal_text(goal["what"], goal["ratio"], most=goal["most"]) for goal in result["bars"]]
    return markdown_table(rows, notes) + "\n" + "".join(goals)


def _cells(found: Mapping[str, float] | None) -> list[str]:
    if found is None:
        return ["-", "no quiet round"]
    return [f"{found['median']:.3f}", range_text(found, 3)]


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws for how long each way holds training up.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = [entry for entry in result["entries"] if entry["stall"]]
    bars = [Bar(entry["name"], entry["stall"], ours=entry["name"].startswith("lockstep")) for entry in shown]
    draw_bars({"": bars}, "seconds that training cannot go on (median, min to max)", file)


# ---- command line ------------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.checkpoint", __doc__)
    add_device(parser)
    add_rounds(parser, rounds=5)
    add_tiny(parser)
    add_model_and_folder(parser)
    parser.add_argument("--step-seconds", type=float, default=1.0, help="that a step computes before its update")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rounds, options.step_seconds, options.keep_loaded = TINY_MODEL, 1, 0.01, True
    return options


def _run(options: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    """Measures, and writes what is known after each round: a run that is cut short leaves its rounds behind."""
    environment = describe("benchmarks.checkpoint", given, ["torchvision", "accelerate"], options.device)
    started = time.monotonic()
    job = Job(options.model, torch.device(options.device))
    settings = {key: getattr(options, key) for key in ("model", "device", "rounds", "step_seconds", "seed", "tiny")}
    settings |= {"num_threads": torch.get_num_threads(), "most_foreign_cores": MOST_FOREIGN_CORES}
    settings["keep_loaded"] = options.keep_loaded
    result: dict[str, Any] = {"environment": environment, "settings": settings, "bytes": job.num_bytes}
    with new_folder(options.folder) as folder:
        rounds = Rounds(job, folder / "saves", options.step_seconds)
        rounds.warm_up()
        for number in range(options.rounds):
            rounds.run(number, options.seed, check=number == options.rounds - 1)
            entries = summarize(rounds, options.keep_loaded)
            result |= {"took_seconds": round(time.monotonic() - started, 1)}
            result |= {"reads_back": number == options.rounds - 1, "bars": compare(entries), "entries": entries}
            write(result, options.json)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, else 0, whatever the figures are."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    with world_of_one():
        result = _run(options, arguments)
    sys.stdout.write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
