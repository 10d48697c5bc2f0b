"""Simulated stragglers, dropouts and arrival times: keyed draws, budgets that the methods' own step counts follow,
bookkeeping.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import bayesfed
from bayesfed.errors import InputError, RunFailed
from bayesfed.families import PointMass
from bayesfed.federation.local import LocalProblem
from bayesfed.problem import Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Gaussian
from bayesfed.runs.directory import read_jsonl
from bayesfed.seeding import numpy_generator
from bayesfed.system import Fate, System

QUIET = ["display=false", "figures=false", "eval.samples=2"]
LINREG = ["experiment=linreg", *QUIET]


def fates(clients: int = 200, rounds: int = 20, seed: int = 1, **settings) -> list[Fate]:
    system = System(**settings)
    return [system.fate(seed, client, round) for round in range(1, rounds + 1) for client in range(clients)]


# -- draws -------------------------------------------------------------------------------------------------------------


def test_frequencies():
    found = fates(stragglers=0.3, least_work=0.2, most_work=0.6, dropout=0.1)
    lost = [f for f in found if f.lost]
    assert len(lost) / len(found) == pytest.approx(0.1, abs=0.015)
    slow = [f.work for f in found if not f.lost and f.work < 1]
    assert len(slow) / (len(found) - len(lost)) == pytest.approx(0.3, abs=0.03)
    assert 0.2 <= min(slow) < max(slow) <= 0.6
    assert np.mean(slow) == pytest.approx(0.4, abs=0.01)
    assert np.std(slow) == pytest.approx(0.4 / math.sqrt(12), abs=0.01)


def test_arrival_times_follow_size_work_speed_and_noise():
    system = System(stragglers=1.0, deadline=0.8, speed_spread=0.7, jitter=0.2)
    for client, round, size in ((0, 1, 1.0), (3, 2, 0.5), (3, 7, 2.0)):
        fate = system.fate(5, client, round, size)
        speed = math.exp(0.7 * numpy_generator(5, "system", "speed", client).standard_normal())
        noise = math.exp(0.2 * numpy_generator(5, "system", "jitter", client, round).standard_normal())
        assert fate.arrival == pytest.approx(size * fate.work / speed * noise, rel=1e-12)
        assert bool(fate.lost) == (fate.arrival > 0.8)
        assert not fate.lost or fate.lost.startswith("late: ")
    median = np.median([f.arrival for f in fates(deadline=1e9, speed_spread=0.7)])
    assert median == pytest.approx(1, rel=0.1)  # the unit of time


def test_the_seed_the_client_and_the_round_decide():
    settings = {"stragglers": 0.5, "dropout": 0.2, "deadline": 1.0}
    assert fates(**settings) == fates(**settings)
    assert fates(**settings) != fates(seed=2, **settings)
    system = System(**settings)
    assert system.fates(1, [4, 2], 3, [10] * 9) == {k: system.fate(1, k, 3) for k in (4, 2)}
    assert system.fates(1, [2], 3, [10, 10, 40])[2] == system.fate(1, 2, 3, 2.0)


def test_a_stream_for_each_purpose():
    """Switching one thing on leaves the draws of the others as they are."""
    alone = [bool(f.lost) for f in fates(dropout=0.2)]
    assert alone == [f.lost.startswith("dropped") for f in fates(dropout=0.2, stragglers=0.5, deadline=0.5)]
    work = [f.work for f in fates(stragglers=0.5)]
    assert all(f.lost or f.work == w for f, w in zip(fates(dropout=0.2, stragglers=0.5), work, strict=True))


def test_fixed_stragglers_stay():
    system = System(stragglers=0.5, fixed=True)
    first = [system.fate(1, k, 1).work for k in range(40)]
    assert [system.fate(1, k, 9).work for k in range(40)] == first
    assert 10 < sum(w < 1 for w in first) < 30
    moving = System(stragglers=0.5)
    assert [moving.fate(1, k, 9).work for k in range(40)] != [moving.fate(1, k, 1).work for k in range(40)]


def test_off_by_default():
    assert not System().active
    assert set(fates()) == {Fate()}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"dropout": 1}, r"system\.dropout=1: must be below 1"),
        ({"dropout": -0.1}, r"system\.dropout=-0\.1: must be a finite number >= 0"),
        ({"stragglers": 2}, r"system\.stragglers=2: must be a finite number >= 0 and <= 1"),
        ({"least_work": 0}, r"system\.least_work=0: must be a finite number > 0"),
        ({"least_work": 0.5, "most_work": 0.4}, r"system\.most_work=0\.4: must be a finite number >= 0\.5"),
        ({"deadline": 0}, r"system\.deadline=0: must be a finite number > 0"),
        ({"deadline": "noon"}, r"system\.deadline=noon"),
        ({"fixed": 1}, r"system\.fixed=1: must be true or false"),
        ({"speed_spread": -1}, r"system\.speed_spread=-1"),
        ({"straglers": 0.5}, r"system\.straglers=0\.5: no such key; did you mean 'stragglers'"),
    ],
)
def test_errors_name_field_value_and_fix(section, message):
    with pytest.raises(InputError, match=message):
        System.of(section)


def test_a_client_without_steps_cannot_straggle(tmp_path):
    with pytest.raises(
        InputError, match=r"system\.stragglers=0\.5: client=exact solves .* closed form.*another client"
    ):
        bayesfed.run([*LINREG, "system.stragglers=0.5", f"hydra.run.dir={tmp_path}/r"])
    assert not (tmp_path / "r").exists()


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_lost_clients_are_not_asked_but_counted_and_their_download_too(tmp_path):
    settings = [*LINREG, "data.num_clients=8", "system.dropout=0.4", "rounds=4", "strategy.fraction=0.8"]
    result = bayesfed.run([*settings, f"hydra.run.dir={tmp_path}/r"])
    lines = read_jsonl(tmp_path / "r" / "clients.jsonl")
    system = System(dropout=0.4)
    for record in result.rounds[1:]:
        round = record["round"]
        here = [line for line in lines if line["round"] == round]
        assert len(here) == record["clients/sampled"] == 6
        lost = {line["client"] for line in here if not line["accepted"]}
        assert lost == {line["client"] for line in here if system.fate(1, line["client"], round).lost}
        assert all(line["reason"] == "dropped out (system.dropout)" for line in here if not line["accepted"])
        assert record["clients/failed"] == len(lost)
        assert record["clients/replied"] == 6 - len(lost)
    whole = bayesfed.run(
        [*LINREG, "data.num_clients=8", "rounds=1", "strategy.fraction=0.8", f"hydra.run.dir={tmp_path}/w"]
    )
    assert result.rounds[1]["bytes/down"] == whole.rounds[1]["bytes/down"]
    up = whole.rounds[1]["bytes/up"] / 6
    assert result.rounds[1]["bytes/up"] == pytest.approx(up * result.rounds[1]["clients/replied"], rel=0.02)
    assert result.summary["gradients/total"] == pytest.approx(
        sum(line.get("gradient-evaluations", 0) for line in lines if line["accepted"])
    )


def test_a_round_nobody_answers_is_a_failure_that_says_why(tmp_path):
    with pytest.raises(RunFailed, match=r"round 1: 0 of 5 clients replied.*late: .* > system\.deadline=1e-09"):
        bayesfed.run([*LINREG, "system.deadline=1e-9", f"hydra.run.dir={tmp_path}/r"])
    with pytest.raises(RunFailed, match=r"strategy\.min_replies=5 .*dropped out"):
        bayesfed.run([*LINREG, "system.dropout=0.5", "strategy.min_replies=5", f"hydra.run.dir={tmp_path}/m"])


# -- budgets: the steps really taken -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_problem() -> LocalProblem:
    """A point estimate's problem with 23 examples."""
    data = Examples(torch.arange(46.0, dtype=torch.float64).view(23, 2), torch.zeros(23, dtype=torch.float64))
    model = FlatModel(torch.nn.Linear(2, 1), torch.float64, torch.device("cpu"))
    return LocalProblem(
        model=model,
        initial=model.vector.clone(),
        data=data,
        likelihood=Gaussian(1.0),
        server=PointMass(model.vector.clone()),
        site=None,
        rho=0.0,
        temperature=1.0,
        proximal=0.0,
        learn_precision=False,
        round=1,
        client=0,
        seed=1,
    )


