"""Clients on Ray: resident workers, one broadcast of the global arrays a round, replies streamed."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bayesfed.app import client_app
from bayesfed.engine.flower_version import error_reply, node_context, set_identity
from bayesfed.engine.grid import LocalGrid
from bayesfed.errors import InputError, RunFailed, integer, number
from bayesfed.profiling import occupied, span

if TYPE_CHECKING:
    from bayesfed.runs.session import Session

log = getLogger("bayesfed")
ATTEMPTS = 3  # a task whose worker died is given to a new worker this many times in all
BATCH_SECONDS = 0.02  # short tasks share a call, which costs about a millisecond by itself


def share_memory() -> None:
    """Let this process copy arrays straight to and from Ray's shared memory; pickled inside messages they cost thrice that."""

    def parts(array: Any) -> Any:
        return array.dtype, tuple(array.shape), array.stype, np.frombuffer(array.data, np.uint8)

    def array(values: Any) -> Array:
        dtype, shape, stype, data = values
        return Array(dtype, shape, stype, data.tobytes())

    ray.util.register_serializer(Array, serializer=parts, deserializer=array)


@dataclass(frozen=True)
class Task:
    """A message without its shared arrays: ``shared`` maps record names to references in the object store."""

    node: int
    message_type: str
    group: str
    records: dict[str, ConfigRecord | MetricRecord | ArrayRecord]
    shared: dict[str, ray.ObjectRef]


class Worker:
    """A process that keeps the ClientApp, and with it data, model and site store, between rounds."""

    def __init__(self, build: Callable[[], ClientApp], num_clients: int, path: list[str]):
        sys.path.extend(entry for entry in path if entry not in sys.path)
        import torch

        torch.set_num_threads(1)
        set_identity()
        share_memory()
        self.app = build()
        self.num_clients = num_clients
        self.contexts: dict[int, Any] = {}
        self.arrays: dict[str, ArrayRecord] = {}

    def run(self, tasks: list[Task]) -> list[Message]:
        """Serve the messages one after the other."""
        return [self._serve(task) for task in tasks]

    def _serve(self, task: Task) -> Message:
        records = dict(task.records)
        for name, reference in task.shared.items():
            key = reference.hex()
            if key not in self.arrays:
                self.arrays = {key: ray.get(reference)}  # only this round's
            records[name] = self.arrays[key]
        message = Message(RecordDict(records), task.node, task.message_type, group_id=task.group)
        context = self.contexts.setdefault(task.node, node_context(task.node, task.node - 1, self.num_clients))
        try:
            return self.app(message, context)
        except Exception as error:  # whatever a client raises is that client's failure
            return error_reply(message, error)


@dataclass
class Batch:
    """Tasks that one worker gets in one call."""

    tasks: list[Task]
    attempts: int = 0
    sent: float = 0.0


@dataclass
class Pool:
    """Worker actors and what each is doing."""

    actors: list[Any]
    busy: dict[ray.ObjectRef, tuple[int, Batch]] = field(default_factory=dict)


