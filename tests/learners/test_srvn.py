"""The optimizer SRVN: closed forms, estimators, loops of PyTorch, prior and site terms, breakdown."""

import pytest
import torch

from bayesfed.errors import InputError
from clients.optim import SRVN, srvn_step
from clients.srvn.step import step_limit, whiten

DTYPE = torch.float64
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
Y = X @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=DTYPE) + 0.5


def model():
    layer = torch.nn.Linear(4, 1, dtype=DTYPE)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    return layer


def mean_loss(layer):
    return 0.5 * (layer(X)[:, 0] - Y).square().mean()


def ridge(prior_precision=1.0, prior_mean=0.0, linear=0.0, quadratic=0.0, ess=40.0):
    """Mean and precision of the exact posterior of weights and bias; site terms in units of the mean loss."""
    design = torch.cat([X, torch.ones(40, 1, dtype=DTYPE)], 1)
    precision = ess * (design.T @ design / 40 - quadratic * torch.eye(5)) + prior_precision * torch.eye(5)
    right = ess * (design.T @ Y / 40 - linear) + prior_precision * prior_mean
    return torch.linalg.solve(precision, right), precision


def close(one, two, rtol=1e-8):
    torch.testing.assert_close(one, two, rtol=rtol, atol=1e-9)


SITE = {
    "prior_precision": 2.0, "prior_mean": torch.linspace(-1, 1, 5, dtype=DTYPE),
    "linear": torch.linspace(-0.1, 0.2, 5, dtype=DTYPE), "quadratic": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("samples", [0, 2])
def test_full_covariance_with_hessians_reaches_the_exact_posterior(samples):
    """Prior and site included. Expected Hessians of a quadratic don't vary; gradients do, over antithetic pairs not."""
    layer = model()
    optimizer = SRVN(
        layer.parameters(), 1.0, 40, "full", "hessian", samples, prior_precision=2.0, prior_mean=SITE["prior_mean"],
        site_linear=SITE["linear"], site_quadratic=0.1, antithetic=True,
    )  # fmt: skip
    for _ in range(30):
        loss = optimizer.step(lambda: mean_loss(layer))
    mean, precision = ridge(**SITE)
    close(optimizer.mean, mean)
    close(optimizer.precision, precision)
    close(optimizer.covariance, torch.linalg.inv(precision))
    close(torch.cat([layer.weight.detach()[0], layer.bias.detach()]), mean)
    assert float(loss) > 0


def test_diagonal_covariance_with_hessians_reaches_the_mean_field_optimum():
    layer = model()
    optimizer = SRVN(layer.parameters(), 0.5, 40, "diagonal", "hessian", 0, prior_precision=2.0)
    for _ in range(120):
        optimizer.step(lambda: mean_loss(layer))
    mean, precision = ridge(2.0)
    close(optimizer.mean, mean)
    close(optimizer.precision, precision.diagonal())


def test_one_step_is_the_pure_step_and_the_factor_comes_from_old_values():
    layer = model()
    optimizer = SRVN(layer.parameters(), 0.3, 40, "full", "hessian", 0, temperature=0.7)
    mean, precision = ridge()
    before = optimizer.factor.clone()
    expected = srvn_step(torch.zeros(5, dtype=DTYPE), before, -precision @ mean, precision, 0.3, 0.7)
    optimizer.step(lambda: mean_loss(layer))
    close(optimizer.mean, expected[0])
    close(optimizer.factor, expected[1])


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_stein_curvature_is_unbiased(covariance):
    """Gradients alone give E_q[hess]: over 2,000 samples C^T H C agrees with the exact one to 10 %."""
    layer = model()
    generator = torch.Generator().manual_seed(2)
    settings = {"antithetic": True, "temperature": 1e-6, "prior_precision": 1e-6}  # little else moves the factor
    optimizer = SRVN(layer.parameters(), 0.01, 40, covariance, **settings, generator=generator)
    mean, precision = ridge(1e-6)
    before = optimizer.factor.clone()
    for _ in range(2000):
        with optimizer.sampled_params(train=True):
            mean_loss(layer).backward()
    hessian = precision if covariance == "full" else precision.diagonal()
    expected = srvn_step(torch.zeros(5, dtype=DTYPE), before, -precision @ mean, hessian, 0.01, 1e-6)
    optimizer.step()
    torch.testing.assert_close(optimizer.mean, expected[0], rtol=1e-9, atol=1e-9)  # pairs: linear terms cancel
    change, wanted = optimizer.factor - before, expected[1] - before
    assert float((change - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_an_ordinary_loop_with_minibatches(covariance):
    layer = model()
    generator = torch.Generator().manual_seed(3)
    optimizer = SRVN(
        layer.parameters(), 0.05, 40, covariance, lr_covariance=0.004, beta1=0.5, antithetic=True, generator=generator
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        rows = slice(20 * (step % 2), 20 * (step % 2) + 20)
        with optimizer.sampled_params(train=True):
            (0.5 * (layer(X[rows])[:, 0] - Y[rows]).square().mean()).backward()
        optimizer.step()
        scheduler.step()
    mean, precision = ridge()
    assert float((optimizer.mean - mean).norm() / mean.norm()) < 0.02
    wanted = precision if covariance == "full" else precision.diagonal()
    assert float((optimizer.precision - wanted).norm() / wanted.norm()) < 0.15


def test_the_mean_is_back_after_sampling_and_samples_have_the_covariance():
    layer = model()
    precision = ridge()[1]
    optimizer = SRVN(layer.parameters(), 0.1, 40, "full", init_precision=precision)
    before = [p.detach().clone() for p in layer.parameters()]
    draws = []
    for _ in range(4000):
        with optimizer.sampled_params():
            draws.append(torch.cat([p.detach().reshape(-1) for p in layer.parameters()]))
    for p, old in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p, old)
    covariance = torch.cov(torch.stack(draws).T)
    assert float((covariance @ precision - torch.eye(5)).abs().max()) < 0.15


def test_breakdown_is_an_error_or_shrinks_the_step():
    layer = model()
    large = {"covariance": "full", "curvature": "hessian", "mc_samples": 0, "init_precision": 0.1}
    raising = SRVN(layer.parameters(), 1.0, 40, **large, on_breakdown="raise")
    with pytest.raises(ValueError, match="broke down"):
        raising.step(lambda: mean_loss(layer))
    assert torch.equal(raising.mean, torch.zeros(5, dtype=DTYPE))
    shrinking = SRVN(layer.parameters(), 1.0, 40, **large)
    for _ in range(60):
        before = shrinking.factor.diagonal().clone()
        shrinking.step(lambda: mean_loss(layer))
        assert float((shrinking.factor.diagonal() / before).min()) >= 0.5 - 1e-9
    assert shrinking.reductions > 3
    close(shrinking.precision, ridge()[1])
    close(shrinking.mean, ridge()[0])


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_a_shortened_step_is_the_pure_step_at_the_limit(covariance):
    """Mean and factor are shortened alike: all of them if full, each coordinate on its own if diagonal."""
    layer = model()
    optimizer = SRVN(layer.parameters(), 0.8, 40, covariance, "hessian", 0, init_precision=2.0)
    mean, precision = ridge()
    factor, gradient = optimizer.factor.clone(), -precision @ mean
    hessian = precision if covariance == "full" else precision.diagonal()
    limit = step_limit(whiten(factor, hessian)).clamp_max(0.8)
    assert float(limit.max()) < 0.8
    optimizer.step(lambda: mean_loss(layer))
    assert optimizer.reductions == 1
    if covariance == "full":
        expected = srvn_step(torch.zeros(5, dtype=DTYPE), factor, gradient, hessian, float(limit))
    else:
        whole = srvn_step(torch.zeros(5, dtype=DTYPE), factor, gradient, hessian, 1e-3)
        expected = whole[0] * limit / 1e-3, factor + (whole[1] - factor) * limit / 1e-3
    close(optimizer.mean, expected[0])
    close(optimizer.factor, expected[1])


def test_negative_curvature_stops_at_the_floor():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=DTYPE))
    optimizer = SRVN([weight], 0.0, 10, "diagonal", "hessian", 0, lr_covariance=0.5, min_precision=0.25)
    for _ in range(50):
        optimizer.step(lambda: -0.5 * weight.square().sum())
    close(optimizer.precision, torch.full((3,), 0.25, dtype=DTYPE))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_state_dict_continues_with_the_same_bits(covariance):
    def steps(layer, optimizer, count):
        for _ in range(count):
            optimizer.step(lambda: backward(mean_loss(layer)))
        return optimizer

    def backward(loss):
        loss.backward()
        return loss

    settings = {"lr": 0.05, "ess": 40, "covariance": covariance, "beta1": 0.9, "antithetic": True, "mc_samples": 1}
    one = model()
    first = steps(one, SRVN(one.parameters(), **settings, prior_precision=2.0), 3)
    two = model()
    two.load_state_dict(one.state_dict())
    second = SRVN(two.parameters(), **settings)
    second.load_state_dict(first.state_dict())
    steps(one, first, 3), steps(two, second, 3)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.factor, second.factor)
    other = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="shape"):
        SRVN(other.parameters(), **settings).load_state_dict(first.state_dict())


