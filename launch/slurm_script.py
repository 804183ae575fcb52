"""The batch script of `python -m launch slurm`: its text, and nothing else. Asks no cluster; `launch.slurm` submits it.

One srun starts an agent on every node. What the script does beyond that is to end well: it passes on what asks the run
to stop, reads in the run folder how the run has ended, and has Slurm start the job again where that is wanted.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import Config
from trainer.errors import Problem, UserError
from trainer.units import parse_bytes

CANCEL_SIGNAL = "USR2"  # to the batch shell: stop with a checkpoint, for good
_LAUNCHER_MARGIN = 25  # beyond faults.grace, for the launcher to end what does not, and the script to see it
_TICK_SECONDS = 30  # by which Slurm may send a signal too early or too late
_FIRST_PORT, _NUM_PORTS = 15000, 17000  # below those that systems give away
_CODE_FOLDER = Path(__file__).resolve().parent.parent

# What is not for `launch.slurm.extra`, and why.
_RESERVED = {
    "nodes": "set launch.nodes instead",
    "array": "set launch.slurm.array instead",
    "ntasks": "a node has one agent, which starts launch.processes processes",
    "ntasks-per-node": "a node has one agent, which starts launch.processes processes",
    "chdir": "start the job from that folder instead",
    "wait": "use --wait instead",
    "parsable": "it is the launcher that reads sbatch's answer",
    "test-only": "use --dry-run to see the script",
    "wrap": "the script is made by the launcher",
    "help": "it starts nothing",
    "usage": "it starts nothing",
    "version": "it starts nothing",
}
_INSTEAD_OF = {"mem-per-cpu": "mem", "mem-per-gpu": "mem", "no-requeue": "requeue", "requeue": "no-requeue"}

_ONLY_SBATCH = ("output", "error", "input", "open-mode", "array", "requeue", "no-requeue", "signal", "export", "chdir")

Options = dict[str, str | bool]


@dataclass(frozen=True)
class Allocation:
    """An allocation that we are in, as `salloc` or a batch job gives one.

    Args:
        num_nodes: of it, which are to be used.
        gpus_per_node: that Slurm has given us on this node; None where it has given none.
    """

    num_nodes: int
    gpus_per_node: int | None = None


def stop_seconds(config: Config) -> int:
    """Returns how long the run may take to end, once it has been asked to."""
    return math.ceil(config.faults.grace.seconds) + _LAUNCHER_MARGIN


def notice_seconds(config: Config) -> int:
    """Returns how long before the time limit the run is asked to stop."""
    return stop_seconds(config) + _TICK_SECONDS


def run_folder(config: Config) -> Path:
    """Returns the run folder as nodes find it. A task of an array puts its number behind the name."""
    return Path.cwd() / config.run_dir


def task_folder(config: Config, task: int | None) -> Path:
    """Returns the run folder of an array's task; that of the run where there is none."""
    folder = run_folder(config)
    return folder if task is None else folder.with_name(f"{folder.name}-{task}")


def array_tasks(array: str) -> list[int]:
    """Returns the numbers that sbatch's --array means.

    Raises:
        UserError: it means nothing.
    """
    tasks: list[int] = []
    for part in array.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None:
            raise UserError(f"write numbers such as 0-3, 1,5,7 or 0-7%2 (got '{array}')", path="launch.slurm.array")
        tasks += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    if not tasks:
        raise UserError(f"there is no task in '{array}'", path="launch.slurm.array")
    return sorted(set(tasks))


