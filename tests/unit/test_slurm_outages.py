"""A Slurm that does not answer for a moment: to the launcher, and to the batch script. No Slurm is needed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteConfig

from launch import slurm_jobs
from launch.cli import main
from launch.slurm_script import script
from launch.slurm_watch import Submission, Watch
from trainer.config import Config, load_config

pytestmark = pytest.mark.usefixtures("outside_slurm")

LINE = (
    "JobId=12 JobName=x JobState={state} Reason=None Requeue=1 Restarts=0 ExitCode={code} RunTime=00:00:09 "
    "TimeLimit=UNLIMITED NodeList=n1 Command=/a b/slurm.sh WorkDir=/a StdOut=/a b/o.out Power= "
)
# What runs in place of srun: the first task, on this machine.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 exec "$@"
"""


def read(write_config: WriteConfig, **changes: Any) -> Config:
    return load_config(str(write_config(**changes)), [])


def text_of(config: Config) -> str:
    return script(config, "tiny.yaml", [])


class FlakySlurm:
    """Answers scontrol with a list of outcomes, the last one again and again; the clock runs with `sleep`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.ordered: list[str] = []
        self._now = 1000.0
        self._real = slurm_jobs.subprocess.run
        monkeypatch.setattr(slurm_jobs.subprocess, "run", self._run)
        monkeypatch.setattr("shutil.which", lambda name: name)
        monkeypatch.setattr("time.sleep", self._sleep)
        monkeypatch.setattr("time.monotonic", lambda: self._now)

    def _sleep(self, seconds: float) -> None:
        self._now += seconds

    def _run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[0] == "sbatch":
            return subprocess.CompletedProcess(command, 0, "12\n", "")
        if command[0] in ("scancel", "sinfo"):
            self.ordered.append(" ".join(command))
            return subprocess.CompletedProcess(command, 0, "", "")
        if command[0] != "scontrol":
            return self._real(command, **options)
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "hangs":
            raise subprocess.TimeoutExpired(command, 60)
        if answer in ("forgotten", "down"):
            said = "Invalid job id specified" if answer == "forgotten" else "Unable to contact slurm controller"
            return subprocess.CompletedProcess(command, 1, "", f"slurm_load_jobs error: {said}\n")
        code = "3:0" if answer == "FAILED" else "0:0"
        line = LINE.format(state=answer, code=code)
        return subprocess.CompletedProcess(command, 0, line + "\n", "")


OUTAGE = ("down", "hangs", "down", "down")


@pytest.mark.parametrize("follows", [True, False])
def test_an_outage_is_no_end(
    follows: bool,
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slurm = FlakySlurm(monkeypatch, "RUNNING", *OUTAGE, "RUNNING", "COMPLETED")
    note = Submission("12", "/a b/slurm.sh", 55, {}, True)
    assert Watch(note, tmp_path, read(write_config), shows=follows).run() == 0
    assert slurm.answers == ["COMPLETED"]
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    slurm.answers = ["RUNNING", *OUTAGE, "FAILED", "forgotten"]  # that it was there is not forgotten
    assert Watch(note, tmp_path, read(write_config), shows=follows).run() == 1


def test_accepted_is_submitted(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for answers in (["down"], ["hangs"], ["PENDING", "down"]):
        FlakySlurm(monkeypatch, *answers)
        assert main(["slurm", "--config", str(write_config())]) == 0
        assert "job 12 submitted\n" in capsys.readouterr().out
        (tmp_path / "run" / "launch" / "slurm.json").unlink()
    FlakySlurm(monkeypatch, *OUTAGE, "RUNNING", "COMPLETED")
    assert main(["slurm", "--config", str(write_config()), "--wait"]) == 0


def test_cancel_asks_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Submission("12", "/a b/slurm.sh", 55, {}, True).write(tmp_path)
    slurm = FlakySlurm(monkeypatch, "RUNNING", "RUNNING", *OUTAGE, "RUNNING", "COMPLETED", "hangs", "COMPLETED")
    assert main(["slurm", "cancel", str(tmp_path)]) == 0
    assert slurm.answers == ["COMPLETED"]
    assert slurm.ordered == ["scancel --batch --signal=USR2 12"]
    assert "nothing of it runs or waits any more" in capsys.readouterr().out


def test_a_task_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess[str]([], 1, "Job array task 12_3 not found\n", "")
    monkeypatch.setattr(slurm_jobs, "call", lambda *command, **options: answer)
    assert slurm_jobs.find("12_3") == []


STOPPING_AGENT = """#!/bin/bash
echo '{
  "status": "stopped",
  "stopped_by": "SIGUSR1",
  "step": 7
}' > RUN/summary.json
exit 75
"""
# Fails for as long as there is a line in the file `fails`.
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show node" ] && echo ' NodeAddr=10.0.0.1 ' && exit
[ "$1" = show ] && [ "$2" = hostnames ] && echo node1 && exit
echo "$*" >> asked
if [ -s fails_$1 ]; then
    sed -i 1d fails_$1
    echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2
    exit 1
fi
[ "$1" = requeue ] || echo 'JobId=20001 JobState=RUNNING Reason=None PreemptTime=None Command=x'
"""


def stop_by_signal(text: str, folder: Path, failures: Mapping[str, int], **variables: str) -> tuple[int, str]:
    """Runs a script whose run was stopped by a signal. Returns its exit code, and what it says."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "summary.json").unlink(missing_ok=True)
    (folder / "asked").write_text("")
    for command in ("show", "requeue"):
        (folder / f"fails_{command}").write_text("x\n" * failures.get(command, 0))
    agent = STOPPING_AGENT.replace("RUN", str(folder / "run"))
    sleep = "#!/bin/bash\necho sleep $1 >> asked\n"
    squeue = "#!/bin/bash\necho RUNNING\n"
    commands = {"srun": SRUN, "scontrol": SCONTROL, "agent": agent, "sleep": sleep, "squeue": squeue}
    for name, body in commands.items():
        (bin_folder / name).write_text(body)
        (bin_folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_JOB_ID": "20001", "SLURM_JOB_NODELIST": "node1", **variables}
    done = subprocess.run(
        ["bash"], input=text, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("asks", ["show", "requeue"])
def test_a_requeue_is_not_lost(asks: str, write_config: WriteConfig, tmp_path: Path) -> None:
    text = text_of(read(write_config, launch__slurm__python=str(tmp_path / "bin" / "agent")))
    code, told = stop_by_signal(text, tmp_path, {asks: 4})
    assert (code, told.count("requeued: job 20001 goes on"), told.count("\nerror: ")) == (75, 1, 0)
    lines = (tmp_path / "asked").read_text().splitlines()
    assert lines.count("sleep 3") == 4
    assert lines[-1] == "requeue 20001"
    code, told = stop_by_signal(text, tmp_path, {asks: 5})
    assert code == 75
    assert "requeued: " not in told.replace("not requeued: ", "")
    assert told.splitlines()[-1].startswith("error: not requeued: ")


def test_a_task_requeues_itself_alone(write_config: WriteConfig, tmp_path: Path) -> None:
    slurm = {"python": str(tmp_path / "bin" / "agent"), "array": "0-3"}
    text = text_of(read(write_config, launch__slurm=slurm)).replace('run_dir+="-$task"', "")
    stop_by_signal(text, tmp_path, {}, SLURM_ARRAY_JOB_ID="20001", SLURM_ARRAY_TASK_ID="3")
    assert (tmp_path / "asked").read_text().splitlines() == ["show job -o 20001_3", "requeue 20001_3"]