@pytest.mark.parametrize("work", [1.0, 0.999, 0.5, 0.37, 0.01])
@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 16), (3, 7), (4, 100), (2, 1)])
def test_as_many_mini_batches_as_the_budget(local_problem, work, epochs, batch_size):
    problem = dataclasses.replace(local_problem, work=work)
    whole = [len(x) for x, _ in dataclasses.replace(problem, work=1.0).batches(epochs, batch_size)]
    sizes = [len(x) for x, _ in problem.batches(epochs, batch_size)]
    assert len(sizes) == problem.steps(epochs, batch_size) == max(1, math.floor(work * len(whole)))
    assert sizes == whole[: len(sizes)]
    assert sum(sizes) == problem.examples_seen(epochs, batch_size)


def test_the_first_steps_are_those_of_the_whole_epoch(local_problem):
    problem = local_problem
    part = [x for x, _ in dataclasses.replace(problem, work=0.5).batches(2, 7)]
    assert all(torch.equal(a, b) for a, (b, _) in zip(part, problem.batches(2, 7), strict=False))


RUN = [*LINREG, "client=sgd", "client.lr=0.01", "client.epochs=3", "client.batch_size=10", "rounds=1", "dtype=float64"]
SLOW = ["system.stragglers=1", "system.least_work=0.1", "system.most_work=0.9"]


