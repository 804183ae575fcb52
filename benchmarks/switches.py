"""The switches that are there for speed: what each does to the time of a step, against its being off.

    python -m benchmarks.switches --json benchmarks/results/switches-cpu.json

Owns which switches are measured on what, the JSON that comes of it and its table. Everything goes through the
trainer's own functions, so that a switch does here what it does for a user. Each switch has a fresh process, in which
its settings alternate in random order; those of several processes have two, started by torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import random
import subprocess
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

from benchmarks.feed import MOST_FOREIGN_CORES
from benchmarks.memory import (
    Timing,
    alternate,
    compare,
    describe_machine,
    in_fresh_process,
    machine_notes,
    markdown_table,
    show_times,
    waiting_for,
)
from trainer.config import Config
from trainer.config_devices import BackendsConfig
from trainer.config_model import ModelConfig, OptimConfig
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import one_line
from trainer.memory.blocks import repeated_blocks
from trainer.model import build_model, compile_model, uses_channels_last
from trainer.optim import build_optimizer
from trainer.precision import set_backends
from trainer.runtime import Runtime

NUM_CLASSES = 1000
NUM_RANKS = 2
TIMEOUT = 900  # seconds, of the processes of torchrun

_REPOSITORY = Path(__file__).resolve().parent.parent
_TRANSFORMER = "torchvision.models.vision_transformer:VisionTransformer"


@dataclass(frozen=True)
class Workload:
    """What a switch is measured on: a model, its micro-batch and precision."""

    label: str
    model: str
    args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    image_size: int = 96
    precision: str = "float32"

    @property
    def batch_text(self) -> str:
        """The micro-batch in words."""
        return f"{self.batch_size} images of {self.image_size}x{self.image_size}, {self.precision}"


@dataclass(frozen=True)
class Switch:
    """One setting of the config and the values that are compared, the yardstick first.

    Args:
        path: dotted path of the setting; `clip_grad_norm_.foreach` is torch's argument, which we leave to torch.
        values: the first is the one that all others are compared with.
        workload: what it is measured on.
        what: what is timed.
        fixed: other settings of `model`.
        lacks: what this machine lacks to measure it, if anything.
        apart: every measurement in a fresh process, for torch keeps what it learnt with another value.
    """

    path: str
    values: tuple[Any, ...]
    workload: Workload
    what: str = "forward and backward"
    fixed: dict[str, Any] = field(default_factory=dict)
    lacks: str | None = None
    apart: bool = False

    @property
    def section(self) -> str:
        """Of the config."""
        return self.path.partition(".")[0]

    @property
    def key(self) -> str:
        """In its section."""
        return self.path.partition(".")[2]

    @property
    def label(self) -> str:
        """What tells it from all others."""
        return f"{self.path} of {self.workload.label}"


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


# ---- which switches --------------------------------------------------------------------------------------------


def _vit(label: str, layers: int, width: int, batch_size: int, size: int, patch: int, precision: str) -> Workload:
    args = {"image_size": size, "patch_size": patch, "num_layers": layers, "num_heads": max(width // 64, 1)}
    args |= {"hidden_dim": width, "mlp_dim": 4 * width, "num_classes": NUM_CLASSES}
    return Workload(label, _TRANSFORMER, args, batch_size, size, precision)


def switches(device_type: str, tiny: bool) -> list[Switch]:
    """Returns all switches, those that cannot be measured here with what is missing."""
    on_gpu = device_type == "cuda"
    if tiny:
        convolutional = Workload("small_cnn", "small_cnn", {"in_channels": 3}, batch_size=2, image_size=16)
        transformer = _vit("tiny ViT", layers=2, width=16, batch_size=2, size=16, patch=8, precision="float32")
        exact = exact_transformer = parameters = exchanged = convolutional
        launch_bound = transformer
    elif on_gpu:
        convolutional = Workload("resnet50", "resnet50", {}, batch_size=128, image_size=224, precision="bf16")
        transformer = Workload("vit_b_16", "vit_b_16", {}, batch_size=64, image_size=224, precision="bf16")
        exact = dataclasses.replace(convolutional, batch_size=64, precision="float32")
        exact_transformer = dataclasses.replace(transformer, batch_size=32, precision="float32")
        parameters, exchanged = convolutional, convolutional
        launch_bound = _vit("ViT-S/16", layers=12, width=384, batch_size=8, size=96, patch=16, precision="bf16")
    else:
        convolutional = Workload("resnet18", "resnet18")
        transformer = _vit("ViT-S/16", layers=12, width=384, batch_size=16, size=96, patch=16, precision="float32")
        exact, exact_transformer, launch_bound = convolutional, transformer, transformer
        parameters = Workload("resnet50", "resnet50")
        exchanged = dataclasses.replace(convolutional, batch_size=8)
    no_gpu = None if on_gpu else "needs an NVIDIA GPU"
    no_second_gpu = f"needs {NUM_RANKS} GPUs" if on_gpu and torch.cuda.device_count() < NUM_RANKS else None
    ranks = f"forward and backward, {NUM_RANKS} processes"
    return [
        Switch("model.channels_last", (False, True), convolutional),
        Switch("model.compile", ("none", "blocks", "model"), convolutional),
        Switch("model.compile", ("none", "blocks", "model"), transformer),
        Switch(
            "model.compile_mode",
            ("default", "reduce-overhead"),
            launch_bound,
            fixed={"compile": "model"},
            lacks=no_gpu,
        ),
        Switch("optim.implementation", ("for_loop", "foreach", "fused"), parameters, "step of adamw"),
        Switch("clip_grad_norm_.foreach", (False, True), parameters, "clipping of gradients"),
        Switch("backends.matmul_precision", ("highest", "high", "medium"), exact_transformer),
        Switch("backends.cudnn_tf32", (False, True), exact, lacks=no_gpu),
        Switch("backends.cudnn_benchmark", (False, True), convolutional, lacks=no_gpu, apart=True),
        Switch("parallel.gradient_as_bucket_view", (False, True), exchanged, ranks, lacks=no_second_gpu),
        Switch("parallel.static_graph", (False, True), exchanged, ranks, lacks=no_second_gpu),
        Switch("parallel.bucket_mb", (25, 1, 100), exchanged, ranks, lacks=no_second_gpu),
        Switch("parallel.gradient_compression", ("none", "bf16"), exchanged, ranks, lacks=no_second_gpu),
    ]


def as_text(value: object) -> str:
    """Returns a value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- one switch ------------------------------------------------------------------------------------------------


