"""Several messages at once: the replies and sites of one at a time, and nobody fails for another."""

from __future__ import annotations

import time

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from bayesfed import wire
from bayesfed.federation.client.sites import MemorySites
from clients.ivon import IVONSolver
from clients.point import PointSolver

SOLVER = IVONSolver(lr=0.02, epochs=3, batch_size=8, beta2=0.99, hess_init=0.1)
METHOD = {
    "name": "bayes_admm", "round": 1, "accepted": 0, "durable": 0, "rho": 0.5, "damping": 0.5, "temperature": 1.0,
    "proximal": 0.0, "learn_precision": True, "lr_factor": 1.0,
}  # fmt: skip
P = 4


def message(client: int, **method) -> Message:
    posterior = wire.pack({"mean": torch.zeros(P).double(), "precision": torch.full((P,), 3.0).double()})
    return Message(RecordDict({"posterior": posterior, "method": ConfigRecord(METHOD | method)}), client + 1, "train")


def mean_of(reply: Message) -> torch.Tensor:
    return torch.from_numpy(reply.content["posterior"]["mean"].numpy())


def test_train_many_replies_and_saves_what_train_does(trainer, context):
    kept, replies = [], []
    for many in (False, True):
        sites = MemorySites()
        client = trainer(sites, solver=SOLVER)
        for method in ({}, {"round": 2, "accepted": 1, "durable": 1}):
            messages, contexts = [message(c, **method) for c in range(5)], [context(c) for c in range(5)]
            if many:
                got = client.train_many(messages, contexts)
            else:
                got = [client.train(m, c) for m, c in zip(messages, contexts, strict=True)]
        replies.append(got)
        kept.append([sites.read(c, 2) for c in range(5)])
    for alone, together in zip(*replies, strict=True):
        assert together.metadata.src_node_id == alone.metadata.src_node_id
        assert torch.allclose(mean_of(together), mean_of(alone), rtol=1e-10)
        first, second = dict(alone.content["metrics"]), dict(together.content["metrics"])
        assert first.pop("seconds") > 0
        assert second.pop("seconds") > 0
        assert second == pytest.approx(first, rel=1e-9)
    for alone, together in zip(*kept, strict=True):
        assert alone.keys() == together.keys()
        assert all(torch.allclose(together[name], alone[name], rtol=1e-9, atol=1e-12) for name in alone)


def test_seconds_are_shares(trainer, context):
    class Slow(IVONSolver):
        def solve_together(self, problems):
            time.sleep(0.5)
            return super().solve_together(problems)

    client = trainer(MemorySites(), solver=Slow(lr=0.02, epochs=1, batch_size=8))
    replies = client.train_many([message(c) for c in range(5)], [context(c) for c in range(5)])
    seconds = [reply.content["metrics"]["seconds"] for reply in replies]
    assert all(0.1 <= s < 0.4 for s in seconds)


@pytest.mark.parametrize("where", ["message", "solver", "both"])
def test_one_client_fails_and_the_others_do_not(trainer, context, where, caplog):
    class Failing(PointSolver):
        """Client 2 can't be trained, alone or with others."""

        def solve(self, problem):
            if problem.client == 2 and where != "message":
                raise ValueError("client 2 fails")
            return super().solve(problem)

        def solve_together(self, problems):
            if where == "solver" and any(p.client == 2 for p in problems):
                raise ValueError("client 2 fails")
            return super().solve_together(problems)

    sites = MemorySites()
    solver = Failing(optimizer="sgd", lr=0.1, epochs=1, batch_size=8)
    client = trainer(sites, solver=solver)
    bad = {2: {"name": "other"}} if where != "solver" else {}
    replies = client.train_many([message(c, **bad.get(c, {})) for c in range(5)], [context(c) for c in range(5)])
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False]
    reason = replies[2].error.reason
    assert ("ValueError: client 2 fails" if where == "solver" else "set up for strategy 'bayes_admm'") in reason
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3, 4, 5]
    assert sites.rounds(2) == []
    assert sites.rounds(3) == [1]
    assert ("trained one by one: ValueError: client 2 fails" in caplog.text) == (where == "solver")
    for reply, other in ((replies[0], 0), (replies[4], 4)):
        expected = trainer(MemorySites(), solver=solver).train(message(other), context(other))
        assert torch.allclose(mean_of(reply), mean_of(expected), rtol=1e-10)


def test_a_solver_that_does_not_batch_gives_the_bits_of_train(trainer, context):
    messages, contexts = [message(c) for c in range(5)], [context(c) for c in range(5)]
    many = trainer(MemorySites()).train_many(messages, contexts)
    alone = trainer(MemorySites())
    for reply, m, c in zip(many, messages, contexts, strict=True):
        assert torch.equal(mean_of(reply), mean_of(alone.train(m, c)))
    assert trainer(MemorySites()).train_many([], []) == []