class RayGrid(LocalGrid):
    """A Flower ``Grid`` over resident Ray actors.

    Arrays that several messages share are put into the object store once. Messages go out in client order in small
    batches, to whichever worker is free; any worker can serve any client, because the state of a client is in the site store. A
    batch whose worker dies is given to a new worker (solving a round again gives the same site and the same reply).

    Args:
        build: makes the ClientApp, once in each worker; picklable.
        num_clients: number of nodes.
        num_workers: actors to start.
        num_gpus: of each actor.
    """

    def __init__(self, build: Callable[[], ClientApp], num_clients: int, num_workers: int, num_gpus: float = 0.0):
        super().__init__(num_clients)
        here = str(Path.cwd())
        path = [entry for entry in sys.path if entry and Path(entry).exists()]
        remote = ray.remote(Worker)
        options = remote.options(num_cpus=1, num_gpus=num_gpus)
        self._start = lambda: options.remote(build, num_clients, [*path, here])
        share_memory()
        self.pool = Pool([self._start() for _ in range(num_workers)])
        self._task_seconds = math.inf  # mean of the last call

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._abandon()
        with span("store"):
            tasks = self._tasks(list(messages))
        queue, seconds = self._batches(tasks), 0.0
        pool = self.pool
        free = deque(range(len(pool.actors)))
        while queue or pool.busy:
            while queue and free:
                worker, batch = free.popleft(), queue.popleft()
                batch.sent = time.monotonic()
                with span("send"):
                    pool.busy[pool.actors[worker].run.remote(batch.tasks)] = (worker, batch)
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(pool.busy), num_returns=1, timeout=wait)
            if not done:
                return
            worker, batch = pool.busy.pop(done[0])
            try:
                with span("receive"):
                    replies = ray.get(done[0])
            except ray.exceptions.RayActorError as error:
                replies = self._replace(worker, batch, queue, error)
            free.append(worker)
            took = time.monotonic() - batch.sent
            occupied(worker, batch.tasks[0].message_type, took, len(batch.tasks))
            seconds += took
            yield from replies
        self._task_seconds = seconds / max(len(tasks), 1)

    def close(self) -> None:
        """Stop the workers; Ray itself stays up for the next run of this process."""
        for actor in self.pool.actors:
            ray.kill(actor)
        self.pool.actors = []

    def _batches(self, tasks: list[Task]) -> deque[Batch]:
        """As many tasks together as take ``BATCH_SECONDS``; longer ones go out singly, which evens out unequal clients."""
        share = math.ceil(len(tasks) / len(self.pool.actors))
        size = max(1, min(32, share, int(BATCH_SECONDS / max(self._task_seconds, 1e-6))))
        return deque(Batch(tasks[i : i + size]) for i in range(0, len(tasks), size))

    @staticmethod
    def _tasks(messages: list[Message]) -> list[Task]:
        counts: dict[int, int] = {}
        for message in messages:
            for record in message.content.values():
                counts[id(record)] = counts.get(id(record), 0) + 1
        references: dict[int, ray.ObjectRef] = {}
        tasks = []
        for message in messages:
            records, shared = {}, {}
            for name, record in message.content.items():
                if isinstance(record, ArrayRecord) and counts[id(record)] > 1:
                    if id(record) not in references:
                        references[id(record)] = ray.put(record)
                    shared[name] = references[id(record)]
                else:
                    records[name] = record
            meta = message.metadata
            tasks.append(Task(meta.dst_node_id, meta.message_type, meta.group_id, records, shared))
        return tasks

    def _replace(self, worker: int, batch: Batch, queue: deque[Batch], error: Exception) -> list[Message]:
        """A worker died: start another and hand the batch on, or give up on it."""
        reason = _reason(error)
        if isinstance(error, ray.exceptions.ActorDiedError) and "creation task" in str(error):
            raise RunFailed(f"a Ray worker could not start: {reason}") from error
        log.warning("worker %d died (%s); starting another", worker, reason)
        self.pool.actors[worker] = self._start()
        batch.attempts += 1
        if batch.attempts < ATTEMPTS:
            queue.appendleft(batch)
            return []
        failed = []
        for task in batch.tasks:
            message = Message(RecordDict(), task.node, task.message_type, group_id=task.group)
            failed.append(error_reply(message, RuntimeError(f"its worker died {ATTEMPTS} times ({reason})")))
        return failed

    def _abandon(self) -> None:
        """Replace workers that still work on messages of an earlier call (it timed out)."""
        for worker, _ in self.pool.busy.values():
            ray.kill(self.pool.actors[worker])
            self.pool.actors[worker] = self._start()
        self.pool.busy.clear()


def _reason(error: Exception) -> str:
    """The last line of Ray's report: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class RayEngine:
    """``engine=ray``.

    Args:
        num_workers: actors; None is one per core, or as many as the GPUs allow if ``num_gpus`` > 0.
        num_gpus: GPU share of each actor, e.g. 0.5.
        address: an existing cluster (``auto``, ``host:port`` or ``ray://host:port``); None starts Ray on this machine.

    Raises:
        InputError: a value out of range, or the cluster can't be joined.
    """

    _started: ClassVar[bool] = False  # whether this process's Ray is ours, not the user's or a cluster's

    def __init__(self, num_workers: int | None = None, num_gpus: float = 0.0, address: str | None = None):
        integer("num_workers", num_workers, at_least=1, optional=True)
        number("num_gpus", num_gpus, at_least=0)
        self.num_workers, self.num_gpus, self.address = num_workers, float(num_gpus), address

    def run(self, session: Session) -> None:
        """Run ``session`` to its end; Ray stays up, so that the jobs of a sweep share it."""
        self.connect()
        build = partial(client_app, session.config, str(session.directory.sites.resolve()))
        session.workers = self._workers(session.num_clients)
        grid = RayGrid(build, session.num_clients, session.workers, self.num_gpus)
        try:
            session.server_app()(grid, node_context(0, 0, session.num_clients))
        finally:
            grid.close()

    def connect(self) -> None:
        """Start Ray or join the cluster, once per process (a job of a sweep that wants more workers starts its own Ray anew)."""
        if ray.is_initialized():
            if not (RayEngine._started and (self.num_workers or 0) > ray.cluster_resources().get("CPU", 0)):
                return
            ray.shutdown()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about a future default
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
        if self.address is None:
            # a worker needs a CPU slot each, and a slot more than there are cores costs nothing
            options |= {"num_cpus": max(os.cpu_count() or 1, self.num_workers or 1), "include_dashboard": False}
        try:
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
