"""Replies that are wrong, late, missing, from elsewhere, or ran away: left out with a reason, or the end of the run."""

from __future__ import annotations

import math
import re

import pytest
import torch
from flwr.app import Array, Message, MetricRecord, RecordDict
from flwr.common.serde import error_to_proto, recorddict_to_proto

from bayesfed import wire
from bayesfed.errors import RunDiverged, RunFailed

P = 5
KINDS = ("point", "isotropic", "diagonal", "full")
Arrays = dict[str, torch.Tensor]


def without_metrics(good: Arrays) -> RecordDict:
    return RecordDict({"posterior": wire.pack(good)})


def garbled(good: Arrays) -> RecordDict:
    arrays = wire.pack(good)
    arrays["mean"] = Array(dtype="float32", shape=(P,), stype="numpy.ndarray", data=b"no array")
    return RecordDict({"posterior": arrays, "metrics": MetricRecord({"num-examples": 1, "round": 1})})


def serialised(messages: list[Message]) -> int:
    """What Flower makes of them."""
    return sum(
        error_to_proto(m.error).ByteSize() if m.has_error() else recorddict_to_proto(m.content).ByteSize()
        for m in messages
    )


NAN = torch.tensor([0, 0, math.nan, 0, 0.0])
BAD = {
    "nan": (lambda make, good: good | {"mean": NAN}, "mean is not finite in 1 of 5 entries, first entry 2: nan"),
    "negative": (
        lambda make, good: good | {"precision": torch.tensor([1, 1, 1, -4.0, 1])},
        "precision is not positive in 1 of 5 entries, first entry 3: -4",
    ),
    "infinite": (lambda make, good: good | {"precision": torch.full((P,), math.inf)}, "precision is not finite"),
    "shape": (
        lambda make, good: good | {"mean": torch.zeros(P + 1)},
        r"array 'mean' has shape \(6,\), expected \(5,\)",
    ),
    "dtype": (
        lambda make, good: good | {"mean": torch.zeros(P).double()},
        "array 'mean' has dtype float64, expected torch.float32",
    ),
    "name": (
        lambda make, good: {"mu": torch.zeros(P), "precision": torch.ones(P)},
        r"expected arrays \['mean', 'precision'\], got \['mu', 'precision'\]",
    ),
    "missing array": (lambda make, good: {"mean": torch.zeros(P)}, r"got \['mean'\]"),
    "extra array": (lambda make, good: good | {"more": torch.zeros(1)}, "got .*'more'"),
    "no arrays": (lambda make, good: RecordDict(), r"expected arrays \['mean', 'precision'\], got NoneType"),
    "garbled": (lambda make, good: garbled(good), "array 'mean' cannot be read"),
    "no metrics": (lambda make, good: without_metrics(good), "metrics are missing"),
    "wrong round": (lambda make, good: make(good, 3, 7), "reply is of round 7"),
    "no examples": (lambda make, good: make(good, 0, 1), "num-examples is 0"),
    "error": (lambda make, good: RuntimeError("out of memory"), "RuntimeError: out of memory"),
    "silence": (lambda make, good: None, "no reply before the timeout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_reply_is_left_out(posterior, strategy, scripted, reply_content, callbacks, case: str) -> None:
    """Named with its reason, counted, and the others give what they give without it."""
    make, reason = BAD[case]

    def answer(client: int, round: int):
        return make(reply_content, posterior("diagonal", 2, 1)) if client == 2 else posterior("diagonal", client, round)

    made, came = strategy(), []

    def arrange(replies: list[Message]) -> list[Message]:
        came.extend(replies)
        return replies

    made.start(scripted(6, answer, arrange), num_rounds=1, callbacks=callbacks)
    assert list(callbacks.reasons(1)) == [2]
    assert callbacks.metrics[1]["bytes/up"] == serialised(came)  # refused or not, it was sent
    assert re.search(reason, callbacks.reasons(1)[2])
    assert callbacks.metrics[1]["clients/failed"] == 1
    assert callbacks.metrics[1]["clients/replied"] == 5
    assert sorted(made.ledger.accepted) == [0, 1, 3, 4, 5]

    others = strategy()
    others.start(scripted(6, lambda c, r: None if c == 2 else posterior("diagonal", c, r)), num_rounds=1)
    assert torch.equal(made.posterior.mean, others.posterior.mean)
    assert torch.equal(made.posterior.precision, others.posterior.precision)
    assert torch.equal(made.hsum.linear, others.hsum.linear)


@pytest.mark.parametrize(
    ("kind", "precision", "reason"),
    [("full", -torch.eye(P), "not positive definite"), ("isotropic", torch.tensor(-1.0), "precision is not positive")],
)
def test_bad_precision_of_other_families(
    posterior, strategy, scripted, callbacks, kind: str, precision, reason: str
) -> None:
    def answer(client: int, round: int) -> dict[str, torch.Tensor]:
        arrays = posterior(kind, client, round)
        return arrays | {"precision": precision} if client == 1 else arrays

    strategy(kind).start(scripted(6, answer), num_rounds=1, callbacks=callbacks)
    assert list(callbacks.reasons(1)) == [1]
    assert reason in callbacks.reasons(1)[1]


@pytest.mark.parametrize("kind", ["duplicate", "unknown"])
@pytest.mark.parametrize("early", [True, False])
def test_unasked_replies_are_ignored(posterior, strategy, scripted, callbacks, caplog, kind: str, early: bool) -> None:
    """A second, different reply of a client, or one of a node that was not asked: the first one counts."""

    def arrange(replies: list[Message]) -> list[Message]:
        if not replies:  # the queries before round 1
            return []
        other = replies[4] if kind == "duplicate" else replies[5]
        extra = Message(other.content, reply_to=_message(5 if kind == "duplicate" else 99))
        if kind == "duplicate":
            changed = {name: value + 1 for name, value in posterior("diagonal", 4, 1).items()}
            extra.content = RecordDict(
                {"posterior": wire.pack(changed), "metrics": MetricRecord({"num-examples": 1, "round": 1})}
            )
        return [replies[4], extra, *replies[:4], replies[5]] if early else [*replies, extra]

    made, plain = strategy(), strategy()
    made.start(scripted(6, lambda c, r: posterior("diagonal", c, r), arrange), num_rounds=1, callbacks=callbacks)
    plain.start(scripted(6, lambda c, r: posterior("diagonal", c, r)), num_rounds=1)
    assert torch.equal(made.posterior.mean, plain.posterior.mean)
    assert torch.equal(made.hsum.quadratic, plain.hsum.quadratic)
    assert callbacks.metrics[1]["clients/replied"] == 6
    assert [client for client, _ in callbacks.done[1]] == list(range(6))
    assert "was not asked for" in caplog.text


def _message(node: int) -> Message:
    return Message(RecordDict(), node, "train", group_id="1")


def test_too_few_replies_stop_the_run(posterior, strategy, scripted, callbacks) -> None:
    """Nothing of the failed round is kept: posterior, sum of sites and bookkeeping are those of the round before."""

    def answer(client: int, round: int):
        return ValueError("broken") if round == 3 and client < 4 else posterior("diagonal", client, round)

    made = strategy(min_replies=3)
    made.start(scripted(6, answer), num_rounds=2)
    before = made.posterior, made.hsum.clone(), dict(made.ledger.accepted)
    with pytest.raises(
        RunFailed, match=r"round 3: 2 of 6 clients replied, strategy.min_replies=3 .*client 0: .*broken"
    ):
        made.start(scripted(6, answer), num_rounds=3, first_round=3, callbacks=callbacks)
    assert made.posterior is before[0]
    assert torch.equal(made.hsum.linear, before[1].linear)
    assert made.ledger.accepted == before[2] == dict.fromkeys(range(6), 2)
    assert callbacks.metrics == {}


@pytest.mark.parametrize("kind", KINDS)
def test_no_reply_at_all_is_a_failure(strategy, scripted, kind: str) -> None:
    with pytest.raises(RunFailed, match="0 of 6 clients replied"):
        strategy(kind).start(scripted(6, lambda c, r: None), num_rounds=1)


# -- replies that ran away, or came from elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "limit", "client"])
def test_a_run_that_diverged_says_so(posterior, strategy, scripted, kind: str) -> None:
    """Too few replies are left because their numbers ran away: which clients, and what to do; not "no reply"."""
    away = {
        "nan": lambda: {"mean": torch.full((P,), math.nan)},
        "limit": lambda: {"mean": torch.full((P,), 3e35)},
        "client": lambda: wire.Diverged("the site is not finite; use a smaller damping"),
    }[kind]
    made = strategy("point", min_replies=2)
    with pytest.raises(RunDiverged) as failed:
        made.start(scripted(6, lambda c, r: posterior("point", c, r) if c == 4 else away()), num_rounds=1)
    text = str(failed.value)
    assert text.startswith(
        "diverged: round 1: the answers of 5 of 6 clients are not finite or beyond the limits (clients 0, 1, 2, 3, 5;"
    )
    assert "client.lr" in text
    assert {"nan": "mean is not finite", "limit": "limits.mean_norm=1e+30", "client": "the site is not finite"}[
        kind
    ] in text


def test_divergence_is_not_blamed_for_what_it_did_not_cause(strategy, scripted) -> None:
    """One client diverged, but the others were silent."""
    answers = [{"mean": torch.full((P,), math.nan)}, None, None]
    with pytest.raises(
        RunFailed, match=r"round 1: 0 of 3 clients replied, strategy.min_replies=2 \(client 0: mean is not finite"
    ):
        strategy("point", clients=3, min_replies=2).start(scripted(3, lambda c, r: answers[c]), num_rounds=1)


@pytest.mark.parametrize("size", [1e13, 1e20, 1e29])
def test_large_values_that_are_right_are_taken(strategy, scripted, size: float) -> None:
    made = strategy("point", clients=2)
    made.start(scripted(2, lambda c, r: {"mean": torch.full((P,), size)}), num_rounds=1)
    assert made.posterior.mean.tolist() == pytest.approx([size] * P)


def test_a_reply_of_another_client_is_refused(posterior, strategy, scripted, callbacks) -> None:
    """As when a SuperNode is started anew with another partition-id: client 3's answer comes from client 1's node."""

    def answer(client: int, round: int):
        who = 3 if client == 1 else client
        metrics = MetricRecord({"num-examples": 1, "round": round, "client": who})
        return RecordDict({"posterior": wire.pack(posterior("diagonal", who, round)), "metrics": metrics})

    made = strategy()
    made.start(scripted(6, answer), num_rounds=1, callbacks=callbacks)
    assert list(callbacks.reasons(1)) == [1]
    assert "reply is of client 3" in callbacks.reasons(1)[1]
