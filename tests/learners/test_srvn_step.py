"""The SR-VN step (arXiv 2507.07853) on Gaussian targets N(mu, H^-1)."""

import itertools

import pytest
import torch

from clients.optim import srvn_step
from clients.srvn.step import step_limit, whiten

DTYPE = torch.float64


def lower(seed, condition=10.0, dim=5):
    """A lower-triangular factor whose covariance has a condition number of about `condition`."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.eye(dim, dtype=DTYPE) + 0.2 * torch.randn(dim, dim, generator=generator, dtype=DTYPE).tril(-1)
    return torch.logspace(0, torch.tensor(condition).sqrt().log10().item(), dim, dtype=DTYPE)[:, None] * unit


def precision_of(factor):
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=DTYPE), upper=False)
    return inverse.T @ inverse


@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0])
def test_the_target_is_a_fixed_point(rho):
    factor, mean = lower(0), torch.arange(5, dtype=DTYPE)
    new_mean, new_factor = srvn_step(mean, factor, torch.zeros(5, dtype=DTYPE), precision_of(factor), rho)
    torch.testing.assert_close(new_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(new_factor, factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_local_rate_is_one_minus_rho_at_condition_1e7(rho):
    target = lower(1, condition=1e7)
    hessian = precision_of(target)
    assert float(torch.linalg.cond(hessian)) > 1e6
    generator = torch.Generator().manual_seed(3)
    error = 1e-3 * torch.randn(5, generator=generator, dtype=DTYPE)
    change = 1e-3 * torch.randn(5, 5, generator=generator, dtype=DTYPE).tril()

    def kl(mean, factor):
        whitened = torch.linalg.solve_triangular(target, factor, upper=False)
        shift = torch.linalg.solve_triangular(target, mean[:, None], upper=False)
        return float(0.5 * ((whitened**2).sum() - 5 - 2 * whitened.diagonal().log().sum() + (shift**2).sum()))

    mean, factor = target @ error, target @ (torch.eye(5, dtype=DTYPE) + change)
    new_mean, new_factor = srvn_step(mean, factor, hessian @ mean, hessian, rho)
    assert kl(new_mean, new_factor) / kl(mean, factor) == pytest.approx((1 - rho) ** 2, abs=2e-3)


def test_newton_schulz_at_rho_one():
    h, c = torch.tensor([[3.0]], dtype=DTYPE), torch.tensor([[0.3]], dtype=DTYPE)
    zero = torch.zeros(1, dtype=DTYPE)
    for _ in range(8):
        expected = 0.5 * c * (3 - h * c**2)
        _, c = srvn_step(zero, c, zero, h, 1.0)
        torch.testing.assert_close(c, expected, rtol=1e-14, atol=0)
    assert float(c) == pytest.approx(3**-0.5, rel=1e-12)
    with pytest.raises(ValueError, match="broke down"):
        srvn_step(zero, torch.tensor([[1.001]], dtype=DTYPE), zero, h, 1.0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_breakdown(diagonal):
    zero, eye = torch.zeros(3, dtype=DTYPE), torch.eye(3, dtype=DTYPE)
    factor = torch.ones(3, dtype=DTYPE) if diagonal else eye
    with pytest.raises(ValueError, match=r"-23\.5.*0\.04082"):
        srvn_step(zero, factor, zero, 50 * factor, 1.0)
    _, new = srvn_step(zero, factor, zero, 50 * factor, 0.0408)
    assert float((new if diagonal else new.diagonal()).min()) > 0


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_step_limit_bounds_every_direction(temperature):
    """rho lambda_max(C^T H C - gamma I) <= 2 max_change; diagonal entries alone would allow more where coordinates are
    correlated.
    """
    correlated = 0.9 * torch.ones(8, 8, dtype=DTYPE) + 0.1 * torch.eye(8, dtype=DTYPE)
    for curvature in (5 * correlated, whiten(lower(9), precision_of(lower(10))), 40 * torch.eye(8, dtype=DTYPE)):
        largest = float(torch.linalg.eigvalsh(curvature)[-1]) - temperature
        assert float(step_limit(curvature, temperature, 0.25)) * largest <= 0.5 + 1e-12
    assert float(step_limit(40 * torch.eye(8, dtype=DTYPE), temperature, 0.25)) == pytest.approx(
        0.5 / (40 - temperature)
    )
    assert step_limit(torch.tensor([0.2, 21.0], dtype=DTYPE)).tolist() == [float("inf"), 0.05]


def test_differs_from_von_by_rho_squared():
    factor, hessian = lower(4, 3.0), precision_of(lower(5, 3.0))
    zero, precision = torch.zeros(5, dtype=DTYPE), precision_of(factor)

    def difference(rho):
        _, new = srvn_step(zero, factor, zero, hessian, rho)
        return float((new @ new.T - torch.linalg.inv((1 - rho) * precision + rho * hessian)).norm())

    assert 3.6 < difference(0.004) / difference(0.002) < 4.4


def test_equivariant_under_triangular_maps():
    factor, hessian, change = lower(6), precision_of(lower(7)), lower(8)
    mean, gradient = torch.arange(5, dtype=DTYPE), torch.linspace(-1, 1, 5, dtype=DTYPE)
    back = torch.linalg.inv(change)
    new_mean, new_factor = srvn_step(mean, factor, gradient, hessian, 0.01)
    mapped = srvn_step(change @ mean, change @ factor, back.T @ gradient, back.T @ hessian @ back, 0.01)
    torch.testing.assert_close(mapped[0], change @ new_mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mapped[1], change @ new_factor, rtol=1e-11, atol=1e-11)


def test_worked_diagonal_example_descends_and_equals_the_full_step():
    target, h = torch.tensor([1, -0.5], dtype=DTYPE), torch.tensor([1.0, 7.0], dtype=DTYPE)
    mean, c = torch.tensor([-2, 1.5], dtype=DTYPE), torch.tensor([0.8, 0.45], dtype=DTYPE)
    full_mean, full = mean, torch.diag(c)
    values = []
    for _ in range(100):
        values.append(float(0.5 * (h * (mean - target) ** 2 + h * c**2 - (h * c**2).log() - 1).sum()))
        mean, c = srvn_step(mean, c, h * (mean - target), h, 0.07)
        full_mean, full = srvn_step(full_mean, full, h * (full_mean - target), torch.diag(h), 0.07)
    assert all(after < before for before, after in itertools.pairwise(values))
    assert values[-1] < 1e-3
    torch.testing.assert_close(full_mean, mean)
    torch.testing.assert_close(full, torch.diag(c))


def test_shapes_are_checked():
    zero = torch.zeros(3, dtype=DTYPE)
    with pytest.raises(ValueError, match="shapes don't fit"):
        srvn_step(zero, torch.eye(3, dtype=DTYPE), zero, zero, 0.1)