def measure(switch: Switch, setup: Setup) -> dict[str, Taken]:
    """Measures every value of a switch in this process, alternating.

    A value that fails is left out, and the others go on.
    """
    torch.set_num_threads(setup.num_threads)
    with contextlib.ExitStack() as stack:
        prepare = _preparation(switch, setup, stack)
        return _measure(switch, setup, prepare, waiting_for(setup.device))


def _measure(
    switch: Switch, setup: Setup, prepare: Callable[[Any], Callable[[], object]], wait: Callable[[], object]
) -> dict[str, Taken]:
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
        model, _ = _build(switch, setup, {})
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return lambda value: _on_parameters(switch, setup, model, value)
    if switch.key.startswith("compile"):
        torch.compile(lambda x: x + 1)(torch.ones(8, device=setup.device))  # imports the compiler
    return lambda value: _step(switch, setup, value, stack)


def _build(switch: Switch, setup: Setup, changes: Mapping[str, Any]) -> tuple[nn.Module, ModelConfig]:
    """Returns the model as the trainer shapes it, on its device, in training mode."""
    workload = switch.workload
    section = {"name": workload.model, "args": workload.args, **switch.fixed, **changes}
    config = ModelConfig.model_validate(section)
    model = build_model(config, NUM_CLASSES).to(setup.device).train()
    if uses_channels_last(config, model):
        model.to(memory_format=torch.channels_last)
    compile_model(config, model, repeated_blocks(model) if config.compile == "blocks" else {})
    return model, config


def _batch(workload: Workload, device: torch.device) -> Batch:
    """Returns images and labels as our feed gives them: in channels_last memory, in the precision of the step."""
    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    shape = workload.batch_size, 3, workload.image_size, workload.image_size
    images = torch.randn(shape).to(device, dtype, memory_format=torch.channels_last)
    return images, torch.randint(NUM_CLASSES, shape[:1]).to(device)


