"""Files of a pack while it is written: temporary until they are whole, and removed where their writer was killed.

Many processes of several hosts write into one folder, which may be a network file system. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.errors import UserError
from trainer.system import sync_folder
from trainer.units import format_bytes

STALE_SECONDS = 3600.0
VISIBLE_SECONDS = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name, and on the disk, only when the body has ended well.

    Raises:
        UserError: the disk is full or cannot be written. OSErrors of the body are taken for that.
    """
    temporary = path
    try:
        try:
            temporary, file = _open_temporary(path)
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            raise write_error(path.parent, error) from error
    except BaseException:
        if temporary != path:
            temporary.unlink(missing_ok=True)
        raise


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        file = open(temporary, "xb", buffering=2**20)  # noqa: SIM115  # the caller closes it
        with contextlib.suppress(OSError):  # no locks on this file system: see remove_leftovers
            fcntl.flock(file, fcntl.LOCK_EX)  # tells that its writer lives
        if temporary.exists():  # not taken for a leftover before it was locked
            return temporary, file
        file.close()


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed, and not those of another job at work.

    A writer holds a lock, which ends with it. Locks may not reach other hosts, or may be missing altogether: there,
    a file counts as left over when it has not been written for an hour.
    """
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError), open(leftover, "rb") as file:
            is_locking, is_stale = True, time.time() - os.fstat(file.fileno()).st_mtime > STALE_SECONDS
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                is_locking = False
            if is_stale or (is_locking and f".{socket.gethostname()}." in leftover.name):
                leftover.unlink()


def appears(file: Path) -> bool:
    """Tells whether another host's file is there; what a network file system remembers may be seconds old."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not file.exists():
        if not file.parent.is_dir() or time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            # A change of our own makes an NFS client look at the folder again.
            probe = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.probe.tmp")
            probe.touch()
            probe.unlink()
        time.sleep(0.2)
    return True


def write_error(folder: Path, error: OSError) -> UserError:
    """Returns what a user is told of a folder that cannot be written."""
    if error.errno in _FULL:
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
        return UserError(
            f"no space left in '{folder}'{free}: {error.strerror}; make room and start again: complete shards are kept"
        )
    return UserError(f"cannot write to '{folder}': {error.strerror or error}")