def budgets(epochs: int = 3, batches: int = 5) -> dict[int, int]:
    """Steps of each client: 50 training examples in batches of 10."""
    system = System(stragglers=1.0, least_work=0.1, most_work=0.9)
    return {k: max(1, math.floor(system.fate(1, k, 1).work * epochs * batches)) for k in range(5)}


def trained(tmp_path, *overrides: str):
    result = bayesfed.run([*RUN, *overrides, f"hydra.run.dir={tmp_path}/r"])
    return result, {line["client"]: line for line in read_jsonl(tmp_path / "r" / "clients.jsonl")}


@pytest.mark.parametrize("side_by_side", [[], ["engine.clients_per_batch=5"]], ids=["alone", "side by side"])
def test_fednova_normalises_by_the_steps_taken(tmp_path, side_by_side):
    _, lines = trained(tmp_path, "strategy=fednova", *SLOW, *side_by_side)
    steps = budgets()
    assert len(set(steps.values())) > 2
    assert {k: line["local-progress"] for k, line in lines.items()} == steps
    assert {k: line["gradient-evaluations"] for k, line in lines.items()} == {k: 10 * n for k, n in steps.items()}


@pytest.mark.parametrize("side_by_side", [1, 5])
def test_scaffolds_control_variate_divides_by_the_steps_taken(tmp_path, side_by_side):
    """Option II: c_k' = c_k - c + (w_g - w_k)/(steps lr), here with c_k = c = 0: the server's c is its
    weighted mean.
    """
    from safetensors.torch import load_file

    from bayesfed.app import plain, problem_of
    from bayesfed.config import compose_config

    overrides = [*RUN, "strategy=scaffold", *SLOW, f"engine.clients_per_batch={side_by_side}"]
    bayesfed.run([*overrides, f"hydra.run.dir={tmp_path}/r"])
    problem = problem_of(plain(compose_config(overrides)))
    start = torch.cat([p.detach().reshape(-1) for p in problem.build_model(1).parameters()]).double()
    steps = budgets()
    controls = {}
    for k in range(5):
        (path,) = (tmp_path / "r" / "checkpoint" / "sites" / f"client-{k:05d}").glob("*.safetensors")
        controls[k] = load_file(path)["state.control"]
    state = load_file(next((tmp_path / "r" / "checkpoint").glob("server-*.safetensors")))
    torch.testing.assert_close(state["control"], sum(controls.values()) / 5, rtol=1e-12, atol=1e-14)  # equal sizes
    # the server's new weights are the mean of w_k = w_g - lr steps c_k'
    expected = start - sum(0.01 * steps[k] * controls[k] for k in range(5)) / 5
    torch.testing.assert_close(state["posterior.mean"], expected, rtol=1e-10, atol=1e-12)


