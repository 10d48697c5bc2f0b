"""What a client does with a message, and that server and clients never disagree about ``sum_k eta_k``, whatever is lost."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.engine.flower_version import error_reply, node_context
from bayesfed.engine.grid import LocalGrid
from bayesfed.errors import RunFailed
from bayesfed.families import FAMILIES, NaturalParameters
from bayesfed.runs.checkpoint import Checkpoint
from clients.exact import ExactSolver
from clients.local import LocalProblem, LocalSolution, Solver
from clients.sites import DiskSites, MemorySites
from strategies import BayesADMM

P = 4
METHOD = {
    "name": "bayes_admm", "round": 1, "accepted": 0, "durable": 0, "rho": 0.5, "damping": 0.5, "temperature": 1.0,
    "proximal": 0.0, "learn_precision": True, "lr_factor": 1.0,
}  # fmt: skip


def message(client: int = 0, posterior: ArrayRecord | None = None, **method) -> Message:
    if posterior is None:
        posterior = wire.pack({"mean": torch.zeros(P).double(), "precision": torch.ones(P).double()})
    values = {k: v for k, v in (METHOD | method).items() if v is not None}
    return Message(RecordDict({"posterior": posterior, "method": ConfigRecord(values)}), client + 1, "train")


# -- one message --------------------------------------------------------------------------------------------------------


def test_query_says_who_and_how_many(trainer, context):
    reply = trainer(MemorySites()).query(Message(RecordDict(), 3, "query"), context(2))
    assert dict(reply.content["client"]) == {"partition-id": 2, "num-examples": 20}


def test_the_dual_is_formed_from_the_arrays_on_the_wire(trainer, context):
    sites = MemorySites()
    sent = message()
    reply = trainer(sites).train(sent, context(0))
    family = FAMILIES["diagonal"]

    def natural(record):
        return family.from_arrays(wire.unpack(record, {"mean": (P,), "precision": (P,)}, torch.float64)).natural

    expected = (natural(reply.content["posterior"]) - natural(sent.content["posterior"])) * 0.25
    kept = sites.read(0, 1)
    assert torch.equal(kept["site.first"], expected.first)
    assert torch.equal(kept["site.second"], expected.second)
    assert reply.content["metrics"]["num-examples"] == 20
    assert reply.content["metrics"]["round"] == 1


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
def test_in_16_bits_the_dual_is_formed_from_what_the_bits_decode_to(trainer, context, format):
    sites, family = MemorySites(), FAMILIES["diagonal"]
    codec = wire.Codec(format, {"mean": (P,), "precision": (P,)}, torch.float64)
    server = {"mean": torch.linspace(-1, 1, P).double() / 3, "precision": torch.linspace(1, 9, P).double()}
    record, _ = codec.encode(server)
    reply = trainer(sites, wire=format).train(message(posterior=record), context(0))
    received = codec.decode(record)
    answer = codec.decode(reply.content["posterior"], received)
    assert not torch.equal(received["mean"], server["mean"])
    expected = (family.from_arrays(answer).natural - family.from_arrays(received).natural) * 0.25
    assert torch.equal(sites.read(0, 1)["site.first"], expected.first)
    assert torch.equal(sites.read(0, 1)["site.second"], expected.second)


@pytest.mark.parametrize(("mine", "theirs"), [("full", "float16"), ("float16", "full"), ("float16", "bfloat16")])
def test_a_message_in_another_format_is_refused(trainer, context, mine, theirs):
    codec = wire.Codec(theirs, {"mean": (P,), "precision": (P,)}, torch.float64)
    record, _ = codec.encode({"mean": torch.zeros(P).double(), "precision": torch.ones(P).double()})
    sites = MemorySites()
    with pytest.raises(wire.BadMessage, match=f"format '{theirs}', this side is set up for wire={mine}"):
        trainer(sites, wire=mine).train(message(posterior=record), context(0))
    assert sites.rounds(0) == []


class Far(Solver):
    """Runs away."""

    families = frozenset({"diagonal"})

    def solve(self, problem: LocalProblem) -> LocalSolution:
        return LocalSolution(type(problem.server)(problem.server.mean + 1e5, problem.server.precision), {"loss": 0.0})


def test_a_mean_beyond_float16_is_a_failure_that_keeps_no_site(trainer, context):
    sites, shapes = MemorySites(), {"mean": (P,), "precision": (P,)}
    sent = {"mean": torch.zeros(P).double(), "precision": torch.ones(P).double()}
    record, _ = wire.Codec("float16", shapes, torch.float64).encode(sent)
    with pytest.raises(ValueError, match="mean can't be sent as float16 in 4 of 4 entries, first entry 0: 100000"):
        trainer(sites, solver=Far(), wire="float16").train(message(posterior=record), context(0))
    assert sites.rounds(0) == []
    record, _ = wire.Codec("bfloat16", shapes, torch.float64).encode(sent)
    trainer(sites, solver=Far(), wire="bfloat16").train(message(posterior=record), context(0))
    assert sites.rounds(0) == [1]


def test_without_damping_nothing_is_kept(trainer, context, tmp_path):
    trainer(DiskSites(tmp_path)).train(message(damping=0.0), context(0))
    assert list(tmp_path.iterdir()) == []


def test_the_same_message_twice_gives_the_same_reply_and_site(trainer, context):
    sites = MemorySites()
    client = trainer(sites)
    client.train(message(), context(0))
    again = message(round=2, accepted=1, durable=1)
    replies, kept = [], []
    for _ in range(2):
        replies.append(client.train(again, context(0)).content["posterior"]["mean"].data)
        kept.append(sites.read(0, 2)["site.first"])
    assert replies[0] == replies[1]
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "fedavg"}, "set up for strategy 'bayes_admm'"),
        ({"round": None}, "'round' is missing"),
        ({"round": 0}, "'round' is 0"),
        ({"round": 1.0}, "expected a int"),
        ({"accepted": 1}, "'accepted' is 1"),
        ({"accepted": -1}, "'accepted' is -1"),
        ({"round": 3, "accepted": 1, "durable": 2}, "'durable' is 2"),
        ({"round": 4, "accepted": 3, "durable": 2, "older": 3}, "'older' is 3"),
        ({"round": 4, "accepted": 3, "durable": 2, "older": -1}, "'older' is -1"),
        ({"rho": math.nan}, "'rho' is nan"),
        ({"rho": -0.5}, "'rho' is -0.5"),
        ({"damping": 1.5}, "'damping' is 1.5"),
        ({"temperature": 0.0}, "'temperature' is 0.0"),
        ({"proximal": -1.0}, "'proximal' is -1.0"),
        ({"lr_factor": math.inf}, "'lr_factor' is inf"),
        ({"work": 0.0}, "'work' is 0.0"),
        ({"work": 1.5}, "'work' is 1.5"),
        ({"learn_precision": 1}, "expected a bool"),
    ],
)
def test_bad_method_values_are_refused_before_anything_is_kept(trainer, context, change, text):
    sites = MemorySites()
    with pytest.raises(wire.BadMessage, match=text):
        trainer(sites).train(message(**change), context(0))
    assert sites.rounds(0) == []


@pytest.mark.parametrize(
    "arrays",
    [
        {"mean": torch.zeros(P)},
        {"mean": torch.zeros(P).double(), "precision": torch.ones(P, P).double()},
        {"mean": torch.zeros(P), "precision": torch.ones(P)},
        {"mean": torch.zeros(P + 1).double(), "precision": torch.ones(P + 1).double()},
        {"mean": torch.zeros(P).double(), "precision": torch.ones(P).double(), "extra": torch.ones(1)},
    ],
    ids=["missing", "shape", "dtype", "size", "extra"],
)
def test_bad_arrays_are_refused(trainer, context, arrays):
    with pytest.raises(wire.BadMessage, match="array"):
        trainer(MemorySites()).train(message(posterior=wire.pack(arrays)), context(0))


@pytest.mark.parametrize(("mean", "precision"), [(math.nan, 1.0), (0.0, -1.0), (0.0, math.inf)])
def test_a_server_posterior_that_is_none_is_refused(trainer, context, mean, precision):
    arrays = {"mean": torch.full((P,), mean).double(), "precision": torch.full((P,), precision).double()}
    with pytest.raises(ValueError, match=r"mean|precision"):
        trainer(MemorySites()).train(message(posterior=wire.pack(arrays)), context(0))


def test_unknown_partition_is_refused(trainer, context):
    with pytest.raises(wire.BadMessage, match="partition-id=7"):
        trainer(MemorySites()).train(message(7), context(7))


def test_global_random_state_is_untouched(trainer, context):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trainer(MemorySites()).train(message(), context(0))
    assert torch.equal(torch.get_rng_state(), before)


class Remembering(Solver):
    """Counts its calls in the memory it is handed back."""

    families = frozenset({"diagonal"})
    keep_momentum = True

    def solve(self, problem: LocalProblem) -> LocalSolution:
        count = problem.memory.get("count", torch.zeros(())) + 1
        return LocalSolution(problem.server, {"loss": 0.0, "count": float(count)}, {"count": count})


def test_a_solvers_memory_follows_the_accepted_rounds(trainer, context):
    client = trainer(MemorySites(), solver=Remembering())

    def count(**method):
        return client.train(message(**method), context(0)).content["metrics"]["count"]

    assert count() == 1
    assert count(round=2, accepted=1) == 2  # lost on the way back
    assert count(round=3, accepted=1) == 2
    assert count(round=4, accepted=3, durable=1) == 3
    assert count(round=2, accepted=1, durable=1) == 2  # the server went back to round 1


# -- soak -----------------------------------------------------------------------------------------------------------------

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
        v, big_v = problem.site.first, problem.site.second * -2
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
    for client, round in strategy.accepted.items():
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
        strategy = BayesADMM(family=family, rho=0.5, damping=0.3, fraction=fraction, prior_precision=2.0)
        strategy.setup(torch.zeros(P, dtype=torch.float64), 5, seed, format)
        return strategy

    def checkpoint(strategy: BayesADMM, round: int) -> None:
        arrays = {f"posterior.{n}": v for n, v in strategy.posterior.arrays().items()}
        state = {"accepted": strategy.accepted, "durable": strategy.durable}
        Checkpoint(round, arrays | strategy.tensors(), state).save(tmp_path / "checkpoint")
        strategy.older, strategy.durable = strategy.durable, dict(strategy.accepted)

    def restored() -> tuple[BayesADMM, int]:
        newest = max((tmp_path / "checkpoint").iterdir(), key=lambda path: path.name)
        if newest.name != "server-000000.safetensors" and draw.random() < 0.3:
            newest.write_bytes(b"damaged")
        found = Checkpoint.latest(tmp_path / "checkpoint")
        tensors, strategy = dict(found.tensors), fresh()
        arrays = {n: tensors.pop(f"posterior.{n}") for n in strategy.posterior.arrays()}
        strategy.posterior = type(strategy.posterior).from_arrays(arrays)
        strategy.load_tensors(tensors)
        strategy.accepted = {int(k): v for k, v in found.state["accepted"].items()}
        strategy.durable = dict(strategy.accepted)
        strategy.older = {int(k): v for k, v in found.state["durable"].items()}
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


def test_soak_of_a_solvers_memory(trainer, quiet):
    """The number of calls a client remembers is the number of its rounds that were accepted."""
    draw = random.Random(5)
    sites = MemorySites()
    grid = FaultyGrid(trainer(sites, solver=Remembering()), draw, rate=0.5)
    strategy = BayesADMM(family="diagonal", damping=0.0)
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
    for client, round in strategy.accepted.items():
        assert float(sites.read(client, round)["count"]) == counted[client]
    assert min(counted.values()) > 10


def test_exact_solver_is_a_solver():
    assert ExactSolver().families == {"point", "isotropic", "diagonal", "full"}


def test_metrics_record_is_plain_numbers(trainer, context):
    reply = trainer(MemorySites()).train(message(), context(0))
    metrics = reply.content["metrics"]
    assert isinstance(metrics, MetricRecord)
    assert {"loss", "dual-norm", "seconds", "num-examples", "round"} <= set(metrics)
