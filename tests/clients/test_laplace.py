"""What the Laplace client makes of the Gauss-Newton diagonal."""

from __future__ import annotations

import torch

from bayesfed.families import DiagonalGaussian
from bayesfed.federation.local import LocalProblem
from bayesfed.problem import Examples
from bayesfed.problem.curvature import ggn_diagonal
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Categorical
from clients.laplace import LaplaceSolver


def pose(likelihood, y, **options) -> LocalProblem:
    torch.manual_seed(2)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))
    model = FlatModel(module, torch.float64)
    x = torch.randn(len(y), 4, dtype=torch.float64)
    server = DiagonalGaussian(torch.zeros(model.dim).double(), torch.full((model.dim,), 3.0).double())
    settings = {
        "model": model,
        "initial": model.vector.clone(),
        "data": Examples(x, y),
        "likelihood": likelihood,
        "server": server,
        "site": None,
        "rho": 1.0,
        "temperature": 1.0,
        "proximal": 0.0,
        "learn_precision": True,
        "round": 1,
        "client": 0,
        "seed": 1,
    }
    return LocalProblem(**(settings | options))


def test_laplace_precision() -> None:
    """S_k = S_g + (H_k/tau - V_k)/rho at the mode; fixed covariance keeps S_g."""
    likelihood, y = Categorical(), torch.arange(11) % 3
    site = DiagonalGaussian.zero(torch.zeros(43).double())
    site.quadratic.fill_(-0.25)
    problem = pose(likelihood, y, site=site, rho=2.0, temperature=0.5)
    solver = LaplaceSolver(optimizer="adam", lr=0.01, epochs=3, batch_size=4)
    solution = solver.solve(problem)
    curvature, _ = ggn_diagonal(problem.model, likelihood, problem.data, solution.posterior.mean)
    assert torch.allclose(solution.posterior.precision, 3.0 + (curvature / 0.5 - 0.5) / 2.0, rtol=1e-12)
    assert solution.metrics["gradient-evaluations"] == 3 * 11 + 3 * 11
    fixed = solver.solve(pose(likelihood, y, learn_precision=False))
    assert torch.equal(fixed.posterior.precision, torch.full((43,), 3.0).double())
