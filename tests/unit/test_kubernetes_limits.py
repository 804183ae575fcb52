"""What a job on Kubernetes cannot be: settings that are refused, what is lost with a pod, names that are too long."""

from __future__ import annotations

import logging
import re

import pytest
from conftest import WriteConfig
from kubernetes_manifests import BASE, KINDS, PREFIX, STORED, Manifest, config_of

from launch import kubernetes
from launch.cli import main
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("run_name", "longest", "expected"),
    [
        ("digits", 61, "digits"),
        ("My.Run_2", 61, "my-run-2-[0-9a-f]{6}"),
        ("2024-run", 61, "run-2024-run-[0-9a-f]{6}"),
        ("x" * 80, 61, "x{54}-[0-9a-f]{6}"),
        ("a-" * 40, 50, "[a-]+-[0-9a-f]{6}"),
        ("9._", 61, "run-9-[0-9a-f]{6}"),
    ],
)
def test_names(run_name: str, longest: int, expected: str) -> None:
    name = kubernetes.derive_name(run_name, longest)
    assert re.fullmatch(expected, name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= longest


def test_no_two_runs_have_one_name() -> None:
    names = ["my-run", "My-Run", "my.run", "my_run", "my-run.", "x" * 70, "x" * 71]
    assert len({kubernetes.derive_name(name, 61) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({f"{PREFIX}image": None}, "launch.kubernetes.image: is missing"),
        ({f"{PREFIX}volume_claim": None}, "launch.kubernetes.volume_claim: is missing: runs/tiny would be gone"),
        (
            {**STORED, "memory__on_oom": "shrink", "launch__nodes": "1:2"},
            "memory.on_oom: needs a run folder that all pods",
        ),
        ({f"{PREFIX}gpus_per_node": 2, "launch__processes": 3}, "launch.processes: 3 processes: each pod has 2 GPUs"),
        ({f"{PREFIX}memory_per_node": "8GiB"}, "launch.kubernetes.shared_memory: 8GiB counts as memory of the pod"),
        ({"launch__environment": {"POD_IP": "1"}}, "launch.environment: POD_IP is set by the job itself"),
        ({f"{PREFIX}runtime": "x"}, "launch.kubernetes.runtime: has no effect with kind: job"),
        ({**KINDS["trainjob"], "launch__environment": {"PET_NNODES": 1}}, "launch.environment: PET_NNODES is set"),
        ({**KINDS["cluster-runtime"], f"{PREFIX}secrets": ["s"]}, "launch.kubernetes.secrets: a TrainJob cannot say"),
        ({**KINDS["cluster-runtime"], f"{PREFIX}max_pod_failures": 3}, "launch.kubernetes.max_pod_failures: a TrainJ"),
        ({"tracking__wandb": {"tags": ["x" * 1_100_000]}}, "too large for a ConfigMap"),
    ],
)
def test_what_does_not_go_together(changes: Manifest, expected: str, write_config: WriteConfig) -> None:
    with pytest.raises(UserError) as raised:
        kubernetes.manifests(config_of(write_config, **changes))
    (problem,) = raised.value.problems
    assert str(problem).startswith(expected) or expected in str(problem)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("namespace", "My Team"),
        ("gpu_resource", "gpu"),
        ("memory_per_node", "90%"),
        ("shared_memory", 0.5),
        ("mount_path", "workspace"),
        ("node_selector", {"a b": "c"}),
        ("node_selector", {"spot": True}),
        ("secrets", ["A_B"]),
    ],
)
def test_values_that_no_cluster_takes(key: str, value: object, write_config: WriteConfig) -> None:
    with pytest.raises(UserError, match=f"launch.kubernetes.{key}"):
        config_of(write_config, **{PREFIX + key: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"run__dir": "/scratch/tiny"}, ["run.dir: /scratch/tiny is not below launch.kubernetes.mount_path, /worksp"]),
        ({"run__dir": "/workspace/runs/tiny"}, []),
        ({"checkpoint__dir": "/scratch"}, ["checkpoint.dir: /scratch is not below"]),
        ({"checkpoint__dir": "s3://bucket/run"}, []),
        (
            {"checkpoint__dir": "s3://bucket/run", f"{PREFIX}volume_claim": None},
            ["run.dir: runs/tiny is gone with its"],
        ),
        ({"run__dir": "/nfs/tiny", f"{PREFIX}volume_claim": None}, ["run.dir: /nfs/tiny is gone with its pod"]),
    ],
)
def test_what_is_lost_with_a_pod(
    changes: Manifest, expected: list[str], write_config: WriteConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lockstep"):
        kubernetes.manifests(config_of(write_config, **changes))
    assert len(caplog.messages) == len(expected)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, expected, strict=True))


def test_a_problem_names_the_line(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(**{**BASE, f"{PREFIX}memory_per_node": "4GiB"})
    assert main(["kubernetes", "--config", str(file)]) == 2
    assert re.fullmatch(rf"error: {file}:\d+: launch.kubernetes.shared_memory: .*\n", capsys.readouterr().err)
