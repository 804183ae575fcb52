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
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from benchmarks.feed import MOST_FOREIGN_CORES, _spread
from benchmarks.memory import describe_machine, machine_notes, markdown_table
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest, Progress
from trainer.checkpoint.state import Parts, State
from trainer.checkpoint.storage import open_storage
from trainer.checkpoint.writing import Saver

MODEL = "vit_l_16"
TINY_MODEL = "shufflenet_v2_x0_5"
BARE, OVERLAPPED, FIRST = "lockstep, bare", "lockstep, overlapped", "lockstep, first"
TORCH_SAVE, DCP = "torch.save", "DCP async_save"
NAMES = (BARE, OVERLAPPED, FIRST, TORCH_SAVE, "torch.save and fsync", "accelerator.save_state", DCP)


@dataclass(frozen=True)
class Bar:
    """A ratio of medians that must not be larger."""

    what: str
    ours: tuple[str, str]  # name and figure
    peers: tuple[str, str]
    most: float


BARS = (
    Bar("stall of ours, bare, to torch.save", (BARE, "stall"), (TORCH_SAVE, "total"), 0.1),
    Bar("stall of ours, overlapped, to torch.save", (OVERLAPPED, "stall"), (TORCH_SAVE, "total"), 0.1),
    Bar("total of ours to DCP async_save", (BARE, "total"), (DCP, "total"), 1.2),
)


@dataclass(frozen=True)
class Cost:
    """One save."""

    stall: float  # seconds
    total: float  # seconds
    foreign_cores: float = 0.0  # that others kept busy meanwhile, on average


class Job:
    """What is saved: a model and an optimizer that has made one step, without the forward that it would need."""

    def __init__(self, model: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model: nn.Module = torchvision.models.get_model(model).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state().tensors.values())

    def state(self) -> State:
        """Returns the state as the Trainer would."""
        return Parts(self.model, self.optimizer, None, None, {}, 0, 1).collect()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compute(self, seconds: float) -> None:
        """Stands for a step's forward and backward: keeps all of torch's threads, or the device, busy."""
        end = time.perf_counter() + seconds
        data = torch.randn(1024, 1024, device=self.device)
        while time.perf_counter() < end:
            data = torch.tanh(data @ data)
            self.synchronize()


class Ours:
    """`Saver`, as the Trainer uses it."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.step = 0
        self.folder = CheckpointFolder(open_storage(str(folder)), keep=1)
        self.saver = Saver(self.folder, _Alone(), None, True, job.device)
        self.saver.prepare(job.state())

    def save(self, _: Path, step_seconds: float) -> Cost:
        """Saves, and is asked for the optimizer's step after a forward and backward of so long."""
        self.step += 1
        started = time.perf_counter()
        state = self.job.state()
        self.saver.save(state, Manifest(Progress(step=self.step), {}, 1, 1, state.values, {}, {}))
        stall = time.perf_counter() - started
        if step_seconds:
            self.job.compute(step_seconds)
        waits = time.perf_counter()
        self.saver.before_update()
        self.job.synchronize()  # on a GPU it is the device that waits
        stall += time.perf_counter() - waits
        self.saver.wait()
        total = time.perf_counter() - started
        if self.saver.failures:
            raise RuntimeError(f"a save failed: {self.saver.failures[-1]}")
        return Cost(stall, total)

    def check_reads_back(self) -> None:
        """Compares the last checkpoint with the job, bit for bit.

        Raises:
            RuntimeError: it is another.
        """
        checkpoint = self.folder.newest()
        tensors = self.job.state().tensors
        wrong = [name for name, tensor in tensors.items() if not checkpoint.read(name).equal(tensor.cpu())]
        if checkpoint.step != self.step or wrong:
            raise RuntimeError(f"step {checkpoint.step} does not read back as step {self.step}: {wrong[:3]}")


