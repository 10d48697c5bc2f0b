"""Every learner against every field of the local problem: it solves what it was asked, by a closed form on quadratics,
or refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_class
from torch import Tensor

from bayesfed.errors import InputError
from bayesfed.families import FAMILIES, LogNormal, NaturalParameters, PointMass
from bayesfed.federation.local import LocalPath, LocalProblem, LocalSolution, Solver
from bayesfed.problem import Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Gaussian
from bayesfed.seeding import torch_generator
from clients.side_by_side import BatchingSolver, can_batch

CONF = Path(__file__).resolve().parents[2] / "conf" / "client"
F64, P, N = torch.float64, 3, 24
MODEL = FlatModel(torch.nn.Linear(P, 1, bias=False), F64)
ADAM = {"lr": 0.1, "epochs": 120, "batch_size": N, "local_schedule": "cosine", "weight_decay": 0.0}
# what brings each learner of conf/client to its fixed point: noise of the mean cancels in antithetic pairs
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "von": {"epochs": 8, "mc_samples": 0, "local_schedule": "constant"},
    "ivon": {
        "lr": 0.2,
        "epochs": 100,
        "batch_size": N,
        "beta1": 0.5,
        "beta2": 0.97,
        "mc_samples": 4,
        "antithetic": True,
        "hess_init": 1.0,
    },
    "srvon": {"lr": 1.0, "epochs": 16, "mc_samples": 0},
    "srvon/diagonal": {
        "lr": 0.1,
        "lr_covariance": 0.02,
        "epochs": 150,
        "batch_size": N,
        "beta1": 0.5,
        "mc_samples": 4,
        "antithetic": True,
    },
    "laplace": ADAM,
    "lmd": {"lr": 0.5, "epochs": 150, "batch_size": N, "signed": False, "mc_samples": 4, "sigma": 0.0, "decay": 0.0},
    "sgd": {"lr": 0.3, "epochs": 60, "batch_size": N},
    "adam": ADAM,
    "adamw": ADAM,
}
ROUGH = {"ivon": 0.5, "srvon/diagonal": 0.5}  # of precisions, where they are estimated from samples


def pairs() -> list[tuple[str, str]]:
    """Every learner of ``conf/client`` with its families; of learners that share a class the first has all of them."""
    found: list[tuple[str, str]] = []
    seen = set()
    for file in sorted(CONF.glob("*.yaml")):
        kind = get_class(yaml.safe_load(file.read_text())["_target_"])
        families = sorted(kind.families)
        found += [(file.stem, family) for family in (families[-1:] if kind in seen else families)]
        seen.add(kind)
    return found


PAIRS = pairs()


def learner(name: str, family: str, **changes: Any) -> Solver:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    kind = get_class(values.pop("_target_"))
    values = {key: value for key, value in values.items() if key != "name" and not key.startswith("schedule")}
    return kind(**values | SETTINGS.get(f"{name}/{family}", SETTINGS[name]) | changes)


def vector(name: str, scale: float = 1.0, size: int = P) -> Tensor:
    return scale * torch.randn(size, generator=torch_generator(5, name), dtype=F64)


def examples(name: str) -> Examples:
    x = torch.linalg.qr(torch.randn(N, P, generator=torch_generator(5, "x"), dtype=F64))[0] * N**0.5
    x = x + 0.1 * x.roll(1, dims=1)
    return Examples(x, x @ vector(name)[:, None] + 0.1 * vector(f"{name} noise", size=N)[:, None])


def precision(family: str, scale: float) -> Tensor:
    base = torch.tensor([2.0, 3.0, 4.0], dtype=F64) * scale
    return {"diagonal": base, "full": base.diag() + 0.5 * scale}.get(family, torch.tensor(3.0 * scale, dtype=F64))


def server_of(family: str, name: str) -> Any:
    if family == "point":
        return PointMass(vector(name))
    if family == "lognormal":
        return LogNormal.from_mean_precision(vector(name), torch.tensor(9.0, dtype=F64))
    return FAMILIES[family].from_mean_precision(vector(name), precision(family, 1.0))


def site_of(family: str) -> NaturalParameters:
    size, scale = (2 * P if family == "lognormal" else P), (0.5 if family == "point" else 4.0)
    first = vector("v", scale, size)
    return NaturalParameters(family, first, -0.5 * precision(family, 0.0 if family == "point" else 1.5))


def pose(family: str, **changes: Any) -> LocalProblem:
    settings = {
        "model": MODEL,
        "initial": vector("initial"),
        "data": examples("targets"),
        "likelihood": Gaussian(1.0),
        "server": server_of(family, "server"),
        "site": None,
        "rho": 1.0,
        "temperature": 1.0,
        "proximal": 0.0,
        "learn_precision": True,
        "round": 2,
        "client": 0,
        "seed": 1,
    }
    return LocalProblem(**settings | changes)


def quadratic(problem: LocalProblem) -> tuple[Tensor, Tensor]:
    """``A_k``, ``b_k`` of the summed loss."""
    x, y = problem.data.x, problem.data.y[:, 0]
    beta = problem.likelihood.precision
    return beta * x.T @ x, beta * x.T @ y


def slope(problem: LocalProblem, posterior: Any) -> Tensor:
    """Gradient of the local problem at a posterior, from the formulas of :class:`LocalProblem`; 0 where
    it is solved.
    """
    A, b = quadratic(problem)
    server, tau, zero = problem.server, problem.temperature, torch.zeros(P, dtype=F64)
    linear = zero if problem.path.linear is None else problem.path.linear
    site = problem.site
    gap = posterior.mean - server.mean
    if isinstance(server, PointMass):
        loss = problem.loss_scale * ((A @ posterior.mean - b) / N + linear)
        return loss + (0.0 if site is None else site.linear) + problem.proximal * gap
    if isinstance(server, LogNormal):
        spread = 1 / server.precision if problem.learn_precision else torch.tensor(0.0, dtype=F64)
        means = (posterior.log_median.view(2, -1) + spread / 2).exp()
        residual = A @ (means[0] - means[1]) - b
        found = torch.cat([means[0] * residual, -means[1] * residual])
        found = found + (means.square() * spread.expm1() * A.diagonal()).flatten()  # covariance of u and the gradient
        z, V = posterior.log_median, 0.0 if site is None else site.precision
        return (
            found / tau
            + (0.0 if site is None else site.linear)
            - V * z
            + problem.rho * server.precision * (z - server.log_median)
        )
    S = server.precision
    found = (A @ posterior.mean - b + N * linear) / tau + problem.rho * server.multiply(S, gap)
    return found if site is None else found + site.linear - server.multiply(site.precision, posterior.mean)


def curvature(problem: LocalProblem, learns: bool) -> Tensor:
    """The precision that solves the problem."""
    server = problem.server
    if not (problem.learn_precision and learns) or server.name in ("point", "lognormal"):
        return server.precision
    A, _ = quadratic(problem)
    A = {"full": A, "diagonal": A.diagonal(), "isotropic": A.diagonal().mean()}[server.name]
    V = 0.0 if problem.site is None else problem.site.precision
    return server.precision + (A / problem.temperature - V) / problem.rho


def solved(name: str, problem: LocalProblem, **changes: Any) -> LocalSolution | None:
    """The solution, seen to be one; None if the learner declares, and says, that it can't."""
    family = problem.server.name
    solver = learner(name, family, **changes)
    if problem.asks & solver.lacks.keys() or (problem.work < 1 and not solver.stepwise):
        with pytest.raises(InputError):
            solver.solve(problem)
        return None
    solution = solver.solve(problem)
    start = server_of(family, "server")
    tolerance = 0.1 if name == "lmd" else 0.02
    assert float(slope(problem, solution.posterior).norm()) < tolerance * float(slope(problem, start).norm())
    wanted, found = curvature(problem, solver.learns_precision), solution.posterior.precision
    rough = ROUGH.get(f"{name}/{family}", ROUGH.get(name, 1e-6)) if problem.learn_precision else 0.0
    if solver.learns_precision and family != "point" and name != "laplace":
        torch.testing.assert_close(found, wanted, rtol=rough, atol=rough * float(wanted.max()) if rough < 1e-3 else 0.0)
    elif name == "laplace":
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    else:
        assert torch.equal(found, wanted)
    together(name, problem, **changes)
    return solution


