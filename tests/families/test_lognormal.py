"""The log-normal family: its algebra, moments, and the ways it travels."""

import math

import pytest
import torch

from bayesfed import wire
from bayesfed.families import FAMILIES, LogNormal, NaturalParameters, exponential, gaussian
from bayesfed.runs.posterior_file import load_posterior, save_posterior

F64 = {"dtype": torch.float64}


def member(seed=0, precision=4.0, dim=5):
    z = torch.randn(2 * dim, generator=torch.Generator().manual_seed(seed), **F64)
    return LogNormal.from_log_median(z, torch.tensor(precision, **F64))


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-12, "atol": 1e-13} | tolerance))


def test_natural_and_expectation_parameters_go_round():
    q = member()
    for again in (LogNormal.from_natural(q.natural), LogNormal.from_expectation(*q.expectation)):
        close(again.log_median, q.log_median)
        close(again.precision, q.precision)
        close(again.mean, q.mean)


def test_a_mixture_of_natural_parameters_is_a_weighted_geometric_mean_of_medians():
    """The product q_1^a q_2^b: precisions add, medians average geometrically, weighted by precision."""
    one, two = member(0, 4.0), member(1, 9.0)
    pooled = LogNormal.from_natural(0.3 * one.natural + 0.7 * two.natural)
    s1, s2 = 0.3 * 4.0, 0.7 * 9.0
    assert float(pooled.precision) == pytest.approx(s1 + s2)
    close(pooled.log_median.exp(), one.log_median.exp() ** (s1 / (s1 + s2)) * two.log_median.exp() ** (s2 / (s1 + s2)))
    x = member(2).log_median.exp()
    density = 0.3 * one.log_prob(x) + 0.7 * two.log_prob(x)
    y = member(3).log_median.exp()
    close(pooled.log_prob(x) - pooled.log_prob(y), density - 0.3 * one.log_prob(y) - 0.7 * two.log_prob(y))


def test_density_of_the_parts():
    q, x = member(), member(4).log_median.exp()
    reference = torch.distributions.LogNormal(q.log_median, q.precision**-0.5)
    close(q.log_prob(x), reference.log_prob(x).sum())


def test_moments_of_weights_and_parts():
    q = member(precision=6.0)
    draws = q.sample(400_000, torch.Generator().manual_seed(1))
    assert bool(((draws.mean(0) - q.mean).abs() < 5 * (q.variance / len(draws)).sqrt()).all())
    torch.testing.assert_close(draws.var(0), q.variance, rtol=0.03, atol=0)
    logs = q.sample_parts(1000, torch.Generator().manual_seed(1)).log()
    assert float(logs.var()) == pytest.approx(float(q.log_median.var()) + 1 / 6, rel=0.1)


def test_kl_is_that_of_the_logarithms():
    q, p = member(0, 4.0), member(1, 2.0)
    x = q.sample_parts(200_000, torch.Generator().manual_seed(2))
    monte_carlo = q.log_prob(x) - p.log_prob(x)
    error = float(monte_carlo.std()) / math.sqrt(len(x))
    assert float(q.kl(p)) == pytest.approx(float(monte_carlo.mean()), abs=4 * error)
    close(q.kl(q), torch.zeros((), **F64))


@pytest.mark.parametrize("offset", [None, 0.2])
def test_a_given_mean_is_kept(offset):
    mean = torch.tensor([0.5, -2.0, 0.0], **F64)
    q = LogNormal.from_mean_precision(mean, torch.tensor(4.0), offset)
    close(q.mean, mean)
    smaller = q.log_median.view(2, -1).amin(0).add(1 / 8).exp()
    close(smaller, torch.full((3,), offset or 0.5 * float(mean.square().mean().sqrt()), **F64))


def test_the_prior_has_the_scale_of_the_initialisation():
    initial = torch.tensor([3.0, -4.0, 0.0, 0.0], **F64)
    prior = LogNormal.prior(initial, 100.0)
    assert prior.mean.tolist() == [0.0] * 4
    close(prior.log_median, torch.full((8,), math.log(1.25) - 0.005, **F64))
    assert float(LogNormal.prior(initial * 0, 100.0).log_median[0]) == pytest.approx(math.log(0.05) - 0.005)
    close(exponential("diagonal").prior(initial, 2.0).mean, torch.zeros(4, **F64))


@pytest.mark.parametrize("format", ["full", "float16", "bfloat16"])
def test_it_travels(format):
    server, client = member(0).to(torch.float32), member(1).to(torch.float32)
    codec = wire.Codec(format, FAMILIES["lognormal"].array_shapes(5), torch.float32)
    record, sent = codec.encode(server.arrays())
    received = LogNormal.from_arrays(codec.decode(record))
    assert torch.equal(received.log_median, sent["log_median"])
    answer, values = codec.encode(client.arrays(), received.arrays())
    decoded = LogNormal.from_arrays(codec.decode(answer, received.arrays()))
    assert torch.equal(decoded.log_median, values["log_median"])
    torch.testing.assert_close(decoded.log_median, client.log_median, rtol=0.01, atol=0.01)
    torch.testing.assert_close(decoded.precision, client.precision)


def test_it_is_saved(tmp_path):
    q = member().to(torch.float32)
    save_posterior(tmp_path / "p.safetensors", q, {"kind": "mlp"})
    again, description = load_posterior(tmp_path / "p.safetensors")
    assert isinstance(again, LogNormal)
    assert torch.equal(again.log_median, q.log_median)
    assert torch.equal(again.mean, q.mean)
    assert (again.dim, description) == (5, {"kind": "mlp"})


def test_zero_and_shapes_fit_the_number_of_weights():
    q = member()
    total = q.natural + LogNormal.zero(q.mean)
    assert torch.equal(total.linear, q.natural.linear)
    assert {n: tuple(v.shape) for n, v in q.arrays().items()} == LogNormal.array_shapes(q.dim)


def test_errors():
    with pytest.raises(ValueError, match="precision is not positive"):
        LogNormal.from_natural(NaturalParameters("lognormal", torch.zeros(4), torch.tensor(0.1)))
    with pytest.raises(ValueError, match=r"log_median is not finite in 1 of 4"):
        LogNormal.from_log_median(torch.tensor([0.0, 1.0, torch.nan, 2.0]), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"shape \(2P,\)"):
        LogNormal.from_log_median(torch.zeros(3), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        LogNormal.from_log_median(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="lognormal"):
        exponential("log-normal")
    with pytest.raises(ValueError, match="diagonal, full, isotropic"):
        gaussian("lognormal")
