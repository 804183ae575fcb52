"""The switches that are there for speed: what each does to the time of a step, against its being off.

    python -m benchmarks.switches --json benchmarks/results/switches-cpu.json

Owns how a switch is measured in one process, the JSON that comes of all of them and its table. Everything goes through
the trainer's own functions, so that a switch does here what it does for a user. Each switch has a fresh process, in
which its settings alternate in random order; those of several processes have two, started by torchrun
(`benchmarks.switch_ranks`). Which there are is `benchmarks.switch_list`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.commands import add_device, add_rounds, add_tiny, is_ready, new_parser, show_again
from benchmarks.drawing import Bar, draw_bars
from benchmarks.rounds import (
    MOST_FOREIGN_CORES,
    Timing,
    alternate,
    compare,
    in_fresh_process,
    in_rounds,
    load_note,
    show_times,
    waiting_for,
)
from benchmarks.switch_list import NUM_CLASSES, NUM_RANKS, Switch, Workload, as_text, switches
from benchmarks.telling import describe, markdown_table, origin, write
from trainer.config_devices import BackendsConfig
from trainer.config_model import ModelConfig, OptimConfig
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import one_line
from trainer.memory.blocks import repeated_blocks
from trainer.model import build_model, compile_model, uses_channels_last
from trainer.optim import build_optimizer
from trainer.precision import set_backends

PACKAGES = ("torchvision", "accelerate")


@dataclass(frozen=True)
class Setup:
    """What the measurements of all switches have in common."""

    device_type: str
    rounds: int
    num_runs: int  # steps in one measurement of time
    num_optimizer_runs: int  # the same, where the step is only the optimizer's or that of clipping
    num_threads: int  # of a single process; several share them
    seed: int
    tiny: bool

    @property
    def device(self) -> torch.device:
        """Where it runs; of several processes, each on its own."""
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device(self.device_type, rank) if self.device_type == "cuda" else torch.device(self.device_type)


@dataclass
class Taken:
    """What was measured of one value of a switch."""

    first_seconds: float | None = None  # of its first step, compilation and warm-up included
    times: list[Timing] = field(default_factory=list)
    problem: str | None = None


Batch = tuple[torch.Tensor, torch.Tensor]
Runs = dict[str, Callable[[], object]]  # by the text of a value


# ---- one switch ------------------------------------------------------------------------------------------------


def measure(switch: Switch, setup: Setup) -> dict[str, Taken]:
    """Measures every value of a switch in this process, alternating.

    A value that fails is left out, and the others go on.
    """
    torch.set_num_threads(setup.num_threads)
    with contextlib.ExitStack() as stack:
        prepare = _preparation(switch, setup, stack)
        return measure_values(switch, setup, prepare, waiting_for(setup.device))


def measure_values(
    switch: Switch, setup: Setup, prepare: Callable[[Any], Callable[[], object]], wait: Callable[[], object]
) -> dict[str, Taken]:
    """Measures what `prepare` makes of each value: its first step, then all of them alternating."""
    taken = {as_text(value): Taken() for value in switch.values}
    runs: Runs = {}
    for value in switch.values:
        name = as_text(value)
        try:
            torch.manual_seed(setup.seed)
            run = prepare(value)
            wait()
            started = time.perf_counter()
            run()
            wait()
            taken[name].first_seconds = time.perf_counter() - started
            for _ in range(2):  # compiled code may be compiled once more; CUDA graphs are recorded
                run()
            runs[name] = run
        except Exception as error:  # the other values go on
            sys.stderr.write(traceback.format_exc())
            taken[name].problem = one_line(error)
    num_runs = setup.num_optimizer_runs if switch.section in ("optim", "clip_grad_norm_") else setup.num_runs
    for name, times in alternate(runs, setup.rounds, num_runs, wait, setup.seed, switch.label).items():
        taken[name].times = times
    return taken


def _preparation(switch: Switch, setup: Setup, stack: contextlib.ExitStack) -> Callable[[Any], Callable[[], object]]:
    """Returns what makes of a value the run that is timed."""
    if switch.section in ("optim", "clip_grad_norm_"):
        model, _ = build(switch, setup, {})
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return lambda value: _on_parameters(switch, setup, model, value)
    if switch.key.startswith("compile"):
        torch.compile(lambda x: x + 1)(torch.ones(8, device=setup.device))  # imports the compiler
    return lambda value: _step(switch, setup, value, stack)


def build(switch: Switch, setup: Setup, changes: Mapping[str, Any]) -> tuple[nn.Module, ModelConfig]:
    """Returns the model as the trainer shapes it, on its device, in training mode."""
    workload = switch.workload
    section = {"name": workload.model, "args": workload.args, **switch.fixed, **changes}
    config = ModelConfig.model_validate(section)
    model = build_model(config, NUM_CLASSES).to(setup.device).train()
    if uses_channels_last(config, model):
        model.to(memory_format=torch.channels_last)
    compile_model(config, model, repeated_blocks(model) if config.compile == "blocks" else {})
    return model, config


def make_batch(workload: Workload, device: torch.device) -> Batch:
    """Returns images and labels as our feed gives them: in channels_last memory, in the precision of the step."""
    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    shape = workload.batch_size, 3, workload.image_size, workload.image_size
    images = torch.randn(shape).to(device, dtype, memory_format=torch.channels_last)
    return images, torch.randint(NUM_CLASSES, shape[:1]).to(device)


def loss(model: nn.Module, batch: Batch, workload: Workload) -> torch.Tensor:
    """Returns the loss of a forward pass in the precision of the workload."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=workload.precision == "bf16"):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _step(switch: Switch, setup: Setup, value: Any, stack: contextlib.ExitStack) -> Callable[[], object]:
    model, config = build(switch, setup, {switch.key: value} if switch.section == "model" else {})
    backends = BackendsConfig.model_validate({switch.key: value} if switch.section == "backends" else {})
    if config.compile != "none" and not setup.tiny:
        # Of its own: what another setting has compiled is not found again, and the first step takes what it takes.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(_temporary_folder())
    batch = make_batch(switch.workload, setup.device)

    def run() -> None:
        set_backends(backends)  # process-wide, and the values alternate
        loss(model, batch, switch.workload).backward()
        model.zero_grad()

    return run


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="lockstep-compiled-", ignore_cleanup_errors=True) as folder:
        yield folder