def together(name: str, problem: LocalProblem, **changes: Any) -> None:
    """The batched twin, after three steps."""
    short = learner(name, problem.server.name, **{k: v for k, v in changes.items() if k != "epochs"})
    if not isinstance(short, BatchingSolver) or not can_batch([problem, problem]):
        return
    short.epochs = 3
    alone, pair = short.solve(problem), short.solve_together([problem, problem])
    for found in pair:
        torch.testing.assert_close(found.posterior.arrays(), alone.posterior.arrays(), rtol=1e-9, atol=1e-9)
        assert found.metrics == pytest.approx(alone.metrics, rel=1e-9)
        assert (found.gradient is None) == (alone.gradient is None)
        if found.gradient is not None:
            torch.testing.assert_close(found.gradient, alone.gradient, rtol=1e-9, atol=1e-9)


def moves(**changes: Any) -> Callable[[str, str], None]:
    """The field moves the optimum, and the learner with it."""

    def check(name: str, family: str) -> None:
        given = {key: value(family) if callable(value) else value for key, value in changes.items()}
        problem = pose(family, **given)
        solution = solved(name, problem)
        if solution is None:
            return
        ignored, asked = (float(slope(p, solution.posterior).norm()) for p in (pose(family), problem))
        assert ignored > 2 * asked

    return check


