"""A Flower ``Grid`` over resident Ray workers: one broadcast of the global arrays a round, replies streamed."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from logging import getLogger
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from bayesfed import wire
from bayesfed.engine.grid import LocalGrid
from bayesfed.engine.ray_schedule import LARGEST_BATCH, Schedule
from bayesfed.engine.ray_worker import Task, Worker, share_memory
from bayesfed.errors import RunFailed
from bayesfed.profiling import occupied, span
from bayesfed.wire.flower_version import error_reply

log = getLogger("bayesfed")
ATTEMPTS = 3  # a unit whose worker died is given to another this many times in all
DEATHS = 4 * ATTEMPTS  # of each worker on average, without an answer in between: then it is not the clients' fault
AHEAD_SECONDS = 0.2  # a worker gets its next call early if the one it has is shorter than this
WAITING_BYTES = 1 << 28  # answers that may wait for older ones
CALL_BYTES = 1 << 25  # answers in one call: larger ones take the workers and the server in turns instead of at once


@dataclass
class Call:
    """Units that a worker serves in one call."""

    worker: int
    actor: Any
    units: list[int]
    message_type: str
    sent: float = field(default_factory=time.monotonic)

    def occupied(self, messages: int, answered: dict[int, float]) -> None:
        """Tell the profiler how long the worker had these messages: since they were sent, or since its last answer if
        that is later."""
        now = time.monotonic()
        seconds = now - max(self.sent, answered.get(self.worker, 0.0))
        answered[self.worker] = now
        occupied(self.worker, self.message_type, seconds, messages)


def unit_sizes(messages: int, size: int, workers: int, whole: bool) -> list[int]:
    """How many messages each unit of work has: ``size``, and single ones at the end, at least ``size`` for each worker.

    The workers would otherwise wait for the one that has the last unit. A group of which each reply comes on its own is
    summed by the server, to the same bits.

    Args:
        messages: in all.
        size: of a unit.
        workers: how many there are.
        whole: no single ones.
    """
    if whole:
        return [min(size, messages - start) for start in range(0, messages, size)]
    groups = max(0, messages // size - workers) if size > 1 else 0
    return [size] * groups + [1] * (messages - groups * size)


class RayGrid(LocalGrid):
    """A Flower ``Grid`` over resident Ray actors.

    Arrays that several messages share are put into the object store once a round, and read there without a copy. A unit
    of work is one message, or a group whose replies the worker sums (if the app offers ``fold``), or some clients
    trained side by side (see :func:`unit_sizes`). Units go
    out longest first by the time they took before (:class:`bayesfed.engine.ray_schedule.Schedule`); any worker can
    serve any client, because the state of a client is in the site store. Units whose worker dies are given to another
    one (solving a round again gives the same site and the same reply).

    Args:
        build: makes the ClientApp, once in each worker; picklable.
        num_clients: number of nodes.
        num_workers: actors to start.
        num_gpus: of each actor.
        clients_per_batch: clients trained side by side, if the app has ``train_many``.
        accelerate: of the actors' processes, see :mod:`bayesfed.accelerate`.
    """

    folds = True

    def __init__(
        self,
        build: Callable[[], ClientApp],
        num_clients: int,
        num_workers: int,
        num_gpus: float = 0.0,
        clients_per_batch: int = 1,
        accelerate: str = "auto",
    ):
        super().__init__(num_clients)
        self.clients_per_batch = clients_per_batch
        here = str(Path.cwd())
        path = [entry for entry in sys.path if entry and Path(entry).exists()]
        remote = ray.remote(Worker)
        options = remote.options(num_cpus=1, num_gpus=num_gpus)
        self._start: Callable[[], Any] = lambda: options.remote(build, num_clients, [*path, here], accelerate)
        share_memory()
        self.actors: list[Any] = [self._start() for _ in range(num_workers)]
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._seconds: dict[tuple[str, int], float] = {}  # of a client, last time, by type of message
        self._answered: dict[int, float] = {}  # when a worker's last answer came
        self._owners: dict[int, int] = {}  # the worker that served a client last
        self._deaths = 0  # of workers since the last answer

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None, fold: int = 1) -> Iterator[Message]:
        """Deliver ``messages``, yield the replies (sums of ``fold`` of them) as they come until all are in or time is
        up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._abandon()
        requests = list(messages)
        size = math.lcm(fold, self.clients_per_batch)
        sizes = unit_sizes(len(requests), size, len(self.actors), whole=self.clients_per_batch > 1)
        parts = [slice(end - length, end) for end, length in zip(accumulate(sizes), sizes, strict=True)]
        units = [requests[part] for part in parts]
        with span("store"):
            tasks, answer = self._tasks(requests)
        schedule = self._schedule(units, answer * (size // fold))
        calls = [tasks[part] for part in parts]
        attempts = [0] * len(units)
        free = deque(range(len(self.actors)))
        while schedule.left or self._calls:
            with span("send"):
                self._hand_out(schedule, calls, fold, free)
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=wait)
            if not done:
                return
            call = self._calls.pop(done[0])
            if call.worker not in free:
                free.append(call.worker)
            try:
                with span("receive"):
                    answers = ray.get(done[0])
            except ray.exceptions.RayActorError as error:
                lost = [u for c in self._replace(call, error) for u in c.units]
                for unit in call.units:
                    attempts[unit] += 1
                given_up = [unit for unit in call.units if attempts[unit] >= ATTEMPTS]
                schedule.again([unit for unit in [*call.units, *lost] if unit not in given_up])
                for unit in given_up:
                    schedule.done(unit)
                    reason = RuntimeError(f"its worker died {ATTEMPTS} times ({_reason(error)})")
                    yield from (error_reply(request, reason) for request in units[unit])
                continue
            self._deaths = 0
            call.occupied(sum(len(units[unit]) for unit in call.units), self._answered)
            for unit, (replies, seconds) in zip(call.units, answers, strict=True):
                schedule.done(unit, seconds)
                self._remember(units[unit], call.worker, seconds)
                for answer, request in zip(replies, units[unit], strict=True):
                    yield answer.message(request)

    def close(self) -> None:
        """Stop the workers; Ray itself stays up for the next run of this process."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    # -- details ------------------------------------------------------------------------------------------------------

    def _hand_out(self, schedule: Schedule, tasks: list[list[Task]], fold: int, free: deque[int]) -> None:
        """Give every free worker a call, and a second one if the first is short or the others have enough to do until
        both are done.

        A worker with one call waits for the server between calls.
        """
        sent = True
        while free and sent:
            sent = False
            for _ in range(len(free)):
                worker = free.popleft()
                mine = [call for call in self._calls.values() if call.worker == worker]
                seconds = sum(schedule.seconds[unit] for call in mine for unit in call.units)
                ready = not mine or seconds < AHEAD_SECONDS or schedule.outlasts(seconds)
                chosen = schedule.next(worker) if ready else []
                if not chosen:
                    free.append(worker)
                    continue
                sent = True
                actor = self.actors[worker]
                reference = actor.run.remote([tasks[unit] for unit in chosen], fold, self.clients_per_batch)
                self._calls[reference] = Call(worker, actor, chosen, tasks[chosen[0]][0].message_type)
                if not mine:
                    free.append(worker)

    def _schedule(self, units: list[list[Message]], size: int) -> Schedule:
        """Order ``units``, each of which is answered with about ``size`` bytes."""
        seconds, owners = [], []
        for unit in units:
            keys = [(m.metadata.message_type, m.metadata.dst_node_id) for m in unit]
            seconds.append(sum(self._seconds.get(key, math.inf) for key in keys))
            owners.append(self._owners.get(keys[0][1]))
        workers = len(self.actors)
        window = max(3 * workers, WAITING_BYTES // max(size, 1))
        return Schedule(seconds, owners, workers, window, min(LARGEST_BATCH, CALL_BYTES // max(size, 1)))

    def _remember(self, unit: list[Message], worker: int, seconds: float) -> None:
        for message in unit:
            node = message.metadata.dst_node_id
            self._seconds[message.metadata.message_type, node] = seconds / len(unit)
            self._owners[node] = worker

    @staticmethod
    def _tasks(messages: list[Message]) -> tuple[list[Task], int]:
        """Messages without the arrays that several of them share, and the bytes of arrays in one message."""
        counts: dict[int, int] = {}
        for message in messages:
            for record in message.content.values():
                counts[id(record)] = counts.get(id(record), 0) + 1
        references: dict[int, ray.ObjectRef] = {}
        tasks, size = [], 0
        for message in messages:
            records, shared = {}, {}
            for name, record in message.content.items():
                if isinstance(record, ArrayRecord) and counts[id(record)] > 1:
                    if id(record) not in references:
                        references[id(record)] = ray.put(record)
                        size = max(size, wire.nbytes(record))
                    shared[name] = references[id(record)]
                else:
                    records[name] = record
            meta = message.metadata
            tasks.append(Task(meta.dst_node_id, meta.message_type, meta.group_id, records, shared))
        return tasks, size

    def _replace(self, call: Call, error: Exception) -> list[Call]:
        """A worker died: start another one in its place. Returns its other calls, which are lost too."""
        reason = _reason(error)
        if isinstance(error, ray.exceptions.ActorDiedError) and "creation task" in str(error):
            raise RunFailed(f"a Ray worker could not start: {reason}") from error
        self._deaths += 1
        if self._deaths >= DEATHS * len(self.actors):
            raise RunFailed(
                f"{self._deaths} Ray workers died one after the other without an answer, the last: {reason}"
            ) from error
        log.warning("worker %d died (%s); starting another", call.worker, reason)
        lost = [reference for reference, other in self._calls.items() if other.actor is call.actor]
        self.actors[call.worker] = self._start()
        return [self._calls.pop(reference) for reference in lost]

    def _abandon(self) -> None:
        """Replace workers that still work on messages of an earlier call (it timed out)."""
        for worker in {call.worker for call in self._calls.values()}:
            ray.kill(self.actors[worker])
            self.actors[worker] = self._start()
        self._calls.clear()


def _reason(error: Exception) -> str:
    """The last line of Ray's report: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