def _loss(model: nn.Module, batch: Batch, workload: Workload) -> torch.Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=workload.precision == "bf16"):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _step(switch: Switch, setup: Setup, value: Any, stack: contextlib.ExitStack) -> Callable[[], object]:
    model, config = _build(switch, setup, {switch.key: value} if switch.section == "model" else {})
    backends = BackendsConfig.model_validate({switch.key: value} if switch.section == "backends" else {})
    if config.compile != "none" and not setup.tiny:
        # Of its own: what another setting has compiled is not found again, and the first step takes what it takes.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(_temporary_folder())
    batch = _batch(switch.workload, setup.device)

    def run() -> None:
        set_backends(backends)  # process-wide, and the values alternate
        _loss(model, batch, switch.workload).backward()
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
    for number in range(setup.rounds):
        order = list(switch.values)
        random.Random(setup.seed + number).shuffle(order)
        for value in order:
            alone = dataclasses.replace(switch, values=(value,))
            measured = _in_fresh_process(alone, dataclasses.replace(setup, rounds=1))[as_text(value)]
            entry = taken[as_text(value)]
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


# ---- several processes -----------------------------------------------------------------------------------------


def measure_ranks(chosen: Sequence[Switch], setup: Setup) -> list[dict[str, Taken]]:
    """Measures switches of several processes in one job of torchrun."""
    failed = [{as_text(value): Taken() for value in switch.values} for switch in chosen]
    with tempfile.TemporaryDirectory(prefix="lockstep-switches-") as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps({"setup": asdict(setup), "switches": [asdict(s) for s in chosen]}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
        command += ["-m", "benchmarks.switches", "--json", str(answered), "--as-rank", str(asked)]
        threads = {"OMP_NUM_THREADS": str(max(setup.num_threads // NUM_RANKS, 1))}
        try:
            ended = subprocess.run(
                command, cwd=_REPOSITORY, env={**os.environ, **threads}, timeout=TIMEOUT, check=False, stdout=sys.stderr
            )
            problem = f"torchrun ended with code {ended.returncode}" if ended.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"not done after {TIMEOUT} s"
        if problem is None:
            answer = json.loads(answered.read_text(encoding="utf-8"))
            return [{name: _read_taken(entry) for name, entry in taken.items()} for taken in answer]
    for taken in failed:
        for entry in taken.values():
            entry.problem = problem
    return failed


def _read_taken(entry: Mapping[str, Any]) -> Taken:
    return Taken(entry["first_seconds"], [Timing(**timing) for timing in entry["times"]], entry["problem"])


def run_as_rank(asked: Path, answered: Path) -> None:
    """One of the processes that torchrun started: rank 0 writes what was measured."""
    request = json.loads(asked.read_text(encoding="utf-8"))
    setup = Setup(**request["setup"])
    answer = []
    runtimes: list[Runtime] = []
    for values in request["switches"]:
        switch = Switch(**{**values, "values": tuple(values["values"]), "workload": Workload(**values["workload"])})
        taken = _measure_between_ranks(switch, setup, runtimes)
        # Of all ranks, the slowest; and what the others did is no foreign load.
        for name, own in taken.items():
            own.times = [_of_all_ranks(timings) for timings in zip(*runtimes[-1].gather(own.times), strict=True)]
            own.problem = next((p for p in runtimes[-1].gather(own.problem) if p), None)
            taken[name] = own
        answer.append({name: asdict(entry) for name, entry in taken.items()})
        for runtime in runtimes:
            runtime.accelerator.free_memory()
        gc.collect()
    if runtimes[-1].is_main:
        answered.write_text(json.dumps(answer), encoding="utf-8")
    runtimes[-1].close()


def _of_all_ranks(timings: Sequence[Timing]) -> Timing:
    first, *others = timings
    return Timing(
        seconds=max(timing.seconds for timing in timings),
        own_cores=sum(timing.own_cores for timing in timings),
        foreign_cores=max(0.0, first.foreign_cores - sum(timing.own_cores for timing in others)),
    )


def _measure_between_ranks(switch: Switch, setup: Setup, runtimes: list[Runtime]) -> dict[str, Taken]:
    batch = _batch(switch.workload, setup.device)

    def prepare(value: Any) -> Callable[[], object]:
        runtime = Runtime(_config(switch, value))
        runtimes.append(runtime)
        bare, _ = _build(switch, setup, {})
        bare_optimizer = build_optimizer(
            OptimConfig.model_validate({"name": "sgd", "lr": 1e-6}), bare, setup.device_type
        )
        model, optimizer = runtime.prepare(bare, bare_optimizer)
        model.train()

        def run() -> None:
            runtime.backward(_loss(model, batch, switch.workload))
            optimizer.zero_grad()

        return run

    def wait() -> None:
        waiting_for(setup.device)()
        if runtimes:
            runtimes[-1].barrier()

    return _measure(switch, setup, prepare, wait)


def _config(switch: Switch, value: Any) -> Config:
    """Returns a whole config, of which only what concerns several processes is used."""
    return Config.model_validate(
        {
            "run": {"name": "switches"},
            "data": {"train": {"name": "synthetic"}},
            "model": {"name": switch.workload.model, "args": switch.workload.args},
            "optim": {"name": "sgd", "lr": 1e-6},
            "precision": "bf16" if switch.workload.precision == "bf16" else "no",
            "parallel": {switch.key: value},
            "train": {"steps": 1, "batch_size": NUM_RANKS * switch.workload.batch_size},
        }
    )


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


def table(result: dict[str, Any]) -> str:
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
        *machine_notes(result["environment"], result["entries"], settings["keep_loaded"]),
    ]
    return markdown_table(rows, notes)


# ---- command line ----------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes; read with --markdown")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print the table of --json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", metavar="PREFIX", default=[""], help="such as model.compile or parallel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores_of_a_rank(1), help="of torch; default: one per core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-loaded", action="store_true", help="keep rounds in which others used the machine too")
    parser.add_argument("--tiny", action="store_true", help="a check that all parts run: measures nothing of interest")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.rounds, arguments.threads, arguments.keep_loaded = 1, 1, True
    if min(arguments.rounds, arguments.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    return arguments


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes what is known after each switch: a run that is cut short leaves its switches behind."""
    on_gpu = arguments.device == "cuda"
    setup = Setup(
        device_type=arguments.device,
        rounds=arguments.rounds,
        num_runs=1 if arguments.tiny else 20 if on_gpu else 3,
        num_optimizer_runs=1 if arguments.tiny else 50 if on_gpu else 10,
        num_threads=arguments.threads,
        seed=arguments.seed,
        tiny=arguments.tiny,
    )
    chosen = [s for s in switches(setup.device_type, setup.tiny) if s.path.startswith(tuple(arguments.only))]
    environment = describe_machine("benchmarks.switches", setup.device_type)  # before: of what is measured
    started = time.monotonic()
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {**asdict(setup), "most_foreign_cores": MOST_FOREIGN_CORES, "keep_loaded": arguments.keep_loaded},
        "took_seconds": 0.0,
        "entries": [],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    if setup.tiny and hasattr(torch.compiler, "set_default_backend"):
        torch.compiler.set_default_backend("eager")  # nothing is compiled to machine code

    def add(switch: Switch, taken: Mapping[str, Taken]) -> None:
        result["entries"] += summarize(switch, taken, arguments.keep_loaded)
        result["took_seconds"] = round(time.monotonic() - started, 1)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    between_ranks = [s for s in chosen if s.section == "parallel" and s.lacks is None]
    for switch in chosen:
        if switch not in between_ranks:
            add(switch, {} if switch.lacks is not None else measure_apart(switch, setup))
    if between_ranks:
        for switch, taken in zip(between_ranks, measure_ranks(between_ranks, setup), strict=True):
            add(switch, taken)
    return result


def main() -> int:
    """Returns the exit code: 2 without a GPU, 1 where a switch failed that this machine should have."""
    arguments = _arguments()
    if arguments.as_rank is not None:
        run_as_rank(arguments.as_rank, arguments.json)
        return 0
    if arguments.markdown:
        result = json.loads(arguments.json.read_text(encoding="utf-8"))
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("there is no CUDA GPU here; use --device cpu\n")
        return 2
    else:
        if arguments.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        result = _run(arguments)
    sys.stdout.write(table(result))
    failed = any(entry["problem"] and not entry["is_left_out"] for entry in result["entries"])
    return int(not arguments.markdown and failed)


if __name__ == "__main__":
    sys.exit(main())
