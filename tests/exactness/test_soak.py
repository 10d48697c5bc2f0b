"""Hundreds of rounds in which anything goes wrong: the fixed point is still the pooled posterior, and no site is
lost.
"""

from __future__ import annotations

import random

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.errors import RunFailed
from bayesfed.federation.client.sites import DiskSites
from bayesfed.wire.flower_version import error_reply
from strategies import BayesADMM

pytestmark = pytest.mark.faults
ROUNDS = 320


def server(**options) -> BayesADMM:
    return BayesADMM(family="full", rho=0.5, damping=0.5, prior_precision=2.0, fraction=0.7, temperature=1.0, **options)


def test_soak(quadratics, federation, tmp_path) -> None:
    data, draw = quadratics.random(21, 6, 4), random.Random(3)
    seen: dict[str, int] = {}
    stale: list[RecordDict] = []

    def changed(reply: Message, name: str, edit) -> Message:
        arrays = {n: torch.from_numpy(a.numpy().copy()) for n, a in reply.content["posterior"].items()}
        arrays[name] = edit(arrays[name])
        return Message(
            RecordDict({"posterior": wire.pack(arrays), "metrics": reply.content["metrics"]}), reply_to=asked(reply)
        )

    def asked(reply: Message) -> Message:
        return run.grid.asked[reply.metadata.src_node_id]

    def old(reply: Message) -> Message | None:
        """What some client said in another round."""
        now = reply.content["metrics"]["round"]
        found = [content for content in stale if content["metrics"]["round"] != now]
        return Message(found[0], reply_to=asked(reply)) if found else None

    faults = {
        "lost reply": lambda reply: None,
        "crash after training": lambda reply: error_reply(asked(reply), RuntimeError("crashed")),
        "nan": lambda reply: changed(reply, "mean", lambda m: m.fill_(float("nan"))),
        "inf": lambda reply: changed(reply, "precision", lambda s: s.fill_(float("inf"))),
        "negative precision": lambda reply: changed(reply, "precision", lambda s: -s),
        "wrong shape": lambda reply: changed(reply, "mean", lambda m: m[:-1]),
        "wrong dtype": lambda reply: changed(reply, "mean", lambda m: m.float()),
        "no metrics": lambda reply: Message(
            RecordDict({"posterior": reply.content["posterior"]}), reply_to=asked(reply)
        ),
        "no examples": lambda reply: Message(
            RecordDict(
                {"posterior": reply.content["posterior"], "metrics": MetricRecord({"round": 1, "num-examples": 0})}
            ),
            reply_to=asked(reply),
        ),
        "stale round": old,
    }

    def intercept(reply: Message) -> Message | None:
        if reply.metadata.message_type != "train" or reply.has_error():
            return reply
        if draw.random() > 0.3:
            stale[:] = [*stale, reply.content][-9:]
            return reply
        name = draw.choice(list(faults))
        seen[name] = seen.get(name, 0) + 1
        return faults[name](reply)

    run = federation(data.problem(), server(), intercept=intercept, sites=DiskSites(tmp_path / "sites"))
    deliver = run.grid.stream
    run.grid.asked = {}

    def stream(messages, *, timeout=None):
        messages = list(messages)
        run.grid.asked.update({m.metadata.dst_node_id: m for m in messages})
        for reply in deliver(messages, timeout=timeout):
            yield reply
            if draw.random() < 0.05:
                seen["duplicate"] = seen.get("duplicate", 0) + 1
                yield reply

    run.grid.stream = stream
    saved: list[tuple] = []

    def checkpoint() -> None:
        made = run.strategy
        tensors, values = made.state()
        tensors = {name: value.clone() for name, value in tensors.items()}
        saved.append((len(run.posteriors), tensors, values))
        del saved[:-2]
        made.saved()

    def restart() -> None:
        """A new server process with the last checkpoint, or the one before; everything since is done again."""
        if len(saved) > 1 and draw.random() < 0.4:
            seen["checkpoint damaged"] = seen.get("checkpoint damaged", 0) + 1
            saved.pop()
        length, tensors, values = saved[-1]
        run.strategy = server()
        run.strategy.setup(run.trainer.initial, len(data), run.seed)
        run.strategy.load_state({name: value.clone() for name, value in tensors.items()}, values)
        del run.posteriors[length:]

    checkpoint()
    while len(run.posteriors) <= ROUNDS:
        try:
            run.run(1)
        except RunFailed:
            seen["no reply at all"] = seen.get("no reply at all", 0) + 1
            restart()
        if len(run.posteriors) % 3 == 0:
            checkpoint()
        if draw.random() < 0.05:
            seen["server killed"] = seen.get("server killed", 0) + 1
            restart()
        if draw.random() < 0.05:
            seen["client process restarted"] = seen.get("client process restarted", 0) + 1
            run.trainer.sites = run.sites = DiskSites(tmp_path / "sites")

        sites = [run.site(k) for k in run.strategy.ledger.accepted]
        if sites:  # after every round, whatever happened in it
            hsum = run.strategy.hsum
            for mine, theirs in ((hsum.linear, [v for v, _ in sites]), (hsum.precision, [V for _, V in sites])):
                scale = max(float(site.abs().max()) for site in theirs)
                assert float((mine - sum(theirs)).abs().max()) <= 1e-10 * scale

    assert sum(seen.values()) > 300, seen
    assert set(faults) | {"duplicate", "server killed", "checkpoint damaged", "client process restarted"} <= set(seen)
    assert len(run.refused) > 200
    mean, precision = data.posterior(2.0)
    got = run.posteriors[-1]
    assert float((got.mean - mean).abs().max() / mean.abs().max()) < 1e-6
    assert float((got.precision - precision).abs().max() / precision.abs().max()) < 1e-6
