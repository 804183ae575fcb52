"""The batch script of `python -m launch slurm`, and what is made of Slurm's answers. No Slurm is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig

from launch import slurm_jobs
from launch.cli import main
from launch.slurm_script import Allocation, array_tasks, sbatch_options, script
from launch.slurm_watch import Submission
from trainer.config import Config, load_config
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("outside_slurm")

# What runs in place of srun: the first task, on this machine.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 exec "$@"
"""
PRINT = "#!{}\nimport json, sys\njson.dump(sys.argv[1:], open('{}', 'w'))\n"


def read(write_config: WriteConfig, *overrides: str, **changes: Any) -> Config:
    return load_config(str(write_config(**changes)), list(overrides))


def text_of(config: Config, *overrides: str, allocation: Allocation | None = None) -> str:
    text = script(config, "tiny.yaml", overrides, allocation)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.stderr == ""
    return text


def test_what_is_asked_for_by_default(write_config: WriteConfig, tmp_path: Path) -> None:
    options = sbatch_options(read(write_config))
    assert options == {
        "job-name": "tiny",
        "output": f"{tmp_path}/run/launch/slurm-%j.out",
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "nodes": "1",
        "ntasks-per-node": "1",
        "requeue": True,
        "signal": "B:USR1@85",
    }


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("partition", "main,high", "--partition=main,high"),
        ("account", "lab", "--account=lab"),
        ("qos", "long", "--qos=long"),
        ("time", "2-12:00:00", "--time=2-12:00:00"),
        ("time", 90, "--time=90"),
        ("constraint", "a100&nvlink", '--constraint="a100&nvlink"'),
        ("gpus_per_node", 8, "--gpus-per-node=8"),
        ("gpus_per_node", "a100:8", "--gpus-per-node=a100:8"),
        ("cpus_per_node", 32, "--cpus-per-task=32"),
        ("memory_per_node", "200GiB", "--mem=204800M"),
        ("exclusive", True, "--exclusive"),
        ("array", "0-3%2", "--array=0-3%2"),
        ("requeue", False, "--no-requeue"),
        ("extra", {"nice": 100}, "--nice=100"),
        ("extra", {"contiguous": True}, "--contiguous"),
        ("extra", {"comment": 'a "b" \\c'}, '--comment="a \\"b\\" \\\\c"'),
        ("extra", {"output": "elsewhere"}, "--output=elsewhere"),
        ("extra", {"no-requeue": True}, "--no-requeue"),
        ("extra", {"mem-per-cpu": "2G"}, "--mem-per-cpu=2G"),
    ],
)
def test_every_key_becomes_an_option(key: str, value: object, line: str, write_config: WriteConfig) -> None:
    lines = text_of(read(write_config, **{f"launch__slurm__{key}": value})).splitlines()
    name = line.removeprefix("--").partition("=")[0]
    assert [found for found in lines if found.partition("=")[0] == f"#SBATCH --{name}"] == [f"#SBATCH {line}"]
    assert f"#SBATCH {line}" not in text_of(read(write_config))


def test_extra_wins(write_config: WriteConfig) -> None:
    slurm = {"partition": "main", "exclusive": True, "memory_per_node": "1GiB"}
    extra = {"partition": "high", "exclusive": False, "mem-per-gpu": "8G", "no-requeue": True}
    options = sbatch_options(read(write_config, launch__slurm={**slurm, "extra": extra}))
    assert options["partition"] == "high"
    assert not {"exclusive", "mem", "requeue"} & set(options)
    assert "scontrol requeue" not in text_of(read(write_config, launch__slurm={"extra": extra}))


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"extra": {"nodes": 4}}, "launch.slurm.extra.nodes", "set launch.nodes instead"),
        ({"extra": {"array": "0-1"}}, "launch.slurm.extra.array", "set launch.slurm.array instead"),
        ({"extra": {"mail_type": "END"}}, "launch.slurm.extra.mail_type", "write the long name"),
        ({"extra": {"begin": "now\nrm"}}, "launch.slurm.extra.begin", "in one line"),
        ({"extra": {"licenses": ["a"]}}, "launch.slurm.extra.licenses", "a text or a number"),
        ({"time": 1}, "launch.slurm.time", "1 is too short: 85 seconds before"),
        ({"time": "1:25"}, "launch.slurm.time", "too short"),
        ({"array": "3-1,"}, "launch.slurm.array", "write numbers such as"),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any], path: str, message: str, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_config(launch__slurm=changes))
    assert main(["slurm", "--config", file, "--dry-run"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {file}:")
    assert f"{path}: " in told.err
    assert message in told.err
    assert told.err.count("\n") == 1


def test_time_limits(write_config: WriteConfig) -> None:
    for limit in ("1:26", "0:01:26", "2", "0-1", "1-0"):
        sbatch_options(read(write_config, launch__slurm__time=limit))
    assert (
        sbatch_options(read(write_config, faults__grace="5 minutes", launch__slurm__time=10))["signal"] == "B:USR1@355"
    )


def test_array_tasks() -> None:
    assert array_tasks("0-3") == [0, 1, 2, 3]
    assert array_tasks("7,1-5:2%2") == [1, 3, 5, 7]
    with pytest.raises(UserError):
        array_tasks("a")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "launch.processes=1"),
        ({"slurm": {"gpus_per_node": 8}}, "launch.processes=8"),
        ({"slurm": {"gpus_per_node": "a100:4"}}, "launch.processes=4"),
        ({"slurm": {"extra": {"gres": "gpu:a100:2,tmp:5"}}}, "launch.processes=2"),
        ({"slurm": {"extra": {"gpus": 8}}}, None),  # each agent counts its own
        ({"processes": 3, "slurm": {"gpus_per_node": 8}}, None),  # the config says it
    ],
)
def test_processes_of_a_node(changes: dict[str, Any], expected: str | None, write_config: WriteConfig) -> None:
    lines = [line.strip(" \\") for line in text_of(read(write_config, launch=changes)).splitlines()]
    assert [line for line in lines if line.startswith("launch.processes")] == ([expected] if expected else [])


