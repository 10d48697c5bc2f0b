"""What all strategies share: sampling, order, bad replies, bookkeeping."""

from __future__ import annotations

import math
import random
import weakref

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result, Strategy

from bayesfed import wire
from bayesfed.errors import RunFailed
from bayesfed.families import DiagonalGaussian, FullGaussian, IsotropicGaussian
from bayesfed.federation.server.replies import group_size
from bayesfed.federation.server.roster import Roster
from bayesfed.wire.flower_version import error_reply, set_identity
from strategies import BayesADMM, FedAvg, FedProx

P = 5


KINDS = ("point", "isotropic", "diagonal", "full")


# -- participants ------------------------------------------------------------------------------------------------------


def test_participants_are_a_function_of_seed_and_round(strategy) -> None:
    a, b, other = (strategy(clients=50, seed=seed, fraction=0.2) for seed in (1, 1, 2))
    rounds = range(1, 40)
    drawn = [a.sample(t) for t in rounds]
    assert drawn == [b.sample(t) for t in rounds]
    assert drawn == [a.sample(t) for t in rounds]
    assert drawn != [other.sample(t) for t in rounds]
    assert len({tuple(s) for s in drawn}) > 35
    for sample in drawn:
        assert sample == sorted(set(sample))
        assert len(sample) == 10
    assert set().union(*drawn) == set(range(50))


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 7), (0.01, 1), (0.5, 4), (0.43, 3), (0.99, 7)])
def test_number_of_participants(strategy, fraction: float, count: int) -> None:
    assert len(strategy(clients=7, fraction=fraction).sample(3)) == count


def test_only_participants_get_messages(posterior, strategy, scripted, callbacks) -> None:
    made = strategy(fraction=0.5)
    grid = scripted(6, lambda client, round: posterior("diagonal", client, round))
    made.start(grid, num_rounds=4, callbacks=callbacks)
    for round in range(1, 5):
        assert sorted(grid.methods[round]) == made.sample(round) == callbacks.sampled[round]
        assert callbacks.metrics[round]["clients/sampled"] == 3


# -- order of arrival --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_arrival_order_does_not_change_a_bit(posterior, strategy, scripted, kind: str) -> None:
    """Replies of very different size, so that float sums in another order would differ."""

    def answer(client: int, round: int) -> dict[str, torch.Tensor]:
        arrays = posterior(kind, client, round)
        return {name: value * 10.0 ** (client - 4) for name, value in arrays.items()}

    ends = []
    for seed in range(5):
        shuffler = random.Random(seed)

        def arrange(replies: list[Message], shuffler=shuffler) -> list[Message]:
            return shuffler.sample(replies, len(replies))

        made = strategy(kind, clients=8)
        made.start(scripted(8, answer, iter if seed == 0 else arrange), num_rounds=3)
        ends.append(made)
    for other in ends[1:]:
        for name, value in ends[0].posterior.arrays().items():
            assert torch.equal(other.posterior.arrays()[name], value)
        for name, value in ends[0].tensors().items():
            assert torch.equal(other.tensors()[name], value)


def test_replies_are_consumed_as_they_come(posterior, strategy, scripted) -> None:
    """Of replies in order at most two are alive at a time: there is no list of them."""
    alive, most = [], [0]

    class Lazy(scripted):
        def stream(self, messages, *, timeout=None):
            for message in messages:
                for reply in super().stream([message]):
                    if "posterior" in reply.content:
                        alive.append(weakref.ref(reply.content["posterior"]))
                    yield reply
                    del reply
                    most[0] = max(most[0], sum(ref() is not None for ref in alive))

    strategy(clients=12).start(Lazy(12, lambda c, r: posterior("diagonal", c, r)), num_rounds=1)
    assert len(alive) == 12
    assert 0 < most[0] <= 2


# -- bookkeeping -------------------------------------------------------------------------------------------------------


