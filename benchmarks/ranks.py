"""What further processes on one machine bring: ours, DDP by hand and Accelerate, in the same run.

    python -m benchmarks.ranks --json benchmarks/results/ranks-cpu.json
    python -m benchmarks.ranks --device cuda --json benchmarks/results/ranks-gpu.json

Owns the jobs, their rounds, the JSON that comes of them, its table and its plot. The loops are `benchmarks.loops`. A
job is one process, or several with the same batch per process (weak scaling) or the same global batch (strong
scaling). Every round starts each job of each entry once, in random order. Ours is started by `python -m launch local`
and read from its reports, the others by torchrun and read from their own clocks. On a CPU each process has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from benchmarks import loops
from benchmarks.commands import add_device, add_rounds, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.feed import TIMEOUT
from benchmarks.loops import Work, open_loader, our_config, write_config
from benchmarks.rounds import MOST_FOREIGN_CORES, Clocks, Problem, Timing, compare, in_rounds, load_note, waiting_for
from benchmarks.telling import REPOSITORY, describe, markdown_table, origin, range_text, spread, write
from trainer.precision import HUGE_PAGES_VARIABLE

OURS = "ours"
DESCRIPTIONS = {
    "ddp": "DistributedDataParallel, written by hand",
    "accelerate": "Accelerate, bare",
    OURS: "`python -m launch local`",
}
NAMES = tuple(DESCRIPTIONS)
MODES = {"one": "one process", "weak": "same batch per process", "strong": "same global batch"}


@dataclass(frozen=True)
class Setup:
    """What all jobs have in common."""

    work: Work  # of the one process
    num_ranks: int  # of the others
    steps: int  # that are counted, after as many that are not

    def of(self, mode: str) -> tuple[int, Work]:
        """Returns how many processes a job has, and what each of them trains."""
        if mode == "one":
            return 1, self.work
        share = self.num_ranks if mode == "strong" else 1
        return self.num_ranks, replace(self.work, batch_size=self.work.batch_size // share)


# ---- a process of a peer's job -------------------------------------------------------------------------------


class _Over(Exception):
    """All steps are made."""


class _Counter:
    """The seconds of the second half of some steps."""

    def __init__(self, steps: int, wait: Callable[[], object]) -> None:
        self._steps = steps
        self._wait = wait
        self._num_made = 0
        self._began = self.seconds = 0.0

    def after_step(self, num_samples: int) -> None:
        self._num_made += 1
        if self._num_made == self._steps:
            self._wait()
            self._began = time.perf_counter()
        elif self._num_made == 2 * self._steps:
            self._wait()
            self.seconds = time.perf_counter() - self._began
            raise _Over


def run_as_rank(request: Path, file: Path) -> None:
    """One process of a job of a peer: rank 0 writes how long the steps took, and among how many processes."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    work = Work(**{**asked["work"], "shape": tuple(asked["work"]["shape"])})
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if work.device_type == "cuda":
        torch.cuda.set_device(work.device)
        torch.backends.cudnn.benchmark = True
    counter = _Counter(asked["steps"], waiting_for(work.device))
    try:
        if asked["entry"] == "accelerate":
            loops.accelerate(work, open_loader(work), counter.after_step)
        elif num_ranks == 1:
            loops.raw(work, open_loader(work), counter.after_step)
        else:
            dist.init_process_group("nccl" if work.device_type == "cuda" else "gloo")
            sampler: DistributedSampler[int] = DistributedSampler(range(work.num_samples))  # type: ignore[arg-type]
            device_ids = [work.device] if work.device_type == "cuda" else None
            wrap = partial(DistributedDataParallel, device_ids=device_ids)
            loops.raw(work, open_loader(work, sampler), counter.after_step, wrap)
    except _Over:
        pass
    is_together = dist.is_initialized()
    if not is_together or dist.get_rank() == 0:
        answer = {"seconds": counter.seconds, "num_ranks": dist.get_world_size() if is_together else 1}
        write(answer, file)
    if is_together:
        dist.destroy_process_group()


# ---- jobs ----------------------------------------------------------------------------------------------------


