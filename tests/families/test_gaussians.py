"""The Gaussian families: coordinates, densities, divergences, samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from bayesfed.errors import InputError
from bayesfed.families import (
    FAMILIES,
    DiagonalGaussian,
    FullGaussian,
    Gaussian,
    IsotropicGaussian,
    NaturalParameters,
    PointMass,
    gaussian,
)
from bayesfed.seeding import torch_generator

torch.set_num_threads(1)
P = 4
ALL = (IsotropicGaussian, DiagonalGaussian, FullGaussian)
every = pytest.mark.parametrize("family", ALL, ids=lambda f: f.name)
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def make(family: type[Gaussian], seed: int, dtype: torch.dtype = torch.float64, dim: int = P) -> Gaussian:
    g = torch_generator(seed, "gaussian")
    mean = torch.randn(dim, generator=g, dtype=torch.float64)
    if family is IsotropicGaussian:
        precision = torch.rand((), generator=g, dtype=torch.float64) + 0.5
    elif family is DiagonalGaussian:
        precision = torch.rand(dim, generator=g, dtype=torch.float64) * 3 + 0.2
    else:
        root = torch.randn(dim, dim, generator=g, dtype=torch.float64)
        precision = root @ root.T + 0.5 * torch.eye(dim, dtype=torch.float64)
    return family.from_mean_precision(mean.to(dtype), precision.to(dtype))


def covariance(q: Gaussian) -> Tensor:
    """By plain inversion, (P, P)."""
    precision = q.precision if q.precision.dim() == 2 else torch.diag(q.precision.expand(q.dim))
    return torch.linalg.inv(precision)


def reference(q: Gaussian) -> torch.distributions.Distribution:
    if isinstance(q, FullGaussian):
        return MultivariateNormal(q.mean, covariance_matrix=covariance(q))
    return Independent(Normal(q.mean, q.precision.expand(q.dim).rsqrt()), 1)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@every
@both
def test_round_trips(family: type[Gaussian], dtype: torch.dtype) -> None:
    """mean/precision <-> natural <-> expectation, to 1e-12 (float32: 1e-5)."""
    q = make(family, 1, dtype)
    for back in (
        family.from_natural(q.natural),
        family.from_expectation(*q.expectation),
        family.from_arrays(q.arrays()),
    ):
        assert type(back) is family
        assert close(back.mean, q.mean, dtype)
        assert close(back.precision, q.precision, dtype)


@every
def test_definition_of_the_coordinates(family: type[Gaussian]) -> None:
    """lambda = (S m, -S/2), and mu = E[T] with T = theta theta^T restricted to the structure."""
    q = make(family, 2)
    matrix = torch.linalg.inv(covariance(q))
    assert close(q.natural.linear, matrix @ q.mean, torch.float64)
    assert q.natural.family == family.name
    assert torch.equal(q.natural.quadratic, q.precision / -2)
    moments = covariance(q) + torch.outer(q.mean, q.mean)
    expected = {"full": moments, "diagonal": moments.diagonal(), "isotropic": moments.trace()}[family.name]
    assert torch.equal(q.expectation[0], q.mean)
    assert close(q.expectation[1], expected, torch.float64)


@every
def test_linear_algebra_of_natural_parameters(family: type[Gaussian]) -> None:
    a, b = make(family, 3).natural, make(family, 4).natural
    for got, first, second in (
        (a + b, a.linear + b.linear, a.quadratic + b.quadratic),
        (a - b, a.linear - b.linear, a.quadratic - b.quadratic),
        (a * 3.0, 3 * a.linear, 3 * a.quadratic),
        (3.0 * a, 3 * a.linear, 3 * a.quadratic),
        (a / 4.0, a.linear / 4, a.quadratic / 4),
        (-a, -a.linear, -a.quadratic),
        (a.zeros_like() + b, b.linear, b.quadratic),
        (family.zero(a.linear) + b, b.linear, b.quadratic),
    ):
        assert torch.equal(got.linear, first)
        assert torch.equal(got.quadratic, second)
    copy = a.clone()
    assert copy.add_(b, -0.5) is copy
    assert close(copy.linear, (a - b * 0.5).linear, torch.float64)
    assert not torch.equal(copy.linear, a.linear)  # the clone shares no memory
    assert float(a.norm()) == pytest.approx(math.sqrt(a.linear.square().sum() + a.quadratic.square().sum()))
    assert bool(a.isfinite())
    assert not bool((a * math.nan).isfinite())
    assert a.to(torch.float32).quadratic.dtype == torch.float32


def test_natural_parameters_of_different_spaces_do_not_mix() -> None:
    a = make(DiagonalGaussian, 3).natural
    with pytest.raises(ValueError, match=r"cannot combine natural parameters of diagonal \(4,\) and full"):
        a + make(FullGaussian, 3).natural
    with pytest.raises(ValueError, match=r"and diagonal \(5,\)"):
        a - make(DiagonalGaussian, 3, dim=5).natural
    with pytest.raises(TypeError, match="float"):
        a + 1.0
    with pytest.raises(ValueError, match="expected natural parameters of the full family, got diagonal"):
        FullGaussian.from_natural(a)


@every
@both
def test_log_prob(family: type[Gaussian], dtype: torch.dtype) -> None:
    q = make(family, 5, dtype)
    theta = torch.randn(3, 7, P, generator=torch_generator(6)).to(dtype)
    assert q.log_prob(theta).shape == (3, 7)
    assert close(q.log_prob(theta), reference(q).log_prob(theta), dtype)


@every
@both
def test_kl_against_torch(family: type[Gaussian], dtype: torch.dtype) -> None:
    q, p = make(family, 7, dtype), make(family, 8, dtype)
    assert close(q.kl(p), kl_divergence(reference(q), reference(p)), dtype)
    assert float(q.kl(p)) > 0.1
    assert abs(float(q.kl(q))) < 1e-5
    assert not close(q.kl(p), p.kl(q), dtype)


@every
def test_kl_against_monte_carlo(family: type[Gaussian]) -> None:
    """The mean of log q - log p over 40,000 samples, within 4 standard errors."""
    q, p = make(family, 7), make(family, 8)
    theta = q.sample(40_000, torch_generator(9))
    values = q.log_prob(theta) - p.log_prob(theta)
    assert abs(float(values.mean() - q.kl(p))) < 4 * float(values.std()) / 200


@every
def test_gradient_of_the_kl_in_expectation_parameters(family: type[Gaussian]) -> None:
    """grad_mu KL(q || p) = lambda_q - lambda_p, by autograd through from_expectation."""
    q, p = make(family, 10), make(family, 11)
    mu = tuple(x.clone().requires_grad_() for x in q.expectation)
    gradient = torch.autograd.grad(family.from_expectation(*mu).kl(p), mu)
    difference = q.natural - p.natural
    assert torch.allclose(gradient[0], difference.linear, rtol=0, atol=1e-10)
    second = gradient[1] if family is not FullGaussian else (gradient[1] + gradient[1].T) / 2
    assert torch.allclose(second, difference.quadratic, rtol=0, atol=1e-10)


@every
@both
def test_moments_of_samples(family: type[Gaussian], dtype: torch.dtype) -> None:
    """60,000 draws; mean within 4.5 standard errors and covariance to 3 % of its largest entry. L^-1 z fails this."""
    q, n = make(family, 12, dtype), 60_000
    theta = q.sample(n, torch_generator(13))
    assert theta.shape == (n, P)
    assert theta.dtype == dtype
    wanted = covariance(q.to(torch.float64))
    errors = (theta.double().mean(0) - q.mean).abs() / (wanted.diagonal() / n).sqrt()
    assert float(errors.max()) < 4.5
    assert float((theta.double().T.cov() - wanted).abs().max()) < 0.03 * float(wanted.abs().max())
    if isinstance(q, FullGaussian):  # the wrong factor would be told apart
        inverse = torch.linalg.inv(q.to(torch.float64).factor)
        assert float((inverse @ inverse.T - wanted).abs().max()) > 0.2 * float(wanted.abs().max())


@every
def test_samples_come_from_the_generator_alone(family: type[Gaussian]) -> None:
    q = make(family, 14)
    state = torch.get_rng_state()
    a, b, c = (q.sample(5, torch_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_isotropic_member_and_summary(family: type[Gaussian]) -> None:
    q = family.isotropic(torch.zeros(3, dtype=torch.float64), 2.5)
    assert torch.equal(torch.linalg.inv(covariance(q)), 2.5 * torch.eye(3).double())
    assert q.precision_summary() == (2.5, 2.5, 2.5)
    assert q.precision.shape == family.precision_shape(3)


def test_summary_is_of_the_diagonal() -> None:
    q = FullGaussian.from_mean_precision(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 2.0]]))
    assert q.precision_summary() == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("family", "mean", "precision", "message"),
    [
        (
            DiagonalGaussian,
            [0.0, 0, 0],
            [1.0, -2.0, 0.0],
            "precision is not positive in 2 of 3 entries, first entry 1: -2",
        ),
        (DiagonalGaussian, [0.0, 0], [1.0, math.nan], "precision is not finite in 1 of 2 entries, first entry 1: nan"),
        (DiagonalGaussian, [0.0, math.inf], [1.0, 1.0], "mean is not finite in 1 of 2 entries, first entry 1: inf"),
        (DiagonalGaussian, [0.0, 0], [1.0], r"precision of a diagonal .* must have shape \(2,\), got \(1,\)"),
        (IsotropicGaussian, [0.0, 0], 0.0, "precision is not positive in 1 of 1 entries, first value: 0"),
        (IsotropicGaussian, [0.0, 0], [1.0, 1.0], r"must have shape \(\), got \(2,\)"),
        (
            FullGaussian,
            [0.0, 0],
            [[1.0, 2.0], [2.0, 1.0]],
            "not positive definite: its leading 2 x 2 block fails, smallest eigenvalue -1",
        ),
        (
            FullGaussian,
            [0.0, 0],
            [[1.0, 0.5], [0.0, 1.0]],
            r"not symmetric in 2 of 4 entries, first entry \[0, 1\]: 0.5",
        ),
        (FullGaussian, [0.0, 0], [1.0, 1.0], r"must have shape \(2, 2\), got \(2,\)"),
        (DiagonalGaussian, [[0.0]], [1.0], r"mean must have shape \(P,\), got \(1, 1\)"),
    ],
)
def test_errors_name_the_entries(family, mean, precision, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family.from_mean_precision(torch.tensor(mean), torch.tensor(precision))


def test_natural_parameters_without_a_distribution_are_named() -> None:
    lam = NaturalParameters("diagonal", torch.ones(3), torch.tensor([-1.0, 0.5, -1.0]))
    with pytest.raises(ValueError, match="precision is not positive in 1 of 3 entries, first entry 1: -1"):
        DiagonalGaussian.from_natural(lam)
    with pytest.raises(ValueError, match="variance is not positive in 1 of 2 entries, first entry 0"):
        DiagonalGaussian.from_expectation(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="not positive definite"):
        FullGaussian.from_expectation(torch.tensor([2.0, 0.0]), torch.eye(2))
    with pytest.raises(ValueError, match="variance is not positive"):
        IsotropicGaussian.from_expectation(torch.tensor([2.0, 0.0]), torch.tensor(3.0))


def test_kl_between_families_is_refused() -> None:
    with pytest.raises(ValueError, match="two diagonal posteriors of one dimension, got full in 4"):
        make(DiagonalGaussian, 1).kl(make(FullGaussian, 1))


def test_raise_precision_elementwise() -> None:
    """Below the floor (or nan): floor and the given mean; elsewhere the very same bits."""
    precision = torch.tensor([3.0, 0.5, -7.0, math.nan, 1.0], dtype=torch.float64)
    first = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    mean = torch.tensor([9.0, -1.0, -2.0, -3.0, 9.0], dtype=torch.float64)
    lam, count = DiagonalGaussian.raise_precision(
        NaturalParameters("diagonal", first, precision / -2), torch.tensor(1.0).double(), mean
    )
    assert int(count) == 3
    assert torch.equal(lam.precision, torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0]).double())
    assert torch.equal(lam.precision, lam.quadratic * -2)
    assert torch.equal(lam.linear, torch.tensor([1.0, -1.0, -2.0, -3.0, 5.0]).double())
    one, count = IsotropicGaussian.raise_precision(
        NaturalParameters("isotropic", first, torch.tensor(4.0).double()), torch.tensor(0.5).double(), mean
    )
    assert int(count) == 1
    assert torch.equal(IsotropicGaussian.from_natural(one).mean, mean)


def test_raise_precision_by_eigendirection() -> None:
    g = torch_generator(15)
    vectors = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
    values, mean = torch.tensor([5.0, -3.0, 2.0, 0.1]).double(), torch.randn(4, generator=g, dtype=torch.float64)
    matrix, first = (vectors * values) @ vectors.T, torch.randn(4, generator=g, dtype=torch.float64)
    lam, count = FullGaussian.raise_precision(
        NaturalParameters("full", first, matrix / -2), torch.tensor(1.0).double(), mean
    )
    assert int(count) == 2
    q = FullGaussian.from_natural(lam)
    wanted = torch.tensor([5.0, 1.0, 2.0, 1.0]).double()
    assert torch.allclose(vectors.T @ q.precision @ vectors, torch.diag(wanted), atol=1e-12)
    rotated = vectors.T @ first / values
    expected = torch.stack([rotated[0], (vectors.T @ mean)[1], rotated[2], (vectors.T @ mean)[3]])
    assert torch.allclose(vectors.T @ q.mean, expected, atol=1e-12)


@every
def test_raise_precision_leaves_a_healthy_one_alone(family: type[Gaussian]) -> None:
    q = make(family, 16)
    lam, count = family.raise_precision(q.natural, torch.tensor(1e-3).double(), torch.zeros(P).double())
    assert int(count) == 0
    assert torch.equal(lam.linear, q.natural.linear)
    assert torch.equal(lam.quadratic, q.natural.quadratic)


@every
def test_meta_tensors_stay_meta(family: type[Gaussian]) -> None:
    """Building, coordinates and their algebra work without data (memory estimates, other devices)."""
    q = family.isotropic(torch.zeros(P, device="meta"), 2.0)
    lam = q.natural * 0.5 + family.zero(q.mean)
    back = family.from_natural(lam)
    tensors = [q.mean, q.precision, lam.linear, lam.quadratic, *q.arrays().values(), back.mean, back.precision]
    tensors += [*q.expectation, q.kl(q), q.log_prob(q.mean)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_families_by_name() -> None:
    assert {name: FAMILIES[name].name for name in FAMILIES} == {name: name for name in FAMILIES}
    assert set(FAMILIES) == {"isotropic", "diagonal", "full", "lognormal", "point"}
    assert gaussian("full") is FullGaussian
    with pytest.raises(InputError, match="did you mean 'diagonal'"):
        gaussian("diagnoal")


def test_point_mass() -> None:
    mean = torch.tensor([1.0, 2.0])
    q = PointMass(mean)
    assert torch.equal(q.sample(3), mean.expand(3, 2))
    assert float(q.precision) == math.inf
    assert list(q.arrays()) == ["mean"]
    q.sample(1)[0, 0] = 5.0
    assert torch.equal(q.mean, torch.tensor([1.0, 2.0]))
    assert q.to(torch.float64).mean.dtype == torch.float64
    with pytest.raises(ValueError, match="mean is not finite"):
        PointMass.from_arrays({"mean": torch.tensor([math.nan])})
