"""What runs in a Ray worker, and what travels to and from it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bayesfed.engine.batching import groups
from bayesfed.host import look_as
from bayesfed.wire.flower_version import error_reply, node_context, set_identity


def share_memory() -> None:
    """Let this process read arrays in Ray's shared memory; pickled inside messages they would be copied four times.

    ``Array.data`` is then a read-only ``memoryview`` instead of ``bytes``.
    """

    def parts(array: Any) -> Any:
        return array.dtype, tuple(array.shape), array.stype, np.frombuffer(array.data, np.uint8)

    def array(values: Any) -> Array:
        dtype, shape, stype, data = values
        array = Array(dtype, shape, stype, b"")
        array.data = data.data
        return array

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

    def __init__(self, build: Callable[[], ClientApp], num_clients: int, path: list[str], accelerate: str):
        look_as(path)
        from bayesfed.accelerate import start  # imports torch, which the server's process may have elsewhere

        start(accelerate)
        set_identity()
        share_memory()
        self.app: Any = build()
        with suppress(Exception):  # it comes up again, and is reported, with the first message
            getattr(self.app, "prepare", lambda: None)()
        gc.collect()
        gc.freeze()  # or every collection during training would walk through all that was imported
        self.num_clients = num_clients
        self.contexts: dict[int, Context] = {}
        self.arrays: dict[str, ArrayRecord] = {}

    def run(self, units: list[list[Task]], fold: int, batch: int) -> list[tuple[list[Answer], float]]:
        """Serve units of tasks one after the other: the answers of each, and the seconds it took.

        Args:
            units: each some tasks.
            fold: replies that are summed together.
            batch: clients that are trained side by side.
        """
        done = []
        for tasks in units:
            started = time.perf_counter()
            messages = [self._message(task) for task in tasks]
            replies = [reply for group in groups(messages, batch) for reply in self._serve(group)]
            if fold > 1 and hasattr(self.app, "fold"):
                pieces = (slice(i, i + fold) for i in range(0, len(messages), fold) if i + 1 < len(messages))
                for part in pieces:  # a single reply is smaller than a sum
                    replies[part] = self.app.fold(messages[part], replies[part])
            done.append(([Answer.of(reply) for reply in replies], time.perf_counter() - started))
        return done

    def _serve(self, messages: list[Message]) -> list[Message]:
        contexts = [self._context(message.metadata.dst_node_id) for message in messages]
        if len(messages) > 1 and hasattr(self.app, "train_many"):
            return self.app.train_many(messages, contexts)
        replies = []
        for message, context in zip(messages, contexts, strict=True):
            try:
                replies.append(self.app(message, context))
            except Exception as error:  # whatever a client raises is that client's failure
                replies.append(error_reply(message, error))
        return replies

    def _context(self, node: int) -> Context:
        if node not in self.contexts:
            self.contexts[node] = node_context(node, node - 1, self.num_clients)
        return self.contexts[node]

    def _message(self, task: Task) -> Message:
        records = dict(task.records)
        keys = {reference.hex(): reference for reference in task.shared.values()}
        if keys.keys() != self.arrays.keys():  # only this round's
            self.arrays = {key: ray.get(reference) for key, reference in keys.items()}
        for name, reference in task.shared.items():
            key = reference.hex()
            records[name] = self.arrays[key]
        return Message(RecordDict(records), task.node, task.message_type, group_id=task.group)
