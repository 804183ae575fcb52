"""The manifests of `python -m launch kubernetes`: valid by the real schemas, and each setting is found in them."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import REPOSITORY, WriteConfig
from dockerfile_parse import DockerfileParser
from jsonschema import ValidationError
from kubeflow_trainer_api import models
from kubernetes_manifests import (
    BASE,
    KINDS,
    PREFIX,
    RICH,
    STORED,
    Manifest,
    as_job,
    config_of,
    container_of,
    pod_of,
    variables_of,
)

from launch import kubernetes
from launch.cli import main
from trainer.config import load_config

# Values that the schemas leave open, and what the API server takes of those that we may write.
ENUMS = {
    "action": {"FailJob", "Ignore", "Count"},
    "completionMode": {"Indexed"},
    "fsGroupChangePolicy": {"Always", "OnRootMismatch"},
    "medium": {"", "Memory"},
    "operator": {"In", "NotIn"},
    "restartPolicy": {"Never"},  # with a pod failure policy
    "clusterIP": {"None"},
    "fieldPath": {"status.podIP", "metadata.labels['batch.kubernetes.io/controller-uid']"},
}


def walk(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from walk(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def check(manifest: Manifest) -> None:
    """Fails where the API server would refuse a manifest."""
    for key, value in walk(manifest):
        assert key not in ENUMS or value in ENUMS[key], f"{key}: {value}"
    if manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1":
        model = getattr(models, f"TrainerV1alpha1{manifest['kind']}")
        assert model.from_dict(manifest).to_dict() == manifest  # it drops what it does not know
        return
    for version in ("1.31", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.fixture
def made(write_config: WriteConfig) -> Callable[..., dict[str, Manifest]]:
    """Returns the manifests of a config with changes, by kind, as read back from the YAML."""

    def make(**changes: Any) -> dict[str, Manifest]:
        text = kubernetes.render(config_of(write_config, **changes))
        return {document["kind"]: document for document in yaml.safe_load_all(text)}

    return make


Made = Callable[..., dict[str, Manifest]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, RICH], ids=["few", "many"])
def test_the_schemas_take_them(kind: str, changes: Manifest, made: Made) -> None:
    manifests = made(**KINDS[kind], **changes)
    expected = {"job": ["Service", "Job"], "trainjob": ["TrainingRuntime", "TrainJob"], "cluster-runtime": ["TrainJob"]}
    assert list(manifests) == ["ConfigMap", *expected[kind]]
    for manifest in manifests.values():
        check(manifest)
    if kind != "cluster-runtime":  # of which we know only a part
        check(inner_job(manifests))


def inner_job(manifests: Mapping[str, Manifest]) -> Manifest:
    """Returns the Job of a TrainJob, without what torch's plugin adds."""
    job = copy.deepcopy(as_job(manifests))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["env"] = [variable for variable in container["env"] if not variable["name"].startswith("PET_")]
    return job


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Job", "spec.backofLimit", 3),
        ("Job", "spec.completions", "2"),
        ("Job", "spec.completionMode", "indexed"),
        ("Job", "spec.template.spec.restartPolicy", "OnFailure"),
        ("Job", "spec.template.spec.volumes.1.emptyDir.sizelimit", "1Gi"),
        ("Job", "spec.podFailurePolicy.rules.0.action", "Fail"),
        ("Job", "spec.podFailurePolicy.rules.0.onExitCodes.values", ["2"]),
        ("Service", "spec.publishNotReadyAddresses", "true"),
        ("ConfigMap", "data.config.yaml", 3),
        ("TrainJob", "spec.trainer.numProcPerNode", "auto"),
        ("TrainJob", "spec.trainer.workingDir", "/workspace"),
        ("TrainJob", "spec.runtimeRef.name", 3),
        ("TrainingRuntime", "spec.template.spec.replicatedJobs.0.template.spec.backofLimit", 3),
    ],
)
def test_the_schemas_refuse_others(kind: str, path: str, value: object, made: Made) -> None:
    manifest = made(**KINDS["trainjob" if "Train" in kind else "job"])[kind]
    check(manifest)
    place: Any = manifest
    *parents, last = ["data", "config.yaml"] if path.startswith("data") else path.split(".")
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place[parent]
    place[last] = value
    with pytest.raises((AssertionError, ValidationError, ValueError)):
        check(manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_what_pods_get(kind: str, made: Made) -> None:
    manifests = made(**KINDS[kind], **RICH, **{f"{PREFIX}shared_memory": "16GB", f"{PREFIX}mount_path": "/data"})
    pod, container = pod_of(manifests), container_of(manifests)
    amounts = {"cpu": "32", "memory": "200Gi", "nvidia.com/gpu": 8}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert container["image"] == "me/lockstep:1"
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
    assert volumes == {
        "config": {"configMap": {"name": manifests["ConfigMap"]["metadata"]["name"]}},
        "shared-memory": {"emptyDir": {"medium": "Memory", "sizeLimit": "15625000Ki"}},
        "volume": {"persistentVolumeClaim": {"claimName": "runs"}},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"config": "/etc/lockstep", "shared-memory": "/dev/shm", "volume": "/data"}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "a100"}
    assert pod["securityContext"]["fsGroup"] == 1000
    assert pod["terminationGracePeriodSeconds"] == 60
    assert variables_of(manifests)["NCCL_DEBUG"] == "INFO"
    assert "CUDA_VISIBLE_DEVICES" not in variables_of(manifests)
    if kind == "cluster-runtime":
        assert container["command"][:2] == ["env", "--chdir=/data"]
    else:
        assert container["workingDir"] == "/data"
    assert {manifest["metadata"]["namespace"] for manifest in manifests.values()} == {"research"}
    assert pod_of(made(**KINDS[kind], faults__grace="2 minutes"))["terminationGracePeriodSeconds"] == 150