def run_job(entry: str, mode: str, setup: Setup) -> Timing:
    """Runs a job to its end.

    Returns:
        The time of a step; the load is that of the whole job.

    Raises:
        Problem: it failed, or had fewer processes than it was to have.
    """
    num_ranks, work = setup.of(mode)
    variables = {HUGE_PAGES_VARIABLE: "1"}  # for all what ours has by default
    if work.device_type == "cpu":
        variables |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory(prefix="lockstep-ranks-") as name:
        folder = Path(name)
        is_ours = entry == OURS
        command = _our_command(num_ranks, work, setup.steps, folder) if is_ours else None
        command = command or _peer_command(entry, num_ranks, work, setup.steps, folder)
        before = Clocks.read()
        try:
            ended = subprocess.run(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Problem(f"not done after {TIMEOUT} s", is_absence=False) from None
        after = Clocks.read()
        if ended.returncode:
            sys.stderr.write(ended.stderr)
            last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise Problem(last, is_absence=False)
        read = read_reports if is_ours else read_answer
        seconds, had = read(folder)
    if had != num_ranks:
        raise Problem(f"it had {had} processes instead of {num_ranks}", is_absence=False)
    own = (after.tree - before.tree) / (after.wall - before.wall)
    return Timing(seconds / setup.steps, own, after.foreign_cores(before))


def _our_command(num_ranks: int, work: Work, steps: int, folder: Path) -> list[str]:
    config = our_config(
        work,
        folder / "run",
        train={"steps": 2 * steps, "batch_size": num_ranks * work.batch_size},
        log={"every": steps},
    )
    file = write_config(config, folder / "config.yaml")
    return [sys.executable, "-m", "launch", "local", "--config", str(file), "--processes", str(num_ranks)]


def _peer_command(entry: str, num_ranks: int, work: Work, steps: int, folder: Path) -> list[str]:
    request = folder / "request.json"
    asked = {"entry": entry, "work": asdict(work), "steps": steps}
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*command, "-m", "benchmarks.ranks", "--as-rank", str(request), "--json", str(folder / "answer.json")]


def read_answer(folder: Path) -> tuple[float, int]:
    """Returns the seconds of a peer's steps, and its number of processes."""
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answer["seconds"], answer["num_ranks"]


def read_reports(folder: Path) -> tuple[float, int]:
    """Returns the seconds between our two reports, the second one included, and our number of processes."""
    run = folder / "run"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (record["time"] for record in map(json.loads, lines) if "train/loss" in record)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return second - first, summary["num_processes"]


Key = tuple[str, str]  # entry and mode


def run_rounds(
    setup: Setup, names: Sequence[str], rounds: int, seed: int
) -> tuple[dict[Key, list[Timing]], dict[Key, Problem]]:
    """Runs every job once a round; one that fails is left out from then on.

    Returns:
        The times of a step by job, and why jobs were left out.
    """
    modes = list(MODES) if setup.num_ranks > 1 else ["one"]
    taken: dict[Key, list[Timing]] = {(name, mode): [] for name in names for mode in modes}
    problems: dict[Key, Problem] = {}
    left = list(taken)
    for number, (name, mode) in in_rounds(left, rounds, seed):
        where = f"round {number + 1}: {name}: {MODES[mode]}"
        try:
            timing = run_job(name, mode, setup)
        except Problem as problem:
            problems[name, mode] = problem
            taken[name, mode].clear()
            left.remove((name, mode))
            sys.stderr.write(f"{where}: {problem}\n")
            continue
        taken[name, mode].append(timing)
        sys.stderr.write(
            f"{where}: {1000 * timing.seconds:.1f} ms, others kept {timing.foreign_cores:.2f} cores busy\n"
        )
    return taken, problems


# ---- JSON, table and plot ------------------------------------------------------------------------------------


