"""Delivery of messages: what is sent, what comes back when clients fail, workers die or time runs out."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from bayesfed.engine.inline import InlineEngine, InlineGrid
from bayesfed.errors import InputError, RunFailed
from bayesfed.wire.flower_version import set_identity

VALUES = np.arange(5000, dtype=np.float64)


def make_app(folder: str) -> ClientApp:
    """Does what the message says; by value, so that Ray's workers need not import this file."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = message.content["order"]
        client = context.node_config["partition-id"]
        if order["do"] == "raise":
            raise RuntimeError("out of memory")
        if order["do"] == "die" and not Path(folder, f"died-{client}").exists():
            Path(folder, f"died-{client}").touch()
            os._exit(1)
        if order["do"] == "die always":
            os._exit(1)
        if order["do"] == "sleep":
            time.sleep(60)
        values = message.content["arrays"]["x"].numpy()
        metrics = MetricRecord({"client": client, "sum": float(values.sum()), "pid": os.getpid()})
        arrays = ArrayRecord({"x": Array(values + client)})
        return Message(RecordDict({"metrics": metrics, "arrays": arrays}), reply_to=message)

    return app


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.engines)])
def grid(request, tmp_path):
    if request.param == "inline":
        yield InlineGrid(make_app(str(tmp_path)), 6)
        return
    request.getfixturevalue("ray_with_three_slots")
    grid = ray_grid(tmp_path)
    yield grid
    grid.close()


def ray_grid(tmp_path, workers: int = 2):
    import sys

    import cloudpickle

    from bayesfed.engine.ray_grid import RayGrid

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return RayGrid(functools.partial(make_app, str(tmp_path)), 6, workers)


def orders(*clients: int, **other: str) -> list[Message]:
    """Messages to ``clients`` that share their arrays; ``c3="raise"`` tells client 3 to raise."""
    set_identity()
    arrays = ArrayRecord({"x": Array(VALUES)})
    return [
        Message(
            RecordDict({"arrays": arrays, "order": ConfigRecord({"do": other.get(f"c{c}", "work")})}), c + 1, "train"
        )
        for c in clients
    ]


def by_client(replies) -> dict[int, Message]:
    return {reply.metadata.src_node_id - 1: reply for reply in replies}


def test_replies(grid):
    for round in range(3):  # the third goes out in larger batches
        replies = by_client(grid.send_and_receive(orders(0, 1, 2, 3, 4, 5)))
        assert sorted(replies) == [0, 1, 2, 3, 4, 5], round
        for client, reply in replies.items():
            assert reply.content["metrics"]["client"] == client
            assert reply.content["metrics"]["sum"] == VALUES.sum()
            assert np.array_equal(reply.content["arrays"]["x"].numpy(), VALUES + client)


def test_other_arrays_in_the_next_round_are_other_arrays(grid):
    grid.send_and_receive(orders(0, 1, 2))
    changed = orders(0, 1, 2)
    for message in changed:
        message.content["arrays"] = ArrayRecord({"x": Array(np.full(3, 2.0))})  # not shared: each has its own
    assert [r.content["metrics"]["sum"] for r in grid.send_and_receive(changed)] == [6.0, 6.0, 6.0]


def test_a_client_that_raises_is_an_error_reply_with_the_reason(grid):
    replies = by_client(grid.send_and_receive(orders(0, 1, 2, c1="raise")))
    assert sorted(replies) == [0, 1, 2]
    assert replies[1].has_error()
    assert "RuntimeError: out of memory" in replies[1].error.reason
    assert not replies[0].has_error()
    assert not replies[2].has_error()


def test_flowers_interface(grid):
    assert list(grid.get_node_ids()) == [1, 2, 3, 4, 5, 6]
    ids = list(grid.push_messages(orders(0, 1)))
    assert len(list(grid.pull_messages(ids))) == 2
    assert list(grid.pull_messages(ids)) == []
    grid.set_run("r")
    assert grid.run == "r"
    message = grid.create_message(RecordDict(), "train", 3, "g")
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (3, "g")


@pytest.mark.engines
def test_a_dead_worker_is_replaced_and_its_batch_done_again(ray_with_three_slots, tmp_path, caplog):
    grid = ray_grid(tmp_path)
    replies = by_client(grid.send_and_receive(orders(0, 1, 2, 3, c2="die")))
    assert sorted(replies) == [0, 1, 2, 3]
    assert not any(reply.has_error() for reply in replies.values())
    assert "starting another" in caplog.text
    grid.close()


@pytest.mark.engines
def test_a_client_that_kills_every_worker_is_given_up(ray_with_three_slots, tmp_path):
    grid = ray_grid(tmp_path, workers=1)
    replies = by_client(grid.send_and_receive(orders(0, 1, c1="die always")))
    assert not replies[0].has_error()
    assert "worker died 3 times" in replies[1].error.reason
    grid.close()


@pytest.mark.engines
def test_workers_that_die_while_they_load_end_the_run(ray_with_three_slots, monkeypatch):
    """Killed for want of memory, say: no client would ever be answered."""
    import bayesfed.engine.ray_grid as module

    monkeypatch.setattr(module, "DEATHS", 2)
    grid = module.RayGrid(functools.partial(os._exit, 9), 40, 1)
    with pytest.raises(RunFailed, match="2 Ray workers died one after the other without an answer"):
        grid.send_and_receive(orders(*range(40)))
    grid.close()


@pytest.mark.engines
def test_after_a_timeout_the_next_round_starts_at_once(ray_with_three_slots, tmp_path):
    grid = ray_grid(tmp_path)
    grid.send_and_receive(orders(0, 1))  # workers are up
    started = time.monotonic()
    assert sorted(by_client(grid.send_and_receive(orders(0, 1, c1="sleep"), timeout=1))) == [0]
    assert sorted(by_client(grid.send_and_receive(orders(0, 1)))) == [0, 1]
    assert time.monotonic() - started < 50
    grid.close()


@pytest.mark.engines
def test_work_is_shared_among_workers(ray_with_three_slots, tmp_path):
    grid = ray_grid(tmp_path)
    grid.send_and_receive(orders(0, 1))
    pids = {reply.content["metrics"]["pid"] for reply in grid.send_and_receive(orders(0, 1, 2, 3, 4, 5))}
    assert len(pids) == 2
    assert os.getpid() not in pids
    grid.close()


def test_engine_settings():
    from bayesfed.engine.flower_engine import FlowerEngine
    from bayesfed.engine.ray_engine import RayEngine

    InlineEngine(num_workers=4)
    for engine in (FlowerEngine, RayEngine):
        with pytest.raises(InputError, match="num_workers=0"):
            engine(num_workers=0)
        with pytest.raises(InputError, match="num_gpus=-1"):
            engine(num_gpus=-1)
    with pytest.raises(InputError, match="address=auto"):
        FlowerEngine(address="auto")


@pytest.mark.engines
def test_more_than_ray_has(ray_with_three_slots):
    from bayesfed.engine.ray_engine import RayEngine

    with pytest.raises(InputError, match=r"engine.num_workers=99: Ray has \d+ CPU slots"):
        RayEngine(num_workers=99)._workers(100)
    with pytest.raises(InputError, match=r"engine.num_gpus=0.5: .*GPUs"):
        RayEngine(num_workers=2, num_gpus=0.5)._workers(100)
    assert RayEngine(num_workers=3)._workers(2) == 2
