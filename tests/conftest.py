"""Tiers by folder, and what many tests need: a small config, and the command line run in this process."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml

if TYPE_CHECKING:
    from resuming import TrainServer
    from watching import WatchedJob
    from worker_pools import MakePool

gc.disable()  # until all is imported, for the reason that `trainer.imports` tells

# Several threads for numbers as few as these only wait for one another. Whatever is launched has as many as by default.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
SUPPORT = Path(__file__).resolve().parent / "support"
TIERS = ("unit", "dist", "cluster", "gpu")
NIGHTLY = os.environ.get("LOCKSTEP_NIGHTLY") == "1"
nightly = pytest.mark.nightly  # much like another one, or long


def few(cases: Iterable[Any], *in_ci: Any) -> list[Any]:
    """Returns the cases of a parametrised test; those that are not in `in_ci`, much like these, run nightly only."""
    cases = list(cases)
    unknown = [case for case in in_ci if case not in cases]
    assert not unknown, f"{unknown} is none of {cases}"
    return [case if case in in_ci else pytest.param(case, marks=nightly) for case in cases]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.args == config.getini("testpaths"):  # the whole suite: no file may be passed over
        collected = {Path(item.fspath) for item in items}
        assert collected == set((REPOSITORY / "tests").rglob("test_*.py"))
    for item in items:
        tier = Path(item.fspath).relative_to(REPOSITORY / "tests").parts[0]
        assert tier in TIERS, f"{item.fspath} is in no tier"
        item.add_marker(tier)
        if not NIGHTLY and item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip("nightly; LOCKSTEP_NIGHTLY=1 runs it"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def forget_accelerate() -> None:
    """Drops the process-wide state that Accelerate keeps of the last run."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes every operation that waits for the GPU an error, on all threads."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_new_may_be_garbage() -> None:
    """A run looks for garbage when it ends. Without this it would look at all of torch every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    yield
    forget_accelerate()
    logger = logging.getLogger("lockstep")  # which the command line gives a handler of its own
    logger.handlers = []
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


class Alone:
    """A job of one process, whose turn it always is."""

    def main_first(self) -> AbstractContextManager[None]:
        return nullcontext()


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Train = Callable[..., Outcome]


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str]) -> Train:
    """Runs `train.py` with these arguments in this process."""

    def run(*arguments: str | Path) -> Outcome:
        from trainer.cli import train as train_command

        forget_accelerate()
        try:
            code = train_command([str(a) for a in arguments])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainServer]:
    """Runs `train.py` in processes of its own that start at once."""
    from resuming import TrainServer

    with TrainServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing of a Slurm job that this process may be part of be seen."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)


@pytest.fixture
def regnets_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets RegNets, which compute the widths of their layers with tensors, be built on the meta device."""
    import torch
    from torchvision.models.regnet import BlockParams

    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return from_init_params(*args, **kwargs)

    from_init_params = BlockParams.from_init_params
    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The run folder of `tiny_config`, empty."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def fault_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that this process takes its plan of faults from, not written yet."""
    from trainer.faults.plan import VARIABLE

    file = tmp_path / "plan.json"
    monkeypatch.setenv(VARIABLE, str(file))
    return file


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Lets torch compute with one thread: several that wait for a busy machine's cores take longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def watched_job(tmp_path: Path) -> Iterator[WatchedJob]:
    """Starts ranks, each a forked process that runs a function under its watch."""
    from watching import WatchedJob

    job = WatchedJob(tmp_path)
    yield job
    job.close()


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Makes pools of loader workers."""
    from worker_pools import opened_pools

    with opened_pools() as make:
        yield make


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a shard of a packed folder hold two samples."""
    monkeypatch.setattr("trainer.data.listing.SHARD_SAMPLES", 2)


def tiny_config(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A config that trains in a second: 60 vectors of 8 numbers, an MLP with dropout, two epochs."""
    config: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(run_dir)},
        "data": {
            "train": {"name": "vectors:Vectors", "args": {"length": 60}},
            "eval": {"name": "vectors:Vectors", "args": {"length": 23}},
            "workers": 0,
        },
        "model": {"name": "mlp", "args": {"in_features": 8, "hidden": [16], "dropout": 0.2}},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"epochs": 2, "batch_size": 12},
        "log": {"every": 1},
        "tracking": {"trackers": []},
    }
    for dotted, value in changes.items():
        section = config
        *parents, last = dotted.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return config


WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Writes `tiny_config` with changes such as `train__epochs=3` and returns the file."""

    def write(name: str = "tiny.yaml", **changes: Any) -> Path:
        file = tmp_path / name
        file.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", **changes), sort_keys=False))
        return file

    return write
