"""What a cluster makes of a job's manifests, on hosts of `cluster_machines`: pods, names, variables, and the policy.

Stands for the Job controller, the kubelet and cluster DNS, and for Kubeflow Trainer with its `torch` plugin; as far as
our manifests use them, and only for indexed jobs whose pods have one container. A pod is a process with its own process
ids, /etc/hosts and files of the ConfigMap, on the host of its index.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cluster_machines import Hosts
from conftest import REPOSITORY, SUPPORT

PATIENCE = 240  # seconds

Manifest = dict[str, Any]

# Makes what the kubelet makes before it starts a container: the ConfigMap's files and the names of the cluster.
_POD = """
set -e
mount -t tmpfs none /mnt; mkdir /mnt/upper /mnt/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc
mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/resolv.conf" /etc/resolv.conf
mkdir -p "$2"; mount --bind -o ro "$1/config" "$2"
cd "$3"; shift 3; exec "$@"
"""


@dataclass
class Pod:
    """A pod, from its start to its end."""

    index: int
    number: int  # of all pods of the job
    process: subprocess.Popen[bytes]
    log: Path
    is_disrupted: bool = False  # whether it has the condition DisruptionTarget

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the pod's first process; SIGKILL ends all of them."""
        if number == signal.SIGKILL:
            self.process.kill()  # the first process dies with it, and with that one the pod
            return
        for child in psutil.Process(self.process.pid).children():
            child.send_signal(number)


@dataclass
class Ended:
    """What became of a pod."""

    index: int
    code: int
    action: str  # of the policy, or Succeeded
    output: str


