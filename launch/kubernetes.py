"""`python -m launch kubernetes`: the manifests of a job. Nothing here speaks to a cluster.

Two kinds: a plain Indexed Job with a headless service, and Kubeflow Trainer's TrainJob. In both, every pod runs
`python -m launch agent` with the same config, which travels in a ConfigMap; the agents meet at the first pod's name.
Which pods are started again, and which of them count as failed, is the Job's pod failure policy, whose exit codes are
the agent's with `--replaceable`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from launch.stopping import shutdown_seconds
from trainer.cli import EXIT_STOPPED, EXIT_USAGE
from trainer.config import Config
from trainer.errors import Problem, UserError
from trainer.units import parse_bytes

logger = logging.getLogger("lockstep")

Manifest = dict[str, Any]

CONFIG_FOLDER, CONFIG_FILE = "/etc/lockstep", "config.yaml"
JOB_CONTAINER = "train"
TRAINJOB_CONTAINER = TRAINJOB_STEP = "node"  # Kubeflow Trainer finds both by this name
_GROUP = 1000  # of the user in launch/Dockerfile; every pod's user gets it, so as to write the volume
_END_SECONDS = 15  # which an agent has after its ranks
_NAME_LENGTH = 63  # of a host name, which a pod's is
_CONFIG_BYTES = 1_000_000  # a ConfigMap is at most 1 MiB
_OWN_VARIABLES = ("POD_IP", "JOB_UID", "JOB_COMPLETION_INDEX")
_TORCH_VARIABLES = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


def render(config: Config) -> str:
    """Returns the manifests of a job, as YAML for `kubectl apply -f -`.

    Raises:
        UserError: something is missing or does not go together.
    """
    documents = manifests(config)
    kind, name = documents[-1]["kind"].lower(), documents[-1]["metadata"]["name"]
    head = f"# Run {config.run.name}, written by `python -m launch kubernetes`, as {kind}/{name}.\n"
    return head + "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120) for document in documents
    )


def manifests(config: Config) -> list[Manifest]:
    """Returns the objects that make a job, the job itself last.

    Raises:
        UserError: something is missing or does not go together.
    """
    problems = _problems(config)
    if problems:
        raise UserError(*problems)
    _warn(config)
    settings, most = config.launch.kubernetes, config.launch.nodes.most
    if settings.kind == "job":
        name = derive_name(config.run.name, _NAME_LENGTH - len(f"-{most - 1}"))
    else:
        name = derive_name(config.run.name, _NAME_LENGTH - len(f"-{TRAINJOB_STEP}-0-{most - 1}-abcde"))
    config_map = _config_map(config, name)
    map_name = str(config_map["metadata"]["name"])
    if settings.kind == "job":
        return [config_map, _service(config, name), _job(config, name, map_name)]
    if settings.runtime is None:
        return [config_map, _training_runtime(config, name, map_name), _train_job(config, name, map_name)]
    return [config_map, _train_job(config, name, map_name)]


def derive_name(run_name: str, longest: int) -> str:
    """Returns a name that a service and a pod can have, and that no other run's name leads to.

    Args:
        run_name: as the user wrote it.
        longest: number of characters that the name may have.
    """
    label = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not label[:1].isalpha():  # a service's name begins with a letter
        label = f"run-{label}".rstrip("-")
    if label == run_name and len(label) <= longest:
        return label
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:6]
    return f"{label[: longest - 7].rstrip('-')}-{digest}"


def quantity(amount: str) -> str:
    """Returns an amount of memory such as `200GiB` as Kubernetes writes it."""
    num_bytes = parse_bytes(amount)
    for unit, size in (("Gi", 1024**3), ("Mi", 1024**2), ("Ki", 1024)):
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)


def _problems(config: Config) -> list[Problem]:
    settings, prefix = config.launch.kubernetes, "launch.kubernetes"
    found = []
    if settings.image is None:
        found.append(Problem("is missing: pods need an image; launch/Dockerfile makes one", f"{prefix}.image"))
    is_own_disk = settings.volume_claim is None and "://" not in (config.checkpoint.dir or "")
    folder = config.checkpoint.dir or str(config.run_dir)
    if is_own_disk and not folder.startswith("/"):
        message = f"is missing: {folder} would be gone with its pod; or save elsewhere, as checkpoint.dir: s3://..."
        found.append(Problem(message, f"{prefix}.volume_claim"))
    if config.memory.on_oom == "shrink" and config.launch.nodes.most > 1 and settings.volume_claim is None:
        message = f"needs a run folder that all pods see: set {prefix}.volume_claim"
        found.append(Problem(message, "memory.on_oom"))
    processes, gpus = config.launch.processes, settings.gpus_per_node
    if processes and gpus and processes > gpus:
        found.append(Problem(f"{processes} processes: each pod has {gpus} GPUs", "launch.processes"))
    memory = settings.memory_per_node
    if memory is not None and parse_bytes(settings.shared_memory) >= parse_bytes(memory):
        message = f"{settings.shared_memory} counts as memory of the pod, which has {memory} in all"
        found.append(Problem(message, f"{prefix}.shared_memory"))
    reserved = set(_OWN_VARIABLES) | (set(_TORCH_VARIABLES) if settings.kind == "trainjob" else set())
    for name in sorted(reserved & set(config.launch.environment)):
        found.append(Problem(f"{name} is set by the job itself", "launch.environment"))
    if settings.kind == "job" and settings.runtime is not None:
        found.append(Problem("has no effect with kind: job", f"{prefix}.runtime"))
    elif settings.runtime is not None:
        reason = f"a TrainJob cannot say so of the runtime '{settings.runtime}'; leave out {prefix}.runtime"
        if settings.secrets:
            found.append(Problem(reason, f"{prefix}.secrets"))
        if "max_pod_failures" in settings.model_fields_set:
            found.append(Problem(reason, f"{prefix}.max_pod_failures"))
    if len(config.to_yaml().encode()) > _CONFIG_BYTES:
        found.append(Problem("the config is too large for a ConfigMap, which holds 1 MiB"))
    return found


def _warn(config: Config) -> None:
    """Says what will be lost with a pod, where that may be meant."""
    settings = config.launch.kubernetes
    for key, text in (("run.dir", str(config.run_dir)), ("checkpoint.dir", config.checkpoint.dir)):
        if text is None or "://" in text:
            continue
        if settings.volume_claim is None:
            logger.warning("%s: %s is gone with its pod, unless the pod has a volume there of its own", key, text)
        elif text.startswith("/") and not PurePosixPath(text).is_relative_to(settings.mount_path):
            logger.warning("%s: %s is not below launch.kubernetes.mount_path, %s", key, text, settings.mount_path)


def _config_map(config: Config, name: str) -> Manifest:
    """Returns the config as an object that never changes: pods that are replaced must read what the others did."""
    text = config.to_yaml()
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(config, f"{name}-{digest}", name)}
    return {**head, "immutable": True, "data": {CONFIG_FILE: text}}


def _service(config: Config, name: str) -> Manifest:
    """Returns what gives pods names: `<job>-0.<job>` is the first one's, ready or not."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(config, name, name), "spec": spec}


