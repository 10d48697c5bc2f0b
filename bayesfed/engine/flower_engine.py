"""Flower's own simulation runtime, in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bayesfed import profiling
from bayesfed.errors import InputError, RunFailed, integer, number
from bayesfed.host import cores

if TYPE_CHECKING:
    from bayesfed.runs.session import Session


class FlowerEngine:
    """``engine=flower``: the reference to compare with, and a check that bayesfed's apps are plain Flower apps.

    The runtime runs the ServerApp in a thread and ends with ``ray.shutdown()``, so it gets a process of its own, which
    reads the run directory and writes its results there.

    Args:
        num_workers: limits the ClientApps that run at once (cores / num_workers CPUs each); None is one per core.
        num_gpus: GPU share of each ClientApp.
        address: must be None: the runtime starts its own Ray.
        clients_per_batch: None or 1: the runtime delivers messages one at a time.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        num_gpus: float = 0.0,
        address: str | None = None,
        clients_per_batch: int | None = None,
    ):
        integer("num_workers", num_workers, at_least=1, optional=True)
        number("num_gpus", num_gpus, at_least=0)
        integer("clients_per_batch", clients_per_batch, at_least=1, optional=True)
        if clients_per_batch is not None and clients_per_batch > 1:
            fix = "Flower's runtime delivers messages one at a time; use engine=inline or engine=ray"
            raise InputError("clients_per_batch", clients_per_batch, fix)
        if address is not None:
            raise InputError("address", address, "engine=flower starts its own Ray; use engine=ray to join a cluster")
        self.num_workers, self.num_gpus = num_workers, float(num_gpus)

    def run(self, session: Session) -> None:
        """Run ``session`` to its end.

        Raises:
            RunFailed: the child failed.
        """
        path = str(session.directory.path.resolve())
        # -P: the working directory doesn't come first, or a folder `strategies` in it would hide ours
        command = [
            sys.executable,
            "-P",
            "-m",
            "bayesfed.engine.flower_engine",
            path,
            str(time.time() - _seconds_so_far()),
        ]
        environment = {"FLWR_TELEMETRY_ENABLED": "0", **os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        # its own process group: Ctrl-C is handled here, and nothing the child started outlives it
        lock = session.directory.lock
        descriptors = (lock,) if lock >= 0 else ()  # locked as long as either of the two lives
        child = subprocess.Popen(command, start_new_session=True, env=environment, pass_fds=descriptors)
        try:
            code = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        if code != 0:
            raise RunFailed(f"Flower's runtime ended with code {code}")

    def serve(self, directory: Path) -> None:
        """What the child does."""
        from bayesfed.runs.session import resume_session
        from bayesfed.wire.flower_version import simulate

        with profiling.span("start-up"), profiling.span("load"):
            session = resume_session(directory)
        allowed = cores()
        cpus = 1.0 if self.num_workers is None else max(1, allowed // self.num_workers)
        session.workers = max(1, int(allowed / cpus))
        resources = {"num_cpus": cpus, "num_gpus": self.num_gpus}
        simulate(session.server_app(), session.client_app(), session.num_clients, resources)


def _seconds_so_far() -> float:
    """How long ago the run began, for the child's profile."""
    profiler = profiling.current()
    return 0.0 if profiler is None else profiler.elapsed()


def _child(run_path: Path, began: float) -> None:
    """Serve the run in ``run_path``, which the parent began at ``began`` (seconds since the epoch)."""
    from bayesfed.app import device_of
    from bayesfed.configured import build
    from bayesfed.runs.directory import RunDirectory

    cfg = RunDirectory.open(run_path).config()
    profiler = None
    if cfg.profile:
        ago = time.time() - began
        profiler = profiling.Profiler.on(device_of({"device": cfg.device}), ago)
        profiler.settle("start-up", "process")
    with profiling.recording(profiler):
        build(cfg.engine, "engine").serve(run_path)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), float(sys.argv[2]))