def test_fedpa_spreads_its_samples_over_the_steps_taken(tmp_path, monkeypatch):
    from strategies import fedpa

    seen = []
    before = fedpa.PathSamples.__init__

    def record(self, steps, burn_in, samples):
        seen.append(steps)
        before(self, steps, burn_in, samples)

    monkeypatch.setattr(fedpa.PathSamples, "__init__", record)
    options = [
        "strategy=fedpa",
        "strategy.burn_in_rounds=0",
        "strategy.burn_in=0.2",
        "strategy.samples=2",
        "client.epochs=6",
    ]
    _, lines = trained(tmp_path, *options, *SLOW, "system.least_work=0.4")
    system = System(stragglers=1.0, least_work=0.4, most_work=0.9)
    assert seen == [math.floor(system.fate(1, k, 1).work * 30) for k in range(5)]
    assert all(line["accepted"] for line in lines.values())


@pytest.mark.parametrize(
    ("options", "per_step"),
    [
        (
            [
                "strategy.family=diagonal",
                "client=ivon",
                "client.epochs=3",
                "client.batch_size=10",
                "client.mc_samples=2",
            ],
            20,
        ),
        (["strategy=fedlap_cov", "client=laplace", "client.lr=0.01", "client.epochs=3", "client.batch_size=10"], 10),
        (
            [
                "strategy.family=diagonal",
                "client=srvon",
                "client.curvature=stein",
                "client.epochs=3",
                "client.batch_size=10",
                "client.mc_samples=1",
            ],
            10,
        ),
        (["strategy=fedavg", "client=lmd", "client.lr=0.01", "client.epochs=3", "client.batch_size=10"], 10),
    ],
    ids=["ivon", "laplace", "srvon", "lmd"],
)
def test_other_solvers_count_what_they_did(tmp_path, options, per_step):
    """Laplace's curvature costs one gradient per example more, straggler or not."""
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    bayesfed.run([*LINREG, *options, "rounds=1", f"hydra.run.dir={fast}"])
    bayesfed.run([*LINREG, *options, *SLOW, "rounds=1", f"hydra.run.dir={slow}"])
    cost = [{r["client"]: r["gradient-evaluations"] for r in read_jsonl(p / "clients.jsonl")} for p in (fast, slow)]
    for k, steps in budgets().items():
        assert cost[0][k] - cost[1][k] == per_step * (15 - steps)


@pytest.mark.parametrize("client", ["von", "srvon"])
def test_newton_steps_are_left_out_whole(tmp_path, client):
    bayesfed.run([*LINREG, f"client={client}", "client.epochs=10", *SLOW, "rounds=1", f"hydra.run.dir={tmp_path}/r"])
    lines = {r["client"]: r for r in read_jsonl(tmp_path / "r" / "clients.jsonl")}
    per_step = 50 * (1 + 6)  # examples, times a gradient and six rows of a Hessian
    found = {k: line["gradient-evaluations"] / per_step for k, line in lines.items()}
    system = System(stragglers=1.0, least_work=0.1, most_work=0.9)
    assert found == pytest.approx({k: max(1, math.floor(system.fate(1, k, 1).work * 10)) for k in range(5)})