def _job(config: Config, name: str, config_map: str) -> Manifest:
    count = config.launch.nodes.most
    command, arguments = _command(config, name, f"{name}-0.{name}", "$(JOB_COMPLETION_INDEX)")
    container = {
        "name": JOB_CONTAINER,
        "image": config.launch.kubernetes.image,
        "command": command,
        "args": arguments,
        "env": _environment(config),
        **_resources(config, "resources"),
        **_container_parts(config),
    }
    pod = {"subdomain": name, **_pod_parts(config, config_map, container)}
    spec = {
        "completions": count,
        "parallelism": count,
        "completionMode": "Indexed",
        **_retry_policy(config, JOB_CONTAINER),
        "template": {"metadata": {"labels": _metadata(config, name, name)["labels"]}, "spec": pod},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, name, name), "spec": spec}


def _train_job(config: Config, name: str, config_map: str) -> Manifest:
    """Returns a TrainJob on its own runtime, or on one of the cluster's, of which it may change a part only."""
    settings = config.launch.kubernetes
    port = config.launch.port or "$(PET_MASTER_PORT)"
    least = f"{config.launch.nodes.least}:" if config.launch.nodes.is_elastic else ""
    command, arguments = _command(config, name, f"$(PET_MASTER_ADDR):{port}", "$(PET_NODE_RANK)")
    if settings.runtime is not None and settings.volume_claim is not None:  # whose pods have a working directory
        command = ["env", f"--chdir={settings.mount_path}", *command]
    spec: Manifest = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime" if settings.runtime is None else "ClusterTrainingRuntime",
            "name": settings.runtime or name,
        },
        "trainer": {
            "image": settings.image,
            "numNodes": config.launch.nodes.most,
            "numProcPerNode": config.launch.processes or settings.gpus_per_node or 1,
            "command": command,
            "args": [*arguments, "--nodes", f"{least}$(PET_NNODES)"],
            "env": _environment(config),
            **_resources(config, "resourcesPerNode"),
        },
    }
    if settings.runtime is not None:
        container = {"name": TRAINJOB_CONTAINER, "volumeMounts": _mounts(config)}
        pod = {**_patched_pod_parts(config, config_map), "containers": [container]}
        replicated = {"name": TRAINJOB_STEP, "template": {"spec": {"template": {"spec": pod}}}}
        patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
        spec["runtimePatches"] = [{"manager": "lockstep/launch", "trainingRuntimeSpec": patch}]
    head = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob"}
    return {**head, "metadata": _metadata(config, name, name), "spec": spec}