def test_another_kind_of_gpu(made: Made) -> None:
    container = container_of(made(**{f"{PREFIX}gpus_per_node": 4, f"{PREFIX}gpu_resource": "amd.com/gpu"}))
    assert container["resources"]["limits"] == {"amd.com/gpu": 4}


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_which_pods_are_started_again(kind: str, made: Made) -> None:
    manifests = made(**KINDS[kind], **{f"{PREFIX}max_pod_failures": 7, f"{PREFIX}secrets": ["wandb", "bucket"]})
    spec, container = as_job(manifests)["spec"], container_of(manifests)
    codes = {"containerName": container["name"], "operator": "In"}
    assert spec["backoffLimit"] == 7
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {**codes, "values": [2]}},
        {"action": "Ignore", "onExitCodes": {**codes, "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    assert spec["successPolicy"] == {"rules": [{"succeededCount": 1}]}
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "bucket"}}]
    assert as_job(made(**KINDS[kind]))["spec"]["backoffLimit"] == 10


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_logs_are_found_by_label(kind: str, made: Made) -> None:
    manifests = made(**KINDS[kind])
    labels = as_job(manifests)["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "tiny"
    assert all(labels.items() <= manifest["metadata"]["labels"].items() for manifest in manifests.values())


def test_where_pods_meet(made: Made) -> None:
    manifests = made(launch__nodes="1:4")
    job, service = manifests["Job"], manifests["Service"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == pod_of(manifests)["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    text = " ".join(container_of(manifests)["args"])
    assert "--node-rank $(JOB_COMPLETION_INDEX) --rendezvous tiny-0.tiny --job tiny.$(JOB_UID)" in text
    assert text.endswith("--address $(POD_IP) --replaceable")
    assert "--rendezvous tiny-0.tiny:30000 " in " ".join(container_of(made(launch__port=30000))["args"])
    trainer = made(**KINDS["trainjob"], launch__nodes="2:4", launch__processes=3)["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 3)
    text = " ".join(trainer["args"])
    assert "--node-rank $(PET_NODE_RANK) --rendezvous $(PET_MASTER_ADDR):$(PET_MASTER_PORT) " in text
    assert text.endswith(" --nodes 2:$(PET_NNODES)")
    trainer = made(**KINDS["trainjob"], **{f"{PREFIX}gpus_per_node": 8}, launch__port=9)["TrainJob"]["spec"]["trainer"]
    assert trainer["numProcPerNode"] == 8
    assert "$(PET_MASTER_ADDR):9" in trainer["args"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_takes_what_pods_say(
    kind: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = made(**KINDS[kind], launch__nodes=2)
    file = tmp_path / "mounted.yaml"
    file.write_text(manifests["ConfigMap"]["data"]["config.yaml"])
    container = container_of(manifests)
    words = [*container["command"], *container["args"]]
    values = {"JOB_COMPLETION_INDEX": "1", "POD_IP": "10.1.2.3", "JOB_UID": "abc", "PET_NODE_RANK": "1"}
    values |= {"PET_MASTER_ADDR": "tiny-node-0-0.tiny", "PET_MASTER_PORT": "29500", "PET_NNODES": "2"}
    words = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in words]
    words[words.index("/etc/lockstep/config.yaml")] = str(file)
    start = words.index("python")
    assert words[start : start + 3] == ["python", "-m", "launch"]
    assert main([*words[start + 3 :], "--dry-run"]) == 0
    shown = capsys.readouterr().out
    place = "tiny-0.tiny:29400" if kind == "job" else "tiny-node-0-0.tiny:29500"
    assert f" --nnodes 2 --nproc-per-node 1 --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint {place} " in shown
    assert " --rdzv-id tiny.abc --rdzv-conf is_host=false," in shown
    assert " --local-addr 10.1.2.3 " in shown


def test_the_config_travels(write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config("base.yaml", **BASE)
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\noptim: {lr: 0.5}\n")
    arguments = ["--config", str(child), "--nodes", "1:3", "--processes", "2", "train.epochs=9"]
    assert main(["kubernetes", *arguments]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Run tiny, written by `python -m launch kubernetes`, as job/tiny.\n")
    config_map = next(yaml.safe_load_all(text))
    assert config_map["immutable"] is True
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", config_map["metadata"]["name"])
    mounted = tmp_path / "mounted.yaml"
    mounted.write_text(config_map["data"]["config.yaml"])
    wanted = ["launch.nodes=1:3", "launch.processes=2", "train.epochs=9"]
    assert load_config(str(mounted)).to_yaml() == load_config(str(child), wanted).to_yaml()
    for option in (["--dry-run"], ["--output", str(tmp_path / "job.yaml")]):
        assert main(["kubernetes", *arguments, *option]) == 0
        assert (capsys.readouterr().out or (tmp_path / "job.yaml").read_text()) == text
    assert main(["kubernetes", *arguments, "--output", str(tmp_path / "absent" / "job.yaml")]) == 2
    assert "absent/job.yaml: No such file" in capsys.readouterr().err
    other = [*arguments, "train.epochs=10"]
    assert main(["kubernetes", *other]) == 0  # pods of the first job, which are replaced, still read the first config
    assert next(yaml.safe_load_all(capsys.readouterr().out))["metadata"]["name"] != config_map["metadata"]["name"]


def test_the_first_command_of_its_page_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (REPOSITORY / "docs" / "launch-kubernetes.md").read_text()
    command = re.search(r"^    python -m launch (kubernetes .*) \| kubectl apply -f -$", text, re.MULTILINE)
    assert command is not None
    block = re.findall(r"```yaml\n(.*?)```", text[: command.start()], re.DOTALL)[-1]
    words = command[1].split()
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / words[words.index("--config") + 1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    for manifest in yaml.safe_load_all(capsys.readouterr().out):
        check(manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_names_leave_room_for_the_number_of_a_pod(kind: str, made: Made) -> None:
    name = made(**KINDS[kind], run__name="x" * 80, launch__nodes=1000)["Job" if kind == "job" else "TrainJob"]
    pod = f"{name['metadata']['name']}{'' if kind == 'job' else '-node-0'}-999"
    assert len(pod) + (0 if kind == "job" else len("-abcde")) == 63


def test_pods_without_gpus(made: Made) -> None:
    manifests = made()
    assert "resources" not in container_of(manifests)
    assert variables_of(manifests) == {"CUDA_VISIBLE_DEVICES": ""}
    manifests = made(**{f"{PREFIX}cpus_per_node": 6}, launch__processes=2)
    assert container_of(manifests)["resources"]["limits"] == {"cpu": "6"}
    assert variables_of(manifests)["OMP_NUM_THREADS"] == "3"
    manifests = made(**{f"{PREFIX}cpus_per_node": 6}, launch__environment={"OMP_NUM_THREADS": 1, "TEXT": "$(HOME) $X"})
    assert variables_of(manifests) == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TEXT": "$$(HOME) $X"}


@pytest.mark.parametrize("changes", [{**STORED, "launch__nodes": 1}, {"launch__nodes": 2}])
def test_a_smaller_micro_batch_is_kept_where_all_see_it(changes: Manifest, made: Made) -> None:
    assert "Job" in made(**changes, memory__on_oom="shrink")


def test_the_dockerfile(tmp_path: Path) -> None:
    parser = DockerfileParser(path=str(REPOSITORY / "launch" / "Dockerfile"), cache_content=True)
    steps = [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]
    assert re.fullmatch(r"python:3\.\d+-slim", parser.baseimage)
    assert steps[-1] == ("USER", "1000")
    assert not {"ENTRYPOINT", "CMD", "ADD"} & {name for name, _ in steps}
    first, second = (value.split() for name, value in steps if name == "COPY")
    assert second == [".", "."]
    for name in first[:-1]:
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    assert ("RUN", 'pip install -e ".[${EXTRAS}]"') in steps
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "-e", ".[s3]"]
    done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Would install lockstep-trainer-" in done.stdout, done.stderr
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert not {*first, "trainer", "launch", "train.py", "configs"} & set(ignored)
