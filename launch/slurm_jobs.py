"""What Slurm says of jobs and of itself, and its refusals in terms of our config keys. Starts and ends nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config import Config
from trainer.errors import UserError, nearest
from trainer.units import counted, parse_bytes

_SECONDS = 60  # after which Slurm is taken not to answer
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
_ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}

# Why a job waits that will never run as it is: the config key, and what to say. `...PerJob` limits follow their name.
_NEVER = {
    "PartitionTimeLimit": ("launch.slurm.time", "is more than the partition allows"),
    "PartitionNodeLimit": ("launch.nodes", "is more, or fewer, than the partition allows"),
    "PartitionConfig": ("launch.slurm", "is beyond what the partition allows"),
    "BadConstraints": ("launch.slurm.constraint", "no nodes of this cluster are such"),
    "AccountNotAllowed": ("launch.slurm.account", "may not use the partition"),
    "InvalidAccount": ("launch.slurm.account", "is not an account here"),
    "QOSNotAllowed": ("launch.slurm.qos", "may not be used here"),
    "InvalidQOS": ("launch.slurm.qos", "is no QOS here"),
    "DependencyNeverSatisfied": ("launch.slurm.extra.dependency", "can never be satisfied"),
}
_PER_JOB = {
    "Wall": "launch.slurm.time",
    "Node": "launch.nodes",
    "GRES": "launch.slurm.gpus_per_node",
    "CPU": "launch.slurm.cpus_per_node",
    "Mem": "launch.slurm.memory_per_node",
}
_STUCK = {
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "PartitionDown": "the partition takes no jobs at the moment",
    "PartitionInactive": "the partition takes no jobs at the moment",
    "JobHeldUser": "it is held: `scontrol release` lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "Reservation": "it waits for its reservation",
}
# What sbatch says when it refuses, and the config key; the first that fits counts.
_REFUSALS = (
    (r"account", "launch.slurm.account"),
    (r"qos", "launch.slurm.qos"),
    (r"feature", "launch.slurm.constraint"),
    (r"time limit", "launch.slurm.time"),
    (r"gres|gpu", "launch.slurm.gpus_per_node"),
    (r"memory", "launch.slurm.memory_per_node"),
    (r"array", "launch.slurm.array"),
    (r"node count", "launch.nodes"),
)


class NoAnswerError(UserError):
    """Slurm cannot be asked at the moment. It says nothing about jobs, which go on."""


@dataclass(frozen=True)
class Record:
    """What Slurm says of a job, or of a task of an array.

    Args:
        job: its name for Slurm's commands: 12 or 12_3; 12_[4-7] stands for tasks that have not started.
        state: as squeue has it, such as PENDING.
        reason: why it waits.
        exit_code: of the batch script; None where a signal ended it.
        nodes: that it runs on.
        run_time: so far, and its limit.
        num_requeues: how often it was started again.
        output: the file of its output, as far as Slurm says.
        line: all that Slurm says.
    """

    job: str
    state: str
    reason: str
    exit_code: int | None
    nodes: str
    run_time: str
    num_requeues: int
    output: str
    line: str

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs or waits any more."""
        return self.state in _ENDED

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


def need(command: str) -> None:
    """Checks that a command of Slurm is here.

    Raises:
        UserError: it is not.
    """
    if shutil.which(command) is None:
        message = f"there is no {command} here: start this where Slurm's commands are, such as on a login node"
        raise UserError(f"{message} (`--dry-run` shows the script anywhere)")


