"""IVON on Bayesian linear regression with correlated inputs, where the fixed point is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesfed.seeding import torch_generator
from clients.optim import IVON

torch.set_num_threads(1)
N, DIM, NOISE_VAR = 200, 4, 0.5
COPIES = 300  # independent runs side by side (the loss is their sum), so that averages need few steps


def regression() -> tuple[Tensor, Tensor]:
    """Hessian and linear term of the mean loss for correlated inputs."""
    g = torch_generator(1, "regression")
    mixing = torch.eye(DIM, dtype=torch.float64) + 0.6 * torch.randn(DIM, DIM, generator=g, dtype=torch.float64)
    x = torch.randn(N, DIM, generator=g, dtype=torch.float64) @ mixing
    y = x @ torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    y += NOISE_VAR**0.5 * torch.randn(N, generator=g, dtype=torch.float64)
    return x.T @ x / (N * NOISE_VAR), x.T @ y / (N * NOISE_VAR)


def fit(ess: float, copies: int = COPIES, **options) -> tuple[Tensor, Tensor]:
    """Long-run mean and precision (DIM,), averaged over the copies and over the second half of the steps."""
    hessian, b = regression()
    theta = nn.Parameter(torch.zeros(copies, DIM, dtype=torch.float64))
    vectors = {k: v.repeat(copies) for k, v in options.items() if isinstance(v, Tensor)}
    settings = {"lr": 0.2, "beta2": 0.998, "hess_init": 2.0, "rescale_lr": False, **options, **vectors}
    optimizer = IVON([theta], ess=ess, generator=torch_generator(2, "fit"), **settings)
    sums, steps = [torch.zeros(DIM, dtype=torch.float64) for _ in range(2)], 5000
    for t in range(steps):
        with optimizer.sampled_params(train=True):
            (0.5 * ((theta @ hessian) * theta).sum(1) - theta @ b).sum().backward()
        optimizer.step()
        if t >= steps // 2:
            for total, value in zip(sums, optimizer.posterior, strict=True):
                total += value.view(copies, DIM).mean(0)
    return sums[0] / (steps - steps // 2), sums[1] / (steps - steps // 2)


def test_posterior_mean_and_mean_field_precision() -> None:
    """m* = S^-1 N b to 2e-4, precision S_ii = N (H_ii + delta) to 2 % (the recursion is biased upwards by O(1 -
    beta2)).
    """
    hessian, b = regression()
    assert (hessian - hessian.diagonal().diag()).abs().max() > 0.3 * hessian.diagonal().min()  # correlated
    prior = 3.0
    full = N * hessian + prior * torch.eye(DIM, dtype=torch.float64)
    mean, precision = fit(N, weight_decay=prior / N)
    assert torch.allclose(mean, torch.linalg.solve(full, N * b), rtol=0, atol=2e-4)
    assert torch.allclose(precision, full.diagonal(), rtol=0.02)
    assert (precision > full.diagonal() * 0.995).all()


def test_general_prior_and_sites() -> None:
    """m = (H + diag(delta - V))^-1 (b - v + delta m0), precision ess (H_ii - V + delta); T-sign sites."""
    hessian, b = regression()
    ess, m0 = 150.0, torch.tensor([1.0, 0.0, -1.0, 0.5]).double()
    s0, v = torch.tensor([20.0, 40.0, 10.0, 30.0]).double(), torch.tensor([0.3, -0.4, 0.2, 0.1]).double()
    quadratic, delta = torch.tensor([0.1, -0.3, 0.2, 0.05]).double(), s0 / ess
    mean, precision = fit(ess, prior_mean=m0, prior_precision=s0, site_linear=v, site_quadratic=quadratic)
    expected = torch.linalg.solve(hessian + (delta - quadratic).diag(), b - v + delta * m0)
    assert torch.allclose(mean, expected, rtol=0, atol=3e-4)
    assert torch.allclose(precision, ess * (hessian.diagonal() - quadratic + delta), rtol=0.02)


def test_admm_site_units() -> None:
    """v = tau v_k / N_k, V = tau V_k / N_k and ess = N_k / (tau rho) give S_k = S_g + (A_k / tau - V_k) / rho."""
    hessian, b = regression()
    tau, rho = 0.8, 0.5
    s_g, m_g = torch.tensor([60.0, 90.0, 80.0, 70.0]).double(), torch.tensor([0.1, 0.2, -0.2, 0.6]).double()
    v_k, V_k = torch.tensor([30.0, -20.0, 10.0, 5.0]).double(), torch.tensor([40.0, 20.0, 10.0, 30.0]).double()
    mean, precision = fit(
        N / (tau * rho),
        prior_mean=m_g,
        prior_precision=s_g,
        site_linear=tau * v_k / N,
        site_quadratic=tau * V_k / N,
    )
    full = s_g.diag() + (N * hessian / tau - V_k.diag()) / rho
    assert torch.allclose(mean, torch.linalg.solve(full, s_g * m_g + (N * b / tau - v_k) / rho), rtol=0, atol=2e-4)
    assert torch.allclose(precision, full.diagonal(), rtol=0.02)


def test_isotropic_fixed_point() -> None:
    """The best isotropic Gaussian has the exact mean and precision trace(S) / P; one copy, one long run, 1 %."""
    hessian, b = regression()
    prior = torch.tensor([20.0, 40.0, 10.0, 30.0]).double()
    full = N * hessian + prior.diag()
    mean, precision = fit(N, prior_precision=prior, hess_structure="scalar")
    assert torch.allclose(mean, torch.linalg.solve(full, N * b), rtol=0, atol=1e-3)
    assert torch.allclose(precision, full.diagonal().mean().expand(DIM), rtol=0.01)
