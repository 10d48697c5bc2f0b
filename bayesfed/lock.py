"""One process at a time in a folder: a lock that names its holder, ends with it, and leaves no file behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from logging import getLogger
from pathlib import Path

from bayesfed.errors import InputError
from bayesfed.foreign import plain_text

log = getLogger("bayesfed")
NAME = ".lock"
POLL = 0.2  # seconds between attempts
GLANCE = 0.3  # seconds after which somebody who only looked whether the lock is held (`holder`) is gone
OURS = re.compile(r"\.[\w-]+\.(yaml|jsonl?|safetensors|csv|md|tex|html)\.\w+\.partial")
PARTIAL = ".partial"  # how the name of a file ends that is being written; it is renamed when it is whole
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks


class Held(BlockingIOError):
    """Another process, or another thread of this one, holds the lock; the text says which."""


@contextmanager
def alone(folder: Path, field: str, patience: float = 0.0) -> Iterator[int]:
    """Be the only one at work in ``folder``, which is made if need be; what killed processes were writing there is
    removed.

    Args:
        folder: of a run, a comparison, a partition.
        field: what the user wrote to name it.
        patience: seconds to wait for another process.

    Returns:
        the lock's file descriptor: a child process that inherits it keeps the folder locked, also if this one is
        killed.

    Raises:
        InputError: another process is at work there, or the folder can't be made or written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(locked(folder / NAME, patience))
            for pattern in (".*", "checkpoint/*", "checkpoint/sites/*/*"):
                for rest in folder.glob(pattern + PARTIAL):
                    if pattern != ".*" or OURS.fullmatch(rest.name):  # the folder may be somebody's home
                        rest.unlink(missing_ok=True)
        except Held as held:
            raise InputError(field, folder, f"another process ({held}) is at work there") from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise InputError(field, folder, f"can't be written ({reason(error)})") from error
        yield handle


def check_folder(folder: Path, mark: str, kind: str) -> None:
    """Check that what ``out`` names is a new or empty folder, or that of ``kind``, which holds a file ``mark``.

    Raises:
        InputError: it is something else.
    """
    try:
        names = {entry.name for entry in folder.iterdir()} - {NAME}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise InputError("out", folder, "is a file; name a folder") from None
    except (OSError, ValueError) as error:
        raise InputError("out", folder, f"can't be read ({reason(error)})") from error
    if names and mark not in names:
        raise InputError("out", folder, f"holds other files; name a new or empty folder, or that of {kind}")


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[int]:
    """Hold the lock ``path``; the file is removed when it is released (one that a killed process left is taken over).

    The kernel's lock on the open file counts, not the file: it ends with the process, and also keeps out other threads.
    The file names pid, host and time for others to read.

    Args:
        path: of the lock file.
        patience: seconds to wait for another process that holds it.

    Raises:
        Held: another process still holds it.
        OSError: the file can't be written.
    """
    handle, pid = _take(path, patience), os.getpid()
    try:
        _sign(handle)
        yield handle
    finally:
        if os.getpid() == pid:  # not in a fork, which leaves the lock to its parent
            with suppress(OSError):
                if _is(path, handle):
                    path.unlink()
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # forks have the file open, too
        os.close(handle)


def holder(path: Path) -> tuple[str, bool] | None:
    """Who holds, or left, the lock ``path``, and whether it is held now; None if there is no such file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _signature(handle), False
    except BlockingIOError:
        return _signature(handle), True
    except OSError:
        return None
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """Why the system refused: its words without the number and the path."""
    return getattr(error, "strerror", None) or str(error)


def _take(path: Path, patience: float) -> int:
    deadline = time.monotonic() + max(patience, GLANCE)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            signature = _signature(handle)
            os.close(handle)
            if time.monotonic() >= deadline:
                raise Held(signature) from None
            time.sleep(POLL)
            continue
        except OSError as error:
            if error.errno not in UNKNOWN:
                os.close(handle)
                raise
            log.warning("%s: this file system has no locks: let no other process work there", path.parent)
        if _is(path, handle):
            return handle
        os.close(handle)  # its last holder removed it between opening and locking


def _sign(handle: int) -> None:
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(record).encode(), 0)


def _signature(handle: int) -> str:
    try:
        record = json.loads(os.pread(handle, 1000, 0))
        return plain_text(f"pid {record['pid']} on host {record['host']}, since {record['since']}")
    except (OSError, ValueError, TypeError, KeyError):
        return "which has not signed the lock"


def _is(path: Path, handle: int) -> bool:
    """Whether ``path`` is the file that is open as ``handle``."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False
