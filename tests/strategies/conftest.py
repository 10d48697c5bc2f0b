"""A grid whose clients answer what a test says, in the order a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.engine.grid import LocalGrid
from bayesfed.seeding import torch_generator
from bayesfed.wire.flower_version import error_reply
from strategies import BayesADMM, FedAvg

torch.set_num_threads(1)
P = 5
Answer = Callable[[int, int], Any]


class ScriptedGrid(LocalGrid):
    """``answer(client, round)`` gives the arrays of a reply (dict), a whole ``RecordDict``, an exception to send as an
    error reply, or None for silence; ``arrange`` reorders, adds or removes the replies of a round.

    Attributes:
        methods: round -> client -> the plain values sent.
        sent: round -> client -> the arrays sent.
    """

    def __init__(self, clients: int, answer: Answer, arrange: Callable[[list[Message]], Iterable[Message]] = iter):
        super().__init__(clients)
        self.answer, self.arrange = answer, arrange
        self.methods: dict[int, dict[int, dict[str, Any]]] = {}
        self.sent: dict[int, dict[int, dict[str, torch.Tensor]]] = {}

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        replies = []
        for message in messages:
            client = message.metadata.dst_node_id - 1
            if message.metadata.message_type == "query":
                info = ConfigRecord({"partition-id": client, "num-examples": client + 1})
                yield Message(RecordDict({"client": info}), reply_to=message)
                continue
            method = dict(message.content["method"])
            round = method["round"]
            self.methods.setdefault(round, {})[client] = method
            arrays = {n: torch.from_numpy(a.numpy()) for n, a in message.content["posterior"].items()}
            self.sent.setdefault(round, {})[client] = arrays
            if (reply := self._reply(message, self.answer(client, round), client, round)) is not None:
                replies.append(reply)
        yield from self.arrange(replies)

    @staticmethod
    def _reply(message: Message, answer: Any, client: int, round: int) -> Message | None:
        if answer is None:
            return None
        if isinstance(answer, Exception):
            return error_reply(message, answer)
        if not isinstance(answer, RecordDict):
            answer = content(answer, client + 1, round)
        return Message(answer, reply_to=message)


def content(arrays: dict[str, torch.Tensor], num_examples: int, round: int) -> RecordDict:
    """A well-formed reply."""
    metrics = MetricRecord({"num-examples": num_examples, "round": round, "loss": 1.0})
    return RecordDict({"posterior": wire.pack(arrays), "metrics": metrics})


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedGrid]:
    return ScriptedGrid


@pytest.fixture(scope="session")
def reply_content() -> Callable[..., RecordDict]:
    return content


class Log:
    """Callbacks that remember."""

    def __init__(self) -> None:
        self.sampled: dict[int, list[int]] = {}
        self.done: dict[int, list[tuple[int, str]]] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def begin_round(self, round: int, sampled: list[int]) -> None:
        self.sampled[round] = sampled

    def client_done(self, round: int, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        assert (metrics is None) == bool(reason)
        self.done.setdefault(round, []).append((client, reason))

    def end_round(self, round: int, metrics: dict[str, float]) -> None:
        self.metrics[round] = metrics

    def reasons(self, round: int) -> dict[int, str]:
        return {client: reason for client, reason in self.done[round] if reason}


@pytest.fixture
def callbacks() -> Log:
    return Log()


@pytest.fixture(scope="session")
def posterior() -> Callable[..., dict[str, torch.Tensor]]:
    """``posterior("diagonal", client, round)``: arrays (P = 5) that differ by client and round."""

    def make(family: str, client: int, round: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        g = torch_generator(1, family, client, round)
        mean = torch.randn(P, generator=g)
        if family == "point":
            return {"mean": mean.to(dtype)}
        precision = torch.rand(P, generator=g) + 0.5
        if family == "isotropic":
            precision = precision[0]
        elif family == "full":
            root = torch.randn(P, P, generator=g)
            precision = root @ root.T + torch.eye(P)
        return {"mean": mean.to(dtype), "precision": precision.to(dtype)}

    return make


@pytest.fixture(scope="session")
def strategy() -> Callable[..., Any]:
    """``strategy("diagonal", clients=6)``: one that is set up for them; ``point`` is FedAvg."""

    def make(kind: str = "diagonal", clients: int = 6, seed: int = 1, **options):
        made = (
            FedAvg(**options)
            if kind == "point"
            else BayesADMM(family=kind, rho=0.5, damping=0.5, temperature=1.0, **options)
        )
        made.setup(torch.zeros(P), clients, seed)
        return made

    return make
