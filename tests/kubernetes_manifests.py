"""Configs of jobs on Kubernetes, and the Job and the pod that come of their manifests, whatever their kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conftest import WriteConfig
from kubernetes_pods import job_of

from trainer.config import Config, load_config

Manifest = dict[str, Any]

PREFIX = "launch__kubernetes__"
BASE = {f"{PREFIX}image": "me/lockstep:1", f"{PREFIX}volume_claim": "runs", "run__dir": "runs/tiny"}
RICH = {
    f"{PREFIX}namespace": "research",
    f"{PREFIX}gpus_per_node": 8,
    f"{PREFIX}cpus_per_node": 32,
    f"{PREFIX}memory_per_node": "200GiB",
    f"{PREFIX}node_selector": {"cloud.google.com/gke-accelerator": "a100"},
    "launch__environment": {"NCCL_DEBUG": "INFO"},
    "launch__nodes": "1:4",
    "launch__port": 30000,
}
STORED = {f"{PREFIX}volume_claim": None, "checkpoint__dir": "s3://bucket/run"}
KINDS: dict[str, Manifest] = {
    "job": {},
    "trainjob": {f"{PREFIX}kind": "trainjob"},
    "cluster-runtime": {f"{PREFIX}kind": "trainjob", f"{PREFIX}runtime": "torch-distributed"},
}
# Of Kubeflow Trainer, which torch's plugin completes.
CLUSTER_RUNTIME: Manifest = {
    "spec": {
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "theirs"}]}}},
                        },
                    }
                ]
            }
        }
    }
}


def config_of(write_config: WriteConfig, **changes: Any) -> Config:
    return load_config(str(write_config(**{**BASE, **changes})), [])


def as_job(manifests: Mapping[str, Manifest]) -> Manifest:
    """Returns the Job that comes of manifests of any kind."""
    if "Job" in manifests:
        return manifests["Job"]
    return job_of(manifests["TrainJob"], manifests.get("TrainingRuntime", CLUSTER_RUNTIME))


def pod_of(manifests: Mapping[str, Manifest]) -> Manifest:
    pod = as_job(manifests)["spec"]["template"]["spec"]
    assert isinstance(pod, dict)
    return pod


def container_of(manifests: Mapping[str, Manifest]) -> Manifest:
    (container,) = pod_of(manifests)["containers"]
    assert isinstance(container, dict)
    return container


def variables_of(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    return {v["name"]: v["value"] for v in container_of(manifests)["env"] if "value" in v}
