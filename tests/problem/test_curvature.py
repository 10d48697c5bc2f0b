"""Curvature of a summed loss against dense matrices by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from bayesfed.accelerate import layers
from bayesfed.problem import Examples
from bayesfed.problem.curvature import SummedLoss, ggn, ggn_diagonal, ggn_vp, hvp
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Categorical, Gaussian, Likelihood

Case = tuple[FlatModel, Likelihood, Examples]
TARGETS = {
    "categorical": (Categorical(), torch.arange(11) % 3),
    "gaussian": (Gaussian(2.5), torch.randn(11, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
}


def pose(name: str, module: nn.Module | None = None) -> Case:
    """11 examples with 4 inputs and 3 outputs, float64; a small perceptron with dropout."""
    torch.manual_seed(2)
    module = module or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    likelihood, y = TARGETS[name]
    return FlatModel(module, torch.float64), likelihood, Examples(torch.randn(11, 4, dtype=torch.float64), y)


def dense(model: FlatModel, likelihood: Likelihood, data: Examples, vector: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_n J_n^T L_n J_n`` and the Hessian from explicit Jacobians and Hessians of each example, (P, P) each."""
    model.module.eval()
    gauss_newton = torch.zeros(len(vector), len(vector)).double()
    newton = torch.zeros_like(gauss_newton)
    for x, y in zip(data.x, data.y, strict=True):
        outputs = lambda v: functional_call(model.module, model.named(v), (x[None],))[0]  # noqa: B023, E731
        loss = lambda o: likelihood.loss(o[None], y[None])  # noqa: B023, E731
        jacobian = jacrev(outputs)(vector)
        gauss_newton += jacobian.T @ hessian(loss)(outputs(vector)) @ jacobian
        newton += hessian(lambda v: loss(outputs(v)))(vector)  # noqa: B023
    model.module.train()
    return gauss_newton, newton


@pytest.mark.parametrize("name", TARGETS)
def test_against_dense_matrices(name: str) -> None:
    """Products, diagonal and dense derivatives, also when the examples go through in pieces; the model is left as it
    was.
    """
    case = pose(name)
    model, vector = case[0], case[0].vector.clone()
    gauss_newton, newton = dense(*case, vector)
    assert not torch.allclose(gauss_newton, newton, rtol=1e-3)  # the Hessian has the model's own curvature in it
    direction = torch.randn(len(vector), dtype=torch.float64)
    for rows in (4, 1000):
        torch.testing.assert_close(hvp(*case, vector, direction, rows), newton @ direction, rtol=1e-10, atol=1e-12)
        product = ggn_vp(*case, vector, direction, rows)
        torch.testing.assert_close(product, gauss_newton @ direction, rtol=1e-10, atol=1e-12)
    for memory_mb in (128, 0.004):
        diagonal, cost = ggn_diagonal(*case, vector, memory_mb)
        torch.testing.assert_close(diagonal, gauss_newton.diagonal(), rtol=1e-10, atol=1e-12)
        assert float(diagonal.min()) >= 0
        assert cost == 3 * 11
        loss = SummedLoss(*case, memory_mb)
        torch.testing.assert_close(loss.hessian(vector), newton, rtol=1e-10, atol=1e-12)
    model.module.eval()
    mean = case[1].loss(model(case[2].x), case[2].y)
    mean.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters])
    torch.testing.assert_close(loss.loss(vector), 11 * mean.detach())
    torch.testing.assert_close(loss.gradient(vector), 11 * gradient, rtol=1e-10, atol=1e-12)
    assert loss.gradients_per_point == 11 * (1 + len(vector))
    model.module.train()
    ggn_diagonal(*case, vector), hvp(*case, vector, direction)
    assert all(layer.training for layer in model.module.modules())
    assert torch.equal(model.vector, vector)


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


class Scaled(nn.Linear):
    """A layer whose bias is not used as that of a linear layer."""

    def forward(self, x):
        return super().forward(x) + 2 * self.bias


@pytest.mark.parametrize("kind", [Tied, Doubled, Convolution, Scaled, nn.Linear])
def test_layers_and_examples_agree(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way over linear layers is taken only where it holds."""
    torch.manual_seed(4)
    case = pose("categorical", kind(4, 3) if issubclass(kind, nn.Linear) else kind())
    vector = case[0].vector.clone()
    diagonal, _ = ggn_diagonal(*case, vector)
    monkeypatch.setattr(ggn, "_linear_layers", lambda *_: [])
    slow, _ = ggn_diagonal(*case, vector)
    assert torch.allclose(diagonal, slow, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("large", [1, layers.LARGE])
def test_layers_are_used_for_perceptrons(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and there it is taken, also over :class:`bayesfed.accelerate.layers.QuickLinear`."""
    monkeypatch.setattr(layers, "LARGE", large)
    monkeypatch.setattr(ggn, "_of_examples", lambda *_: pytest.fail("gradients of single examples"))
    case = pose("categorical")
    ggn_diagonal(*case, case[0].vector.clone())
