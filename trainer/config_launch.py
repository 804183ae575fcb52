"""The `launch` section: where a job runs. What each target makes of it is in `launch`. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from trainer.config_values import (
    Bool,
    Bytes,
    NodeRange,
    Nodes,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    Section,
    TimeSpan,
)

DEFAULT_PORT = 29400  # torchrun's

Text = Annotated[str, Field(min_length=1)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]


def _variables(value: object) -> object:
    if isinstance(value, dict):
        for name, text in value.items():
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)) is None:
                raise ValueError(f"'{name}' cannot be the name of an environment variable")
            if not isinstance(text, str | int | float) or isinstance(text, bool) or "\n" in str(text):
                raise ValueError(f"{name} must be text in one line (got {text!r}); write quotes around it")
        return {str(name): str(text) for name, text in value.items()}
    return value


Variables = Annotated[dict[str, str], BeforeValidator(_variables)]

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"


def _labels(value: object) -> object:
    if isinstance(value, dict):
        for name, text in value.items():
            if re.fullmatch(rf"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?{_LABEL}", str(name)) is None:
                raise ValueError(f"'{name}' cannot be the name of a label")
            if isinstance(text, bool) or re.fullmatch(rf"({_LABEL})?", str(text)) is None:
                raise ValueError(f"{name} cannot be {text!r}; write quotes around text")
        return {str(name): str(text) for name, text in value.items()}
    return value


Labels = Annotated[dict[str, str], BeforeValidator(_labels)]
KubernetesName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]


class HostsConfig(Section):
    """`python -m launch hosts`: machines that are reached over OpenSSH."""

    names: tuple[Text, ...] = Field(
        (), description="Hosts, as `ssh` takes them: `name`, `user@name`, or a `Host` of ssh's config."
    )
    hostfile: Text | None = Field(
        None, description="File with a host per line instead; `slots=N` after a name and `#` comments are passed over."
    )
    folder: Text | None = Field(
        None, description="Folder of this code and of relative paths on every host. Default: the one here."
    )
    python: Text | None = Field(None, description="Python on every host. Default: the one here.")
    ssh_options: tuple[Text, ...] = Field((), description="Arguments for every `ssh`, such as `-F` and a file.")
    setup: tuple[Text, ...] = Field((), description="Lines of bash before Python, such as `source /opt/env.sh`.")
    clock_tolerance: Seconds = Field(TimeSpan(5.0), description="How far apart the hosts' clocks may be.")
    return_timeout: Seconds = Field(
        TimeSpan(300.0),
        description="How long a job that has restarts left waits for lost hosts that it needs. A host that it does not "
        "need is tried as long as it runs.",
    )


def _slurm_time(value: object) -> object:
    if isinstance(value, bool) or re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", str(value)) is None:
        raise ValueError(f"write minutes, hours:minutes:seconds or days-hours:minutes:seconds (got {value!r})")
    return str(value)


SlurmTime = Annotated[
    str,
    BeforeValidator(_slurm_time),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^[\d:-]+$"}]}),
]


class SlurmConfig(Section):
    """`python -m launch slurm`: what the batch script asks for."""

    partition: Text | None = Field(None, description="sbatch's --partition. Default: the cluster's.")
    account: Text | None = Field(None, description="sbatch's --account.")
    qos: Text | None = Field(None, description="sbatch's --qos.")
    time: SlurmTime | None = Field(
        None, description="Time limit as sbatch takes it, such as 30 (minutes), 4:00:00 or 2-12:00:00."
    )
    constraint: Text | None = Field(None, description="sbatch's --constraint: features that nodes must have.")
    gpus_per_node: Annotated[str, Field(pattern=r"^([A-Za-z][\w.-]*:)?[1-9]\d*$")] | PositiveInt | None = Field(
        None, description="GPUs of each node, such as 8 or `a100:8`. Default: none is asked for."
    )
    cpus_per_node: PositiveInt | None = Field(None, description="Cores of each node. Default: the cluster's.")
    memory_per_node: Bytes | None = Field(None, description="Memory of each node, such as 200GiB.")
    exclusive: Bool = Field(False, description="Take whole nodes.")
    array: Annotated[str, Field(pattern=r"^[\d,:%-]+$")] | None = Field(
        None,
        description="sbatch's --array, such as '0-3': a run each, whose name and folder end in the task's number and "
        "whose seed is `run.seed` plus that number; `checkpoint.dir`, if set, ends in it, too.",
    )
    requeue: Bool = Field(
        True, description="Go on by itself, as the same job, after preemption and when the time limit comes."
    )
    setup: tuple[Text, ...] = Field(
        (), description="Lines of bash before the job, such as `module load cuda/13.0` or `source venv/bin/activate`."
    )
    python: Text | None = Field(
        None, description="Python on the nodes. Default: the one here, or `python` in a container."
    )
    container: Text | None = Field(
        None, description="What runs each command in a container, such as `apptainer exec --nv /images/train.sif`."
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other option of sbatch by its long name, such as `nice: 100`; true for one without a value. "
        "It wins over what is written above.",
    )


class KubernetesConfig(Section):
    """`python -m launch kubernetes`: what the manifests say."""

    kind: Literal["job", "trainjob"] = Field(
        "job",
        description="`job`: an Indexed Job with a headless service, which every cluster has; `trainjob`: Kubeflow "
        "Trainer's TrainJob.",
    )
    image: Text | None = Field(None, description="Container image, such as one built from launch/Dockerfile.")
    namespace: KubernetesName | None = Field(None, description="Namespace. Default: that of the current context.")
    runtime: KubernetesName | None = Field(
        None,
        description="A TrainJob's ClusterTrainingRuntime, such as `torch-distributed`, whose retry policy is then that "
        "of the job. Default: a TrainingRuntime of its own.",
    )
    gpus_per_node: PositiveInt | None = Field(
        None, description="GPUs of each pod. Default: none is asked for, and training is on the CPU."
    )
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = Field(
        "nvidia.com/gpu", description="Name of the GPU resource."
    )
    cpus_per_node: PositiveInt | None = Field(None, description="Cores of each pod.")
    memory_per_node: Bytes | None = Field(None, description="Memory of each pod, such as 200GiB.")
    shared_memory: Bytes = Field(
        "8GiB",
        description="Size of /dev/shm, which loader workers hand batches over in. It counts as memory of the pod.",
    )
    volume_claim: KubernetesName | None = Field(
        None, description="A PersistentVolumeClaim that all pods can write, for run folders and data."
    )
    mount_path: Annotated[str, Field(pattern=r"^/.+")] = Field(
        "/workspace", description="Where that volume is; relative paths, such as `runs/`, are below it."
    )
    secrets: tuple[KubernetesName, ...] = Field(
        (), description="Secrets whose keys become environment variables, such as one with WANDB_API_KEY."
    )
    node_selector: Labels = Field(default_factory=dict, description="Labels that nodes must have.")
    max_pod_failures: NonNegativeInt = Field(
        10,
        description="Start failed pods again so many times. Pods that were evicted or stopped, and those that ended "
        "because another pod failed, are started again without counting; a bad config ends the job at once.",
    )


class LaunchConfig(Section):
    """How `python -m launch` starts and restarts a job, and where."""

    nodes: Nodes = Field(
        NodeRange(1, 1),
        description="Machines, for the targets hosts, slurm and kubernetes: 4, or '1:4' for a job that goes on with "
        "those that are left, and takes others in, from its last checkpoint.",
    )
    processes: PositiveInt | None = Field(
        None, description="Processes on each machine. Default: one per GPU, or one where there is no GPU."
    )
    max_restarts: NonNegativeInt = Field(
        0, description="Start a job that failed again so many times, from its last checkpoint, by itself."
    )
    port: Port | None = Field(
        None, description="Where machines meet on the first one (TCP). Default: a free one, or the job's own."
    )
    interface: Text | None = Field(
        None,
        description="Network interface for traffic between machines, such as `eth0`. Default: NCCL chooses; gloo takes "
        "the one that leads to the first machine.",
    )
    environment: Variables = Field(
        default_factory=dict, description="Environment variables of every process, such as `NCCL_DEBUG: INFO`."
    )
    hosts: HostsConfig = Field(default_factory=HostsConfig, description="Machines that are reached over OpenSSH.")
    slurm: SlurmConfig = Field(default_factory=SlurmConfig, description="What a Slurm job asks for.")
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig, description="What Kubernetes is told.")

    @model_validator(mode="after")
    def _one_list_of_hosts(self) -> LaunchConfig:
        if self.hosts.names and self.hosts.hostfile:
            raise ValueError("hosts.names and hosts.hostfile both say which machines: set one of them")
        return self