def sbatch_options(config: Config) -> Options:
    """Returns the options of sbatch by their long names; true for one without a value.

    Raises:
        UserError: `launch.slurm.extra` has one that cannot be.
    """
    wanted, nodes = config.launch.slurm, config.launch.nodes
    folder = str(run_folder(config)).replace("%", "%%")
    output = f"{folder}/launch/slurm-%j.out"
    if wanted.array is not None:
        array_tasks(wanted.array)  # it can be read
        output = f"{folder}-%a/launch/slurm-%A_%a.out"
    memory = None if wanted.memory_per_node is None else math.ceil(parse_bytes(wanted.memory_per_node) / 2**20)
    ours = {
        "job-name": config.run.name,
        "output": output,
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "nodes": f"{nodes.least}-{nodes.most}" if nodes.is_elastic else str(nodes.least),
        # With it sbatch takes the fewest nodes of a range instead of the most that are free (Slurm 22.05).
        "ntasks-per-node": None if nodes.is_elastic else "1",
        "no-kill": nodes.is_elastic,
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "time": wanted.time,
        "constraint": wanted.constraint,
        "gpus-per-node": wanted.gpus_per_node,
        "cpus-per-task": wanted.cpus_per_node,
        "mem": None if memory is None else f"{memory}M",
        "exclusive": wanted.exclusive,
        "array": wanted.array,
        "requeue" if wanted.requeue else "no-requeue": True,
        "signal": f"B:USR1@{notice_seconds(config)}",
    }
    extra = _extra(wanted.extra)
    for name in extra:
        ours.pop(_INSTEAD_OF.get(name, ""), None)
    merged = {**ours, **extra}
    options: Options = {k: v if v is True else str(v) for k, v in merged.items() if v is not None and v is not False}
    limit = _seconds(options.get("time"))
    if limit is not None and "signal" not in extra and limit <= notice_seconds(config):
        message = f"{options['time']} is too short: {notice_seconds(config)} seconds before its end the run is asked "
        message += "to stop (faults.grace, and what Slurm's clock needs)"
        raise UserError(message, path="launch.slurm.time")
    return options


def salloc(config: Config) -> list[str]:
    """Returns the command, up to what is to be run, that asks for an allocation such as a run's."""
    options = {name: value for name, value in sbatch_options(config).items() if name not in _ONLY_SBATCH}
    return ["salloc", *(f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items())]


def script(
    config: Config,
    config_file: str,
    overrides: Sequence[str],
    allocation: Allocation | None = None,
    agent_options: Sequence[str] = (),
) -> str:
    """Returns the text of the script.

    Args:
        config: the run.
        config_file: its file.
        overrides: that win over the file.
        allocation: that we are in, where nothing is submitted; None for a script for sbatch.
        agent_options: of every agent, besides.

    Raises:
        UserError: something in `launch.slurm` cannot be.
    """
    options = sbatch_options(config)
    if allocation is None:
        head = "#!/bin/bash\n# Made by `python -m launch slurm`. `sbatch` and this file start the job by hand.\n"
        head += "".join(_directive(name, value) for name, value in options.items())
    else:
        head = "#!/bin/bash\n# Made by `python -m launch slurm` inside an allocation, where nothing is submitted.\n"
    may_requeue = allocation is None and "requeue" in options
    parts = [
        head,
        _SIGNALS.replace("SECONDS", str(notice_seconds(config))),
        *([_ABORT] if allocation else []),
        _surroundings(config),
        _place(config, allocation),
        _srun(config, config_file, overrides, options, allocation, agent_options),
        _ENDED,
        *([_REQUEUE] if may_requeue else []),
        'exit "$code"\n',
    ]
    return "\n".join(parts)


def _extra(extra: Mapping[str, object]) -> dict[str, object]:
    problems = []
    for name, value in extra.items():
        path = f"launch.slurm.extra.{name}"
        if name in _RESERVED:
            problems.append(Problem(_RESERVED[name], path))
        elif re.fullmatch(r"[a-z][a-z-]+", name) is None:
            problems.append(Problem("write the long name of an option of sbatch, such as mail-type", path))
        elif not isinstance(value, str | int | float | None) or "\n" in str(value):
            problems.append(Problem(f"must be a text or a number in one line, or true (got {value!r})", path))
    if problems:
        raise UserError(*problems)
    return dict(extra)


def _directive(name: str, value: str | bool) -> str:
    if value is True:
        return f"#SBATCH --{name}\n"
    text = str(value)
    if re.fullmatch(r"[\w./:,=@%+\[\]-]+", text, re.ASCII) is None:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}\n"


