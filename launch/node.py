"""This machine's part of a job on several: torch's elastic agent, which meets those of the other machines.

`python -m launch agent` is what the targets hosts, slurm and kubernetes run on every machine; a person may, too. Where
the first machine is and how many there are comes from whoever starts it. Which ranks a machine gets, and who rank 0
is, the agents agree on when they meet; whoever is lost is left out the next time that they do.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from launch.starting import TRAIN_SCRIPT, LaunchPlan, agent_variables, count_gpus, count_processes, run
from launch.stopping import SIGNALS, shutdown_seconds
from trainer.cli import EXIT_STOPPED
from trainer.config import Config
from trainer.errors import UserError

logger = logging.getLogger("lockstep")

LEASH_SECONDS = 40.0  # of silence, after which an agent on a leash takes its launcher for lost
_LAST_CALL_SECONDS = 5  # for more machines, when there are enough
_KEEP_ALIVE_SECONDS, _KEEP_ALIVE_ATTEMPTS = 3, 3  # a machine that is silent for so many times so long is left out
_ROUTE_TEST = ("192.0.2.1", 9)  # TEST-NET-1: nobody is asked anything


@dataclass(frozen=True)
class Place:
    """Where this machine's agent meets the others.

    Args:
        node_rank: 0 on the machine where they meet, anything else elsewhere.
        host: name or address of that machine, as the others reach it.
        port: TCP port there.
        job: name of this start of the job, the same for all and new for each.
        address: of this machine, as the others reach it; None to find out.
        num_gpus: that this machine is paid for; 0 where nobody knows.
        join_seconds: for machines to come to the first meeting: images are pulled, file systems wake up.
    """

    node_rank: int
    host: str
    port: int
    job: str
    address: str | None = None
    num_gpus: int = 0
    join_seconds: int = 900


def plan(place: Place, arguments: Sequence[str], config: Config, script: str = TRAIN_SCRIPT) -> LaunchPlan:
    """Returns what starts this machine's processes.

    Args:
        place: where the machines meet.
        arguments: what the script is called with.
        config: says how many machines and processes, and how often to start again.
        script: that every process runs.

    Raises:
        UserError: there are fewer GPUs than processes or than were promised, or the first machine's name is not known
            here.
    """
    num_gpus = count_gpus(config)
    if not num_gpus and place.num_gpus:
        hint = "is its driver dead, or is this torch for CPUs?"
        raise UserError(f"{socket.gethostname()} was to have {place.num_gpus} GPUs, and torch sees none: {hint}")
    count = count_processes(config.launch.processes, num_gpus)
    address = place.address or find_address(place)
    meeting = {
        "is_host": str(place.node_rank == 0).lower(),
        "join_timeout": place.join_seconds,
        "last_call_timeout": _LAST_CALL_SECONDS,
        "keep_alive_interval": _KEEP_ALIVE_SECONDS,
        "keep_alive_max_attempt": _KEEP_ALIVE_ATTEMPTS,
    }
    options = ["--nnodes", str(config.launch.nodes), "--nproc-per-node", str(count)]
    options += ["--max-restarts", str(config.launch.max_restarts)]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{place.host}:{place.port}", "--rdzv-id", place.job]
    options += ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in meeting.items()), "--local-addr", address]
    variables = agent_variables(config, count, num_gpus)
    # With a store that the agents share with the ranks a machine that comes back ends the job (pytorch 2.11 to 2.15).
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    interface = config.launch.interface or os.environ.get("GLOO_SOCKET_IFNAME") or _interface_of(address)
    if interface is not None:  # gloo looks up the machine's own name, which Debian maps to 127.0.1.1
        variables["GLOO_SOCKET_IFNAME"] = interface
    if config.launch.interface is not None:
        variables["NCCL_SOCKET_IFNAME"] = config.launch.interface
    return LaunchPlan(["torchrun", *options, script, *arguments], {**variables, **config.launch.environment})


def run_on_leash(plan: LaunchPlan, config: Config, run: Callable[[LaunchPlan, Config], int] = run) -> int:
    """Runs a plan that ends when the launcher on another machine does, or cannot be heard any more.

    It holds our standard input: a line with a signal's name is passed on, any other is a sign of life.
    """
    leash = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # the ranks have no input
    os.close(null)
    for name in SIGNALS:  # until torch's agent has its own handlers
        signal.signal(signal.Signals[name], lambda number, frame: sys.exit(EXIT_STOPPED))
    threading.Thread(target=_obey, args=(leash, shutdown_seconds(config)), name="leash", daemon=True).start()
    return run(plan, config)


def run_replaceable(plan: LaunchPlan, place: Place, config: Config) -> int:
    """Runs a plan on a machine that whoever started it starts again, as Kubernetes does with a pod.

    Returns the exit code of the training, but 75 (start me again) where the failure is another machine's: only the
    one that failed counts as failed, whatever the number of those that failed with it. It may come before the first
    machine has a name, and right after one of the same address.
    """
    if place.node_rank != 0 and not _first_machine_comes(place):
        return EXIT_STOPPED
    return run(plan, config, code_of_others=EXIT_STOPPED)


def _first_machine_comes(place: Place) -> bool:
    """Waits until the place where machines meet can be reached; returns False after a signal, or too long a time."""
    requested = threading.Event()  # the first process of a container ignores signals that it does not handle
    numbers = [signal.Signals[name] for name in SIGNALS]
    previous = {number: signal.signal(number, lambda *_: requested.set()) for number in numbers}
    try:
        # Agents are told apart by address and process id, which in a container is always the same one: the others
        # must have missed this one's predecessor.
        age = time.time() - psutil.Process().create_time()
        requested.wait(max(0.0, _KEEP_ALIVE_SECONDS * _KEEP_ALIVE_ATTEMPTS + 1 - max(0.0, age)))
        end = time.monotonic() + place.join_seconds
        is_told = False
        while not requested.is_set():
            try:
                socket.create_connection((place.host, place.port), timeout=5).close()
            except OSError as error:
                reason = f"the first machine, {place.host}, cannot be reached at port {place.port}: {error}"
            else:
                return True
            if time.monotonic() > end:
                sys.stderr.write(f"error: {reason}\n")
                break
            if not is_told:
                logger.info("waiting: %s", reason)
            is_told = True
            requested.wait(1.0)
        return False
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def find_address(place: Place) -> str:
    """Returns the address of this machine from which the first one is reached; there, the one of its own name.

    Raises:
        UserError: the first machine's name is not known here.
    """
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        message = f"the first machine's name, {place.host}, is not known on {socket.gethostname()}: {error}"
        raise UserError(message) from None
    family, kind, _, _, target = found[0]
    address = _source_address(family, kind, target)
    if place.node_rank == 0 and (address is None or address.startswith("127.")):
        address = _source_address(socket.AF_INET, socket.SOCK_DGRAM, _ROUTE_TEST) or address
    return address or str(target[0])


def _source_address(family: int, kind: int, target: tuple[object, ...]) -> str | None:
    """Returns the address that packets to a target would come from. None is sent."""
    with socket.socket(family, kind) as probe:
        try:
            probe.connect(target)
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return None


def _obey(leash: int, grace: float) -> None:
    """Passes on what is asked for; when the launcher is gone, asks the ranks to stop, and later ends everything."""
    heard, text = time.monotonic(), b""
    while time.monotonic() - heard < LEASH_SECONDS:
        if not select.select([leash], [], [], 1.0)[0]:
            continue
        chunk = os.read(leash, 4096)
        if not chunk:
            break
        heard = time.monotonic()
        *lines, text = (text + chunk).split(b"\n")
        for line in lines:
            if (name := line.decode(errors="replace").strip()) in SIGNALS:
                os.kill(os.getpid(), signal.Signals[name])
    with suppress(OSError):  # so is whoever read this
        sys.stderr.write("the launcher is gone: stopping\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace + 10)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)