def call(*command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm to its end.

    Raises:
        NoAnswerError: it does not answer.
    """
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{command[0]} does not answer: is Slurm running?") from None


def find(job: str) -> list[Record]:
    """Returns what Slurm knows of a job, a record for each task of an array; none where it has forgotten it.

    Raises:
        NoAnswerError: Slurm cannot be asked at the moment.
    """
    answer = call("scontrol", "show", "job", "-o", job)
    if answer.returncode:
        if "Invalid job id" in answer.stderr or re.search(r"^Job .*not found$", answer.stdout, re.MULTILINE):
            return []
        raise NoAnswerError(f"scontrol: {first_line(answer.stderr)}")
    return [_record(line) for line in answer.stdout.splitlines() if line.startswith("JobId=")]


def find_running(job: str, script: str) -> list[Record]:
    """Returns what runs or waits of a job that was submitted as this script."""
    return [record for record in find(job) if not record.has_ended and f" Command={script} " in f"{record.line} "]


def _record(line: str) -> Record:
    def value(key: str, default: str = "") -> str:
        found = re.search(rf"(?:^| ){key}=(\S*)", line)
        return found[1] if found else default

    job = value("JobId")
    if task := value("ArrayTaskId"):
        is_one = task.isdigit()
        job = f"{value('ArrayJobId')}_{task}" if is_one else f"{value('ArrayJobId')}_[{task}]"
    code, _, number = value("ExitCode", "0:0").partition(":")
    nodes = value("NodeList")
    # A path, which may have spaces; Slurm writes it last but for Power and the like.
    output = re.search(r" StdOut=(.*?)(?: Power=| NtasksPerTRES:| MailUser=| TresPerNode=|$)", line)
    return Record(
        job=job,
        state=value("JobState"),
        reason=value("Reason").replace("_", " "),
        exit_code=int(code) if number in ("0", "") else None,
        nodes="" if nodes == "(null)" else nodes,
        run_time=f"{value('RunTime')} of {value('TimeLimit').lower()}",
        num_requeues=int(value("Restarts", "0") or 0),
        output=output[1].strip().replace("%%", "%") if output else "",
        line=line,
    )


def never_runs(record: Record, config: Config) -> UserError | None:
    """Returns why a job that waits will never run as it is, with the config key; None where it may."""
    reason = record.reason.split(",")[0].strip()
    if reason in _NEVER:
        key, message = _NEVER[reason]
    elif limit := re.fullmatch(r"(?:Assoc|QOS)(?:Max|Min)(\w+?)PerJob\w*", reason):
        key = next((key for part, key in _PER_JOB.items() if part.lower() in limit[1].lower()), "launch.slurm")
        message = "is beyond what your account, or the QOS, allows for one job"
    else:
        return None
    value = _value(config, key)
    more = _limits(config, key)
    text = f"{value} {message}" if value is not None else f"the request {message}"
    if reason == "BadConstraints":
        text = message if value is None else f"{value}: {message}"
    return UserError(f"{text}: Slurm would never run this job ({reason}){more}", path=key)


def explain_wait(record: Record) -> str:
    """Returns why a job waits, in words."""
    reason = record.reason.split(",")[0].strip()
    told = record.reason if reason not in ("None", "") else "not looked at yet"
    return f"{told}: {_STUCK[reason]}" if reason in _STUCK else told


def refusal(stderr: str, config: Config) -> UserError:
    """Returns sbatch's refusal of a job as a problem with a config key."""
    text = first_line(stderr)
    slurm = config.launch.slurm
    if found := re.search(r"unrecognized option '--([\w-]+)", stderr):
        return UserError("sbatch has no such option", path=f"launch.slurm.extra.{found[1]}")
    if "partition" in text.lower() and "account/partition" not in text:
        wanted, known = str(_value(config, "launch.slurm.partition")), partitions()
        unknown = [name for name in wanted.split(",") if name not in known]
        if unknown:
            message = f"there is no '{unknown[0]}'; this cluster has: {', '.join(known)}{nearest(unknown[0], known)}"
            return UserError(message, path="launch.slurm.partition")
        return UserError(text, path="launch.slurm.partition")
    if "configuration is not available" in text or "Node count" in text or "processors" in text:
        return _impossible(text, config)
    for name, value in slurm.extra.items():
        if f"--{name} " in text or (name in ("nodelist", "exclude") and "node name" in text):
            return UserError(f"{value}: {text}", path=f"launch.slurm.extra.{name}")
    for pattern, key in _REFUSALS:
        if re.search(pattern, text, re.IGNORECASE):
            value = _value(config, key)
            prefix = "" if value is None else f"{value}: "
            return UserError(f"{prefix}{text}{_limits(config, key)}", path=key)
    return UserError(f"sbatch: {text}", path="launch.slurm" if slurm.extra else "")


def partitions() -> list[str]:
    """Returns the names of the cluster's partitions."""
    return sorted({name.rstrip("*") for name in call("sinfo", "-h", "-a", "-o", "%P").stdout.split()})


def first_line(stderr: str) -> str:
    """Returns what one of Slurm's commands says first of what went wrong."""
    lines = [line.partition("error: ")[2] or line.partition("fatal: ")[2] for line in stderr.splitlines()]
    told = [line.strip() for line in lines if line.strip() and "DNS SRV" not in line and "res_nsearch" not in line]
    last = [line.removeprefix("Batch job submission failed: ") for line in told]
    return last[-1] if last else " ".join(stderr.split()) or "it failed, and does not say why"


@dataclass(frozen=True)
class _Node:
    name: str
    cpus: int
    memory_mib: int
    gpus: int


def _nodes(config: Config) -> list[_Node]:
    """Returns the nodes of the partition that the job is for."""
    wanted = str(_value(config, "launch.slurm.partition") or "")
    answer = call("sinfo", "-h", "-N", "-o", "%P|%N|%c|%m|%G", *(["-p", wanted] if wanted else []))
    found = {}
    for line in answer.stdout.splitlines():
        partition, name, cpus, memory, gres = line.split("|")
        if wanted or partition.endswith("*"):
            gpus = sum(int(number) for number in re.findall(r"gpu:(?:[^:,()]*:)?(\d+)", gres))
            found[name] = _Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus)
    return list(found.values())