def anchored(**changes: Any) -> Callable[[str, str], None]:
    """The field moves the optimum where something else than the loss has a say."""

    def check(name: str, family: str) -> None:
        moves(**changes, **({"proximal": 2.0} if family == "point" else {}))(name, family)

    return check


def of_points(**changes: Any) -> Callable[[str, str], None]:
    """The field belongs to the formula of point estimates only."""

    def check(name: str, family: str) -> None:
        if family == "point":
            return moves(**changes)(name, family)
        same = learner(name, family, **({} if name == "exact" else {"epochs": 2}))
        one, other = (same.solve(pose(family, **given)).posterior for given in ({}, changes))
        return torch.testing.assert_close(one.arrays(), other.arrays(), rtol=0, atol=0)

    return check


def of_posteriors(**changes: Any) -> Callable[[str, str], None]:
    """The field belongs to the formula of Gaussians only."""

    def check(name: str, family: str) -> None:
        if family != "point":
            return moves(**changes)(name, family)
        same = learner(name, family, **({} if name == "exact" else {"epochs": 2}))
        one, other = (same.solve(pose(family, **given)).posterior for given in ({}, changes))
        return torch.testing.assert_close(one.arrays(), other.arrays(), rtol=0, atol=0)

    return check


def fixed(name: str, family: str) -> None:
    """Whatever it samples, it takes expectations at the mean, and hands the precision back bit for bit."""
    changes = {"mc_samples": 3} if name in ("von", "srvon") else {}
    problem = pose(family, learn_precision=False)
    if name == "srvon" and family == "diagonal":
        assert solved(name, problem, curvature="stein", **changes) is None
        changes |= {"lr": 1.0, "lr_covariance": None, "epochs": 60}
    solution = solved(name, problem, **changes)
    if solution is not None and family != "point":
        close = {"exact": 1e-9, "von": 1e-6, "srvon": 1e-3, "lmd": 0.05}.get(name, 0.02)
        assert float(slope(problem, solution.posterior).norm()) < close * float(slope(problem, problem.server).norm())
        assert torch.equal(solution.posterior.precision, problem.server.precision)


def starts(name: str, family: str) -> None:
    """Where the steps begin: the initialisation in round 1, the server's mean later; a rate of 0 stays there."""
    if name == "exact":
        return
    for round, start in ((1, vector("initial")), (2, vector("server"))):
        problem = pose(family, round=round, lr_factor=0.0)
        found = learner(name, family, epochs=2).solve(problem).posterior
        torch.testing.assert_close(found.mean, start, rtol=1e-6, atol=1e-6)


