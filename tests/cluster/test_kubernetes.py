"""What the manifests of `python -m launch kubernetes` do, run as pods would: on hosts, by the Job's own policy."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_machines import Hosts
from conftest import WriteConfig, nightly
from kubernetes_pods import JobController, job_of

from launch import kubernetes
from trainer.config import load_config

Start = Callable[..., JobController]


@pytest.fixture
def start(hosts: Hosts, write_config: WriteConfig, tmp_path: Path) -> Iterator[Start]:
    """Starts a job's manifests as a cluster would."""
    started: list[JobController] = []

    def begin(nodes: int | str = 2, **changes: Any) -> JobController:
        changes = {"launch__kubernetes__volume_claim": "runs", "launch__kubernetes__image": "i", **changes}
        volume = tmp_path / "volume"
        volume.mkdir()
        file = write_config(run__dir="runs/tiny", launch__kubernetes__mount_path=str(volume), **changes)
        config = load_config(str(file), [f"launch.nodes={nodes}"])
        manifests = {document["kind"]: document for document in yaml.safe_load_all(kubernetes.render(config))}
        job = manifests.get("Job") or job_of(manifests["TrainJob"], manifests["TrainingRuntime"])
        started.append(JobController(hosts, job, manifests["ConfigMap"], tmp_path / "cluster"))
        return started[0]

    yield begin
    for job in started:
        job.state = "Deleted"
        job.end()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "volume" / "runs" / "tiny"


def long(seconds: float, epochs: int) -> dict[str, Any]:
    """Returns changes with which a run takes a while."""
    data = {"name": "slow:Steady", "args": {"length": 60, "seconds": seconds}}
    return {"data__train": data, "train__epochs": epochs, "launch__max_restarts": 3}


def go_on(job: JobController, run_dir: Path) -> None:
    """Waits until some more steps are reported."""
    file = run_dir / "metrics.jsonl"

    def steps() -> int:
        return len(file.read_text().splitlines()) if file.exists() else 0

    before = steps()
    job.wait_for(lambda: steps() > before + 3)


def status(run_dir: Path) -> tuple[str, int]:
    """Returns how a run has ended, and on how many processes."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return summary["status"], summary["num_processes"]


@nightly
def test_a_train_job(start: Start, run_dir: Path) -> None:
    job = start(launch__kubernetes__kind="trainjob")
    assert job.wait() == "Complete", job.report()
    assert {ended.action for ended in job.history} == {"Succeeded"}, job.report()
    assert status(run_dir) == ("finished", 2)


def test_pods_that_are_replaced(start: Start, run_dir: Path) -> None:
    """One is told to stop; then the first one, where they meet, is killed. Only that one counts as failed."""
    job = start(launch__kubernetes__max_pod_failures=1, **long(0.01, 16))
    go_on(job, run_dir)
    job.pods[1].signal(signal.SIGTERM)
    job.wait_for(lambda: len(job.history) == 2)
    assert job.codes(0) == job.codes(1) == [75], job.report()
    assert job.failed == 0
    go_on(job, run_dir)
    job.pods[0].signal(signal.SIGKILL)
    assert job.wait() == "Complete", job.report()
    assert job.codes(0)[:2] == [75, 137], job.report()
    assert set(job.codes(1)[1:]) <= {75, 0}, job.report()  # has lost the place where they meet
    assert job.failed == 1
    assert status(run_dir) == ("finished", 2)


@nightly
def test_a_pod_leaves_and_comes(start: Start, run_dir: Path) -> None:
    """The other one goes on without it, and with the one that takes its place under the same name of the job."""
    job = start("1:2", **long(0.04, 24))
    go_on(job, run_dir)
    job.unschedulable.add(1)
    job.pods[1].is_disrupted = True  # its node is lost, and there is no other
    job.pods[1].signal(signal.SIGKILL)
    job.wait_for(lambda: job.codes(1) == [137])
    go_on(job, run_dir)
    job.unschedulable.clear()
    assert job.wait() == "Complete", job.report()
    assert job.codes(0) in ([], [0]), job.report()
    assert job.failed == 0
    attempts = json.loads((run_dir / "attempts.json").read_text())
    assert [attempt["num_processes"] for attempt in attempts] == [2, 1, 2], job.report()
    assert status(run_dir) == ("finished", 2)


def test_a_bad_config_ends_the_job_at_once(start: Start) -> None:
    job = start(data__train={"name": "slow:MissingOnRank1", "args": {"length": 60}})
    assert job.wait() == "Failed"
    assert [ended.action for ended in job.history] == ["FailJob"], job.report()
    assert "data.train: rank 1: no such mount" in job.report()