class _Alone:
    rank = 0
    num_ranks = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def torch_save(job: Job, folder: Path, sync: bool) -> Cost:
    """`torch.save` of both state dicts into one file."""
    file = folder / "checkpoint.pt"
    started = time.perf_counter()
    torch.save({"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}, file)
    if sync:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    return Cost(seconds, seconds)


def save_state(accelerator: Accelerator, folder: Path) -> Cost:
    """`accelerator.save_state` of what the accelerator has prepared."""
    started = time.perf_counter()
    accelerator.save_state(str(folder))
    seconds = time.perf_counter() - started
    return Cost(seconds, seconds)


def plain_dcp(job: Job, folder: Path) -> Cost:
    """`torch.distributed.checkpoint.async_save` with its own writer, stager and defaults."""
    started = time.perf_counter()
    model, optimizer = get_state_dict(job.model, job.optimizer)
    future = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "checkpoint")
    stall = time.perf_counter() - started
    assert isinstance(future, Future)
    future.result()
    return Cost(stall, time.perf_counter() - started)


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
        order = ["lockstep", *self._peers]
        random.Random(seed + number).shuffle(order)
        for name in order:
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
        kept = [keep_loaded or cost.foreign_cores <= MOST_FOREIGN_CORES for cost in costs]
        quiet = [cost for cost, k in zip(costs, kept, strict=True) if k]
        warm_up = rounds.warm_ups.get(name)
        entries.append(
            {
                "name": name,
                "stall": _spread([cost.stall for cost in quiet]),
                "total": _spread([cost.total for cost in quiet]),
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
    for bar in BARS:
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
        *machine_notes(result["environment"], entries, settings["keep_loaded"]),
    ]
    bars = [
        f"{bar['what']}: {'not measured' if bar['ratio'] is None else format(bar['ratio'], '.3f')}, "
        f"at most {bar['most']:g}: {'met' if bar['is_met'] else 'NOT MET'}\n"
        for bar in result["bars"]
    ]
    return markdown_table(rows, notes) + "\n" + "".join(bars)


def _cells(spread: Mapping[str, float] | None) -> list[str]:
    if spread is None:
        return ["-", "no quiet round"]
    return [f"{spread['median']:.3f}", f"{spread['min']:.3f} to {spread['max']:.3f}"]


# ---- command line ------------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=description)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes; read with --markdown")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the table of --json")
    parser.add_argument("--model", default=MODEL, help=f"a torchvision model; {MODEL} by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=1.0, help="that a step computes before its update")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="a new one on the disk to measure; default: in the current folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-loaded", action="store_true", help="keep saves while others used the machine too")
    parser.add_argument("--tiny", action="store_true", help="a check that all parts run: measures nothing of interest")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rounds, options.step_seconds, options.keep_loaded = TINY_MODEL, 1, 0.01, True
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes what is known after each round: a run that is cut short leaves its rounds behind."""
    environment = describe_machine("benchmarks.checkpoint", options.device)
    started = time.monotonic()
    job = Job(options.model, torch.device(options.device))
    settings = {key: getattr(options, key) for key in ("model", "device", "rounds", "step_seconds", "seed", "tiny")}
    settings |= {"num_threads": torch.get_num_threads(), "most_foreign_cores": MOST_FOREIGN_CORES}
    settings["keep_loaded"] = options.keep_loaded
    result: dict[str, Any] = {"environment": environment, "settings": settings, "bytes": job.num_bytes}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    if options.folder is None:
        folder = Path(tempfile.mkdtemp(prefix=".checkpoints-", dir=Path.cwd()))
    else:
        folder = options.folder
        folder.mkdir(parents=True)
    try:
        rounds = Rounds(job, folder / "saves", options.step_seconds)
        rounds.warm_up()
        for number in range(options.rounds):
            rounds.run(number, options.seed, check=number == options.rounds - 1)
            entries = summarize(rounds, options.keep_loaded)
            result |= {"took_seconds": round(time.monotonic() - started, 1)}
            result |= {"reads_back": number == options.rounds - 1, "bars": compare(entries), "entries": entries}
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without what it needs, else 0, whatever the figures are."""
    options = _arguments(arguments)
    if options.markdown:
        result = json.loads(options.json.read_text(encoding="utf-8"))
    elif options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("there is no CUDA GPU here; use --device cpu\n")
        return 2
    else:
        warnings.simplefilter("ignore")  # of the peers, about a world of one process
        # Plain DCP saves in a thread, which needs a process group even where there is one process.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            result = _run(options)
        finally:
            dist.destroy_process_group()
    sys.stdout.write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