def streams(key: str) -> Callable[[str, str], None]:
    """Mini-batches and noise are keyed; without either the result is the same."""

    def check(name: str, family: str) -> None:
        solver = learner(name, family, **({} if name == "exact" else {"epochs": 2}))
        random = hasattr(solver, "batch_size") and not (name == "srvon" and family == "full")
        if random:
            solver.batch_size = 5
        problem = pose(family, round=3)
        other = replace(problem, **{key: getattr(problem, key) + 1})
        one, two, again = (solver.solve(p).posterior.mean for p in (problem, other, problem))
        assert torch.equal(one, again)
        assert torch.equal(one, two) == (not random)

    return check


def remembered(name: str, family: str) -> None:
    """What a learner kept changes its next round; one that keeps nothing returns nothing."""
    if not hasattr(learner(name, family), "keep_momentum"):
        assert not learner(name, family).solve(pose(family)).memory
        return
    changes = {"momentum": 0.9} if name == "sgd" else {}
    solver = learner(name, family, epochs=2, keep_momentum=True, **changes)
    first = solver.solve(pose(family))
    assert first.memory
    fresh, later = (solver.solve(pose(family, round=3, memory=m)).posterior.mean for m in ({}, first.memory))
    assert float((fresh - later).abs().max()) > 1e-6
    together(name, pose(family, memory=first.memory), keep_momentum=True, **changes)


def gradients(name: str, family: str) -> None:
    """At a rate of 0 the mean of the loss gradients is that at the start."""
    problem = pose(family, path=LocalPath(keep_gradient=True), lr_factor=0.0)
    solver = learner(name, family)
    if "path" in solver.lacks:
        with pytest.raises(InputError):
            solver.solve(problem)
        return
    A, b = quadratic(problem)
    found = solver.solve(problem).gradient
    assert found is not None
    torch.testing.assert_close(found, (A @ problem.server.mean - b) / N, rtol=1e-9, atol=1e-9)
    together(name, replace(problem, lr_factor=1.0))


def observed(name: str, family: str) -> None:
    """Every step is shown, the last one at what is returned."""
    seen: list[tuple[int, Tensor]] = []
    problem = pose(family, path=LocalPath(observer=lambda step, weights: seen.append((step, weights.clone()))))
    solution = solved(name, problem)
    if solution is not None:
        assert [step for step, _ in seen] == list(range(1, SETTINGS[name]["epochs"] + 1))
        assert torch.equal(seen[-1][1], solution.posterior.mean)


def stragglers(name: str, family: str) -> None:
    """Half the work is half the gradients."""
    solver = learner(name, family)
    whole, half = pose(family), pose(family, work=0.5)
    if not solver.stepwise:
        with pytest.raises(InputError):
            solver.solve(half)
        return
    counts = [learner(name, family, epochs=4).solve(p).metrics["gradient-evaluations"] for p in (whole, half)]
    at_the_end = N if name == "laplace" else 0  # curvature at the mode
    assert (counts[1] - at_the_end) * 2 == counts[0] - at_the_end


CASES: dict[str, Callable[[str, str], None]] = {
    "model": lambda name, family: None,  # what is trained, in every other case
    "initial": starts,
    "data": moves(data=lambda family: examples("other targets")),
    "likelihood": anchored(likelihood=Gaussian(3.0)),
    "server": anchored(server=lambda family: server_of(family, "another server")),
    "site": moves(site=site_of),
    "rho": of_posteriors(rho=6.0),
    "temperature": of_posteriors(temperature=6.0),
    "proximal": of_points(proximal=2.0),
    "learn_precision": fixed,
    "round": starts,
    "client": streams("client"),
    "seed": streams("seed"),
    "lr_factor": starts,
    "memory": remembered,
    "loss_scale": of_points(loss_scale=3.0, proximal=2.0),
    "linear": moves(path=lambda family: LocalPath(linear=vector("linear", 0.5))),
    "keep_gradient": gradients,
    "observer": observed,
    "work": stragglers,
}


def test_every_field_has_a_case_and_every_learner_settings() -> None:
    assert set(CASES) == {field.name for kind in (LocalProblem, LocalPath) for field in fields(kind)} - {"path"}
    assert {name for name, _ in PAIRS} <= SETTINGS.keys()


@pytest.mark.parametrize("asked", CASES)
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_learner_does_what_it_was_asked_or_says_that_it_cannot(name: str, family: str, asked: str) -> None:
    CASES[asked](name, family)