def _seconds(limit: object) -> int | None:
    """Returns a time limit as sbatch reads it; None for what says nothing."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(limit))
    if match is None:
        return None
    days, *rest = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes, or minutes:seconds
        rest = [0, *rest[:2]]
    hours, minutes, seconds = rest
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _num_processes(config: Config, options: Options, allocation: Allocation | None) -> int | None:
    """Returns how many processes a node has where the config does not say; None to count GPUs there."""
    wanted = str(options.get("gpus-per-node", ""))
    if not wanted and (gres := re.search(r"(?:^|,)gpu(?::[^,]*)?(?=,|$)", str(options.get("gres", "")))):
        wanted = gres[0]
    if wanted:
        number = wanted.rpartition(":")[2]
        return int(number) if number.isdigit() else 1
    if allocation is not None and allocation.gpus_per_node:
        return allocation.gpus_per_node
    asks_otherwise = any(name in options for name in ("gpus", "gpus-per-task", "gpus-per-socket"))
    return None if asks_otherwise and allocation is None else 1


def _surroundings(config: Config) -> str:
    lines = [f'export PYTHONPATH={shlex.quote(str(_CODE_FOLDER))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    if config.launch.slurm.setup:
        lines += ["# launch.slurm.setup", *config.launch.slurm.setup]
    return "\n".join(lines) + "\n"


def _place(config: Config, allocation: Allocation | None) -> str:
    # Several launches in one allocation must not meet each other.
    job = "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" if allocation is None else "$SLURM_JOB_ID.$$"
    number = "SLURM_JOB_ID" if allocation is None else "(SLURM_JOB_ID + $$)"
    port = str(config.launch.port or f"$(({_FIRST_PORT} + {number} % {_NUM_PORTS}))")
    lines = [
        "# Machines meet on the first one, by the address that Slurm itself has of it; names may not be known.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "host=$(scontrol show node -o \"$first\" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
        f"port={port}",
        f'job="{job}"  # new for every start',
        "",
        "# The run folder, in which the run says how it has ended.",
        f"run_dir={shlex.quote(str(run_folder(config)))}",
    ]
    if config.launch.slurm.array is not None:
        lines += ["# A task of the array is a run of its own.", 'task="$SLURM_ARRAY_TASK_ID"', 'run_dir+="-$task"']
    return "\n".join(lines) + "\n"


def _srun(
    config: Config,
    config_file: str,
    overrides: Sequence[str],
    options: Options,
    allocation: Allocation | None,
    agent_options: Sequence[str],
) -> str:
    nodes, slurm = config.launch.nodes, config.launch.slurm
    count = '"$SLURM_JOB_NUM_NODES"' if allocation is None else str(allocation.num_nodes)
    flags = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--export=ALL", "--cpu-bind=none"]
    if nodes.is_elastic:
        flags += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
        about = "# An agent on every node. When one is lost or leaves, the others go on."
    else:
        seconds = stop_seconds(config) + _TICK_SECONDS
        flags += ["--kill-on-bad-exit=0", f"--wait={seconds}"]
        about = f"# An agent on every node. When one has ended, the others end by themselves, or {seconds} s later."
    if allocation is not None:
        flags += ["--relative=0", "--overlap"]
    starter = '\'exec "$@" --node-rank "$SLURM_PROCID"\''
    before = _BEFORE
    if nodes.is_elastic and allocation is None:
        starter = '"$on_node"'
        again = "scontrol requeue" if "requeue" in options else "scancel"
        before += _ON_NODE.replace("AGAIN", again)
    python = slurm.python or (sys.executable if slurm.container is None else "python")
    words = [*([slurm.container] if slurm.container else []), shlex.quote(python), "-m", "launch", "agent"]
    arguments = ["--config", str(Path.cwd() / config_file)]
    processes = _num_processes(config, options, allocation)
    given = [*overrides]
    if config.launch.processes is None and processes is not None:
        given.append(f"launch.processes={processes}")
    lines = [
        f"srun {' '.join(flags)} \\",
        f"    bash -c {starter} agent \\",
        f"    {' '.join(words)} \\",
        '    --rendezvous "$host:$port" --job "$job" \\',
        f"    {shlex.join([*agent_options, *arguments])} \\",
        *(f"    {shlex.quote(word)} \\" for word in given),
    ]
    if slurm.array is not None:
        lines += [f"    {word} \\" for word in _of_task(config)]
    if nodes.is_elastic:
        lines.append(f"    --nodes {nodes.least}:{count} \\")
    lines.append("    &")
    return "\n".join([before, about, *lines]) + "\n"


def _of_task(config: Config) -> list[str]:
    """Returns the overrides, as bash takes them, that make a run of its own of an array's task."""
    words = [f'run.name={config.run.name}-"$task"', f'run.seed="$(({config.run.seed} + task))"']
    if config.run.dir is not None:
        words.append('run.dir="$run_dir"')
    if config.checkpoint.dir is not None:
        words.append(f'{shlex.quote("checkpoint.dir=" + config.checkpoint.dir.rstrip("/"))}-"$task"')
    return words