def test_accepted_and_durable_rounds_travel(posterior, strategy, scripted) -> None:
    """A client hears of its own last counted round, and of those in the last two checkpoints."""

    def answer(client: int, round: int):
        return None if (client, round) in {(1, 1), (1, 2), (3, 2)} else posterior("diagonal", client, round)

    made, grid = strategy(clients=4), scripted(4, answer)
    made.start(grid, num_rounds=2)
    made.saved()  # what the session says when it wrote a checkpoint
    made.start(grid, num_rounds=4, first_round=3)
    made.saved()
    made.start(grid, num_rounds=5, first_round=5)
    heard = {
        t: [(m["accepted"], m["durable"], m["older"]) for _, m in sorted(grid.methods[t].items())] for t in grid.methods
    }
    assert heard == {
        1: [(0, 0, 0)] * 4,
        2: [(1, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)],
        3: [(2, 2, 0), (0, 0, 0), (2, 2, 0), (1, 1, 0)],
        4: [(3, 2, 0), (3, 0, 0), (3, 2, 0), (3, 1, 0)],
        5: [(4, 4, 2), (4, 4, 0), (4, 4, 2), (4, 4, 1)],
    }


def test_messages_hold_the_posterior_and_plain_values(posterior, scripted) -> None:
    made = BayesADMM(family="diagonal", rho=0.3, damping=0.2, temperature=0.7, covariance="fixed", prior_precision=3.0)
    made.setup(torch.ones(P), 2)
    made.lr_factor = lambda round: 0.5**round
    grid = scripted(2, lambda c, r: posterior("diagonal", c, r))
    made.start(grid, num_rounds=2, train_config=ConfigRecord({"more": 1}))
    assert grid.methods[2][1] == {
        "name": "bayes_admm",
        "round": 2,
        "accepted": 1,
        "durable": 0,
        "older": 0,
        "rho": 0.3,
        "damping": 0.2,
        "temperature": 0.7,
        "proximal": 0.0,
        "learn_precision": False,
        "lr_factor": 0.25,
        "more": 1,
    }
    assert torch.equal(grid.sent[1][0]["mean"], torch.zeros(P))  # the prior's mean, not the initialisation
    assert torch.equal(grid.sent[1][0]["precision"], torch.full((P,), 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_state_for_checkpoints_is_complete(posterior, strategy, scripted, kind: str) -> None:
    """What state() gives, loaded into a new strategy, continues with the same bits."""
    grid = scripted(4, lambda c, r: posterior(kind, c, r))
    whole, first, second = (strategy(kind, clients=4, fraction=0.5) for _ in range(3))
    whole.start(grid, num_rounds=6)
    first.start(grid, num_rounds=3)
    tensors, values = first.state()
    second.load_state({name: value.clone() for name, value in tensors.items()}, values)
    second.start(grid, num_rounds=6, first_round=4)
    for name, value in whole.posterior.arrays().items():
        assert torch.equal(second.posterior.arrays()[name], value)
    assert second.ledger.accepted == whole.ledger.accepted


# -- 16-bit messages ---------------------------------------------------------------------------------------------------


def in_16_bits(kind: str, format: str, **options):
    made = (
        FedAvg(**options)
        if kind == "point"
        else BayesADMM(family=kind, rho=0.5, damping=0.5, temperature=1.0, **options)
    )
    made.setup(torch.linspace(-1, 1, P) / 3, 4, 1, format)
    return made


@pytest.mark.parametrize("format", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["point", "isotropic", "diagonal"])
def test_the_server_keeps_what_its_messages_leave_out(
    posterior, scripted, reply_content, kind: str, format: str
) -> None:
    """What is evaluated and saved isn't rounded; clients that change nothing leave it where it is; answers are
    differences.
    """
    made = in_16_bits(kind, format, **({} if kind == "point" else {"alpha": 1e-12}))
    made.posterior = type(made.posterior).from_arrays(posterior(kind, 0, 0))
    before = made.posterior
    grid = scripted(4, lambda c, r: RecordDict({
        "posterior": made.codec.encode(made.round.sent.posterior.arrays(), made.round.sent.posterior.arrays())[0],
        "metrics": MetricRecord({"num-examples": 1, "round": r}),
    }))  # fmt: skip
    result = made.start(grid, num_rounds=3)
    assert not torch.equal(made.round.sent.posterior.mean, before.mean)
    for name, value in made.posterior.arrays().items():
        assert torch.allclose(value, before.arrays()[name], rtol=1e-6, atol=0)
    assert torch.equal(torch.from_numpy(result.arrays["mean"].numpy()), made.posterior.mean)
    assert all(name.startswith(f"{format}/") for name in grid.sent[3][0])


def test_a_reply_in_another_format_is_left_out(posterior, scripted, callbacks) -> None:
    made, other = in_16_bits("diagonal", "float16"), in_16_bits("diagonal", "bfloat16")

    def answer(client: int, round: int):
        if client == 1:
            return posterior("diagonal", 1, 1)
        codec = other.codec if client == 2 else made.codec
        return RecordDict({
            "posterior": codec.encode(posterior("diagonal", client, 1), made.round.sent.posterior.arrays())[0],
            "metrics": MetricRecord({"num-examples": 1, "round": round}),
        })  # fmt: skip

    made.start(scripted(4, answer), num_rounds=1, callbacks=callbacks)
    assert callbacks.reasons(1) == {
        1: "the arrays travel in format 'full', this side is set up for wire=float16",
        2: "the arrays travel in format 'bfloat16', this side is set up for wire=float16",
    }


def test_a_server_mean_beyond_float16_stops_the_run(scripted) -> None:
    made = in_16_bits("point", "float16")
    made.posterior.mean[1] = 7e4
    with pytest.raises(RunFailed, match=r"round 1: the server's mean can't be sent as float16 .*entry 1: 70000"):
        made.start(scripted(4, lambda c, r: None), num_rounds=1)


# -- as a Flower strategy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [FedAvg(), FedProx(mu=0.1), BayesADMM(family="diagonal", rho=0.5, damping=1.0, temperature=1.0)],
    ids=lambda s: s.name,
)
def test_plain_flower_strategy(posterior, scripted, made: Strategy) -> None:
    """Only a grid and initial arrays: no setup, no callbacks; Flower's Result comes back."""
    kind = "diagonal" if isinstance(made, BayesADMM) else "point"
    grid, seen = scripted(3, lambda c, r: posterior(kind, c, r)), []

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((round, arrays["mean"].numpy().copy()))
        return MetricRecord({"score": float(round)})

    result = made.start(grid, ArrayRecord({"mean": Array(torch.ones(P).numpy())}), num_rounds=2, evaluate_fn=evaluate)
    assert isinstance(made, Strategy)
    assert isinstance(result, Result)
    assert torch.equal(torch.from_numpy(result.arrays["mean"].numpy()), made.posterior.mean)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert result.train_metrics_clientapp[2]["clients/replied"] == 3
    assert result.evaluate_metrics_serverapp[2]["score"] == 2.0
    assert [round for round, _ in seen][-2:] == [1, 2]
    assert made.num_clients == 3
    assert made.configure_evaluate(1, result.arrays, ConfigRecord(), grid) == []
    assert made.aggregate_evaluate(1, []) is None


def test_start_without_arrays_says_what_is_missing(scripted) -> None:
    with pytest.raises(ValueError, match="initial_arrays with an array 'mean'"):
        FedAvg().start(scripted(2, lambda c, r: None), num_rounds=1)


def test_gaussian_families_by_name(strategy) -> None:
    kinds = {name: type(strategy(name).posterior) for name in ("isotropic", "diagonal", "full")}
    assert kinds == {"isotropic": IsotropicGaussian, "diagonal": DiagonalGaussian, "full": FullGaussian}


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampled", "size"), [(1, 1), (10, 1), (16, 1), (17, 2), (50, 4), (100, 8), (512, 32), (10_000, 32)]
)
def test_group_size_depends_on_the_sampled_clients_only(sampled: int, size: int) -> None:
    assert group_size(sampled) == size


