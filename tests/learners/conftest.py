"""What NVA is tested on."""

import math

import pytest
import torch

from clients.optim import nva

DTYPE = torch.float64
CENTRES = torch.tensor([[0, 1], [math.cos(math.pi / 6), -0.5], [-math.cos(math.pi / 6), -0.5]], dtype=DTYPE)


@pytest.fixture(scope="session")
def triangle():
    """Log density of three Gaussians at the corners of a triangle: four maxima."""

    def log_density(x):
        squares = (x[:, None] - CENTRES).square().sum(-1)
        return torch.logsumexp(-0.5 * squares / 0.54, 1) - math.log(3 * 2 * math.pi * 0.54)

    return log_density


@pytest.fixture(scope="session")
def mixture():
    """A mixture from lists: means, diagonals of the covariances, weights."""

    def make(means, variances, weights):
        covariances = torch.stack([torch.diag(torch.tensor(v, dtype=DTYPE)) for v in variances])
        return nva.Mixture(torch.tensor(means, dtype=DTYPE), covariances, torch.tensor(weights, dtype=DTYPE))

    return make


@pytest.fixture
def with_noise(monkeypatch):
    """``with_noise(change)``: every draw of the samples' noise goes through ``change``."""

    def install(change):
        draw = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *shape, **kind: change(draw(*shape, **kind)))

    return install
