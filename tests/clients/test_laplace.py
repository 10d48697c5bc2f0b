"""The Gauss-Newton diagonal against a dense one, and what the Laplace client makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, hessian, jacrev

from bayesfed.accelerate import layers
from bayesfed.families import DiagonalGaussian
from bayesfed.federation.local import LocalProblem
from bayesfed.problem import Examples
from bayesfed.problem.curvature import ggn
from bayesfed.problem.curvature.ggn import ggn_diagonal
from bayesfed.problem.curvature.quadratic import LocalLoss
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Categorical, Gaussian
from clients.laplace import LaplaceSolver


def pose(likelihood, y, **options) -> LocalProblem:
    torch.manual_seed(2)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))
    model = FlatModel(module, torch.float64)
    x = torch.randn(len(y), 4, dtype=torch.float64)
    server = DiagonalGaussian(torch.zeros(model.dim).double(), torch.full((model.dim,), 3.0).double())
    settings = {
        "model": model, "initial": model.vector.clone(), "data": Examples(x, y), "likelihood": likelihood, "server": server, "site": None, "rho": 1.0,
        "temperature": 1.0, "proximal": 0.0, "learn_precision": True, "round": 1, "client": 0, "seed": 1,
    }  # fmt: skip
    return LocalProblem(**(settings | options))


PROBLEMS = {
    "categorical": (Categorical(), torch.arange(11) % 3),
    "gaussian": (Gaussian(2.5), torch.randn(11, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("memory_mb", [128, 0.004])
def test_against_the_dense_matrix(name: str, memory_mb: float) -> None:
    """sum_n J_n^T L_n J_n from explicit Jacobians, also when the examples go through in pieces."""
    problem = pose(*PROBLEMS[name])
    module, vector = copy.deepcopy(problem.model.module).eval(), problem.initial
    dense = torch.zeros(len(vector), len(vector)).double()
    for x, y in zip(problem.data.x, problem.data.y, strict=True):
        f = lambda v: functional_call(module, problem.model.named(v), (x[None],))[0]  # noqa: B023, E731
        jacobian = jacrev(f)(vector)
        dense += jacobian.T @ hessian(lambda o: problem.likelihood.loss(o[None], y[None]))(f(vector)) @ jacobian  # noqa: B023
    found, cost = ggn_diagonal(problem, vector, memory_mb)
    assert torch.allclose(found, dense.diagonal(), rtol=1e-10, atol=1e-12)
    assert float(found.min()) >= 0
    assert cost == 3 * 11
    # and it is not the Hessian, which has the model's own curvature in it
    assert not torch.allclose(found, LocalLoss(problem).hessian(vector).diagonal(), rtol=1e-3)


class Tied(torch.nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.layer(torch.tanh(self.layer(x))))


class Doubled(Tied):
    """A weight that is also used outside of its layer."""

    def forward(self, x):
        return self.last(torch.tanh(self.layer(x)) + x @ self.layer.weight.mT)


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = torch.nn.Conv1d(1, 2, 3), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.layer(x[:, None])).flatten(1))


@pytest.mark.parametrize("kind", [Tied, Doubled, Convolution, torch.nn.Linear])
def test_layers_and_examples_agree(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way over linear layers is taken only where it holds."""
    torch.manual_seed(4)
    module = torch.nn.Linear(4, 3) if kind is torch.nn.Linear else kind()
    problem = pose(*PROBLEMS["categorical"], model=FlatModel(module, torch.float64))
    vector = problem.model.vector.clone()
    found, _ = ggn_diagonal(problem, vector)
    monkeypatch.setattr(ggn, "_linear_layers", lambda *_: [])
    slow, _ = ggn_diagonal(problem, vector)
    assert torch.allclose(found, slow, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("large", [1, layers.LARGE])
def test_layers_are_used_for_perceptrons(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and there it is taken, also over :class:`bayesfed.accelerate.layers.QuickLinear`."""
    monkeypatch.setattr(layers, "LARGE", large)
    monkeypatch.setattr(ggn, "_of_examples", lambda *_: pytest.fail("gradients of single examples"))
    problem = pose(*PROBLEMS["categorical"])
    ggn_diagonal(problem, problem.initial)


def test_laplace_precision() -> None:
    """S_k = S_g + (H_k/tau - V_k)/rho at the mode; fixed covariance keeps S_g."""
    likelihood, y = PROBLEMS["categorical"]
    site = DiagonalGaussian.zero(torch.zeros(43).double())
    site.quadratic.fill_(-0.25)
    problem = pose(likelihood, y, site=site, rho=2.0, temperature=0.5)
    solver = LaplaceSolver(optimizer="adam", lr=0.01, epochs=3, batch_size=4)
    solution = solver.solve(problem)
    curvature, _ = ggn_diagonal(problem, solution.posterior.mean)
    assert torch.allclose(solution.posterior.precision, 3.0 + (curvature / 0.5 - 0.5) / 2.0, rtol=1e-12)
    assert solution.metrics["gradient-evaluations"] == 3 * 11 + 3 * 11
    fixed = solver.solve(pose(likelihood, y, learn_precision=False))
    assert torch.equal(fixed.posterior.precision, torch.full((43,), 3.0).double())