def _impossible(text: str, config: Config) -> UserError:
    """Finds what is asked for that the cluster does not have."""
    nodes, slurm = _nodes(config), config.launch.slurm
    partition = _value(config, "launch.slurm.partition")
    where = f"partition {partition}" if partition else "the default partition"
    if nodes:
        gpus, cpus = max(node.gpus for node in nodes), max(node.cpus for node in nodes)
        memory = max(node.memory_mib for node in nodes)
        wanted_gpus = int(str(slurm.gpus_per_node or 0).rpartition(":")[2])
        if config.launch.nodes.least > len(nodes):
            return UserError(f"{config.launch.nodes}: {where} has {counted(len(nodes), 'node')}", path="launch.nodes")
        if wanted_gpus > gpus:
            message = f"{slurm.gpus_per_node}: a node of {where} has at most {counted(gpus, 'GPU')}"
            return UserError(message, path="launch.slurm.gpus_per_node")
        if (slurm.cpus_per_node or 0) > cpus:
            message = f"{slurm.cpus_per_node}: a node of {where} has at most {counted(cpus, 'core')}"
            return UserError(message, path="launch.slurm.cpus_per_node")
        if slurm.memory_per_node is not None and parse_bytes(slurm.memory_per_node) > memory * 2**20:
            message = f"{slurm.memory_per_node}: a node of {where} has at most {memory} MiB"
            return UserError(message, path="launch.slurm.memory_per_node")
    asked = [
        f"{key.removeprefix('launch.')}={value}"
        for key in ("launch.nodes", *(f"launch.slurm.{name}" for name in _REQUEST))
        if (value := _value(config, key)) is not None
    ]
    has = _limits(config, "launch.slurm.gpus_per_node")
    return UserError(f"{text}: no node of {where} can give {', '.join(asked)}{has}", path="launch.slurm")


_REQUEST: Sequence[str] = ("gpus_per_node", "cpus_per_node", "memory_per_node", "constraint", "time")


def _limits(config: Config, key: str) -> str:
    """Returns what the cluster has, where that helps."""
    kind = _SHOWN.get(key)
    if kind is None:
        return ""
    wanted = str(_value(config, "launch.slurm.partition") or "")
    answer = call("sinfo", "-h", "-o", f"%P|{kind}", *(["-p", wanted] if wanted else []))
    rows = [line.partition("|") for line in answer.stdout.splitlines()]
    found = sorted({f"{name.rstrip('*')}: {value}" for name, _, value in rows if wanted or name.endswith("*")})
    return f"; the cluster has {', '.join(found)}" if found else ""


# How sinfo shows what there is of what a key asks for.
_SHOWN = {
    "launch.nodes": "%D nodes, %s for a job",
    "launch.slurm.time": "time limit %l",
    "launch.slurm.constraint": "features %f",
    "launch.slurm.gpus_per_node": "%G",
}


def _value(config: Config, key: str) -> object:
    """Returns the value of a key, or of sbatch's option in `extra` that wins over it."""
    slurm = config.launch.slurm
    if key == "launch.nodes":
        return config.launch.nodes
    name = key.rpartition(".")[2]
    instead = {"gpus_per_node": "gpus-per-node", "cpus_per_node": "cpus-per-task", "memory_per_node": "mem"}
    return slurm.extra.get(instead.get(name, name), getattr(slurm, name, None))
