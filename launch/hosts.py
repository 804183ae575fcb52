"""`python -m launch hosts`: one job on machines that are reached over OpenSSH.

Which machines, and the command of each, is decided here; `launch.checks` sees whether they can train together, and
`launch.hosts_job` runs the job.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import checks
from launch.checks import Findings, Meeting
from launch.host_facts import ROOT, collect
from launch.hosts_job import HostsJob, JobSettings
from launch.remote_agent import KEEP_ALIVE_SECONDS
from launch.ssh import MARK_VARIABLE, Host, Ssh, mark_of
from launch.stopping import shutdown_seconds
from trainer.cli import EXIT_FINISHED
from trainer.config import Config
from trainer.config_launch import DEFAULT_PORT
from trainer.config_values import NodeRange
from trainer.errors import Problem, UserError

logger = logging.getLogger("lockstep")

_STOP_MARGIN = 15  # beyond what an agent gives its ranks
# By which `wandb agent` says which trial of which sweep a process is.
_TRIAL_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_SWEEP_PARAM_PATH")


def choose_names(names: Sequence[str] | None, hostfile: str | None, config: Config) -> list[str]:
    """Returns which hosts to use.

    Args:
        names: given on the command line, if any.
        hostfile: given there instead, if any.
        config: says which otherwise.

    Raises:
        UserError: nothing names a host, a name cannot be one, or one is there twice.
    """
    file = hostfile or (None if names is not None else config.launch.hosts.hostfile)
    given = config.launch.hosts.names if names is None else names
    found = list(given) if file is None else read_hostfile(file)
    if not found:
        raise UserError("no host: give --hosts a,b,c or --hostfile FILE, or set launch.hosts.names or .hostfile")
    for name in found:
        if name.startswith("-") or re.fullmatch(r"[^\s,'\"]+", name) is None:
            raise UserError(f"'{name}' cannot be the name of a host")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UserError(f"named twice: {', '.join(twice)}; processes on each host are --processes")
    return found


def read_hostfile(file: str) -> list[str]:
    """Returns the hosts of a file that has one per line, as for Open MPI and DeepSpeed.

    Raises:
        UserError: it cannot be read, or a line is something else.
    """
    try:
        lines = Path(file).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    names, problems = [], []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        unknown = [word for word in words[1:] if re.fullmatch(r"(slots|max[-_]slots)=\d+", word) is None]
        if unknown:
            problems.append(
                Problem(f"write `name` or `name slots=N` (got '{' '.join(unknown)}')", "", f"{file}:{number}")
            )
        names.append(words[0])
    if problems:
        raise UserError(*problems)
    return names


def count_nodes(wanted: NodeRange | None, num_hosts: int) -> NodeRange:
    """Returns how many machines the job has.

    Args:
        wanted: None for all hosts that are named.
        num_hosts: so many are named.

    Raises:
        UserError: more are needed than are named.
    """
    if wanted is None:
        return NodeRange(num_hosts, num_hosts)
    if wanted.least > num_hosts:
        raise UserError(f"{wanted.least} machines are needed, and {num_hosts} hosts are named (launch.nodes: {wanted})")
    return NodeRange(wanted.least, min(wanted.most, num_hosts))


class HostsLaunch:
    """A job on hosts that is about to be started.

    Args:
        names: of hosts; those beyond `launch.nodes` are left out.
        file: the config file.
        overrides: of it.
        config: what these come to.
        agent_options: of every agent, besides.
    """

    def __init__(
        self,
        names: Sequence[str],
        file: str,
        overrides: Sequence[str],
        config: Config,
        agent_options: Sequence[str] = (),
    ) -> None:
        wanted = config.launch.nodes if "nodes" in config.launch.model_fields_set else None
        self.nodes = count_nodes(wanted, len(names))
        self.hosts = [Host(name, number) for number, name in enumerate(names[: self.nodes.most])]
        self.unused = list(names[self.nodes.most :])
        self.config = config
        others = [text for text in overrides if not text.startswith("launch.nodes=")]
        self.arguments = (file, [*others, f"launch.nodes={self.nodes}"])
        self.agent_options = list(agent_options)
        self.job = f"{config.run.name}-{secrets.token_hex(4)}"
        self.ssh = _ssh(config)

    def command(self, host: Host, node_rank: int, job: str, meeting: Meeting) -> list[str]:
        """Returns the ssh that runs a host's agent."""
        file, overrides = self.arguments
        address = f"[{meeting.address}]" if ":" in meeting.address else meeting.address
        place = ["--node-rank", str(node_rank), "--rendezvous", f"{address}:{meeting.port}", "--job", job]
        agent = ["-m", "launch", "agent", "--config", file, *place, "--leash", *self.agent_options, *overrides]
        return self.ssh.line(host, self.ssh.script(agent, {MARK_VARIABLE: mark_of(self.job, host)}))

    def check(self, hosts: Sequence[Host], is_joining: bool = False) -> Findings:
        """Checks hosts against this machine, the first of them, and one another.

        Args:
            hosts: which.
            is_joining: the first of them has the job's port already.
        """
        config = self.config
        if is_joining:
            config = config.model_copy(update={"launch": config.launch.model_copy(update={"port": None})})
        return checks.check(hosts, self.ssh, config, self.arguments, collect(*self.arguments))

    def show(self) -> int:
        """Prints what would be run, for a person to paste."""
        lines = ["# Checks, on each host:"]
        lines += [shlex.join(self.ssh.line(host, self.ssh.facts_script())) for host in self.hosts]
        lines += [
            "",
            "# One agent on each host, on a leash; the checks find the address, and a free port if none is set:",
        ]
        meeting = Meeting(self.hosts[0].address, self.config.launch.port or DEFAULT_PORT)
        for host in self.hosts:
            line = shlex.join(self.command(host, host.number, f"{self.job}.0", meeting))
            lines.append(f"while sleep {KEEP_ALIVE_SECONDS:.0f}; do echo; done | {line}")
        sys.stdout.write("\n".join(lines) + "\n")
        return EXIT_FINISHED

    def run(self, in_spite_of: list[str] | None = None) -> int:
        """Checks the hosts, runs the job and returns its exit code.

        Args:
            in_spite_of: gets what is wrong with the hosts where a job could be started all the same, which is then
                done; None to start none.

        Raises:
            UserError: something is wrong with the hosts, before anything was started.
        """
        if self.unused:
            logger.info("using %s; not %s", ", ".join(h.name for h in self.hosts), ", ".join(self.unused))
        findings = self.check(self.hosts)
        present = [host for host in self.hosts if host not in findings.absent]
        for warning in findings.warnings:
            logger.warning("warning: %s", warning)
        may_lack = self.nodes.is_elastic and len(present) >= self.nodes.least
        if problems := findings.lines(present if may_lack else self.hosts):
            if in_spite_of is None or findings.absent or findings.meeting is None:
                raise UserError(*problems)
            in_spite_of += problems
        for reason in findings.absent.values():
            logger.warning("%s: starting without it", reason)
        assert findings.meeting is not None
        settings = JobSettings(
            name=self.job,
            nodes=self.nodes,
            max_restarts=self.config.launch.max_restarts,
            stop_seconds=shutdown_seconds(self.config) + _STOP_MARGIN,
            return_seconds=self.config.launch.hosts.return_timeout.seconds,
        )
        return HostsJob(self.hosts, settings, self.ssh, self.command, self.check).run(present, findings.meeting)


def _ssh(config: Config) -> Ssh:
    """Returns how hosts are reached: in the same folder, with the same code and modules as here, if not told else."""
    hosts = config.launch.hosts
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if hosts.folder is None and Path.cwd() != ROOT and str(ROOT) not in paths:
        paths.insert(0, str(ROOT))
    variables = {name: os.environ[name] for name in _TRIAL_VARIABLES if os.environ.get(name)}
    return Ssh(
        options=hosts.ssh_options,
        folder=hosts.folder or os.getcwd(),
        python=hosts.python or sys.executable,
        setup=hosts.setup,
        variables={**({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}), **variables},
    )
