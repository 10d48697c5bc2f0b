"""One client doesn't decide: what claims far more weight than the round's others is left out, and honest rounds keep
their bits.
"""

from __future__ import annotations

import pytest
import torch
from flwr.app import MetricRecord, RecordDict

from bayesfed import wire
from bayesfed.federation.server.outliers import Outliers

P = 5


def ends(strategy, scripted, answer, callbacks=None, kind: str = "diagonal", clients: int = 9):
    made = strategy(kind, clients=clients)
    made.start(scripted(clients, answer), num_rounds=2, callbacks=callbacks)
    return made


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("liar", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("claim", [1e3, 1e8, 1e25])
def test_a_huge_precision_is_left_out(
    posterior, strategy, scripted, callbacks, kind: str, liar: int, claim: float
) -> None:
    """Whether the liar comes first or last; the posterior is that of the round without it, bit for bit."""

    def answer(client: int, round: int):
        arrays = posterior(kind, client, round)
        return {"mean": -arrays["mean"], "precision": arrays["precision"] * claim} if client == liar else arrays

    made = ends(strategy, scripted, answer, callbacks, kind)
    without = ends(strategy, scripted, lambda c, r: None if c == liar else posterior(kind, c, r), None, kind)
    assert list(callbacks.reasons(1)) == list(callbacks.reasons(2)) == [liar]
    assert "limits.relative_precision=100" in callbacks.reasons(1)[liar]
    for name, value in made.posterior.arrays().items():
        assert torch.equal(value, without.posterior.arrays()[name])
    assert torch.equal(made.hsum.quadratic, without.hsum.quadratic)


def test_one_huge_entry_is_left_out(posterior, strategy, scripted, callbacks) -> None:
    def answer(client: int, round: int):
        arrays = posterior("diagonal", client, round)
        if client == 3:
            arrays["precision"][2] = 1e6
        return arrays

    ends(strategy, scripted, answer, callbacks)
    assert list(callbacks.reasons(1)) == [3]


def test_four_of_nine_cannot_outvote_the_others(posterior, strategy, scripted, callbacks) -> None:
    def answer(client: int, round: int):
        arrays = posterior("diagonal", client, round)
        return {**arrays, "precision": arrays["precision"] * 1e6} if client in (0, 1, 6, 7) else arrays

    ends(strategy, scripted, answer, callbacks)
    assert sorted(callbacks.reasons(1)) == [0, 1, 6, 7]


def test_the_order_of_clients_and_the_last_bits_stay(posterior, strategy, scripted, monkeypatch) -> None:
    """Nothing is summed in another order because the first replies wait."""
    answers = {c: posterior("diagonal", c, 1) for c in range(9)}
    for client, arrays in answers.items():
        arrays["mean"] *= 10.0 ** (client - 4)
    judged = ends(strategy, scripted, lambda c, r: None if c in (2, 5) else answers[c])
    monkeypatch.setattr(Outliers, "vetted", lambda self, replies: replies)
    plain = ends(strategy, scripted, lambda c, r: None if c in (2, 5) else answers[c])
    assert torch.equal(judged.posterior.mean, plain.posterior.mean)
    assert torch.equal(judged.posterior.precision, plain.posterior.precision)


def test_a_simulated_client_with_more_examples_may_be_as_much_more_precise() -> None:
    class Found:
        def __init__(self, precision: float):
            from bayesfed.families import DiagonalGaussian

            self.posterior = DiagonalGaussian(torch.zeros(2).double(), torch.full((2,), precision).double())

    sizes = {0: 10_000, 1: 10, 2: 10, 3: 10}
    replies = [(0, Found(10_000.0)), (1, Found(10.0)), (2, Found(10.0)), (3, Found(9_000.0))]
    for trusted, refused in ((True, [3]), (False, [0, 3])):  # a deployed client says its number of examples itself
        found = dict(Outliers(20, 100, sizes, trusted).vetted(replies))
        assert [client for client, what in found.items() if isinstance(what, wire.BadMessage)] == refused


def test_with_two_clients_there_is_no_majority(posterior, strategy, scripted, callbacks) -> None:
    def answer(client: int, round: int):
        arrays = posterior("diagonal", client, round)
        return {**arrays, "precision": arrays["precision"] * 1e6} if client == 0 else arrays

    ends(strategy, scripted, answer, callbacks, clients=2)
    assert callbacks.reasons(1) == {}


def test_no_more_examples_than_a_client_said_it_had(posterior, strategy, scripted, callbacks) -> None:
    """The scripted clients say 1, 2, 3 ... when they connect."""

    def answer(client: int, round: int):
        metrics = MetricRecord({"num-examples": 10**15 if client == 2 else client + 1, "round": round})
        return RecordDict({"posterior": wire.pack(posterior("point", client, round)), "metrics": metrics})

    made = ends(strategy, scripted, answer, callbacks, "point")
    without = ends(strategy, scripted, lambda c, r: None if c == 2 else posterior("point", c, r), None, "point")
    assert callbacks.reasons(1) == {2: "num-examples is 1e+15, it was 3 when the client connected"}
    assert torch.equal(made.posterior.mean, without.posterior.mean)


def test_sizes_that_a_stranger_says_are_compared_with_the_others() -> None:
    """Those of a simulation are its own and may differ as they like; a method may weigh by the size said at first, so
    it counts too.
    """
    sizes = {0: 10, 1: 1000, 2: 20, 3: 10**9}
    Outliers(20, 100, sizes, trusted=True).check_examples(3, 10**9)
    deployed = Outliers(20, 100, sizes, trusted=False)
    for client in (0, 1, 2):
        deployed.check_examples(client, sizes[client])
    for claimed in (1, 10**9):
        with pytest.raises(wire.BadMessage, match=r"limits\.relative_examples=100"):
            deployed.check_examples(3, claimed)
    Outliers(20, 100, {0: 1, 1: 10**9}, trusted=False).check_examples(1, 10**9)  # two have no majority