@dataclass
class JobController:
    """Runs an Indexed Job, whose pods have the names `<hostname>-<index>.<subdomain>`."""

    hosts: Hosts
    job: Manifest
    config_map: Manifest
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)  # of the image
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    pods: dict[int, Pod] = field(default_factory=dict)
    history: list[Ended] = field(default_factory=list)
    unschedulable: set[int] = field(default_factory=set)  # indexes whose pods are pending
    failed: int = 0
    state: str = "Running"

    def __post_init__(self) -> None:
        self.spec = self.job["spec"]
        self.pod_spec = self.spec["template"]["spec"]
        (self.container,) = self.pod_spec["containers"]
        assert self.spec["completionMode"] == "Indexed"
        assert self.pod_spec["restartPolicy"] == "Never"
        (self.folder / "config").mkdir(parents=True)
        for name, text in self.config_map["data"].items():
            (self.folder / "config" / name).write_text(text)
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody: at once, not after a time-out
        self._publish()

    def poll(self) -> None:
        """Does what is due: takes pods that have ended into account, starts those that are missing."""
        for pod in list(self.pods.values()):
            code = pod.process.poll()
            if code is not None and self.state == "Running":
                del self.pods[pod.index]
                self._account(pod, code if code >= 0 else 128 - code)
                self._publish()
        succeeded = {ended.index for ended in self.history if ended.code == 0}
        if self.state == "Running":
            for index in range(self.spec["completions"]):
                if index not in self.pods and index not in succeeded | self.unschedulable:
                    self._start(index)
        else:
            self.end()

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Polls until something is true."""
        end = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < end, self.report()
            self.poll()
            time.sleep(0.1)

    def wait(self) -> str:
        """Polls until the job has ended, and returns how: Complete or Failed."""
        self.wait_for(lambda: self.state != "Running")
        return self.state

    def end(self) -> None:
        """Ends all pods: with SIGTERM, and after the time that they have with SIGKILL."""
        for number, seconds in ((signal.SIGTERM, self.pod_spec["terminationGracePeriodSeconds"]), (signal.SIGKILL, 10)):
            for pod in self.pods.values():
                if pod.process.poll() is None:
                    pod.signal(number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and any(pod.process.poll() is None for pod in self.pods.values()):
                time.sleep(0.1)

    def report(self) -> str:
        """Returns all that pods have said, for a test that fails."""
        ended = [f"pod {e.index}, {e.code}, {e.action}:\n{e.output}" for e in self.history]
        return "\n".join([self.state, *ended, *(f"pod {p.index} runs:\n{p.output()}" for p in self.pods.values())])

    def codes(self, index: int) -> list[int]:
        """Returns the exit codes of the pods that an index has had."""
        return [ended.code for ended in self.history if ended.index == index]

    def _account(self, pod: Pod, code: int) -> None:
        action = "Succeeded" if code == 0 else self._action(pod, code)
        self.history.append(Ended(pod.index, code, action, pod.output()))
        if action == "FailJob":
            self.state = "Failed"
        elif action == "Count":
            self.failed += 1
            if self.failed > self.spec["backoffLimit"]:
                self.state = "Failed"
        elif action == "Succeeded":
            succeeded = {ended.index for ended in self.history if ended.code == 0}
            enough = [rule["succeededCount"] for rule in self.spec["successPolicy"]["rules"]]
            if len(succeeded) >= min([*enough, self.spec["completions"]]):
                self.state = "Complete"

    def _action(self, pod: Pod, code: int) -> str:
        """Returns the action of the first rule that fits."""
        for rule in self.spec["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule:
                wanted = rule["onExitCodes"]
                assert wanted["containerName"] == self.container["name"]
                if (code in wanted["values"]) == (wanted["operator"] == "In"):
                    return str(rule["action"])
            elif pod.is_disrupted and any(c["type"] == "DisruptionTarget" for c in rule["onPodConditions"]):
                return str(rule["action"])
        return "Count"

    def _start(self, index: int) -> None:
        variables = self._variables(index)

        def expand(text: str) -> str:
            return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)

        words = [expand(word) for word in [*self.container["command"], *self.container["args"]]]
        (mount,) = [mount for mount in self.container["volumeMounts"] if mount["name"] == "config"]
        place = [str(self.folder), mount["mountPath"], self.container.get("workingDir", "/")]
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", _POD, "pod"]
        command = self.hosts.command(index + 1, [*isolated, *place, *words])
        number = len(self.history) + len(self.pods)
        log = self.folder / f"pod-{number}-of-index-{index}.txt"
        image = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": "/nonexistent",
        }
        image["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(SUPPORT)])
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**image, **self.env, **variables}
            )
        self.pods[index] = Pod(index, number, process, log)
        self._publish()

    def _variables(self, index: int) -> dict[str, str]:
        """Returns the container's variables as the kubelet makes them."""
        annotation = "batch.kubernetes.io/job-completion-index"
        fields = {
            "status.podIP": self.hosts.address(index + 1),
            "metadata.labels['batch.kubernetes.io/controller-uid']": self.uid,
            f"metadata.annotations['{annotation}']": str(index),
        }
        found = {"JOB_COMPLETION_INDEX": str(index)}  # which the Job controller adds
        for variable in self.container["env"]:
            if "valueFrom" in variable:
                found[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            else:
                found[variable["name"]] = variable["value"].replace("$$", "$")
        return found

    def _publish(self) -> None:
        """Gives the pods that there are their names; a pod that is gone has none."""
        base, subdomain = self.job["metadata"]["name"], self.pod_spec["subdomain"]
        lines = ["127.0.0.1 localhost"]
        lines += [f"10.77.{self.hosts.slot}.{i} host{i}" for i in self.hosts.numbers]
        lines += [f"{self.hosts.address(index + 1)} {base}-{index}.{subdomain}" for index in self.pods]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")  # in place: it is mounted


def job_of(train_job: Manifest, runtime: Manifest) -> Manifest:
    """Returns the Job that Kubeflow Trainer and JobSet make of a TrainJob and its runtime."""
    trainer, name = train_job["spec"]["trainer"], train_job["metadata"]["name"]
    (replicated,) = copy.deepcopy(runtime["spec"]["template"]["spec"]["replicatedJobs"])
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    spec = replicated["template"]["spec"]
    pod = spec["template"]["spec"]
    pod["subdomain"] = name
    for patch in train_job["spec"].get("runtimePatches", []):
        (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        assert patched["name"] == replicated["name"]
        _merge(pod, patched["template"]["spec"]["template"]["spec"])
    (container,) = [container for container in pod["containers"] if container["name"] == "node"]
    container.update({key: trainer[key] for key in ("image", "command", "args") if key in trainer})
    if "resourcesPerNode" in trainer:
        container["resources"] = trainer["resourcesPerNode"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    torch = [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    container["env"] = [*container.get("env", []), *trainer["env"], *torch]
    spec.update(completions=trainer["numNodes"], parallelism=trainer["numNodes"], completionMode="Indexed")
    metadata = {"name": f"{name}-{replicated['name']}-0"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _merge(target: Manifest, patch: Manifest) -> None:
    """Lays a patch over an object, lists of named things by name."""
    for key, value in patch.items():
        if isinstance(value, dict):
            _merge(target.setdefault(key, {}), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and "name" in value[0]:
            found = {item["name"]: item for item in target.setdefault(key, [])}
            for item in value:
                if item["name"] in found:
                    _merge(found[item["name"]], item)
                else:
                    target[key].append(copy.deepcopy(item))
        else:
            target[key] = value