def _on_parameters(switch: Switch, setup: Setup, model: nn.Module, value: Any) -> Callable[[], object]:
    """Returns the optimizer's step, or the clipping of gradients, that are there already and stay."""
    if switch.section == "optim":
        config = OptimConfig.model_validate({"name": "adamw", "lr": 1e-6, switch.key: value})
        return build_optimizer(config, model, setup.device.type).step
    parameters = list(model.parameters())
    return lambda: nn.utils.clip_grad_norm_(parameters, 1.0, foreach=value)


def measure_apart(switch: Switch, setup: Setup) -> dict[str, Taken]:
    """Measures a switch in a fresh process, or each value of each round in one of its own."""
    if not switch.apart:
        return _in_fresh_process(switch, setup)
    taken = {as_text(value): Taken() for value in switch.values}
    values = {as_text(value): value for value in switch.values}
    for _, name in in_rounds(values, setup.rounds, setup.seed):
        alone = dataclasses.replace(switch, values=(values[name],))
        measured = _in_fresh_process(alone, dataclasses.replace(setup, rounds=1))[name]
        entry = taken[name]
        entry.times += measured.times
        entry.first_seconds = entry.first_seconds or measured.first_seconds
        entry.problem = entry.problem or measured.problem
    return taken


def _in_fresh_process(switch: Switch, setup: Setup) -> dict[str, Taken]:
    if setup.tiny:
        return measure(switch, setup)
    with in_fresh_process() as process:
        try:
            return process.submit(measure, switch, setup).result()
        except Exception as error:  # the other switches go on
            sys.stderr.write(traceback.format_exc())
            return {as_text(value): Taken(problem=one_line(error)) for value in switch.values}


# ---- JSON and table --------------------------------------------------------------------------------------------


def summarize(switch: Switch, taken: Mapping[str, Taken], keep_loaded: bool) -> list[dict[str, Any]]:
    """Returns what the JSON says about every value of a switch; of one that was left out, why."""
    yardstick = taken.get(as_text(switch.values[0]), Taken())
    entries = []
    for value in switch.values:
        entry = taken.get(as_text(value), Taken(problem=switch.lacks))
        entries.append(
            {
                "switch": switch.path,
                "value": as_text(value),
                "compared_with": as_text(switch.values[0]),
                "model": switch.workload.label,
                "batch": switch.workload.batch_text,
                "what": switch.what,
                "first_seconds": entry.first_seconds,
                **compare(entry.times, yardstick.times, keep_loaded),
                "is_left_out": switch.lacks is not None,
                "problem": entry.problem,
            }
        )
    return entries