def test_elastic(write_config: WriteConfig) -> None:
    text = text_of(read(write_config, launch__nodes="1:4"))
    assert "#SBATCH --nodes=1-4\n" in text
    assert "#SBATCH --no-kill\n" in text
    assert " --no-kill --kill-on-bad-exit=0 --wait=0 " in text
    assert '--nodes 1:"$SLURM_JOB_NUM_NODES"' in text
    text = text_of(read(write_config, launch__nodes=4))
    assert "--no-kill" not in text
    assert " --kill-on-bad-exit=0 --wait=85 " in text


def test_inside_an_allocation(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(read(write_config, launch__nodes=2), allocation=Allocation(2, gpus_per_node=4))
    assert "#SBATCH" not in text
    assert "requeue" not in text
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 " in text
    assert "launch.processes=4" in text


def run_script(text: str, folder: Path, **variables: str) -> list[str]:
    """Runs a script with `SRUN` and returns what the agent would be called with."""
    commands = {"srun": SRUN, "scontrol": "#!/bin/bash\necho ' NodeAddr=10.0.0.1 '"}
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, body in {**commands, "py thon": PRINT.format(sys.executable, folder / "seen.json")}.items():
        (bin_folder / name).write_text(body)
        (bin_folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_JOB_ID": "20001", "SLURM_JOB_NODELIST": "node[1-2]", **variables}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads((folder / "seen.json").read_text()))


def test_words_survive(write_config: WriteConfig, tmp_path: Path) -> None:
    name = 'it\'s $(touch oops) `touch oops` "q" \\ $HOME * ;&|'
    overrides = [f"run.dir={tmp_path}/{name}", "train.epochs=3", 'model.args={a: "b c", d: [1]}']
    setup = ["export GIVEN='a b'", f'echo "$GIVEN" > {tmp_path}/given']
    config = load_config(
        str(write_config(launch__slurm={"python": str(tmp_path / "bin" / "py thon"), "setup": setup})), overrides[:2]
    )
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": f"{tmp_path}/{name}"})})
    words = run_script(text_of(config, *overrides), tmp_path, SLURM_RESTART_COUNT="2")
    assert words[:3] == ["-m", "launch", "agent"]
    assert words[words.index("--rendezvous") + 1] == f"10.0.0.1:{15000 + 20001 % 17000}"
    assert words[words.index("--job") + 1] == "20001.2"
    assert words[words.index("--config") + 1] == str(Path.cwd() / "tiny.yaml")
    assert words[words.index("--node-rank") + 1] == "0"
    assert set(overrides) <= set(words)
    assert not Path("oops").exists()
    assert (tmp_path / "given").read_text() == "a b\n"


def test_a_task_of_an_array_is_a_run_of_its_own(write_config: WriteConfig, tmp_path: Path) -> None:
    slurm = {"python": str(tmp_path / "bin" / "py thon"), "array": "0-8"}
    config = read(write_config, launch__slurm=slurm, run__seed=4, checkpoint__dir="s3://bucket/a b/")
    words = run_script(text_of(config), tmp_path, SLURM_ARRAY_TASK_ID="7")
    assert {"run.name=tiny-7", "run.seed=11", "checkpoint.dir=s3://bucket/a b-7"} <= set(words)
    assert f"run.dir={tmp_path}/run-7" in words


def test_container_python_and_port(write_config: WriteConfig) -> None:
    container = "apptainer exec --nv '/images/a b.sif'"
    text = text_of(read(write_config, launch__slurm__container=container, launch__port=1234))
    assert f"    {container} python -m launch agent \\\n" in text
    assert "\nport=1234\n" in text
    text = text_of(read(write_config, launch__slurm={"container": container, "python": "/opt/py"}))
    assert f"    {container} /opt/py -m launch agent \\\n" in text
    assert f"    {sys.executable} -m launch agent \\\n" in text_of(read(write_config))


@pytest.mark.parametrize("broken", [{"setup": ["if true"]}, {"container": "exec 'a"}])
def test_what_bash_cannot_read(
    broken: dict[str, Any], write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["slurm", "--config", str(write_config(launch__slurm=broken))]) == 2
    assert not (tmp_path / "run" / "launch" / "slurm.json").exists()


def test_dry_run_is_what_is_submitted(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_config())
    assert main(["slurm", "--config", file, "--nodes", "2", "--dry-run", "train.epochs=3"]) == 0
    shown = capsys.readouterr().out
    overrides = ["train.epochs=3", "launch.nodes=2"]
    assert shown == script(load_config(file, overrides), file, overrides)


def test_without_slurm(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["slurm", "--config", str(write_config())]) == 2
    assert capsys.readouterr().err.startswith("error: there is no sbatch here")
    assert main(["slurm", "status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no scontrol here")


def test_the_note(tmp_path: Path) -> None:
    note = Submission("12", "/a b/slurm.sh", 55, {0: "/a-0", 3: "/a-3"}, True)
    note.write(tmp_path)
    assert Submission.read(tmp_path) == note
    (tmp_path / "launch" / "slurm.json").write_text("{}")
    assert Submission.read(tmp_path) is None


# As Slurm 22.05 writes them.
LINE = (
    "JobId=15 ArrayJobId=12 ArrayTaskId={task} JobName=x Priority=1 Nice=0 Account=(null) QOS=(null) JobState={state} "
    "Reason={reason} Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode={code} RunTime=00:00:09 "
    "TimeLimit=UNLIMITED NodeList={nodes} Command=/a b/slurm.sh WorkDir=/a StdErr=/a b/o.out StdIn=/dev/null "
    "StdOut=/a b/o.out Power= "
)


def test_what_slurm_says_of_a_job() -> None:
    record = slurm_jobs._record(LINE.format(task=3, state="FAILED", reason="NonZeroExitCode", code="75:0", nodes="n1"))
    assert (record.job, record.has_ended, record.exit_code, record.num_requeues) == ("12_3", True, 75, 1)
    assert (record.output, record.nodes, record.run_time) == ("/a b/o.out", "n1", "00:00:09 of unlimited")
    record = slurm_jobs._record(LINE.format(task="4-7%2", state="PENDING", reason="Priority", code="0:15", nodes=""))
    assert (record.job, record.waits, record.exit_code, record.nodes) == ("12_[4-7%2]", True, None, "")


@pytest.mark.parametrize(
    ("reason", "path"),
    [
        ("AssocMaxWallDurationPerJobLimit", "launch.slurm.time"),
        ("QOSMaxNodePerJobLimit", "launch.nodes"),
        ("QOSMaxGRESPerJob", "launch.slurm.gpus_per_node"),
        ("InvalidQOS", "launch.slurm.qos"),
        ("AccountNotAllowed", "launch.slurm.account"),
        ("Resources", None),
        ("Priority", None),
        ("ReqNodeNotAvail,_UnavailableNodes:n2", None),
    ],
)
def test_why_a_job_never_runs(
    reason: str, path: str | None, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess[str]([], 0, "", "")
    monkeypatch.setattr(slurm_jobs, "call", lambda *command, **options: answer)
    record = slurm_jobs._record(LINE.format(task=3, state="PENDING", reason=reason, code="0:0", nodes=""))
    problem = slurm_jobs.never_runs(record, read(write_config))
    assert (problem.problems[0].path if problem else None) == path
    if "ReqNode" in reason:
        assert slurm_jobs.explain_wait(record).endswith("nodes that it needs are down, drained or reserved")


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("Batch job submission failed: Invalid account or account/partition combination specified", "account"),
        ("Batch job submission failed: Invalid qos specification", "qos"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "time"),
        ("Batch job submission failed: Memory specification can not be satisfied", "memory_per_node"),
        ("Batch job submission failed: Invalid generic resource (gres) specification", "gpus_per_node"),
        ("Invalid --mail-type specification", "extra.mail-type"),
    ],
)
def test_refusals_name_the_key(
    said: str, path: str, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess[str]([], 0, "", "")
    monkeypatch.setattr(slurm_jobs, "call", lambda *command, **options: answer)
    config = read(write_config, launch__slurm__extra={"mail-type": "X"})
    (problem,) = slurm_jobs.refusal(f"sbatch: error: {said}\n", config).problems
    assert problem.path == f"launch.slurm.{path}"
    assert said.removeprefix("Batch job submission failed: ") in problem.message


def test_no_requeue_of_any_kind(write_config: WriteConfig) -> None:
    for slurm in ({"extra": {"requeue": False}}, {"requeue": False}, {"extra": {"no-requeue": True}}):
        text = text_of(read(write_config, launch={"nodes": "1:4", "slurm": slurm}))
        assert "scontrol requeue" not in text
        assert '|| scancel "$ITSELF"' in text
        assert "#SBATCH --requeue" not in text
    assert text_of(read(write_config, launch__nodes="1:4")).count("scontrol requeue") == 2
