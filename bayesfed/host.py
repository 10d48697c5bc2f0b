"""What bayesfed takes from the machine and the process it runs in."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from bayesfed.errors import InputError

HOME = Path(__file__).resolve().parent.parent  # where the packages bayesfed, strategies and clients lie
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, e.g. "150000 100000" for 1.5 cores


def cores() -> int:
    """CPU cores that this process may use: those of the machine, less what affinity (taskset, Slurm) and container take
    away."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        quota, period = map(int, QUOTA.read_text().split())
        allowed = min(allowed, max(1, math.ceil(quota / period)))
    return allowed


@contextmanager
def same_random() -> Iterator[None]:
    """Put Python's ``random`` back as it was: Rich draws from it when it is imported, Ray when it starts."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def look_as(path: Sequence[str]) -> None:
    """Look for packages as a server whose ``sys.path`` is ``path``: Ray puts the working directory first on its
    workers, and a folder ``strategies`` there would hide bayesfed's own."""
    sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]


def own_packages() -> None:
    """Check that ``strategies`` and ``clients`` are bayesfed's, not folders of the user's project that come first in
    ``sys.path``.

    Raises:
        InputError: naming the folder that hides one of them.
    """
    for name in ("strategies", "clients"):
        module = sys.modules.get(name)
        spec = module.__spec__ if module is not None else find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != HOME / name / "__init__.py":
            fix = f"hides bayesfed's own package `{name}` ({HOME / name}); rename yours, or start where Python doesn't "
            fix += "find it first"
            raise InputError(f"package {name}", origin.parent if origin and origin.stem == "__init__" else origin, fix)