def _training_runtime(config: Config, name: str, config_map: str) -> Manifest:
    container = {
        "name": TRAINJOB_CONTAINER,
        "image": config.launch.kubernetes.image,
        **_container_parts(config),
    }
    job = {
        **_retry_policy(config, TRAINJOB_CONTAINER),
        "template": {
            "metadata": {"labels": _metadata(config, name, name)["labels"]},
            "spec": _pod_parts(config, config_map, container),
        },
    }
    step = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    replicated = {"name": TRAINJOB_STEP, "replicas": 1, "template": {"metadata": step, "spec": job}}
    metadata = _metadata(config, name, name)
    metadata["labels"] = {**metadata["labels"], "trainer.kubeflow.org/framework": "torch"}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata,
        "spec": {
            "mlPolicy": {"numNodes": config.launch.nodes.most, "torch": {}},
            "template": {"spec": {"replicatedJobs": [replicated]}},
        },
    }


def _metadata(config: Config, name: str, job: str) -> Manifest:
    namespace = config.launch.kubernetes.namespace
    labels = {"app.kubernetes.io/name": "lockstep", "app.kubernetes.io/instance": job}
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": labels}


def _retry_policy(config: Config, container: str) -> Manifest:
    """Returns what a Job makes of pods that end: the first rule that fits decides."""
    codes = {"containerName": container, "operator": "In"}
    rules = [
        {"action": "FailJob", "onExitCodes": {**codes, "values": [EXIT_USAGE]}},
        {"action": "Ignore", "onExitCodes": {**codes, "values": [EXIT_STOPPED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "backoffLimit": config.launch.kubernetes.max_pod_failures,
        "podFailurePolicy": {"rules": rules},
        # A pod that comes when the others have finished would wait for them for ever.
        "successPolicy": {"rules": [{"succeededCount": 1}]},
    }


def _command(config: Config, name: str, place: str, node_rank: str) -> tuple[list[str], list[str]]:
    if "$(" not in place and config.launch.port is not None:
        place = f"{place}:{config.launch.port}"
    arguments = ["--config", f"{CONFIG_FOLDER}/{CONFIG_FILE}", "--node-rank", node_rank, "--rendezvous", place]
    # A Job that is made again meets anew; its pods that are replaced meet the others.
    arguments += ["--job", f"{name}.$(JOB_UID)", "--address", "$(POD_IP)", "--replaceable"]
    return ["python", "-m", "launch", "agent"], arguments


def _environment(config: Config) -> list[Manifest]:
    """Returns the variables of the pods. What the arguments above name must be among them."""
    settings = config.launch.kubernetes
    variables: dict[str, str] = {}
    if settings.gpus_per_node is None:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # an image may ask for all GPUs of the node
        if settings.cpus_per_node is not None:  # the number of cores that a container sees is that of the node
            threads = max(1, settings.cpus_per_node // (config.launch.processes or 1))
            variables["OMP_NUM_THREADS"] = str(threads)
    variables.update(config.launch.environment)
    literal = [{"name": name, "value": _literal(text)} for name, text in variables.items()]
    uid = "metadata.labels['batch.kubernetes.io/controller-uid']"
    fields = {"POD_IP": "status.podIP", "JOB_UID": uid}
    return [*literal, *({"name": n, "valueFrom": {"fieldRef": {"fieldPath": p}}} for n, p in fields.items())]


def _literal(text: str) -> str:
    """Returns a variable's text such that Kubernetes puts no other variable in."""
    return text.replace("$(", "$$(")


def _resources(config: Config, key: str) -> Manifest:
    """Returns what each pod gets, under a key, or nothing where nothing is asked for."""
    settings = config.launch.kubernetes
    amounts: dict[str, str | int] = {}
    if settings.cpus_per_node is not None:
        amounts["cpu"] = str(settings.cpus_per_node)
    if settings.memory_per_node is not None:
        amounts["memory"] = quantity(settings.memory_per_node)
    if settings.gpus_per_node is not None:
        amounts[settings.gpu_resource] = settings.gpus_per_node
    return {key: {"requests": amounts, "limits": dict(amounts)}} if amounts else {}


def _container_parts(config: Config) -> Manifest:
    """Returns what a container has in both kinds."""
    settings = config.launch.kubernetes
    parts: Manifest = {"volumeMounts": _mounts(config)}
    if settings.volume_claim is not None:
        parts["workingDir"] = settings.mount_path
    if settings.secrets:
        parts["envFrom"] = [{"secretRef": {"name": name}} for name in settings.secrets]
    return parts


def _mounts(config: Config) -> list[Manifest]:
    settings = config.launch.kubernetes
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    if settings.volume_claim is not None:
        mounts.append({"name": "volume", "mountPath": settings.mount_path})
    return mounts


def _pod_parts(config: Config, config_map: str, container: Mapping[str, Any]) -> Manifest:
    """Returns what a pod has in both kinds."""
    return {
        "restartPolicy": "Never",  # a pod failure policy needs it
        "enableServiceLinks": False,  # a service by the name of `master` would set MASTER_PORT
        **_patched_pod_parts(config, config_map),
        "containers": [container],
    }


def _patched_pod_parts(config: Config, config_map: str) -> Manifest:
    """Returns what a TrainJob may say of pods of the cluster's runtime, too."""
    settings = config.launch.kubernetes
    memory = {"medium": "Memory", "sizeLimit": quantity(settings.shared_memory)}
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "shared-memory", "emptyDir": memory},
    ]
    parts: Manifest = {"terminationGracePeriodSeconds": shutdown_seconds(config) + _END_SECONDS}
    if settings.node_selector:
        parts["nodeSelector"] = dict(settings.node_selector)
    if settings.volume_claim is not None:
        volumes.append({"name": "volume", "persistentVolumeClaim": {"claimName": settings.volume_claim}})
        parts["securityContext"] = {"fsGroup": _GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    return {**parts, "volumes": volumes}


class _Dumper(yaml.SafeDumper):
    """Writes long texts as they are, and everything in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
