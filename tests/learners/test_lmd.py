"""LMD against closed forms (docs/learners_lmd.md)."""

import math

import pytest
import torch

from clients.lmd.step import REGULARISERS, lmd_step
from clients.optim import LMD

F64 = {"dtype": torch.float64}


def leaf(*values):
    return torch.tensor(values, **F64).requires_grad_()


def flat_step(optimizer, steps):
    """Steps along a zero loss: only priors and regularisers act."""
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            sum(p.sum() for group in optimizer.param_groups for p in group["params"]).mul(0.0).backward()
        optimizer.step()


# -- closed forms of the unsigned rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("delta", "plus", "minus"), [(0.0, 1.4445664, 1.0077085), (0.7, 0.7217075, 0.3981090)])
def test_posterior_on_a_quadratic(delta, plus, minus):
    """Exact expectations of h/2 (w - w*)^2, entropy weight tau, L2 on each part."""
    h, target, tau, variance = 2.0, 0.5, 0.3, 0.09
    k = math.exp(variance)
    z, momentum = torch.zeros(2, 1, **F64), torch.zeros(2, 1, **F64)
    for _ in range(3000):
        m = z.exp()
        first = h * (m[0] ** 2 * k**2 - m[0] * m[1] * k - target * m[0] * math.sqrt(k))
        second = -h * (m[0] * m[1] * k - m[1] ** 2 * k**2 - target * m[1] * math.sqrt(k))
        penalty = REGULARISERS["l2"](m * math.exp(variance / 2), variance)
        lmd_step(
            z,
            momentum,
            torch.stack([first, second]),
            penalty,
            decay=delta,
            lr=0.1,
            beta1=0.9,
            beta2=0.9,
            signed=False,
            temperature=tau,
        )
    m = z.exp().flatten()
    assert m.tolist() == pytest.approx([plus, minus], abs=5e-8)
    assert float(m[0] - m[1]) == pytest.approx(h * target * k**-1.5 / (h + delta), rel=1e-12)
    assert float(m[0] * m[1]) == pytest.approx(tau / (k * ((h + delta) * k - h)), rel=1e-12)
    mean = float(m[0] - m[1]) * math.sqrt(k)
    assert mean == pytest.approx(h * target / k / (h + delta), rel=1e-12)
    if delta == 0:
        spread = float((m**2).sum()) * k * (k - 1)
        assert spread == pytest.approx(target**2 * (k - 1) / k**2 + 2 * tau / h, rel=1e-12)


def test_the_optimizer_finds_that_posterior_from_samples():
    """The same by Monte Carlo, through the optimizer: 500 copies of the problem average its noise."""
    p = torch.full((500,), 0.45, **F64).requires_grad_()
    optimizer = LMD(
        [p],
        lr=0.02,
        sigma=0.3,
        offset=1.1,
        beta1=0.5,
        beta2=0.5,
        decay=0.0,
        temperature=0.3,
        signed=False,
        mc_samples=3,
        generator=torch.Generator().manual_seed(0),
    )
    total = torch.zeros(2, **F64)
    for step in range(250):
        optimizer.step(lambda: _backward((p - 0.5).square().sum()))  # h = 2; each copy has its own mean loss
        if step >= 100:
            total += optimizer.log_median.exp().mean(1)
    assert (total / 150).tolist() == pytest.approx([1.4445664, 1.0077085], rel=0.03)