class FoldingGrid:
    """Sums groups of replies with a strategy of its own, as Ray's workers do; counts what the server gets."""

    folds = True

    def __init__(self, grid, worker):
        self.grid, self.worker, self.sums = grid, worker, 0

    def __getattr__(self, name):
        return getattr(self.grid, name)

    def stream(self, messages, *, timeout=None, fold=1):
        messages = list(messages)
        for start in range(0, len(messages), fold):
            group = messages[start : start + fold]
            replies = list(self.grid.stream(group))
            if start // fold % 3 < 2:  # an engine may leave a group to the server
                replies = self.worker.fold(group, replies)
            self.sums += sum("sums" in r.content for r in replies if not r.has_error())
            yield from replies


@pytest.mark.parametrize("kind", KINDS)
def test_sums_made_where_the_clients_are_give_the_same_bits(
    posterior, strategy, scripted, callbacks, kind: str
) -> None:
    """150 clients, groups of 16, two of three summed; some raise, some send nonsense, one whole group fails."""

    def answer(client: int, round: int):
        if client % 17 == 3 or 16 <= client < 32:
            return RuntimeError(f"client {client} is broken")
        if client % 29 == 5:
            return {"mean": torch.zeros(P)} if kind != "point" else {"mean": torch.zeros(P + 1)}
        return posterior(kind, client, round)

    plain, folded, worker = (strategy(kind, clients=150) for _ in range(3))
    plain.start(scripted(150, answer), num_rounds=3)
    grid = FoldingGrid(scripted(150, answer), worker)
    folded.start(grid, num_rounds=3, callbacks=callbacks)
    for one, other in zip(plain.posterior.arrays().values(), folded.posterior.arrays().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain.tensors().values(), folded.tensors().values(), strict=True):
        assert torch.equal(one, other)
    assert plain.ledger == folded.ledger
    assert callbacks.metrics[3]["bytes/up"] == plain.round.up
    assert "client 3 is broken" in callbacks.reasons(3)[3]
    assert "array" in callbacks.reasons(3)[5]
    assert grid.sums == 3 * 6  # groups 0, 3, 4, 6, 7, 9


