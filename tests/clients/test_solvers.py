"""What all solvers have in common: keyed randomness, the same bits twice, schedules, memory, no side effects."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bayesfed.errors import InputError
from bayesfed.families import FAMILIES, PointMass, gaussian
from bayesfed.federation.local import LocalProblem
from bayesfed.problem.flat import FlatModel
from bayesfed.wire import Diverged
from clients.exact import ExactSolver
from clients.ivon import IVONSolver
from clients.lmd import LMDSolver
from clients.point import PointSolver
from clients.srvn import SRVNSolver
from clients.von import VONSolver

SOLVERS = {
    "ivon": (IVONSolver, "diagonal", {"lr": 0.01, "epochs": 40, "batch_size": 7, "hess_init": 5.0}),
    "von": (VONSolver, "full", {"epochs": 3}),
    "srvon full": (SRVNSolver, "full", {"epochs": 20, "lr": 0.5}),
    "srvon diagonal": (SRVNSolver, "diagonal", {"epochs": 20, "lr": 0.2, "curvature": "hessian"}),
    "srvon": (SRVNSolver, "diagonal", {"epochs": 40, "batch_size": 7, "lr": 0.01, "hess_init": 5.0}),
    "sgd": (PointSolver, "point", {"optimizer": "sgd", "lr": 0.01, "epochs": 2, "batch_size": 7, "momentum": 0.9}),
    "adam": (PointSolver, "point", {"optimizer": "adam", "lr": 0.01, "epochs": 2, "batch_size": 7}),
    "adam isotropic": (PointSolver, "isotropic", {"optimizer": "adam", "lr": 0.01, "epochs": 2, "batch_size": 7}),
    "adamw full": (PointSolver, "full", {"optimizer": "adamw", "lr": 0.01, "epochs": 2, "batch_size": 7}),
    "exact": (ExactSolver, "diagonal", {}),
    "exact full": (ExactSolver, "full", {}),
    "exact isotropic": (ExactSolver, "isotropic", {}),
    "exact point": (ExactSolver, "point", {}),
}


@pytest.fixture(params=SOLVERS)
def case(request, quadratic):
    make, family, settings = SOLVERS[request.param]
    return make(**settings), pose(quadratic, family)


def pose(quadratic, family: str, **changes) -> LocalProblem:
    model = FlatModel(quadratic.build_model(1), torch.float64, torch.device("cpu"))
    zero = torch.zeros(model.dim, dtype=torch.float64)
    server = PointMass(zero) if family == "point" else gaussian(family).isotropic(zero, 2.0)
    settings = {
        "model": model,
        "initial": model.vector.clone(),
        "data": quadratic.clients[1],
        "likelihood": quadratic.likelihood,
        "server": server,
        "site": None if family == "point" else server.zero(zero),
        "rho": 0.5,
        "temperature": 1.0,
        "proximal": 0.0,
        "learn_precision": True,
        "round": 2,
        "client": 1,
        "seed": 1,
    }
    return LocalProblem(**settings | changes)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.arrays().values(), other.arrays().values(), strict=True))


def test_it_returns_its_family_finite_in_the_models_precision(case):
    solver, problem = case
    solution = solver.solve(problem)
    assert solution.posterior.name == problem.server.name
    assert solution.posterior.name in solver.families
    for value in solution.posterior.arrays().values():
        assert value.dtype == torch.float64
        assert bool(torch.isfinite(value).all())
    assert solution.metrics["loss"] > 0


def test_the_same_problem_twice_gives_the_same_bits(case):
    solver, problem = case
    first = solver.solve(problem).posterior
    torch.manual_seed(12345)  # global random state means nothing
    assert same(first, solver.solve(problem).posterior)


def test_it_moves_towards_the_data(case):
    solver, problem = case
    model = problem.model

    def loss(vector: torch.Tensor) -> float:
        model.load(vector)
        x, y = problem.data.batch(slice(None), torch.float64, torch.device("cpu"))
        return float(problem.likelihood.loss(model(x), y))

    before = loss(problem.server.mean)
    assert loss(solver.solve(problem).posterior.mean) < before


def test_the_server_posterior_and_site_are_left_alone(case):
    solver, problem = case
    before = {name: value.clone() for name, value in problem.server.arrays().items()}
    solver.solve(problem)
    for name, value in problem.server.arrays().items():
        assert torch.equal(value, before[name])
    if problem.site is not None:
        assert float(problem.site.norm()) == 0


@pytest.mark.filterwarnings("ignore:.*dropped a sample")
@pytest.mark.parametrize(
    ("make", "family", "settings"),
    [SOLVERS["ivon"], SOLVERS["srvon"], (LMDSolver, "point", {"lr": 0.01, "batch_size": 7})],
)
def test_what_some_gradients_are_missing_from_is_not_handed_in(quadratic, make, family, settings):
    data = quadratic.clients[1]
    bad = data.x.clone()
    bad[0 if data.index is None else data.index[0], 0] = torch.nan
    problem = pose(quadratic, family, data=dataclasses.replace(data, x=bad))
    with pytest.raises(Diverged, match=r"2 of 6 gradients were not finite"):
        make(**settings | {"epochs": 2}).solve(problem)


@pytest.mark.parametrize("name", ["ivon", "srvon", "srvon full", "sgd", "adam"])
@pytest.mark.parametrize("change", ["round", "client", "seed"])
def test_random_streams_are_keyed(quadratic, name, change):
    make, family, settings = SOLVERS[name]
    problem = pose(quadratic, family)
    other = dataclasses.replace(problem, **{change: getattr(problem, change) + 1})
    assert not same(make(**settings).solve(problem).posterior, make(**settings).solve(other).posterior)


@pytest.mark.parametrize("name", ["ivon", "sgd", "adam", "adamw full", "von", "srvon full", "srvon"])
def test_a_vanishing_rate_stays_at_the_server(quadratic, name):
    make, family, settings = SOLVERS[name]
    problem = pose(quadratic, family, lr_factor=0.0)
    mean = make(**settings).solve(problem).posterior.mean
    assert torch.equal(mean, problem.server.mean)


@pytest.mark.parametrize("name", ["ivon", "sgd", "adam"])
def test_round_1_starts_at_the_network_initialisation(quadratic, name):
    make, family, settings = SOLVERS[name]
    problem = pose(quadratic, family, lr_factor=0.0, round=1)
    mean = make(**settings).solve(problem).posterior.mean
    assert torch.equal(mean, problem.initial)


@pytest.mark.parametrize("name", ["ivon", "sgd", "adam"])
def test_kept_momentum_continues_and_otherwise_nothing_is_kept(quadratic, name):
    make, family, settings = SOLVERS[name]
    problem = pose(quadratic, family)
    assert make(**settings).solve(problem).memory == {}
    keeping = make(**settings, keep_momentum=True)
    first = keeping.solve(problem)
    assert first.memory
    again = dataclasses.replace(problem, memory=first.memory)
    kept = {key: value.clone() for key, value in first.memory.items()}
    assert not same(keeping.solve(again).posterior, first.posterior)
    for key, value in first.memory.items():
        assert torch.equal(value, kept[key])  # what came in is not written to


def test_fixed_covariance_keeps_the_servers_precision(quadratic):
    for name in ("adam isotropic", "adamw full", "exact", "exact full"):
        make, family, settings = SOLVERS[name]
        problem = pose(quadratic, family, learn_precision=False)
        assert torch.equal(make(**settings).solve(problem).posterior.precision, problem.server.precision)


def test_proximal_term_pulls_towards_the_server(quadratic):
    far = ExactSolver().solve(pose(quadratic, "point")).posterior.mean.norm()
    near = ExactSolver().solve(pose(quadratic, "point", proximal=10.0)).posterior.mean.norm()
    assert near < 0.9 * far


def test_gradient_descent_reaches_the_exact_point(quadratic):
    problem = pose(quadratic, "point", proximal=1.0)
    sgd = PointSolver(optimizer="sgd", lr=0.1, epochs=400, batch_size=100)
    assert torch.allclose(
        sgd.solve(problem).posterior.mean, ExactSolver().solve(problem).posterior.mean, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("family", ["isotropic", "diagonal", "full"])
def test_gradient_descent_reaches_the_exact_mean_with_site_and_anchor(quadratic, family):
    problem = pose(quadratic, family, learn_precision=False, rho=1.5)
    problem.site.linear.fill_(3.0)
    sgd = PointSolver(optimizer="sgd", lr=0.1, epochs=400, batch_size=100)
    assert torch.allclose(
        sgd.solve(problem).posterior.mean, ExactSolver().solve(problem).posterior.mean, rtol=0, atol=1e-9
    )


def test_clipping_bounds_the_step(quadratic):
    settings = {"optimizer": "sgd", "lr": 1.0, "epochs": 1, "batch_size": 100, "clip_norm": 1e-3}
    mean = PointSolver(**settings).solve(pose(quadratic, "point")).posterior.mean
    assert float(mean.norm()) <= 1e-3 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: PointSolver(optimizer="sdg", lr=0.1, epochs=1, batch_size=1), "optimizer"),
        (lambda: PointSolver(optimizer="sgd", lr=0.0, epochs=1, batch_size=1), "lr"),
        (lambda: PointSolver(optimizer="sgd", lr=0.1, epochs=0, batch_size=1), "epochs"),
        (lambda: PointSolver(optimizer="sgd", lr=0.1, epochs=1, batch_size=0), "batch_size"),
        (lambda: PointSolver(optimizer="sgd", lr=0.1, epochs=1, batch_size=1, momentum=1.0), "momentum"),
        (lambda: PointSolver(optimizer="adam", lr=0.1, epochs=1, batch_size=1, beta2=1.0), "beta2"),
        (lambda: PointSolver(optimizer="adam", lr=0.1, epochs=1, batch_size=1, weight_decay=-1.0), "weight_decay"),
        (lambda: PointSolver(optimizer="adam", lr=0.1, epochs=1, batch_size=1, clip_norm=0.0), "clip_norm"),
        (
            lambda: PointSolver(optimizer="adam", lr=0.1, epochs=1, batch_size=1, local_schedule="linear"),
            "local_schedule",
        ),
        (lambda: VONSolver(lr=0.0), "lr"),
        (lambda: VONSolver(lr_precision=1.5), "lr_precision"),
        (lambda: VONSolver(epochs=0), "epochs"),
        (lambda: VONSolver(mc_samples=-1), "mc_samples"),
        (lambda: SRVNSolver(lr=0.0), "lr"),
        (lambda: SRVNSolver(curvature="price"), "curvature"),
        (lambda: SRVNSolver(lr_covariance=2.0), "lr_covariance"),
        (lambda: IVONSolver(lr=-1.0, epochs=1, batch_size=1), "lr"),
        (lambda: ExactSolver().check("mlp", "gaussian"), "client"),
    ],
)
def test_bad_settings(make, field):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.field == field


def test_all_families_have_a_solver():
    solvers = {LMDSolver, *(make for make, _, _ in SOLVERS.values())}  # LMD's tests are in tests/learners
    names = {family for solver in solvers for family in solver.families}
    assert set(FAMILIES) <= names


@pytest.mark.parametrize("name", ["ivon", "adam isotropic"])
def test_mixed_precision_stays_close_and_keeps_the_dtype(quadratic, name):
    make, family, settings = SOLVERS[name]
    model = FlatModel(quadratic.build_model(1), torch.float32, torch.device("cpu"))
    zero = torch.zeros(model.dim)
    changes = {"model": model, "initial": model.vector.clone(), "server": gaussian(family).isotropic(zero, 20.0)}
    plain, mixed = (
        make(**settings, amp=amp).solve(pose(quadratic, family, **changes)).posterior for amp in ("none", "bfloat16")
    )
    assert mixed.mean.dtype == torch.float32
    assert not torch.equal(plain.mean, mixed.mean)
    assert torch.allclose(plain.mean, mixed.mean, atol=0.05)


def test_unknown_mixed_precision_is_refused():
    with pytest.raises(InputError, match="amp"):
        PointSolver(optimizer="adam", lr=0.1, epochs=1, batch_size=1, amp="float16")
