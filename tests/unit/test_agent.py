"""What the launcher starts, and what it makes of ranks that failed: no job is run here."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteConfig
from torch.distributed import HashStore, Store
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)

from launch import agent, local, starting
from launch.cli import main
from trainer.config import Config, load_config
from trainer.faults.fault import Fault, fault_folder, write_first
from trainer.memory.shrink import Shrink
from trainer.rendezvous import fresh_part

KILL, TERM = -signal.SIGKILL, -signal.SIGTERM
KILLED = "was ended by SIGKILL; most likely the system was out of memory, or somebody killed it"


def job(run_dir: Path, first: Mapping[int, int] | None = None, over: bool = False) -> agent._Job:
    made = agent._Job(run_dir, is_over=lambda: over)
    made.first = dict(first or {})
    return made


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 1, 1: KILL}, 1),
        ({0: 2, 1: 1}, 2),  # a rank that lost the one with the bad sample
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: TERM}, 75),  # ended by the agent on its way out
        ({0: 75, 1: KILL}, 1),
        ({0: 75, 1: 1}, 1),
    ],
)
def test_one_code_for_all_ranks(codes: dict[int, int], expected: int, tmp_path: Path) -> None:
    assert agent._exit_code(codes) == expected
    assert job(tmp_path).is_final(codes) == (expected != 1)
    assert (job(tmp_path).explain(codes) is None) == (expected != 1)
    assert job(tmp_path, over=True).is_final(codes)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({}, 1),
        ({0: 0, 1: 0}, 0),
        ({0: 75, 1: 75}, 75),
        ({0: -signal.SIGUSR1, 1: -signal.SIGUSR1}, 75),  # before they had begun to train
        ({0: 75, 1: KILL}, 1),  # did not come to an end in time
        ({0: 1, 1: 1}, 1),
    ],
)
def test_one_code_after_a_signal(codes: dict[int, int], expected: int) -> None:
    assert agent._exit_code_of_stopped(codes, signal.SIGUSR1) == expected


@pytest.mark.parametrize(
    ("first", "codes", "expected"),
    [
        ({1: KILL}, {0: 1, 1: KILL}, f"rank 1 {KILLED}"),
        ({0: 1, 1: KILL}, {0: 1, 1: KILL}, f"rank 1 {KILLED}"),  # both had ended when the agent looked
        ({1: 1}, {0: KILL, 1: 1}, "rank 1 failed, and said why"),  # rank 0 did not react, and the agent killed it
        ({}, {0: TERM, 1: -signal.SIGSEGV}, "rank 1 was ended by SIGSEGV"),
    ],
)
def test_the_first_rank_is_named(first: dict[int, int], codes: dict[int, int], expected: str, tmp_path: Path) -> None:
    assert job(tmp_path, first).explain(codes) == expected


@pytest.mark.parametrize(("kind", "restart"), [("error", True), ("numbers", False), ("lost", True)])
def test_the_fault_that_was_written_down(kind: str, restart: bool, tmp_path: Path) -> None:
    fault = Fault(1, kind, "so it was", step=7, restart=restart)
    older = job(tmp_path)
    older.started -= 1  # a fault's time is rounded
    write_first(fault_folder(tmp_path, 1), fault)
    assert older.is_final({0: 1, 1: 1}) == (not restart)
    assert older.explain({0: 1, 1: 1}) == str(fault)
    # A peer sees only that a rank is gone; the agent knows how.
    assert older.explain({0: 1, 1: KILL}) == (f"rank 1 {KILLED}" if kind == "lost" else str(fault))
    younger = job(tmp_path)
    younger.started += 1
    assert not younger.is_final({0: 1, 1: 1})
    assert younger.explain({0: 1}) == "rank 0 failed, and said why"


@pytest.mark.parametrize(("kind", "expected"), [("error", 1), ("hang", 0)])
def test_a_rank_with_an_error_may_end_after_its_peers(kind: str, expected: int, tmp_path: Path) -> None:
    made = job(tmp_path, first={0: 1})
    made.started -= 1
    write_first(fault_folder(tmp_path, 1), Fault(1, kind, "so it was"))
    assert made.first_rank({0: 1, 1: 1}) == expected


@pytest.mark.parametrize(
    ("codes", "rank_of_fault", "expected"),
    [
        ({0: 75, 1: 75}, None, False),
        ({0: 75, 1: TERM}, None, False),
        ({0: 2, 1: 1}, None, True),
        ({0: 1, 1: 1}, 1, True),
        ({0: 1, 1: 1}, 2, False),  # on another machine
        ({0: KILL, 1: 1}, None, True),
    ],
)
def test_whose_failure_it_is(codes: dict[int, int], rank_of_fault: int | None, expected: bool, tmp_path: Path) -> None:
    made = job(tmp_path)
    made.started -= 1
    if rank_of_fault is not None:
        write_first(fault_folder(tmp_path, 1), Fault(rank_of_fault, "error", "so it was"))
    assert made.is_own_failure(codes) == expected


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (None, False),
        ("{", False),
        ({"stopped_by": None}, False),
        ({"stopped_by": "the file STOP on rank 0"}, False),
        ({"stopped_by": "SIGTERM on rank 3"}, True),
    ],
)
def test_a_machine_that_leaves_is_told_by_a_signal(summary: object, expected: bool, tmp_path: Path) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    assert job(tmp_path).was_stopped_by_signal() == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RendezvousClosedError(), "another machine has ended the job, and said why"),
        (RendezvousTimeoutError(), "not enough machines came to the rendezvous in time"),
        (RendezvousConnectionError(), "the first machine, where the others meet, cannot be reached"),
    ],
)
def test_why_a_machine_is_alone(error: RendezvousError, expected: str, tmp_path: Path) -> None:
    made = job(tmp_path)
    made.started -= 1
    assert made.explain_parting(error).startswith(expected)
    for number, restart in enumerate((True, False)):
        fault = Fault(5, "error", "so it was", step=7, restart=restart)
        write_first(fault_folder(tmp_path, number), fault)
        known = not restart or isinstance(error, RendezvousClosedError)
        assert made.explain_parting(error).startswith(str(fault) if known else expected)


def config_of(write_config: WriteConfig, **changes: Any) -> Config:
    return load_config(str(write_config(**changes)), [])


def test_what_is_started(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(processes: int, gpus: int, **changes: Any) -> tuple[str, dict[str, str]]:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        plan = local.plan(["--config", "x.yaml"], config_of(write_config, launch__processes=processes, **changes))
        return " ".join(plan.command), plan.environment

    text, variables = command(1, 0)
    assert "torchrun" not in text
    assert variables == {}
    text, variables = command(2, 0)
    assert text.startswith("torchrun --standalone --nproc-per-node 2 /")
    assert variables["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "45"
    assert command(2, 0, faults__grace="5 seconds")[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "30"
    assert command(2, 0, faults__grace="2 minutes")[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "135"
    text, variables = command(1, 0, launch__max_restarts=3)
    assert text.startswith("torchrun --standalone --nproc-per-node 1 --max-restarts 3 /")
    assert variables["ACCELERATE_USE_CPU"] == "true"
    text, variables = command(1, 1, launch__max_restarts=3)
    assert text.startswith("torchrun --standalone --nproc-per-node 1 --max-restarts 3 /")
    assert "ACCELERATE_USE_CPU" not in variables
    text, variables = command(2, 2, launch__max_restarts=3)
    assert re.match("accelerate launch --multi_gpu --num_processes 2 .* --max_restarts 3 /", text)
    assert variables["PET_SIGNALS_TO_HANDLE"].endswith("SIGUSR1")


def test_dry_run_shows_all_of_it(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(write_config()), "launch.max_restarts=3", "--processes", "2", "--dry-run"]
    assert main(["local", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("PET_SIGNALS_TO_HANDLE=SIGTERM,")
    assert " TORCH_ELASTIC_SHUTDOWN_TIMEOUT=45 ACCELERATE_USE_CPU=true OMP_NUM_THREADS=" in shown
    assert " torchrun --standalone --nproc-per-node 2 --max-restarts 3 " in shown
    assert shown.endswith(f"train.py --config {arguments[1]} launch.max_restarts=3 launch.processes=2\n")


def test_a_used_store_has_a_fresh_part() -> None:
    """Whatever earlier attempts have left in it, and in whatever order the ranks come."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    for attempt in range(3):
        store.set("lockstep/ask/1", "of a rank that died before it got an answer")
        parts: dict[int, Store] = {}

        def join(rank: int, parts: dict[int, Store] = parts) -> None:
            parts[rank] = fresh_part(store, rank, 3, timedelta(seconds=20))

        ranks = [threading.Thread(target=join, args=(rank,)) for rank in (0, 2, 1)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        assert not parts[0].check(["key"])
        parts[0].set("key", str(attempt))
        assert parts[1].get("key") == parts[2].get("key") == str(attempt).encode()


def test_a_rank_that_does_not_come() -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2 did not come"):
        fresh_part(HashStore(), 0, 2, timedelta(seconds=0.1))


def test_machines_meet_again_after_a_shrink(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name that one knows, too, which comes when the others have shrunk already."""
    records: list[Shrink] = []
    names = []

    def run_agent(command: list[str], *_: object, **__: object) -> agent.Outcome:
        names.append(command[-1])
        if len(records) == 2:
            return agent.Outcome(0)
        records.append(Shrink(4 - len(records), 8, 8, step=3, rank=0, attempt=1, time=1000.0 + len(records)))
        return agent.Outcome(1)

    monkeypatch.setattr(starting, "run_agent", run_agent)
    monkeypatch.setattr(starting, "read_shrink", lambda _: records[-1] if records else None)
    plan = starting.LaunchPlan(["torchrun", "--rdzv-id", "digits.7"])
    config = config_of(write_config, memory__on_oom="shrink")
    assert starting.run(plan, config) == 0
    assert names == ["digits.7", "digits.7.1000", "digits.7.1001"]
    assert starting.run(plan, config) == 0
    assert names[3:] == ["digits.7.1001"]
    assert starting.run(plan, config_of(write_config)) == 0
    assert names[4:] == ["digits.7"]