def test_a_reply_without_a_posterior_counts_only_if_the_grid_folds(posterior, strategy, scripted, callbacks) -> None:
    """A deployed client can't pass off numbers, or sums, as a reply."""

    def answer(client: int, round: int):
        metrics = MetricRecord({"num-examples": 1, "round": round, "bytes": 1})
        sums = wire.pack(
            {"weighted": torch.full((P,), 1e9, dtype=torch.float64), "examples": torch.tensor(1.0).double()}
        )
        return RecordDict({"metrics": metrics, "sums": sums}) if client == 2 else posterior("point", client, round)

    made = strategy("point", clients=4)
    made.start(scripted(4, answer), num_rounds=1, callbacks=callbacks)
    assert list(callbacks.reasons(1)) == [2]
    assert float(made.posterior.mean.abs().max()) < 10


def test_a_folded_reply_that_diverged_says_so(strategy, scripted) -> None:
    grid = FoldingGrid(scripted(150, lambda c, r: {"mean": torch.full((P,), math.nan)}), strategy("point", clients=150))
    with pytest.raises(RunFailed, match="diverged: round 1: the answers of 150 of 150 clients"):
        strategy("point", clients=150).start(grid, num_rounds=1)


class Nodes(list):
    """A grid of nodes that answer the roster's question as listed: a partition id, or an error code; the last answer
    stays.
    """

    def get_node_ids(self):
        return range(1, len(self) + 1)

    stream = None  # one of bayesfed's

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            said = self[message.metadata.dst_node_id - 1]
            answer = said.pop(0) if len(said) > 1 else said[0]
            if isinstance(answer, Exception):
                yield error_reply(message, answer)
            elif answer == "away":
                yield Message(Error(code=5, reason="node unavailable"), reply_to=message)
            else:
                yield Message(
                    RecordDict({"client": ConfigRecord({"partition-id": answer, "num-examples": 2})}), reply_to=message
                )


def test_roster_refuses_strangers_and_waits_for_who_is_away(monkeypatch) -> None:
    monkeypatch.setattr("bayesfed.federation.server.roster.time.sleep", lambda seconds: None)
    set_identity()
    late, claimed = Roster(2), Roster(2)
    late.gather(Nodes([[0], ["away", "away", 1]]), 9.0)
    assert late.nodes == {0: 1, 1: 2}
    claimed.gather(Nodes([[1], [1], [7], [-1], ["a"], [RuntimeError("no data")]]), 0.05)
    assert claimed.nodes == {1: 1}
    assert claimed.sizes == {1: 2}
