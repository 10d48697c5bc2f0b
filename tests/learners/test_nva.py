"""NVA: the checks of spec/lmd_srvn_nva.md c.5 that need no long runs."""

import math

import pytest
import torch

from clients.optim import nva

CENTRES = torch.tensor([[0, 1], [math.cos(math.pi / 6), -0.5], [-math.cos(math.pi / 6), -0.5]], dtype=torch.float64)
MODES = torch.tensor([[0, 0.5109], [0.4424, -0.2554], [-0.4424, -0.2554], [0, 0]], dtype=torch.float64)


def triangle(x):
    squares = (x[:, None] - CENTRES).square().sum(-1)
    return torch.logsumexp(-0.5 * squares / 0.54, 1) - math.log(3 * 2 * math.pi * 0.54)


def test_the_target_has_the_four_modes():
    assert triangle(MODES).tolist() == pytest.approx([-2.147175] * 3 + [-2.147617], abs=2e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_eight_components_find_all_four_modes(seed):
    found = nva.maximize(triangle, 2, 8, 3000, seed).means
    assert float(torch.cdist(MODES, found).amin(1).max()) < 0.1


def test_quadratic_at_fixed_temperature_reaches_the_gibbs_density():
    h, centre = torch.tensor([1.0, 4.0], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    found = nva.maximize(
        lambda x: -0.5 * (h * (x - centre) ** 2).sum(-1),
        *(2, 1, 400, 0, "hessian"),
        temperature=0.5,
        cooling=0.0,
        step_size=0.1,
        damping=0.0,
    )
    torch.testing.assert_close(found.covariances[0], torch.diag(0.5 / h), rtol=1e-6, atol=1e-9)
    assert found.means[0].tolist() == pytest.approx(centre.tolist(), abs=1e-6)


def test_a_constant_changes_nothing():
    plain, shifted = (nva.maximize(lambda x, c=c: triangle(x) + c, 2, 3, 50, 3) for c in (0.0, 8.0))
    torch.testing.assert_close(plain.means, shifted.means)
    torch.testing.assert_close(plain.weights, shifted.weights)
    assert float(plain.weights.sum()) == pytest.approx(1)


def test_errors():
    with pytest.raises(ValueError, match="fitness"):
        nva.maximize(triangle, 2, 3, 5, 0, "rank")
    with pytest.raises(ValueError, match="parents"):
        nva.maximize(triangle, 2, 3, 5, 0, samples=3)
