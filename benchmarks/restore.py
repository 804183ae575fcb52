"""How long it takes to go on from a checkpoint: Lockstep's against `torch.load`, `accelerator.load_state` and DCP.

    python -m benchmarks.restore --json benchmarks/results/restore-cpu.json

Each way has saved the same ViT-L/16 with AdamW's state (3.65 GB), and puts it back into a model and an optimizer that
are there, with other values. `cold` is from the disk: the files' pages were dropped from the system's cache before;
`cached` is from that cache. Ours reads everything once to compare it with its checksums, before anything is changed,
and then once more; `not verified` leaves the first out, which no run does. The peers compare nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.checkpoint_methods import (
    TINY_MODEL,
    Alone,
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
from benchmarks.rounds import MOST_FOREIGN_CORES, Timing, compare, in_rounds, load_note, measure_time
from benchmarks.telling import describe, markdown_table, origin, range_text, write
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.state import Parts
from trainer.checkpoint.storage import open_storage

TORCH_LOAD = "torch.load"
NAMES = ("lockstep", "lockstep, not verified", TORCH_LOAD, "accelerator.load_state", "DCP load")
COLD, CACHED = "cold", "cached"


class Restores:
    """What was saved, and every way to put it back.

    Args:
        source: what is saved.
        model: of it, by its torchvision name.
        folder: an empty one on the disk to measure.
    """

    def __init__(self, source: Job, model: str, folder: Path) -> None:
        self.source = source
        self.target = Job(model, source.device)
        accelerator = Accelerator(cpu=source.device.type == "cpu")
        accelerator.prepare(source.model, source.optimizer)
        self.folders = {name: folder / name.replace(" ", "-").replace(",", "") for name in NAMES}
        for name in NAMES:
            self.folders[name].mkdir(parents=True)
        ours = Ours(source, self.folders["lockstep"])
        ours.save(folder, step_seconds=0.0)
        ours.check_reads_back()
        torch_save(source, self.folders[TORCH_LOAD], sync=True)
        save_state(accelerator, self.folders["accelerator.load_state"])
        plain_dcp(source, self.folders["DCP load"])
        self.folders["lockstep, not verified"] = self.folders["lockstep"]
        accelerator.free_memory()
        self._accelerator = Accelerator(cpu=source.device.type == "cpu")
        self._accelerator.prepare(self.target.model, self.target.optimizer)
        self.ways: dict[str, Callable[[], object]] = {
            "lockstep": functools.partial(self._ours, verify=True),
            "lockstep, not verified": functools.partial(self._ours, verify=False),
            TORCH_LOAD: self._torch_load,
            "accelerator.load_state": self._load_state,
            "DCP load": self._dcp_load,
        }

    def measure(self, name: str, where: str) -> Timing:
        """Puts the state back once.

        Raises:
            RuntimeError: what is there then is not what was saved.
        """
        for tensor in self.target.state().tensors.values():
            tensor.zero_()
        drop_from_cache(self.folders[name])
        if where == CACHED:
            read_whole(self.folders[name])
        timing = measure_time(self.ways[name], 1, self.target.synchronize)
        found = self.target.state().tensors
        wrong = [name for name, saved in self.source.state().tensors.items() if not found[name].equal(saved)]
        if wrong:
            raise RuntimeError(f"{name} does not put back what was saved: {wrong[:3]}")
        return timing

    def _ours(self, verify: bool) -> None:
        checkpoints = CheckpointFolder(open_storage(str(self.folders["lockstep"])), keep=1)
        checkpoint = checkpoints.choose(Alone()) if verify else checkpoints.open(checkpoints.steps()[-1])
        assert checkpoint is not None
        Parts(self.target.model, self.target.optimizer, None, None, {}, 0, 1).restore(checkpoint, set())

    def _torch_load(self) -> None:
        # Not with `mmap`: the optimizer would keep the map, and its state be read in the next step.
        file = self.folders[TORCH_LOAD] / "checkpoint.pt"
        state = torch.load(file, map_location=self.target.device, weights_only=True)
        self.target.model.load_state_dict(state["model"])
        self.target.optimizer.load_state_dict(state["optimizer"])

    def _load_state(self) -> None:
        self._accelerator.load_state(str(self.folders["accelerator.load_state"]))

    def _dcp_load(self) -> None:
        model, optimizer = get_state_dict(self.target.model, self.target.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=self.folders["DCP load"] / "checkpoint")
        set_state_dict(self.target.model, self.target.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def drop_from_cache(folder: Path) -> None:
    """Drops files from the system's page cache, once they are on the disk."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_whole(folder: Path) -> None:
    """Reads files, so that the system has them in its page cache."""
    buffer = bytearray(2**24)
    for file in _files(folder):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


