"""What one machine tells of itself and tries out for others: `python -m launch.host_facts`, at the far end of an ssh.

Each line of standard input is a question in JSON, `{"ask": "facts", ...}`, and is answered with one line after `MARK`,
so that a login script may print what it likes. It ends with its input. What the answers mean is judged elsewhere
(`launch.checks`). torch is imported only where there is an accelerator: here that is a matter of milliseconds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.config import load_config
from trainer.data.tuning import cores_of_a_rank
from trainer.errors import UserError, one_line_text

MARK = "::lockstep "  # before each answer
ROOT = Path(__file__).resolve().parent.parent
_CODE = ("launch", "trainer")
_DEVICE_FILES = ("nvidia[0-9]*", "nvidiactl", "dxg", "kfd", "dri/renderD*", "accel*", "davinci*", "habanalabs*")
_PORTS = range(20_000, 32_000)  # below those that systems give to outgoing connections
_GREETING_BYTES = 64


@dataclass(frozen=True)
class Facts:
    """A machine, as far as a job on several cares.

    Args:
        hostname: its own name.
        addresses: of it, that which was connected to first.
        versions: of python, torch, accelerate and lockstep.
        code: digest by file of the trainer and the launcher.
        config: the resolved config.
        devices: name of each accelerator.
        num_cores: that its processes may use.
    """

    hostname: str
    addresses: tuple[str, ...]
    versions: dict[str, str]
    code: dict[str, str]
    config: dict[str, Any]
    devices: tuple[str, ...]
    num_cores: int

    @classmethod
    def from_answer(cls, answer: dict[str, Any]) -> Facts:
        """Reads what has gone through JSON.

        Raises:
            UserError: it is the answer of another version of this file.
        """
        try:
            return cls(**{**answer, "addresses": tuple(answer["addresses"]), "devices": tuple(answer["devices"])})
        except (KeyError, TypeError):
            raise UserError("other code than here: launch/host_facts.py") from None


def collect(config_file: str, overrides: Sequence[str]) -> Facts:
    """Returns what is the case on this machine.

    Raises:
        UserError: the config cannot be read here.
    """
    config = load_config(config_file, overrides).of_trial(os.environ)
    with _variables(config.launch.environment):  # CUDA_VISIBLE_DEVICES and its like
        found = devices()
    return Facts(
        hostname=socket.gethostname(),
        addresses=tuple(addresses(config.launch.interface)),
        versions=versions(),
        code=code_digests(),
        config=config.model_dump(mode="json"),
        devices=found,
        num_cores=cores_of_a_rank(1),
    )


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def versions() -> dict[str, str]:
    """Returns the versions that must be equal everywhere; `none` where a package is not installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "torch": _torch_version()}
    for name, package in (("accelerate", "accelerate"), ("lockstep", "lockstep-trainer")):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _torch_version() -> str:
    """Returns `torch.__version__`, which says what it was built for, without the seconds that its import takes."""
    specification = importlib.util.find_spec("torch")
    if specification is None or specification.origin is None:
        return "none"
    values: dict[str, Any] = {}
    exec(Path(specification.origin).with_name("version.py").read_text(), values)
    return str(values["__version__"])


def code_digests() -> dict[str, str]:
    """Returns a digest of the contents of every file of the trainer and the launcher."""
    files = [ROOT / "train.py", *(file for name in _CODE for file in (ROOT / name).rglob("*.py"))]
    return {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(files)
        if file.is_file()
    }


def devices() -> tuple[str, ...]:
    """Returns the names of the accelerators that training would use here."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in _DEVICE_FILES):
        return ()
    import torch

    if not torch.accelerator.is_available():
        return ()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    name = getattr(getattr(torch, kind.type, None), "get_device_name", lambda index: kind.type)
    return tuple(str(name(index)) for index in range(torch.accelerator.device_count()))


def listed(names: Sequence[str]) -> str:
    """Returns names of devices as a person reads them, such as `8 x NVIDIA H100`."""
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no GPU"


def addresses(interface: str | None = None) -> list[str]:
    """Returns this machine's addresses, those first that others are the most likely to reach it at.

    Args:
        interface: the one for traffic between machines, if it was chosen.
    """
    by_interface: dict[str, list[str]] = {}
    for name, known in psutil.net_if_addrs().items():
        for family in (socket.AF_INET, socket.AF_INET6):
            found = [address.address for address in known if address.family == family and "%" not in address.address]
            by_interface.setdefault(name, []).extend(a for a in found if not a.startswith("127.") and a != "::1")
    if interface is not None:
        return by_interface.get(interface, [])
    connected = os.environ.get("SSH_CONNECTION", "").split()[2:3]  # "client port server port"
    every = [address for group in by_interface.values() for address in group]
    return list(dict.fromkeys([a for a in connected if a in every] + every))


class _Machine:
    """What is asked of this machine, one method per question."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def facts(self, config: str, overrides: list[str]) -> dict[str, Any]:
        return asdict(collect(config, overrides))

    def clock(self) -> float:
        return time.time()

    def leave_file(self, folder: str, name: str) -> str:
        """Writes a file into a folder, or where the folder would be made, and returns where that is."""
        place = Path(folder).expanduser().absolute()
        while not place.is_dir() and place != place.parent:
            place = place.parent
        (place / name).write_text(socket.gethostname())
        return str(place / name)

    def find_file(self, path: str, seconds: float) -> bool:
        """Tells whether a file is seen here, and a file can be put beside it; some file systems take a moment."""
        end = time.monotonic() + seconds
        while not Path(path).exists():
            if time.monotonic() > end:
                return False
            with suppress(OSError):
                os.listdir(Path(path).parent)  # which has NFS look again
            time.sleep(0.1)
        mine = Path(f"{path}.{secrets.token_hex(4)}")  # hosts may have the same name
        mine.write_text("")
        mine.unlink()
        return True

    def remove_file(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def listen(self, port: int | None, greeting: str) -> int:
        """Greets whoever connects to a port, or to a free one, and returns which."""
        self._listener = _bind(port)
        threading.Thread(target=_greet, args=(self._listener, greeting), name="greeter", daemon=True).start()
        return int(self._listener.getsockname()[1])

    def stop_listening(self) -> None:
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread's accept
            self._listener.close()

    def connect(self, address: str, port: int, greeting: str, seconds: float) -> None:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            if connection.recv(_GREETING_BYTES).decode(errors="replace") != greeting:
                raise OSError("somebody else answers")


def _bind(port: int | None) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    candidates = [port] if port is not None else random.sample(_PORTS, 20)
    for number in candidates:
        try:
            return socket.create_server(("", number), family=family, dualstack_ipv6=family == socket.AF_INET6)
        except OSError as error:
            if number == candidates[-1]:
                raise OSError(error.errno, os.strerror(error.errno or 0)) from None
    raise AssertionError


def _greet(listener: socket.socket, greeting: str) -> None:
    with suppress(OSError):  # the listener is closed
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(greeting.encode())


def main() -> None:
    """Answers questions until there are no more."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    machine = _Machine()
    _answer({"value": "ready"})
    for line in sys.stdin:
        question = json.loads(line)
        method: Callable[..., Any] = getattr(machine, question.pop("ask"))
        try:
            _answer({"value": method(**question)})
        except UserError as error:
            _answer({"errors": [str(problem) for problem in error.problems]})
        except OSError as error:
            _answer({"errors": [error.strerror or one_line_text(error)]})


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
