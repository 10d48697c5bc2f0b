"""Clients side by side find what each finds alone: same batches, same noise, to rounding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from bayesfed.families import NaturalParameters, PointMass, gaussian
from bayesfed.federation.local import LocalProblem, LocalSolution, Solver
from bayesfed.problem import Categorical, Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.models import MLP
from bayesfed.problem.scaling import Scaling
from bayesfed.seeding import torch_generator
from clients.exact import ExactSolver
from clients.ivon import IVONSolver
from clients.point import PointSolver
from clients.side_by_side import SideBySide, can_batch, loners

torch.set_num_threads(1)
SIZES = (9, 1, 20, 22, 17, 8)  # one example, less than a batch of 8, a batch, and batches that end early
INPUTS, CLASSES = 6, 3
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
POINT = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "momentum": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.3},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "local_schedule": "cosine"},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
}
IVON = {
    "plain": {},
    "samples": {"mc_samples": 3, "clip_norm": 0.5, "clip_radius": 0.7, "local_schedule": "inverse"},
    "antithetic": {"antithetic": True, "mc_samples": 3},
    "normal": {"noise": "normal", "min_precision": 0.0},
    "floored": {"min_precision": 0.8, "beta2": 0.9},
}


def ivon(**settings) -> IVONSolver:
    return IVONSolver(**{"lr": 0.02, "epochs": 3, "batch_size": 8, "beta2": 0.99, "hess_init": 0.1, **settings})


def point(name: str, **settings) -> PointSolver:
    return PointSolver(**{"epochs": 3, "batch_size": 8, **POINT[name], **settings})


def pose(
    family: str, dtype: torch.dtype = torch.float64, module: nn.Module | None = None, sizes=SIZES, **changes
) -> list[LocalProblem]:
    """One problem per size, of one model and one pair of arrays, with sites that differ from client to client."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlatModel(module or MLP((INPUTS,), CLASSES, hidden=[7], activation="tanh"), dtype)

    def draw(purpose: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch_generator(1, purpose), dtype=torch.float64, device="cpu")

    x, y = draw("x", sum(sizes), INPUTS), draw("y", sum(sizes)).mul(9).long().abs() % CLASSES
    data = Examples(x, y, None, Scaling.identity())
    rows = torch.arange(len(x), device="cpu").flip(0).split(list(sizes))
    mean = 0.3 * draw("mean", model.dim)
    server, shape = PointMass(mean.to(dtype)), ()
    if family != "point":
        shape = gaussian(family).precision_shape(model.dim)
        server = gaussian(family)(mean.to(dtype), draw("precision", *shape).abs().add(1).to(dtype))
    problems = []
    for client, own in enumerate(rows):
        linear, curvature = draw(f"site {client}", model.dim), 0.3 * draw(f"curvature {client}", *shape)
        site = None if family == "point" else NaturalParameters(family, linear, curvature)
        settings = {
            "model": model,
            "initial": model.vector.clone(),
            "data": data.subset(own),
            "likelihood": LIKELIHOOD,
            "server": server,
            "site": site,
            "rho": 0.5,
            "temperature": 0.3,
            "proximal": 0.1,
            "learn_precision": True,
            "round": 2,
            "client": client,
            "seed": 1,
            "lr_factor": 0.9,
        }
        problems.append(LocalProblem(**settings | changes))
    return problems


LIKELIHOOD = Categorical()


def exceeding(site: NaturalParameters) -> NaturalParameters:
    """A site that asks for more precision than there is."""
    return NaturalParameters(site.family, site.linear, site.quadratic - 3.0)


def one_by_one(solver: Solver, problems: list[LocalProblem]) -> list[LocalSolution]:
    return Solver.solve_many(solver, problems)


def ranked(problems: list[LocalProblem]) -> list[LocalProblem]:
    return sorted(problems, key=lambda p: -p.num_examples)


def assert_same(found: list[LocalSolution], expected: list[LocalSolution], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one.posterior) is type(other.posterior)
        assert one.metrics == pytest.approx(other.metrics, rel=tolerance, abs=tolerance)
        for values, wanted in ((one.posterior.arrays(), other.posterior.arrays()), (one.memory, other.memory)):
            assert values.keys() == wanted.keys()
            for name, value in values.items():
                assert (value.dtype, value.shape) == (wanted[name].dtype, wanted[name].shape)
                scale = float(wanted[name].double().abs().mean())
                torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance * scale)