_SIGNALS = """\
# Slurm sends USR1 before it takes nodes away (preemption) and about SECONDS s before the time limit; `python -m launch
# slurm cancel` sends USR2. Both ask the run, once, to stop with a checkpoint. What scancel sends reaches it by itself.
step="" asked="" signals=0
ask_to_stop() {
    signals=$((signals + 1))
    [ -n "$asked" ] || [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null
    [ "$asked" = USR2 ] || asked=$1
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop USR2' USR2
trap 'signals=$((signals + 1))' TERM
"""

_ABORT = """\
trap 'signals=$((signals + 1)); [ -z "$step" ] || kill -s TERM "$step" 2>/dev/null' INT  # Ctrl-C a second time
"""

_BEFORE = """\
# For Slurm the number of an array's last task stands for all tasks.
itself=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
itself=${itself:-$SLURM_JOB_ID}
said() { sed -n "s/^  \\"$1\\": \\"\\{0,1\\}\\([^\\",]*\\).*/\\1/p" "$run_dir/summary.json" 2>/dev/null; }
sum_up() { cat "$run_dir/summary.json" 2>/dev/null | cksum; }
summary_before=$(sum_up)
status_before=$(said status) step_before=$(said step)
"""

_ON_NODE = """
# With --no-kill Slurm keeps a job whose first node is lost, where this script runs and without which nothing goes on:
# the others then see to it themselves.
on_node=$(cat <<'END'
trap : USR1 TERM INT  # they are for the agent
"$@" --node-rank "$SLURM_PROCID"
code=$?
if [ "$code" = 1 ] && [ "$SLURM_PROCID" != 0 ]; then
    try=(srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$FIRST_NODE" true)
    timeout -k 5 30 "${try[@]}" >/dev/null 2>&1 </dev/null || AGAIN "$ITSELF"
fi
exit "$code"
END
)
export FIRST_NODE=$first ITSELF=$itself
"""

_ENDED = """\
step=$!
[ -z "$asked" ] || kill -s USR1 "$step"  # while it was being started
seen=-1
while [ "$seen" != "$signals" ]; do  # a signal ends a wait early
    seen=$signals
    wait "$step"
    code=$?
done

# How the run has ended it says itself: of agents that end differently srun knows only the highest code.
status=""
[ "$summary_before" = "$(sum_up)" ] || status=$(said status)
case "$status:$code" in
    finished:*) code=0 ;;
    stopped:*) code=75 ;;
    failed:0) code=1 ;;
    *:0 | *:2 | *:75) ;;
    *) [ -n "$asked" ] && [ -z "$status" ] && code=75 || code=1 ;;  # asked before it had begun
esac
"""

_REQUEUE = """\
# Stopped by a signal, and not by the user: Slurm starts this job again, and the run goes on from its checkpoint.
again="" is_told_to_leave="" about=""
patiently() {  # Slurm may not answer for a moment
    for try in 1 2 3 4 5; do
        "$@" && return
        [ "$try" = 5 ] || sleep 3
    done
    return 1
}
show_itself() { scontrol show job -o "$itself" | grep JobState=; }
requeue() { (trap '' TERM && exec scontrol requeue "$itself"); }  # by which Slurm ends this script
if [ "$code" = 75 ] && [ "$asked" != USR2 ]; then
    about=$(patiently show_itself) || echo "error: not requeued: Slurm does not say how job $itself stands" >&2
fi
if [[ $about == *" JobState=RUNNING "* ]]; then
    [[ $about == *" PreemptTime="[0-9]* ]] && is_told_to_leave=yes
    case "$status:$(said stopped_by)" in
        stopped:*STOP*) ;;
        stopped:SIG*)
            if [ "$status_before" = stopped ] && [ "$(said step)" = "$step_before" ] && [ -z "$is_told_to_leave" ]; then
                echo "not started again: it has not made a step before it was asked to stop" >&2
            else
                again=yes
            fi ;;
        :*)
            again=$is_told_to_leave  # preempted before it had begun
            [ -n "$again" ] || echo "not started again: it was asked to stop before it had begun to train" >&2 ;;
    esac
    if [ -n "$again" ]; then
        if patiently requeue; then
            echo "requeued: job $itself goes on from its checkpoint when Slurm starts it again" >&2
        else
            echo "error: not requeued: Slurm does not start job $itself again; start it again by hand" >&2
        fi
    fi
fi
"""