# ---- JSON and table ----------------------------------------------------------------------------------------------


def summarize(taken: Mapping[tuple[str, str], Sequence[Timing]], keep_loaded: bool) -> list[dict[str, Any]]:
    """Returns what the JSON says of every way: the ratios are to `torch.load` of the same round and place."""
    return [
        {"name": name, "where": where, **compare(timings, taken[TORCH_LOAD, where], keep_loaded)}
        for (name, where), timings in taken.items()
    ]


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, and a line about what it was measured on."""
    settings, entries = result["settings"], result["entries"]
    rows = [["", "cold, s", "min to max", "of torch.load's", "cached, s", "min to max", "of torch.load's"]]
    rows.append(["---", *["---:"] * 6])
    by_place = {(entry["name"], entry["where"]): entry for entry in entries}
    for name in NAMES:
        cells = [cell for where in (COLD, CACHED) for cell in _cells(by_place[name, where])]
        rows.append([f"`{name}`", *cells])
    notes = [
        f"{settings['model']} with AdamW, {result['bytes'] / 1e9:.2f} GB, on {settings['device']}, one process",
        f"median of {settings['rounds']} rounds in random order, ratios within a round",
        load_note(entries, settings["keep_loaded"]),
        *origin(result),
    ]
    return markdown_table(rows, notes)


def _cells(entry: Mapping[str, Any]) -> list[str]:
    if entry["seconds"] is None:
        return ["-", "no quiet round", ""]
    ratio = entry["time_ratio"]
    return [
        f"{entry['seconds']['median']:.2f}",
        range_text(entry["seconds"], 2),
        "" if ratio is None else f"{ratio['median']:.2f}",
    ]


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws how long each way takes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups: dict[str, list[Bar]] = {COLD: [], CACHED: []}
    for entry in result["entries"]:
        if entry["seconds"]:
            groups[entry["where"]].append(
                Bar(entry["name"], entry["seconds"], ours=entry["name"].startswith("lockstep"))
            )
    draw_bars(groups, "seconds until the state is there (median, min to max)", file)


# ---- command line ------------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.restore", __doc__)
    add_device(parser)
    add_rounds(parser, rounds=5)
    add_tiny(parser)
    add_model_and_folder(parser)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.rounds, options.keep_loaded = TINY_MODEL, 1, True
    return options


def _run(options: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    """Measures, and writes what is known after each round: a run that is cut short leaves its rounds behind."""
    environment = describe("benchmarks.restore", given, ["torchvision", "accelerate"], options.device)
    started = time.monotonic()
    settings = {key: getattr(options, key) for key in ("model", "device", "rounds", "seed", "tiny", "keep_loaded")}
    settings |= {"num_threads": torch.get_num_threads(), "most_foreign_cores": MOST_FOREIGN_CORES}
    source = Job(options.model, torch.device(options.device))
    result: dict[str, Any] = {"environment": environment, "settings": settings, "bytes": source.num_bytes}
    with new_folder(options.folder) as folder:
        restores = Restores(source, options.model, folder)
        for name in NAMES:  # the first one of each warms it up
            restores.measure(name, CACHED)
        taken: dict[tuple[str, str], list[Timing]] = {(name, where): [] for name in NAMES for where in (COLD, CACHED)}
        for number, (name, where) in in_rounds(taken, options.rounds, options.seed):
            timing = restores.measure(name, where)
            taken[name, where].append(timing)
            sys.stderr.write(
                f"round {number + 1}: {name}, {where}: {timing.seconds:.2f} s, "
                f"others kept {timing.foreign_cores:.2f} cores busy\n"
            )
            if len({len(timings) for timings in taken.values()}) == 1:  # a round is over
                result |= {"took_seconds": round(time.monotonic() - started, 1)}
                result["entries"] = summarize(taken, options.keep_loaded)
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
