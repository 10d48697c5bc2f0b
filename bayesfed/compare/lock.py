"""A lock between processes on one machine that leaves no file behind."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL = 0.2  # seconds between attempts


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock ``path``; the file is removed when it is released (one that a killed process left is taken over).

    Args:
        path: of the lock file.
        patience: seconds to wait for another process that holds it.

    Raises:
        BlockingIOError: another process still holds it.
    """
    deadline = time.monotonic() + patience
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL)
                continue
            if not _is(path, file.fileno()):  # its last holder removed it between opening and locking
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is(path: Path, handle: int) -> bool:
    """Whether ``path`` is the file that is open as ``handle``."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False