def summarize(
    setup: Setup, taken: Mapping[Key, Sequence[Timing]], problems: Mapping[Key, Problem], keep_loaded: bool
) -> list[dict[str, Any]]:
    """Returns what the JSON says of every job: compared with ours of the same kind, and with its own single process.

    Efficiency is the speed of several processes over as many times that of one, within a round.
    """
    entries = []
    for (name, mode), timings in taken.items():
        num_ranks, work = setup.of(mode)
        samples = num_ranks * work.batch_size  # of a step
        compared = compare(timings, taken.get((OURS, mode), []), keep_loaded)
        alone = zip(timings, taken[name, "one"], strict=False)
        efficiencies = [
            samples / t.seconds / (num_ranks * setup.work.batch_size / one.seconds)
            for t, one in alone
            if keep_loaded or max(t.foreign_cores, one.foreign_cores) <= MOST_FOREIGN_CORES
        ]
        kept = [t for t, round_ in zip(timings, compared["rounds"], strict=True) if round_["kept"]]
        problem = problems.get((name, mode))
        entries.append(
            {
                "entry": name,
                "mode": mode,
                "num_ranks": num_ranks,
                "batch_size": work.batch_size,
                **compared,
                "samples_per_second": spread([samples / t.seconds for t in kept]),
                "efficiency": spread(efficiencies) if mode != "one" else None,
                "problem": str(problem) if problem else None,
            }
        )
    return entries


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    rows = [["", "", "processes", "batch of each", "images/s", "min to max", f"time, to `{OURS}`", "efficiency"]]
    rows[0].append("min to max")
    rows.append(["---"] * 2 + ["---:"] * 7)
    for entry in result["entries"]:
        name, rate, ratio = entry["entry"], entry["samples_per_second"], entry["time_ratio"]
        row = [f"`{name}`", DESCRIPTIONS[name], str(entry["num_ranks"]), str(entry["batch_size"])]
        if rate is None:
            rows.append([*row, "-", entry["problem"] or "no quiet round", "", "", ""])
            continue
        row += [f"{rate['median']:.0f}", range_text(rate, 0)]
        row.append("" if ratio is None else f"{ratio['median']:.2f}")
        efficiency = entry["efficiency"]
        if efficiency is None:
            rows.append([*row, "", ""])
            continue
        spread_text = f"{100 * efficiency['min']:.0f} to {100 * efficiency['max']:.0f}%"
        rows.append([*row, f"{100 * efficiency['median']:.0f}%", spread_text])
    settings = result["settings"]
    work = settings["work"]
    precision = "float32" if work["precision"] == "no" else work["precision"]
    where = "one batch on the device" if work["data"] == "device" else "data in memory"
    notes = [
        f"time, to `{OURS}`: of a step of the same kind of job, within the same round, above 1 is slower than ours",
        "efficiency: speed, to that of one process times the number of processes, within the same round",
        f"{work['model']}, {'x'.join(map(str, work['shape']))}, {precision}"
        + (", compiled" if work["compile"] else "")
        + f", {where}",
        "NCCL"
        if work["device_type"] == "cuda"
        else "gloo, one thread per process; huge pages for all, as ours has them by default",
        f"median of {settings['rounds']} alternating rounds of {settings['steps']} steps after as many",
        load_note(result["entries"], settings["keep_loaded"]),
        *origin(result),
    ]
    return markdown_table(rows, notes)


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws the efficiency of several processes, a group of bars for each kind of job.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups: dict[str, list[Bar]] = {}
    for entry in result["entries"]:
        if entry["efficiency"] is not None:
            in_percent = {name: 100 * value for name, value in entry["efficiency"].items()}
            bar = Bar(entry["entry"], in_percent, ours=entry["entry"] == OURS)
            groups.setdefault(MODES[entry["mode"]], []).append(bar)
    draw_bars(groups, "efficiency, % (median, min to max)", file, bar=100)


# ---- command line --------------------------------------------------------------------------------------------


def default_setup(device_type: str, tiny: bool, num_ranks: int) -> Setup:
    """Returns what is trained on a kind of device."""
    if tiny:
        work = Work("small_cnn", (3, 8, 8), 4, 400, {"in_channels": 3, "width": 8}, device_type=device_type)
        return Setup(work, num_ranks, steps=3)
    if device_type == "cuda":
        work = Work("resnet50", (3, 224, 224), 256, 1_280_000, {}, 1000, "bf16", True, "device", device_type)
        return Setup(work, num_ranks, steps=50)
    return Setup(Work("resnet18", (3, 32, 32), 32, 12_800), num_ranks, steps=8)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.ranks", __doc__)
    add_device(parser)
    add_rounds(parser, rounds=3)
    add_tiny(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="beside one; default: 2, or as many as GPUs")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=NAMES, default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.rounds, options.keep_loaded = 1, True
    return options


def _run(options: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    environment = describe("benchmarks.ranks", given, ["torchvision", "accelerate"], options.device)
    num_ranks = options.processes or (torch.cuda.device_count() if options.device == "cuda" else 2)
    setup = default_setup(options.device, options.tiny, num_ranks)
    names = [name for name in NAMES if name in options.only]
    started = time.monotonic()
    taken, problems = run_rounds(setup, names, options.rounds, options.seed)
    result = {
        "environment": environment,
        "settings": {
            **asdict(setup),
            "rounds": options.rounds,
            "most_foreign_cores": MOST_FOREIGN_CORES,
            "keep_loaded": options.keep_loaded,
            "seed": options.seed,
            "tiny": options.tiny,
        },
        "took_seconds": round(time.monotonic() - started, 1),
        "entries": summarize(setup, taken, problems, options.keep_loaded),
    }
    write(result, options.json)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, 1 where a job failed."""
    options = _arguments(arguments)
    if options.as_rank is not None:
        run_as_rank(options.as_rank, options.json)
        return 0
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    result = _run(options, arguments)
    sys.stdout.write(table(result))
    return int(any(entry["problem"] for entry in result["entries"]))


if __name__ == "__main__":
    sys.exit(main())