def _backward(loss):
    loss.backward()
    return loss


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_lognormal_target(sigma):
    """With a log-normal prior alone, the median's log error contracts by 1 - lr/b^2 a step, for any sigma."""
    a, b2, lr = 0.7, 2.0, 0.1
    optimizer = LMD(
        [leaf(0.0, 3.0, -2.0)],
        lr=lr,
        sigma=sigma,
        decay=1 / b2,
        regulariser="lognormal",
        prior_median=math.exp(a),
        signed=False,
    )
    error = optimizer.log_median - a
    for _ in range(5):
        flat_step(optimizer, 1)
        error = error * (1 - lr / b2)
        torch.testing.assert_close(optimizer.log_median - a, error, rtol=1e-12, atol=1e-13)
    flat_step(optimizer, 600)
    torch.testing.assert_close(optimizer.log_median.exp(), torch.full((2, 3), math.exp(a), **F64), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("regulariser", "fixed_point"),
    [
        ("l2", lambda tau, decay, s2: math.sqrt(tau / decay) * math.exp(-s2)),
        ("l1", lambda tau, decay, s2: tau / decay * math.exp(-s2 / 2)),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
def test_fixed_points_without_data(regulariser, fixed_point, signed):
    """Without data the sign is 0, so both variants have them."""
    tau, decay, sigma = 0.2, 0.8, 0.4
    optimizer = LMD(
        [leaf(0.5, -2.0)],
        lr=0.1,
        sigma=sigma,
        decay=decay,
        regulariser=regulariser,
        temperature=tau,
        signed=signed,
        beta2=0.9,
    )
    flat_step(optimizer, 1500)
    expected = torch.full((2, 2), fixed_point(tau, decay, sigma**2), **F64)
    torch.testing.assert_close(optimizer.log_median.exp(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_two_momenta(signed):
    """Three steps by hand: the update mixes with beta1, the memory with beta2, and terms of a prior stay out of it."""
    generator = torch.Generator().manual_seed(0)
    z, momentum, pull = torch.randn(3, 2, 4, generator=generator, **F64)
    found, memory = z.clone(), momentum.clone()
    for _ in range(3):
        g, reg = torch.randn(2, 2, 4, generator=generator, **F64)
        lmd_step(
            found,
            memory,
            g.clone(),
            reg,
            lr=0.1,
            beta1=0.6,
            beta2=0.95,
            signed=signed,
            temperature=0.2,
            pull=(pull, 0.3),
        )
        entropy = 0.0 if signed else 0.2
        direction = 0.6 * momentum + 0.4 * (g - entropy) + pull + 0.3 * z
        momentum = 0.95 * momentum + 0.05 * (g - entropy)
        z = z - 0.1 * ((direction.sign() - 0.2 if signed else direction) + reg)
    torch.testing.assert_close(found, z, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(memory, momentum, rtol=1e-12, atol=1e-13)


# -- terms of a federation ---------------------------------------------------------------------------------------------


def test_federated_terms_enter_the_gradient():
    """No data, unsigned: the fixed point of prior and site, prior_precision (z - z_g) + v - V z = 0."""
    z_g, v = torch.randn(2, 3, **F64), torch.randn(2, 3, **F64)
    optimizer = LMD(
        [leaf(0.5, -1.0, 0.0)],
        lr=0.5,
        decay=0.0,
        signed=False,
        prior_log_median=z_g,
        prior_precision=0.7,
        site_linear=v,
        site_quadratic=0.2,
    )
    flat_step(optimizer, 200)
    torch.testing.assert_close(optimizer.log_median, (0.7 * z_g - v) / 0.5, rtol=1e-12, atol=1e-12)


# -- the signed rule ---------------------------------------------------------------------------------------------------


def push(optimizer, p, steps):
    """A gradient of constant sign: all weights are to grow."""
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            p.sum().neg().backward()
        optimizer.step()


@pytest.mark.parametrize(("regulariser", "cap"), [("l1", 1 / 0.4), ("l2", 0.4**-0.5)])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_decay_caps_the_medians(regulariser, cap, sigma):
    """Under a persistent sign, m rises to where R = 1: 1/decay or decay^-1/2 (of E[u], of E[u^2]^1/2 with noise)."""
    p = leaf(0.1, 1.0)
    optimizer = LMD([p], lr=0.05, sigma=sigma, decay=0.4, regulariser=regulariser)
    push(optimizer, p, 800)
    expected = cap * math.exp(-(sigma**2) * (0.5 if regulariser == "l1" else 1.0))
    assert optimizer.log_median[0].exp().tolist() == pytest.approx([expected] * 2, rel=1e-8)


def test_without_decay_medians_grow_exponentially():
    p = leaf(0.1, 1.0)
    optimizer = LMD([p], lr=0.05, decay=0.0)
    before = optimizer.log_median
    push(optimizer, p, 300)
    torch.testing.assert_close(
        optimizer.log_median, before + torch.tensor([[15.0], [-15.0]], **F64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("sigma", [0.0, 0.6])
def test_product_of_the_medians_is_kept(sigma):
    """No decay, no momentum, one sample: m+ m- is constant and log(m+/m-)/2 moves by lr."""
    p = leaf(0.3, -0.2, 1.5, 0.0)
    optimizer = LMD([p], lr=0.03, sigma=sigma, beta1=0.0, decay=0.0, generator=torch.Generator().manual_seed(3))
    target = torch.tensor([1.0, 0.4, -0.3, -2.0], **F64)
    product, ratio = optimizer.log_median.sum(0), -optimizer.log_median.diff(dim=0)[0] / 2
    for _ in range(40):
        with optimizer.sampled_params(train=True):
            (p - target).square().sum().backward()
        optimizer.step()
        moved = -optimizer.log_median.diff(dim=0)[0] / 2 - ratio
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.03), rtol=1e-9, atol=0)
        torch.testing.assert_close(optimizer.log_median.sum(0), product, rtol=0, atol=1e-13)
        ratio = ratio + moved


def test_without_noise_and_sign_it_is_eg_with_scaled_gradients():
    """sigma = 0, unsigned, no momentum: m+- <- m+- exp(-+ lr m+- g)."""
    p = leaf(0.3, -0.2, 1.5)
    optimizer = LMD([p], lr=0.1, sigma=0.0, beta1=0.0, beta2=0.0, decay=0.0, signed=False, offset=0.2)
    plus, minus = p.detach().clamp(min=0) + 0.2, p.detach().neg().clamp(min=0) + 0.2
    for _ in range(25):
        optimizer.step(lambda: _backward((p - 1).pow(4).sum()))
        g = 4 * (plus - minus - 1) ** 3
        plus, minus = plus * torch.exp(-0.1 * plus * g), minus * torch.exp(0.1 * minus * g)
    torch.testing.assert_close(p.detach(), plus - minus, rtol=1e-10, atol=1e-12)


def test_a_step_is_bounded():
    """|change of log m| <= lr (1 + max R), and exactly lr |sign + R|."""
    torch.manual_seed(0)
    p = torch.randn(200, **F64).requires_grad_()
    optimizer = LMD([p], lr=0.02, decay=0.3, sigma=0.2)
    for _ in range(20):
        before = optimizer.log_median
        reg = 0.3 * (before + 0.02).exp()
        optimizer.step(lambda: _backward((p - p.detach().roll(1)).square().sum() + p.pow(3).sum()))
        moved = (optimizer.log_median - before) / -0.02
        assert float(moved.abs().max()) <= 1 + float(reg.max()) + 1e-9
        torch.testing.assert_close((moved - reg).abs(), torch.ones_like(moved), rtol=0, atol=1e-10)


# -- samples and initialisation ----------------------------------------------------------------------------------------


def test_moments_of_the_weights():
    """E and Var of w over 20,000 draws; and the mean at the start is the parameter's value."""
    values = torch.tensor([0.5, -1.0, 0.0, 2.0], **F64)
    p = values.clone().requires_grad_()
    optimizer = LMD([p], sigma=0.3, offset=0.4, noise="normal", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(p.detach(), values, rtol=1e-14, atol=1e-15)
    draws = []
    for _ in range(20_000):
        with optimizer.sampled_params():
            draws.append(p.detach().clone())
    assert torch.equal(p.detach(), optimizer.mean)
    draws = torch.stack(draws)
    error = optimizer.posterior.variance.div(len(draws)).sqrt()
    assert bool(((draws.mean(0) - values).abs() < 4 * error).all())
    torch.testing.assert_close(draws.var(0), optimizer.posterior.variance, rtol=0.05, atol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0])
def test_initialisation_keeps_the_mean(sigma):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 5))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = LMD(model.parameters(), sigma=sigma)
    for p, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)
    assert bool(optimizer.log_median.isfinite().all())
    smaller = optimizer.log_median.amin(0).add(sigma**2 / 2).exp()
    assert float(smaller[:600].std()) < 1e-6  # one offset in a tensor: half the standard deviation of its entries
    assert float(smaller[0]) == pytest.approx(0.5 * float(before[0].std(correction=0)), rel=1e-5)
    assert smaller[620:640].tolist() == pytest.approx([0.05] * 20, rel=1e-5)  # the gains of LayerNorm


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -7.0])
def test_a_constant_tensor_has_movable_parts(value):
    """Rounding makes the computed spread of equal numbers positive; an offset of that size could never move."""
    optimizer = LMD([torch.full((1000,), value, **F64).requires_grad_()], sigma=0.0)
    assert optimizer.log_median.amin(0).exp().tolist() == pytest.approx([0.05] * 1000, rel=1e-5)


def test_swapping_the_parts_mirrors_the_run():
    """(m+, m-) -> (m-, m+) and w -> -w with the same noise."""

    def run(sign):
        p = leaf(0.3, -0.2, 1.5)
        p.data *= sign
        optimizer = LMD([p], lr=0.05, sigma=0.3, noise="normal")
        noise = torch.randn(30, 2, 3, generator=torch.Generator().manual_seed(0), **F64)
        rows = iter(noise if sign > 0 else noise.flip(1))
        optimizer._noise.fill = lambda out: out.copy_(next(rows).flatten())
        for _ in range(30):
            optimizer.step(lambda: _backward((sign * p - 0.7).square().sum()))
        return sign * p.detach()

    torch.testing.assert_close(run(1), run(-1), rtol=1e-12, atol=1e-12)


def test_medians_stay_positive_under_huge_steps():
    p = leaf(0.3, -0.2, 1.5)
    optimizer = LMD([p], lr=5.0, sigma=0.5, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        optimizer.step(lambda: _backward((p - 1).square().sum()))
    assert bool((optimizer.log_median.exp() > 0).all())
    assert bool(p.isfinite().all())