def table(result: Mapping[str, Any]) -> str:
    """Returns the Markdown table of a result, with a line about what it was measured on."""
    settings = result["settings"]
    rows = [["switch", "value", "on", "ms", "min to max", "time ratio", "min to max", "first step, s"]]
    rows.append(["---"] * 3 + ["---:"] * 5)
    batches: dict[str, str] = {}
    for entry in result["entries"]:
        on = entry["model"]
        if "forward" in entry["what"]:
            where = on if "processes" not in entry["what"] else f"{on} in {NUM_RANKS} processes"
            batches.setdefault(where, entry["batch"])
        is_compiled = entry["switch"].startswith("model.compile") and entry["first_seconds"] is not None
        first = f"{entry['first_seconds']:.1f}" if is_compiled else ""
        rows.append(
            [
                f"`{entry['switch']}`",
                f"`{entry['value']}`",
                f"{on}: {entry['what']}",
                *show_times(entry),
                first,
            ]
        )
    notes = [
        "time ratio: to the first row of the switch, below 1 is faster",
        *(f"{model}: micro-batches of {batch}" for model, batch in batches.items()),
        f"{settings['num_threads']} threads, median of {settings['rounds']} alternating rounds of "
        f"{settings['num_runs']} steps ({settings['num_optimizer_runs']} of the optimizer's), ratios within rounds",
        load_note(result["entries"], settings["keep_loaded"]),
        *origin(result),
    ]
    return markdown_table(rows, notes)


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Draws the time ratio of every value but the yardsticks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups: dict[str, list[Bar]] = {}
    for entry in result["entries"]:
        if entry["time_ratio"] is not None and entry["value"] != entry["compared_with"]:
            group = f"{entry['switch']} on {entry['model']}"
            groups.setdefault(group, []).append(Bar(entry["value"], entry["time_ratio"]))
    draw_bars(groups, "time, to the first value of the switch (median, min to max)", file, 1.0)


# ---- command line ----------------------------------------------------------------------------------------------


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("benchmarks.switches", __doc__)
    add_device(parser)
    add_rounds(parser, rounds=5)
    add_tiny(parser)
    parser.add_argument("--only", nargs="+", metavar="PREFIX", default=[""], help="such as model.compile or parallel")
    parser.add_argument("--threads", type=int, default=cores_of_a_rank(1), help="of torch; default: one per core")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.rounds, options.threads, options.keep_loaded = 1, 1, True
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    return options


def _run(options: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    """Measures, and writes what is known after each switch: a run that is cut short leaves its switches behind."""
    on_gpu = options.device == "cuda"
    setup = Setup(
        device_type=options.device,
        rounds=options.rounds,
        num_runs=1 if options.tiny else 20 if on_gpu else 3,
        num_optimizer_runs=1 if options.tiny else 50 if on_gpu else 10,
        num_threads=options.threads,
        seed=options.seed,
        tiny=options.tiny,
    )
    chosen = [s for s in switches(setup.device_type, setup.tiny) if s.path.startswith(tuple(options.only))]
    environment = describe("benchmarks.switches", given, PACKAGES, setup.device_type)
    started = time.monotonic()
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {**asdict(setup), "most_foreign_cores": MOST_FOREIGN_CORES, "keep_loaded": options.keep_loaded},
        "took_seconds": 0.0,
        "entries": [],
    }
    if setup.tiny and hasattr(torch.compiler, "set_default_backend"):
        torch.compiler.set_default_backend("eager")  # nothing is compiled to machine code

    def add(switch: Switch, taken: Mapping[str, Taken]) -> None:
        result["entries"] += summarize(switch, taken, options.keep_loaded)
        result["took_seconds"] = round(time.monotonic() - started, 1)
        write(result, options.json)

    between_ranks = [s for s in chosen if s.section == "parallel" and s.lacks is None]
    for switch in chosen:
        if switch not in between_ranks:
            add(switch, {} if switch.lacks is not None else measure_apart(switch, setup))
    if between_ranks:
        from benchmarks.switch_ranks import measure_ranks

        for switch, taken in zip(between_ranks, measure_ranks(between_ranks, setup), strict=True):
            add(switch, taken)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 without a GPU, 1 where a switch failed that this machine should have."""
    options = _arguments(arguments)
    if options.markdown:
        return show_again(options.json, table)
    if not is_ready(options.device):
        return 2
    result = _run(options, arguments)
    sys.stdout.write(table(result))
    return int(any(entry["problem"] and not entry["is_left_out"] for entry in result["entries"]))


if __name__ == "__main__":
    sys.exit(main())
