"""``engine.clients_per_batch``: when clients are trained side by side, which ones, and that the run is the same to
rounding.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

import bayesfed
from bayesfed.app import SimulationApp
from bayesfed.engine.batching import batch_of, clients_per_batch, groups
from bayesfed.engine.flower_engine import FlowerEngine
from bayesfed.engine.inline import InlineEngine, InlineGrid
from bayesfed.engine.ray_engine import RayEngine
from bayesfed.errors import InputError
from bayesfed.wire.flower_version import node_context, set_identity

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("requested", "device", "num_params", "sampled", "size"),
    [
        (None, CPU, 4810, 10, 1),  # ordinary runs keep their bits
        (None, CPU, 4810, 63, 1),
        (None, CPU, 4810, 64, 32),
        (None, CPU, 10_000, 1000, 32),
        (None, CPU, 10_001, 1000, 1),
        (None, CUDA, 178_110, 1000, 32),
        (None, CUDA, 178_110, 10, 10),
        (None, CUDA, 16_000_000, 1000, 8),
        (None, CUDA, 500_000_000, 1000, 1),
        (1, CUDA, 100, 1000, 1),
        (1, CPU, 100, 1000, 1),
        (50, CPU, 1_000_000, 1000, 50),
        (50, CPU, 1_000_000, 7, 7),
    ],
)
def test_rule(requested, device, num_params, sampled, size):
    assert clients_per_batch(requested, device, num_params, sampled) == size


def session(*, batches=True, shape=(64, 64), sampled=100) -> SimpleNamespace:
    parameter = torch.empty(shape)
    return SimpleNamespace(
        config={"device": "cpu"},
        solver=SimpleNamespace(batches=batches),
        model=SimpleNamespace(parameters=[parameter]),
        num_parameters=parameter.numel(),
        strategy=SimpleNamespace(sample=lambda round: list(range(sampled))),
    )


def test_runs():
    assert batch_of(session(), None) == 32
    assert batch_of(session(sampled=10), None) == 1
    assert batch_of(session(sampled=10), None, CUDA) == 10
    assert batch_of(session(batches=False), None) == 1
    assert batch_of(session(batches=False), 8) == 1
    assert batch_of(session(shape=(8, 8, 3, 3)), None) == 1  # convolutions are slower side by side
    assert batch_of(session(shape=(8, 8, 3, 3)), 8) == 8


def message(node: int, kind: str = "train", do: str = "work") -> Message:
    set_identity()
    return Message(RecordDict({"order": ConfigRecord({"do": do})}), node, kind)


def test_groups_follow_the_order_of_the_messages():
    kinds = ["query", "query", *["train"] * 5, "query", "train", "train"]
    found = list(groups([message(i, kind) for i, kind in enumerate(kinds)], 2))
    assert [[m.metadata.dst_node_id for m in group] for group in found] == [[0], [1], [2, 3], [4, 5], [6], [7], [8, 9]]
    assert [len(group) for group in groups([message(i) for i in range(3)], 1)] == [1, 1, 1]


class SingleHandler:
    """Says with how many messages one came; does what it says."""

    def reply(self, message: Message, context: Context, size: int = 1) -> Message:
        if message.content["order"]["do"] == "crash":
            raise MemoryError("out of memory")
        info = {"size": size, "partition": context.node_config["partition-id"]}
        return Message(RecordDict({"info": ConfigRecord(info)}), reply_to=message)


class Handler(SingleHandler):
    """Takes several at once; one that crashes takes them all with it."""

    def train_many(self, messages, contexts):
        return [self.reply(m, c, len(messages)) for m, c in zip(messages, contexts, strict=True)]


def app_of(handler) -> SimulationApp:
    app = SimulationApp(lambda: handler, lambda: None)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handler.reply(message, context)

    return app


def sizes(replies) -> list[int | None]:
    return [None if reply.has_error() else reply.content["info"]["size"] for reply in replies]


def test_inline_gives_groups_to_the_app():
    grid = InlineGrid(app_of(Handler()), 7, clients_per_batch=3)
    replies = list(grid.send_and_receive([message(node) for node in range(1, 8)]))
    assert sizes(replies) == [3, 3, 3, 3, 3, 3, 1]
    assert [r.content["info"]["partition"] for r in replies] == list(range(7))
    assert [r.metadata.src_node_id for r in replies] == list(range(1, 8))


def test_inline_with_an_app_or_handler_that_takes_single_messages():
    messages = [message(node) for node in (1, 2, 3)]
    assert sizes(InlineGrid(app_of(SingleHandler()), 3, 3).send_and_receive(messages)) == [1, 1, 1]
    plain = ClientApp()
    plain.train()(SingleHandler().reply)
    assert sizes(InlineGrid(plain, 3, 3).send_and_receive(messages)) == [1, 1, 1]


def test_a_handler_that_fails_on_a_group_gets_its_messages_one_by_one(caplog):
    app = app_of(Handler())
    messages = [message(1), message(2, do="crash"), message(3)]
    replies = app.train_many(messages, [node_context(n, n - 1, 3) for n in (1, 2, 3)])
    assert sizes(replies) == [1, None, 1]
    assert "MemoryError: out of memory" in replies[1].error.reason
    assert "one by one: MemoryError" in caplog.text


@pytest.mark.parametrize("engine", [InlineEngine, RayEngine, FlowerEngine])
def test_engines_take_it(engine):
    assert engine(clients_per_batch=None)
    assert engine(clients_per_batch=1)
    for bad in (0, 2.5, True):
        with pytest.raises(InputError, match="clients_per_batch"):
            engine(clients_per_batch=bad)
    if engine is FlowerEngine:
        with pytest.raises(InputError, match="one at a time; use engine=inline"):
            engine(clients_per_batch=2)
    else:
        assert engine(clients_per_batch=2).clients_per_batch == 2


@pytest.mark.parametrize(
    "method", [["strategy=bayes_admm"], ["strategy=fedavg", "client.keep_momentum=true"]], ids=["bayes_admm", "fedavg"]
)
def test_a_run_is_the_same_to_rounding(tmp_path, digest, method):
    def digits(name: str, *overrides: str):
        quick = ["experiment=digits_het10", "partition.num_clients=70", "rounds=2", "client.epochs=1", "eval.samples=2"]
        quiet = ["display=false", "figures=false", f"hydra.run.dir={tmp_path / name}"]
        return bayesfed.run([*quick, *quiet, *method, *overrides])

    alone, together, automatic = (
        digits(name, f"engine.clients_per_batch={size}")
        for name, size in (("alone", 1), ("together", 32), ("automatic", "null"))
    )
    for name, value in alone.posterior.arrays().items():
        other = together.posterior.arrays()[name]
        assert float((other - value).norm()) <= 1e-4 * float(value.norm()), name
    assert digest(together.run_dir) != digest(alone.run_dir)
    assert digest(together.run_dir) == digest(automatic.run_dir)
    assert together.summary["mean/nll"] == pytest.approx(alone.summary["mean/nll"], rel=1e-4)
    assert together.summary["clients/replied"] == alone.summary["clients/replied"] >= 64
