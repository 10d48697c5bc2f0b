"""``engine=ray``: clients on resident Ray actors, on this machine or a cluster."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import ray
import torch

from bayesfed.app import client_app
from bayesfed.engine.batching import batch_of
from bayesfed.engine.ray_grid import RayGrid
from bayesfed.errors import InputError, integer, number
from bayesfed.host import cores, same_random
from bayesfed.wire.flower_version import node_context

if TYPE_CHECKING:
    from bayesfed.runs.session import Session


class RayEngine:
    """``engine=ray``.

    Args:
        num_workers: actors; None is one per core that this process may use, or as many as the GPUs allow if
            ``num_gpus`` > 0.
        num_gpus: GPU share of each actor, e.g. 0.5.
        address: an existing cluster (``auto``, ``host:port`` or ``ray://host:port``); None starts Ray on this machine.
        clients_per_batch: clients trained side by side; None chooses (:mod:`bayesfed.engine.batching`).

    Raises:
        InputError: a value out of range, or the cluster can't be joined.
    """

    _started: ClassVar[bool] = False  # whether this process's Ray is ours, not the user's or a cluster's

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
        self.num_workers, self.num_gpus, self.address = num_workers, float(num_gpus), address
        self.clients_per_batch = clients_per_batch

    def run(self, session: Session) -> None:
        """Run ``session`` to its end; Ray stays up, so that the jobs of a sweep share it."""
        self.connect()
        build = partial(client_app, session.config, str(session.directory.sites.resolve()))
        session.workers = self._workers(session.num_clients)
        batch = batch_of(session, self.clients_per_batch, torch.device("cuda") if self.num_gpus else None)
        grid = RayGrid(build, session.num_clients, session.workers, self.num_gpus, batch, session.cfg.accelerate)
        try:
            session.server_app()(grid, node_context(0, 0, session.num_clients))
        finally:
            grid.close()

    def connect(self) -> None:
        """Start Ray or join the cluster, once per process (a job of a sweep that wants more workers starts its own Ray
        anew)."""
        if ray.is_initialized():
            if not (RayEngine._started and (self.num_workers or 0) > ray.cluster_resources().get("CPU", 0)):
                return
            ray.shutdown()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about a future default
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # 15 by default: they would starve beside any other busy process
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
        if self.address is None:
            # a worker needs a CPU slot each, and a slot more than there are cores costs nothing
            options |= {"num_cpus": max(cores(), self.num_workers or 1), "include_dashboard": False}
        try:
            with same_random():
                ray.init(address=self.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError("engine.address", self.address, f"can't join Ray: {str(error).splitlines()[0]}") from error
        RayEngine._started = self.address is None

    def _workers(self, num_clients: int) -> int:
        available = ray.cluster_resources()
        count = self.num_workers
        if count is None:
            count = int(available.get("CPU", 1))
            if self.num_gpus > 0:
                count = int(available.get("GPU", 0) / self.num_gpus)
        if self.num_gpus * max(count, 1) > available.get("GPU", 0):
            raise InputError(
                "engine.num_gpus",
                self.num_gpus,
                f"times {count} workers is more than Ray's {available.get('GPU', 0):g} GPUs",
            )
        if count > available.get("CPU", 0):
            raise InputError("engine.num_workers", count, f"Ray has {available.get('CPU', 0):g} CPU slots only")
        return min(count, num_clients)
