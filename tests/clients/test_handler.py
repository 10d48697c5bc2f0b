"""What a client does with a message, and that server and clients never disagree about ``sum_k eta_k``, whatever is
lost.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.errors import InputError
from bayesfed.families import FAMILIES
from bayesfed.federation.client.sites import DiskSites, MemorySites
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from clients.exact import ExactSolver

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


# -- one message -------------------------------------------------------------------------------------------------------


def test_query_says_who_and_how_many(trainer, context):
    reply = trainer(MemorySites()).query(Message(RecordDict(), 3, "query"), context(2))
    assert dict(reply.content["client"]) == {"partition-id": 2, "num-examples": 20, "features": 3, "outputs": 1}


def test_the_dual_is_formed_from_the_arrays_on_the_wire(trainer, context):
    sites = MemorySites()
    sent = message()
    reply = trainer(sites).train(sent, context(0))
    family = FAMILIES["diagonal"]

    def natural(record):
        return family.from_arrays(wire.unpack(record, {"mean": (P,), "precision": (P,)}, torch.float64)).natural

    expected = (natural(reply.content["posterior"]) - natural(sent.content["posterior"])) * 0.25
    kept = sites.read(0, 1)
    assert torch.equal(kept["site.first"], expected.linear)
    assert torch.equal(kept["site.second"], expected.quadratic)
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
    assert torch.equal(sites.read(0, 1)["site.first"], expected.linear)
    assert torch.equal(sites.read(0, 1)["site.second"], expected.quadratic)


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
    with pytest.raises(InputError, match="partition-id=7"):
        trainer(MemorySites()).train(message(7), context(7))


def test_global_random_state_is_untouched(trainer, context):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trainer(MemorySites()).train(message(), context(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_solvers_memory_follows_the_accepted_rounds(trainer, context, remembering):
    client = trainer(MemorySites(), solver=remembering)

    def count(**method):
        return client.train(message(**method), context(0)).content["metrics"]["count"]

    assert count() == 1
    assert count(round=2, accepted=1) == 2  # lost on the way back
    assert count(round=3, accepted=1) == 2
    assert count(round=4, accepted=3, durable=1) == 3
    assert count(round=2, accepted=1, durable=1) == 2  # the server went back to round 1


def test_exact_solver_is_a_solver():
    assert ExactSolver().families == {"point", "isotropic", "diagonal", "full"}


def test_metrics_record_is_plain_numbers(trainer, context):
    reply = trainer(MemorySites()).train(message(), context(0))
    metrics = reply.content["metrics"]
    assert isinstance(metrics, MetricRecord)
    assert {"loss", "dual-norm", "seconds", "num-examples", "round"} <= set(metrics)


# -- contributions and questions ---------------------------------------------------------------------------------------


def test_the_dual_follows_what_the_transforms_let_through(trainer, context):
    """What leaves is what the last of them returns, and the client's own site is formed from it; metrics too."""
    sites, client = MemorySites(), trainer(MemorySites())
    client.sites = sites

    def halve(contribution, assignment):
        server, q = assignment.server, contribution.posterior
        step = (q.mean - server.mean) / 2
        return replace(contribution, posterior=type(q)(server.mean + step, server.precision), metrics={"seen": 1.0})

    whole = trainer(MemorySites()).train(message(), context(0))
    client.transforms = (halve, *client.transforms)
    half = client.train(message(), context(0))
    shapes = {"mean": (P,), "precision": (P,)}
    full, sent = (wire.unpack(reply.content["posterior"], shapes, torch.float64) for reply in (whole, half))
    torch.testing.assert_close(sent["mean"], full["mean"] / 2)
    assert torch.equal(sent["precision"], torch.ones(P).double())
    assert torch.equal(sites.read(0, 1)["site.first"], 0.25 * sent["mean"])
    assert set(half.content["metrics"]) == {"seen", "num-examples", "client", "round", "dual-norm", "seconds"}


@pytest.mark.parametrize(
    ("hook", "value", "text"),
    [
        ("answer", None, "Trainer.answer must return a Contribution, not NoneType"),
        ("settle", 3, r"settle\(\) must return a dict of tensors, not 3"),
        ("settle", {"a": 1.0}, r"settle\(\) must return a dict of tensors"),
    ],
)
def test_what_a_client_half_returns_is_checked(trainer, context, hook, value, text):
    client = trainer(MemorySites())
    client.remembers = True
    setattr(client, hook, lambda *given: value)
    with pytest.raises(ValueError, match=text):
        client.train(message(), context(0))


def test_a_client_answers_the_questions_it_knows(trainer, context):
    client = trainer(MemorySites())
    client.questions = {**client.questions, "size": lambda problem, assignment, solve, parameters: {
        "size": len(assignment.problem.data) * parameters["factor"]
    }}  # fmt: skip

    def ask(**question):
        asked = message()
        asked.content["question"] = ConfigRecord(question)
        return client.evaluate(asked, context(0))

    assert dict(ask(name="size", factor=2).content["metrics"]) == {"size": 40, "round": 1}
    assert "mean/rmse" in ask(name="personalize", samples=2).content["metrics"]
    with pytest.raises(wire.BadMessage, match="unknown question 'weights'; this client answers: personalize, size"):
        ask(name="weights")
    with pytest.raises(wire.BadMessage, match="value 'name' is missing"):
        client.evaluate(message(), context(0))
    assert client.sites.rounds(0) == []
