"""What runs in a Ray worker, and what travels to and from it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bayesfed.engine.flower_version import error_reply, node_context, set_identity


def share_memory() -> None:
    """Let this process read arrays in Ray's shared memory; pickled inside messages they would be copied four times.

    ``Array.data`` is then a read-only ``memoryview`` instead of ``bytes``.
    """

    def parts(array: Any) -> Any:
        return array.dtype, tuple(array.shape), array.stype, np.frombuffer(array.data, np.uint8)

    def array(values: Any) -> Array:
        dtype, shape, stype, data = values
        made = Array(dtype, shape, stype, b"")
        made.data = data.data
        return made

    ray.util.register_serializer(Array, serializer=parts, deserializer=array)


@dataclass(frozen=True)
class Task:
    """A message without its shared arrays: ``shared`` maps record names to references in the object store."""

    node: int
    message_type: str
    group: str
    records: dict[str, ConfigRecord | MetricRecord | ArrayRecord]
    shared: dict[str, ray.ObjectRef]


class Answer(NamedTuple):
    """A reply without what the server knows anyway: its content, or the code and reason of an error."""

    content: RecordDict | None
    code: int = 0
    reason: str = ""

    @classmethod
    def of(cls, reply: Message) -> Answer:
        """Strip a reply."""
        if reply.has_error():
            return cls(None, reply.error.code, reply.error.reason or "")
        return cls(reply.content)

    def message(self, request: Message) -> Message:
        """The reply to ``request``."""
        if self.content is None:
            return Message(Error(code=self.code, reason=self.reason), reply_to=request)
        return Message(self.content, reply_to=request)


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

    def run(self, units: list[list[Task]]) -> list[tuple[list[Answer], float]]:
        """Serve units of tasks one after the other: the answers of each, and the seconds it took."""
        done = []
        for tasks in units:
            started = time.perf_counter()
            done.append(([Answer.of(reply) for reply in self._serve(tasks)], time.perf_counter() - started))
        return done

    def _serve(self, tasks: list[Task]) -> list[Message]:
        messages = [self._message(task) for task in tasks]
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.contexts:
                self.contexts[node] = node_context(node, node - 1, self.num_clients)
            try:
                replies.append(self.app(message, self.contexts[node]))
            except Exception as error:  # whatever a client raises is that client's failure
                replies.append(error_reply(message, error))
        fold = getattr(self.app, "fold", None)
        return fold(messages, replies) if fold and len(tasks) > 1 else replies

    def _message(self, task: Task) -> Message:
        records = dict(task.records)
        for name, reference in task.shared.items():
            key = reference.hex()
            if key not in self.arrays:
                self.arrays = {key: ray.get(reference)}  # only this round's
            records[name] = self.arrays[key]
        return Message(RecordDict(records), task.node, task.message_type, group_id=task.group)
