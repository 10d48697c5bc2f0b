"""Hundreds of rounds over a bad network: server and clients never drift apart."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Message, RecordDict

from bayesfed import wire
from bayesfed.engine.grid import LocalGrid
from bayesfed.errors import RunFailed
from bayesfed.families import NaturalParameters
from bayesfed.federation.client.sites import DiskSites, MemorySites
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.runs.checkpoint import Checkpoint
from bayesfed.wire.flower_version import error_reply, node_context
from strategies import BayesADMM

P = 4
FAULTS = ("lost message", "lost reply", "raises", "raises after saving", "nan", "duplicate", "late duplicate")


class Quadratic(Solver):
    """The closed form for ``l_k = 1/2 sum_i a_ki (theta_i - c_ki)^2``, with a and c drawn by client."""

    families = frozenset({"diagonal", "isotropic"})

    def solve(self, problem: LocalProblem) -> LocalSolution:
        generator = problem.generator("soak").manual_seed(problem.client)
        a, c = torch.rand(2, P, generator=generator, dtype=torch.float64)
        a, c = 20 * a, 4 * c - 2
        if problem.server.name == "isotropic":
            a = a.mean()
        server, rho = problem.server, problem.rho
        v, big_v = problem.site.linear, problem.site.precision
        left = a - big_v + rho * server.precision
        mean = (a * c - v + rho * server.precision * server.mean) / left
        precision = server.precision + (a - big_v) / rho
        return LocalSolution(type(server).from_mean_precision(mean, precision), {"loss": 0.0})


class FaultyGrid(LocalGrid):
    """Five clients behind a bad network."""

    def __init__(self, app, draw: random.Random, rate: float):
        super().__init__(5)
        self.app, self.draw, self.rate = app, draw, rate
        self.old: list[Message] = []
        self.seen: set[str] = set()

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        replies = [reply for message in messages for reply in self.deliver(message)]
        self.draw.shuffle(replies)
        yield from replies

    def deliver(self, message: Message) -> list[Message]:
        if message.metadata.message_type == "query":
            return [self.call(message)]
        fault = self.draw.choice(FAULTS) if self.draw.random() < self.rate else ""
        self.seen.add(fault)
        self.old = [*self.old[-30:], message]
        if fault == "lost message":
            return []
        if fault == "raises":
            return [error_reply(message, RuntimeError("out of memory"))]
        reply = self.call(message)
        if fault == "lost reply":
            return []
        if fault == "raises after saving":
            return [error_reply(message, RuntimeError("connection reset"))]
        if fault == "nan" and not reply.has_error():
            bad = wire.pack({"mean": torch.full((P,), math.nan).double(), "precision": torch.ones(P).double()})
            content = RecordDict({"posterior": bad, "metrics": reply.content["metrics"]})
            return [Message(content, reply_to=message)]
        if fault == "duplicate":
            return [reply, self.call(message)]
        if fault == "late duplicate":
            return [reply, self.call(self.draw.choice(self.old))]
        return [reply]

    def call(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            handler = self.app.query if message.metadata.message_type == "query" else self.app.train
            return handler(message, node_context(node, node - 1, 5))
        except Exception as error:
            return error_reply(message, error)


def committed(sites, strategy: BayesADMM) -> tuple[NaturalParameters, float]:
    """The sum of the clients' committed sites, and the sum of their norms."""
    total, scale = strategy.prior.zeros_like(), 0.0
    for client, round in strategy.ledger.accepted.items():
        kept = sites.read(client, round)
        site = NaturalParameters(strategy.family, kept["site.first"], kept["site.second"])
        total.add_(site)
        scale += float(site.norm())
    return total, scale


@pytest.fixture
def quiet(caplog):
    caplog.set_level(logging.ERROR, "bayesfed")


@pytest.mark.parametrize(
    ("seed", "family", "store", "fraction", "every", "format"),
    [
        (1, "diagonal", "memory", 1.0, 1, "full"),
        (2, "diagonal", "disk", 0.6, 3, "full"),
        (3, "isotropic", "memory", 0.6, 2, "full"),
        (4, "diagonal", "memory", 1.0, 5, "full"),
        (7, "diagonal", "memory", 0.6, 2, "float16"),
        (6, "diagonal", "disk", 0.6, 3, "bfloat16"),
    ],
)
def test_soak(trainer, tmp_path, quiet, seed, family, store, fraction, every, format):
    """200 rounds of losses, crashes, repeats and returns to a checkpoint: both sides agree on the sum of sites."""
    draw = random.Random(seed)
    sites = DiskSites(tmp_path / "sites") if store == "disk" else MemorySites()
    grid = FaultyGrid(trainer(sites, family, Quadratic(), wire=format), draw, rate=0.4)

    def fresh() -> BayesADMM:
        strategy = BayesADMM(
            family=family, rho=0.5, damping=0.3, fraction=fraction, prior_precision=2.0, temperature=1.0
        )
        strategy.setup(torch.zeros(P, dtype=torch.float64), 5, seed, format)
        return strategy

    def checkpoint(strategy: BayesADMM, round: int) -> None:
        Checkpoint(round, *strategy.state()).save(tmp_path / "checkpoint")
        strategy.saved()

    def restored() -> tuple[BayesADMM, int]:
        newest = max((tmp_path / "checkpoint").iterdir(), key=lambda path: path.name)
        if newest.name != "server-000000.safetensors" and draw.random() < 0.3:
            newest.write_bytes(b"damaged")
        found = Checkpoint.latest(tmp_path / "checkpoint")
        strategy = fresh()
        strategy.load_state(found.tensors, found.state)
        return strategy, found.round

    strategy, round, returns = fresh(), 0, 0
    checkpoint(strategy, 0)
    for _ in range(200):
        try:
            strategy.start(grid, num_rounds=round + 1, first_round=round + 1)
        except RunFailed:
            strategy, round = restored()
            grid.old.clear()  # messages end with the run that sent them
            continue
        round += 1
        if round % every == 0:
            checkpoint(strategy, round)
        if draw.random() < 0.08:  # server and clients die
            strategy, round = restored()
            grid.app = trainer(sites, family, Quadratic(), wire=format)
            grid.old.clear()
            returns += 1
        total, scale = committed(sites, strategy)
        assert float((total - strategy.hsum).norm()) <= 1e-12 * max(scale, 1.0)
    assert returns > 10
    assert round > 60
    assert grid.seen == {"", *FAULTS}
    assert scale > 10


def test_soak_of_a_solvers_memory(trainer, quiet, remembering):
    """The number of calls a client remembers is the number of its rounds that were accepted."""
    draw = random.Random(5)
    sites = MemorySites()
    grid = FaultyGrid(trainer(sites, solver=remembering), draw, rate=0.5)
    strategy = BayesADMM(family="diagonal", damping=0.0, rho=1.0, temperature=1.0)
    strategy.setup(torch.zeros(P, dtype=torch.float64), 5, 5)
    counted, replied = dict.fromkeys(range(5), 0), []

    def begin_round(round, sampled):
        replied.clear()

    def client_done(round, client, metrics, reason):
        if metrics is not None:
            replied.append(client)

    def end_round(round, metrics):
        for client in replied:
            counted[client] += 1

    spy = SimpleNamespace(begin_round=begin_round, client_done=client_done, end_round=end_round)
    for round in range(1, 101):
        with contextlib.suppress(RunFailed):  # nobody replied: nothing changed
            strategy.start(grid, num_rounds=round, first_round=round, callbacks=spy)
    for client, round in strategy.ledger.accepted.items():
        assert float(sites.read(client, round)["count"]) == counted[client]
    assert min(counted.values()) > 10