# -- equal to one by one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["point", "isotropic", "diagonal"])
@pytest.mark.parametrize("name", POINT)
def test_point_estimates(name, family, dtype):
    solver, problems = point(name), ranked(pose(family, dtype))
    assert can_batch(problems)
    assert_same(solver.solve_together(problems), one_by_one(solver, problems), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["isotropic", "diagonal"])
@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("name", IVON)
def test_ivon(name, round, family, dtype):
    solver, problems = ivon(**IVON[name]), ranked(pose(family, dtype, round=round))
    if name == "floored":  # sites that exceed the curvature
        problems = [dataclasses.replace(p, site=exceeding(p.site)) for p in problems]
    assert can_batch(problems)
    expected = one_by_one(solver, problems)
    assert_same(solver.solve_together(problems), expected, TOLERANCE[dtype])
    if name == "floored":
        assert sum(solution.metrics["floored"] for solution in expected) > 0


@pytest.mark.parametrize("solver", [point("adam", amp="bfloat16"), ivon(amp="bfloat16", lr=1e-3)], ids=["adam", "ivon"])
def test_mixed_precision(solver):
    problems = ranked(pose("diagonal", torch.float32))
    plain = point("adam") if isinstance(solver, PointSolver) else ivon(lr=1e-3)
    expected, found = one_by_one(solver, problems), solver.solve_together(problems)
    assert_same(found, expected, 2e-2)
    exact = one_by_one(plain, problems)[0].posterior.mean
    assert not torch.allclose(found[0].posterior.mean, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", [*map(point, POINT), ivon()], ids=[*POINT, "ivon"])
@pytest.mark.parametrize(
    "settings", [{"site": None}, {"site": None, "proximal": 0.0}, {"rho": 2.0, "seed": 5}], ids=str
)
def test_without_sites_or_proximal_term(solver, settings):
    family = "point" if settings.get("proximal") == 0 and isinstance(solver, PointSolver) else "diagonal"
    problems = ranked(pose(family, **settings))
    assert_same(solver.solve_together(problems), one_by_one(solver, problems), 1e-10)


@pytest.mark.parametrize(
    ("solver", "family"),
    [(point("momentum", keep_momentum=True), "point"), (point("adam", keep_momentum=True), "point"),
     (point("sgd", keep_momentum=True), "point"), (ivon(keep_momentum=True), "diagonal")],
    ids=["momentum", "adam", "sgd", "ivon"],
)  # fmt: skip
def test_kept_momentum_of_some_clients(solver, family):
    problems = ranked(pose(family))
    first = one_by_one(solver, problems)
    again = [
        dataclasses.replace(problem, round=3, memory=solution.memory if problem.client % 2 else {})
        for problem, solution in zip(problems, first, strict=True)
    ]
    expected, found = one_by_one(solver, again), solver.solve_together(again)
    assert_same(found, expected, 1e-10)
    # what one way keeps the other can go on with
    swapped = [dataclasses.replace(p, round=4, memory=s.memory) for p, s in zip(again, found, strict=True)]
    straight = [dataclasses.replace(p, round=4, memory=s.memory) for p, s in zip(again, expected, strict=True)]
    assert_same(one_by_one(solver, swapped), one_by_one(solver, straight), 1e-10)


def test_solutions_come_in_the_order_of_the_problems():
    solver, problems = ivon(), pose("diagonal", sizes=(3, 60, 17, 9, 24, 18))
    steps = [p.steps(3, 8) for p in ranked(problems)]
    assert loners(steps) == 1  # 60 examples are trained alone
    expected, found = one_by_one(solver, problems), solver.solve_many(problems)
    assert_same(found, expected, 1e-10)
    assert torch.equal(found[1].posterior.mean, expected[1].posterior.mean)
    assert not torch.equal(found[2].posterior.mean, expected[2].posterior.mean)  # to rounding: it was in the batch


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ([5] * 32, 0),
        ([5, 5], 2),
        ([5, 5, 5], 0),
        ([7], 1),
        ([100] + [5] * 31, 1),
        ([100, 90] + [5] * 30, 2),
        ([6, 5, 4, 3, 2, 1], 0),
    ],
)
def test_who_is_better_trained_alone(steps, count):
    assert loners(steps) == count