def test_set_posterior_and_what_is_uploaded():
    layer = model()
    optimizer = SRVN(layer.parameters(), 0.1, 40, "full")
    mean, precision = ridge()
    optimizer.set_posterior(mean, precision)
    close(optimizer.posterior[0], mean)
    close(optimizer.posterior[1], precision)
    with pytest.raises(InputError, match="precision"):
        optimizer.set_posterior(precision=-precision)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": -1.0}, "lr"),
        ({"ess": 0.0}, "ess"),
        ({"covariance": "diag"}, "covariance"),
        ({"curvature": "price"}, "curvature"),
        ({"mc_samples": 0}, "mc_samples"),
        ({"temperature": 0.0}, "temperature"),
        ({"beta1": 1.0}, "beta1"),
        ({"max_change": 1.0}, "max_change"),
        ({"on_breakdown": "stop"}, "on_breakdown"),
        ({"init_precision": -1.0}, "init_precision"),
        ({"prior_precision": torch.eye(5)}, "prior_precision"),
        ({"covariance": "full", "prior_precision": torch.eye(4)}, "prior_precision"),
        ({"covariance": "full", "min_precision": 0.1}, "min_precision"),
        ({"prior_mean": torch.zeros(3)}, "prior_mean"),
    ],
)
def test_bad_arguments(change, field):
    with pytest.raises(InputError) as error:
        SRVN(model().parameters(), **{"lr": 0.1, "ess": 40} | change)
    assert error.value.field == field


def test_misuse():
    layer = model()
    optimizer = SRVN(layer.parameters(), 0.1, 40)
    with pytest.raises(RuntimeError, match="must follow"):
        optimizer.step()
    with optimizer.sampled_params(train=True):
        pass
    with pytest.raises(RuntimeError, match="no parameter got a gradient"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params(), optimizer.sampled_params():
        pass
    with pytest.raises(InputError, match="one group"):
        SRVN([{"params": [layer.weight]}, {"params": [layer.bias]}], 0.1, 40)
    hessian = SRVN(layer.parameters(), 0.1, 40, curvature="hessian")
    with pytest.raises(RuntimeError, match="closure"), hessian.sampled_params(train=True):
        pass
