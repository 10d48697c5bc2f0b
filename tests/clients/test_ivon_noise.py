"""IVON's samples: their distribution, the table that noise is drawn from, antithetic pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesfed.seeding import torch_generator
from clients.noise import Noise, quantile_points, quantile_table
from clients.optim import IVON

torch.set_num_threads(1)


def test_samples_have_the_stated_mean_and_precision() -> None:
    p = nn.Parameter(torch.full((200_000,), 2.0))
    optimizer = IVON([p], lr=0.1, ess=50.0, hess_init=0.3, weight_decay=0.2, generator=torch_generator(6))
    with optimizer.sampled_params():
        deviation = p.detach() - 2
    assert abs(float(deviation.mean())) < 4 * (1 / 25) ** 0.5 * 200_000**-0.5 * 1.0
    assert float(deviation.var()) == pytest.approx(1 / 25, rel=0.015)
    assert torch.allclose(optimizer.precision, torch.tensor(25.0))


def test_quantile_noise_is_standard_normal() -> None:
    table = quantile_table()
    assert torch.equal(table, table.sort()[0])
    assert torch.allclose(table, -table.flip(0))
    for power, moment, tolerance in [(2, 1, 1e-12), (4, 3, 1e-3), (6, 15, 5e-2)]:
        assert float(table.pow(power).mean()) == pytest.approx(moment, abs=tolerance)
    points = quantile_points()
    assert all(torch.equal(column.sort()[0], table) for column in points.unbind(1))
    for values in (points, points.square() - 1, points.prod(1, keepdim=True)):
        products = values.T @ values / len(values)
        assert float((products - products.diag().diag()).abs().max()) < 3e-3
    draws = torch.empty(600_003)  # more than one chunk, and a cut block
    noise = Noise("quantile", torch_generator(7, "noise"))
    first = noise.fill(draws).clone()
    second = noise.fill(draws)
    assert abs(float(first @ second) / draws.numel()) < 4 * draws.numel() ** -0.5
    ranks = torch.special.ndtr(first.double()).sort()[0]
    uniform = (torch.arange(draws.numel()) + 0.5) / draws.numel()
    assert float((ranks - uniform).abs().max()) < 1.63 * draws.numel() ** -0.5  # Kolmogorov-Smirnov, 1 %
    lags = [float(first[:-lag] @ first[lag:]) / draws.numel() for lag in (1, 2, 3, 4, 262_144)]
    assert max(map(abs, lags)) < 4 * draws.numel() ** -0.5 * 1.4
    assert torch.equal(first, Noise("quantile", torch_generator(7, "noise")).fill(torch.empty(600_003)))
    shifted = Noise("quantile", torch_generator(7, "noise")).fill(torch.empty(600_004)[1:])  # not on a 16-byte boundary
    assert torch.equal(first, shifted)
    double = Noise("quantile", torch_generator(7, "noise")).fill(torch.empty(600_003, dtype=torch.float64))
    assert torch.allclose(first.double(), double, atol=1e-6)


def sampled(optimizer: IVON, p: nn.Parameter) -> torch.Tensor:
    """The deviation of one training sample from the mean, which stays where it is (zero gradient and learning rate)."""
    with optimizer.sampled_params(train=True):
        deviation = p.detach().clone() - optimizer.mean
        (p * 0).sum().backward()
    optimizer.step()
    return deviation


def test_antithetic_samples_come_in_pairs_of_opposite_sign() -> None:
    def make() -> tuple[IVON, nn.Parameter]:
        p = nn.Parameter(torch.zeros(7))
        return IVON([p], lr=0.0, ess=10.0, beta2=1.0, antithetic=True, generator=torch_generator(8)), p

    optimizer, p = make()
    first, second, third = (sampled(optimizer, p) for _ in range(3))
    assert torch.equal(second, -first)
    assert not torch.allclose(third.abs(), first.abs())
    resumed, q = make()
    resumed.load_state_dict(optimizer.state_dict())  # between the two of a pair
    assert torch.equal(sampled(resumed, q), -third)