# -- mini-batches ------------------------------------------------------------------------------------------------------


def test_mini_batches_are_those_of_each_client_alone():
    problems = ranked(pose("point"))
    clients = SideBySide(problems, point("sgd", epochs=2))
    alone = [list(problem.batches(2, 8)) for problem in problems]
    seen = 0
    for active, steps in clients.segments():
        for step in steps:
            x, y, weights = clients.batch(step, active)
            assert active == sum(len(batches) > step for batches in alone)
            for row in range(active):
                xs, ys = alone[row][step]
                assert torch.equal(x[row, : len(xs)], xs)
                assert torch.equal(y[row, : len(xs)], ys)
                assert weights[row].tolist() == [1 / len(xs)] * len(xs) + [0.0] * (weights.shape[1] - len(xs))
                seen += 1
    assert seen == sum(map(len, alone))


def test_padding_does_not_spread_a_nan():
    solver, problems = point("sgd"), ranked(pose("point"))
    problems[0].data.x[problems[-1].data.index[0]] = math.nan  # the client with one example
    found = solver.solve_together(problems)
    assert not bool(found[-1].posterior.mean.isfinite().any())
    assert all(bool(solution.posterior.mean.isfinite().all()) for solution in found[:-1])


@pytest.mark.parametrize(
    "solver", [point("momentum"), point("adamw"), ivon(noise="normal", mc_samples=2)], ids=["sgd", "adamw", "ivon"]
)
def test_no_tensor_lands_on_the_default_device(solver):
    problems = ranked(pose("diagonal"))
    expected = solver.solve_together(problems)
    with torch.device("meta"):
        found = solver.solve_together(problems)
    assert_same(found, expected, 0.0)


# -- falling back ------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Subtracts the mean over the batch, without buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0))


class Branching(nn.Module):
    """Looks at its values, which vmap can't."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(self.layer.weight.sum()) > 0 else -self.layer(x)


UNFIT = {
    "dropout": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)),
    "batch norm": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)),
    "batch norm without buffers": lambda: nn.Sequential(
        nn.BatchNorm1d(INPUTS, track_running_stats=False), nn.Linear(INPUTS, CLASSES)
    ),
    "mixing": Mixing,
    "branching": Branching,
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_do_not_batch_are_trained_one_by_one(name):
    problems = pose("point", module=UNFIT[name](), sizes=(16, 24, 16))
    assert not can_batch(problems)
    solver = point("sgd")
    torch.manual_seed(3)
    found = solver.solve_many(problems)
    torch.manual_seed(4)  # dropout is keyed per client, whatever the global generator
    for solution, expected in zip(found, one_by_one(solver, problems), strict=True):
        assert torch.equal(solution.posterior.mean, expected.posterior.mean)


def test_models_that_batch():
    convolutional = nn.Sequential(
        nn.Unflatten(1, (1, INPUTS)),
        nn.Conv1d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    frozen = nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    frozen[0].weight.requires_grad_(False)
    for module in (convolutional, frozen, nn.Sequential(nn.Dropout(0.0), nn.Linear(INPUTS, CLASSES))):
        problems = ranked(pose("diagonal", module=module))
        assert can_batch(problems)
        for solver in (point("adam"), ivon()):
            assert_same(solver.solve_together(problems), one_by_one(solver, problems), 1e-10)


def test_problems_that_do_not_batch():
    problems = pose("point")
    assert can_batch(problems)
    assert not can_batch(problems[:1])
    data = problems[1].data
    others = {
        "model": pose("point")[0].model,
        "likelihood": Categorical(),
        "data": Examples(data.x.clone(), data.y, data.index, data.scaling),
        "server": pose("diagonal")[0].server,
        "site": pose("diagonal")[0].site,
    }
    for name, value in others.items():
        assert not can_batch([problems[0], dataclasses.replace(problems[1], **{name: value})]), name
    assert not can_batch(pose("full"))


def test_solvers_say_whether_they_batch():
    assert point("sgd").batches
    assert ivon().batches
    assert not ExactSolver().batches
