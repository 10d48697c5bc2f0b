"""LMD on a small network in low precision, with data and network of our own."""

import math
from contextlib import nullcontext

import pytest
import torch

from bayesfed.lowprecision import MXForward
from clients.optim import LMD

STEPS, BATCH = 1000, 64


def clusters(seed):
    """60 Gaussian clusters in 32 dimensions, each of one of 10 classes: train and test inputs and labels."""
    g = torch.Generator().manual_seed(seed)
    centres, classes = torch.randn(60, 32, generator=g), torch.arange(60) % 10

    def draw(count):
        which = torch.randint(60, (count,), generator=g)
        return centres[which] + 0.9 * torch.randn(count, 32, generator=g), classes[which]

    return draw(3000), draw(1500)


def train(fmt=None, sigma=0.1, decay=0.1, lr=0.03, seed=0):
    """(test accuracy, test NLL averaged over 16 samples, largest weight) after the run, ``lr`` falling to 0."""
    (x, y), (test_x, test_y) = clusters(seed)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    optimizer = LMD(model.parameters(), lr=lr, sigma=sigma, decay=decay, generator=torch.Generator().manual_seed(seed))
    g = torch.Generator().manual_seed(seed + 1)

    def forward(inputs):
        with MXForward(fmt) if fmt else nullcontext():
            return model(inputs)

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / STEPS))
        rows = torch.randint(len(x), (BATCH,), generator=g)
        with optimizer.sampled_params(train=True):
            torch.nn.functional.cross_entropy(forward(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((forward(test_x).argmax(1) == test_y).float().mean())
        probabilities = torch.zeros(len(test_x), 10)
        for _ in range(16):
            with optimizer.sampled_params():
                probabilities += forward(test_x).softmax(1) / 16
        nll = float(torch.nn.functional.nll_loss(probabilities.clamp_min(1e-30).log(), test_y))
    return accuracy, nll, float(optimizer.mean.abs().max())


@pytest.mark.slow
def test_decay_keeps_low_precision_alive():
    """With decay MXFP6 and MXFP4 forward passes cost little; without it weights grow to 1e5 and more, the NLL too, and
    MXFP4 collapses.
    """
    full, six, four = (train(fmt) for fmt in (None, "e3m2", "e2m1"))
    assert full[0] > 0.85
    assert six[0] > full[0] - 0.03
    assert four[0] > full[0] - 0.06
    assert max(run[2] for run in (full, six, four)) < 11  # E[u] is capped at 1/decay
    grown, collapsed = train(decay=0.0), train("e2m1", decay=0.0)
    assert grown[2] > 1e5
    assert grown[0] < full[0]
    assert grown[1] > 1.5 * full[1]
    assert collapsed[0] < 0.3


@pytest.mark.slow
def test_noise_improves_the_nll():
    assert train(sigma=0.3, lr=0.01)[1] < 0.8 * train(sigma=0.0, lr=0.01)[1]
