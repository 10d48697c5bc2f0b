"""IVON against the equations: a transparent recursion with frozen noise, and the closed forms of its statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from bayesfed.seeding import torch_generator
from clients.optim import IVON

torch.set_num_threads(1)
BASE = {"lr": 0.05, "ess": 40.0, "hess_init": 0.3, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.02}


def network() -> nn.Module:
    generator = torch_generator(1, "network")
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model


X = torch.randn(9, 4, generator=torch_generator(2, "x"), dtype=torch.float64)
P = sum(p.numel() for p in network().parameters())


def loss_of(model: nn.Module) -> Tensor:
    return (model(X).tanh() - 0.5).square().mean()


def gradient(theta: Tensor) -> Tensor:
    model = network()
    nn.utils.vector_to_parameters(theta, model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model), list(model.parameters()))])


def vector(name: str, low: float, high: float) -> Tensor:
    return torch.empty(P, dtype=torch.float64).uniform_(low, high, generator=torch_generator(3, name))


def recursion(steps: int, samples: int = 1, **options) -> tuple[Tensor, Tensor]:
    """(mean, h) after ``steps`` of the published algorithm; arguments as for IVON, all vectors or numbers."""
    o = {**BASE, "clip_radius": math.inf, "debias": True, "rescale_lr": True, **options}
    ess, b1, b2, h0 = o["ess"], o["beta1"], o["beta2"], o["hess_init"]
    delta = o["prior_precision"] / ess if "prior_precision" in o else o["weight_decay"]
    m0, v, V = o.get("prior_mean", 0.0), o.get("site_linear", 0.0), o.get("site_quadratic", 0.0)
    average = (
        (lambda a: torch.as_tensor(a, dtype=torch.float64).mean())
        if o.get("hess_structure") == "scalar"
        else (lambda a: a)
    )
    noise = torch_generator(4, "noise")
    m = nn.utils.parameters_to_vector(network().parameters()).detach()
    h, mom, d = average(torch.full_like(m, h0)), torch.zeros_like(m), average(delta)
    for t in range(1, steps + 1):
        sigma, g, hhat = 1 / (ess * (h + d)).sqrt(), 0, 0
        for _ in range(samples):
            z = torch.empty_like(m).normal_(generator=noise)
            gs = gradient(m + sigma * z)
            g, hhat = g + gs / samples, hhat + average(gs * (sigma * z) / sigma**2 - V) / samples
        mom = b1 * mom + (1 - b1) * g
        h = b2 * h + (1 - b2) * hhat + 0.5 * (1 - b2) ** 2 * (h - hhat) ** 2 / (h + d)
        gbar = mom / (1 - b1**t) if o["debias"] else mom
        u = (gbar + delta * (m - m0) + v - V * m) / (h + d)
        m = m - o["lr"] * (h0 + d if o["rescale_lr"] else 1.0) * torch.as_tensor(u).clamp(
            -o["clip_radius"], o["clip_radius"]
        )
    return m, h


def run(optimizer: IVON, model: nn.Module, steps: int, samples: int = 1) -> None:
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                loss_of(model).backward()
        optimizer.step()


VECTORS = {
    "none": {},
    "scalars": {"prior_mean": 0.3, "prior_precision": 2.0, "site_linear": 0.1, "site_quadratic": -0.05},
    "prior mean": {"prior_mean": vector("m0", -1, 1)},
    "prior": {"prior_mean": vector("m0", -1, 1), "prior_precision": vector("s0", 0.5, 3)},
    "sites": {
        "prior_mean": vector("m0", -1, 1),
        "prior_precision": vector("s0", 4, 9),
        "site_linear": vector("v", -1, 1),
        "site_quadratic": vector("V", -0.05, 0.05),
    },
    "h0 = 0": {"prior_precision": vector("s0", 4, 9), "hess_init": 0.0},
    "linear site": {"site_linear": vector("v", -1, 1)},
}
SWITCHES = [
    {"rescale_lr": r, "debias": d, "clip_radius": c}
    for r, d, c in itertools.product([True, False], [True, False], [math.inf, 0.05])
]


@pytest.mark.parametrize("structure", ["diagonal", "scalar"])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("vectors", VECTORS)
def test_matches_the_recursion(structure: str, samples: int, vectors: str) -> None:
    for switches in SWITCHES:
        options = {**VECTORS[vectors], **switches, "hess_structure": structure}
        model = network()
        optimizer = IVON(
            model.parameters(), **{**BASE, **options}, noise="normal", generator=torch_generator(4, "noise")
        )
        run(optimizer, model, 6, samples)
        m, h = recursion(6, samples, **options)
        assert (optimizer.mean - m).abs().max() < 1e-12
        assert (optimizer.hess - h).abs().max() < 1e-12
        delta = options["prior_precision"] / 40 if "prior_precision" in options else 0.02
        damping = torch.as_tensor(delta, dtype=torch.float64).mean() if structure == "scalar" else delta
        assert torch.allclose(optimizer.precision, (40 * (h + damping)).expand(P), rtol=1e-12)
        assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), optimizer.mean)


@pytest.mark.parametrize("preset", [False, True])
@pytest.mark.parametrize("clear", [None, True, False])
def test_gradient_layouts_and_zero_grad_do_not_matter(preset: bool, clear: bool | None) -> None:
    model = network()
    if preset:  # parameters and gradients as views of one vector each
        values, grads = torch.empty(2, P, dtype=torch.float64)
        start = 0
        for p in model.parameters():
            piece = slice(start, start + p.numel())
            values[piece] = p.data.flatten()
            p.data, p.grad = values[piece].view(p.shape), grads[piece].view(p.shape)
            start += p.numel()
    optimizer = IVON(model.parameters(), **BASE, noise="normal", generator=torch_generator(4, "noise"))
    loss_of(model).backward()  # a stale gradient
    for _ in range(4):
        if clear is not None:
            optimizer.zero_grad(set_to_none=clear)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                if clear is not None:
                    optimizer.zero_grad(set_to_none=clear)
                loss_of(model).backward()
        optimizer.step()
    m, h = recursion(4, 2)
    assert (optimizer.mean - m).abs().max() < 1e-12
    assert (optimizer.hess - h).abs().max() < 1e-12
    if preset and clear is not True:
        assert torch.equal(values, optimizer.mean)
        assert all(
            p.grad is not None and p.grad.untyped_storage().data_ptr() == grads.untyped_storage().data_ptr()
            for p in model.parameters()
        )


def test_two_groups_with_their_own_settings() -> None:
    """A separable loss: each group has to follow the recursion of a problem of its own."""
    a, b = nn.Parameter(torch.tensor([0.5, -1.0]).double()), nn.Parameter(torch.ones(3).double())
    settings = [
        {"lr": 0.1, "ess": 10.0, "hess_init": 0.5, "weight_decay": 0.1, "clip_radius": 0.2, "beta1": 0.5, "beta2": 0.9},
        {
            "lr": 0.02,
            "ess": 99.0,
            "hess_init": 2.0,
            "weight_decay": 0.01,
            "clip_radius": math.inf,
            "beta1": 0.9,
            "beta2": 0.8,
        },
    ]
    groups = [{"params": [p], **s} for p, s in zip([a, b], settings, strict=True)]
    means = [torch.tensor([0.1, 0.2]).double(), 0.7]
    optimizer = IVON(groups, lr=1.0, ess=1.0, prior_mean=means, noise="normal", generator=torch_generator(4, "two"))
    noise = torch_generator(4, "two")
    states = [
        [p.detach().clone(), torch.full_like(p, s["hess_init"]).detach(), torch.zeros_like(p).detach()]
        for p, s in zip([a, b], settings, strict=True)
    ]
    for t in range(1, 6):
        with optimizer.sampled_params(train=True):
            (a.pow(4).sum() + b.exp().sum()).backward()
        optimizer.step()
        for state, s, m0, slope in zip(states, settings, means, [lambda x: 4 * x**3, torch.exp], strict=True):
            m, h, mom = state
            d, c = s["weight_decay"], 1 - s["beta2"]
            z = torch.empty_like(m).normal_(generator=noise)
            sigma = (s["ess"] * (h + d)).rsqrt()
            g = slope(m + sigma * z)
            mom = s["beta1"] * mom + (1 - s["beta1"]) * g
            r = h - g * z / sigma
            h = h - c * r + 0.5 * c**2 * r**2 / (h + d)
            u = (mom / (1 - s["beta1"] ** t) + d * (m - m0)) / (h + d)
            state[:] = m - s["lr"] * (s["hess_init"] + d) * u.clamp(-s["clip_radius"], s["clip_radius"]), h, mom
    assert torch.allclose(optimizer.mean, torch.cat([s[0] for s in states]), rtol=0, atol=1e-12)
    assert torch.allclose(optimizer.hess, torch.cat([s[1] for s in states]), rtol=0, atol=1e-12)


def test_loss_rescaling_leaves_the_trajectory() -> None:
    """loss -> c loss, ess -> ess / c, delta -> c delta, h0 -> c h0 with the un-rescaled rate."""
    c, results = 7.0, []
    for scale in (1.0, c):
        model = network()
        scaled = {**BASE, "ess": 40 / scale, "hess_init": 0.3 * scale, "weight_decay": 0.02 * scale}
        optimizer = IVON(model.parameters(), **scaled, rescale_lr=False, generator=torch_generator(5, "noise"))
        for _ in range(20):
            with optimizer.sampled_params(train=True):
                (scale * loss_of(model)).backward()
            optimizer.step()
        results.append(optimizer.posterior)
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-11)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-11)


def test_identical_contexts_count_once() -> None:
    """Three samples with the same noise are one sample: the statistics average, gradients do not accumulate."""
    results = []
    for samples in (1, 3):
        model, stream = network(), torch_generator(6, "noise")
        optimizer = IVON(model.parameters(), **BASE, generator=stream)
        for _ in range(5):
            state = stream.get_state()
            for _ in range(samples):
                stream.set_state(state)
                with optimizer.sampled_params(train=True):
                    loss_of(model).backward()
            optimizer.step()
        results.append((optimizer.mean, optimizer.hess))
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-12)


def test_precision_at_least_halves_per_step() -> None:
    """(h + delta)' = (h + delta) (1 + (1 - u)^2) / 2, whatever the gradients: here they are huge and adversarial."""
    p = nn.Parameter(torch.zeros(2000))
    optimizer = IVON([p], lr=0.1, ess=5.0, hess_init=0.1, beta2=0.5, weight_decay=0.01, generator=torch_generator(7))
    lowest, before = math.inf, optimizer.precision
    for t in range(60):
        with optimizer.sampled_params(train=True):
            (-(10.0 ** (t % 5 - 2)) * p.square().sum()).backward()  # negative curvature
        optimizer.step()
        lowest, before = min(lowest, float((optimizer.precision / before).min())), optimizer.precision
        assert float(optimizer.precision.min()) > 0
    assert 0.5 * (1 - 1e-4) <= lowest < 0.51


class Quadratic:
    """mean loss = theta' H theta / 2 - b' theta, repeated over many independent copies to average over the noise."""

    def __init__(self, copies: int) -> None:
        root = torch.randn(4, 3, generator=torch_generator(8, "H"), dtype=torch.float64)
        self.hessian = (root.T @ root / 4 + 0.3 * torch.eye(3)).double()
        self.b = torch.tensor([0.5, -1.0, 2.0]).double()
        self.theta = nn.Parameter(torch.tensor([0.2, 0.4, -0.3]).double().repeat(copies, 1))

    def loss(self) -> Tensor:
        return (0.5 * ((self.theta @ self.hessian) * self.theta).sum(1) - self.theta @ self.b).sum()


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("noise", ["quantile", "normal"])
def test_mean_and_variance_of_the_hessian_estimate(samples: int, noise: str) -> None:
    """beta2 = 0 exposes hhat: h' + delta = d (1 + (1 - u)^2) / 2 with u = (h - hhat) / d. Tolerances 3 %, 3 sd."""
    copies, ess, h0, delta, c = 120_000 // samples, 30.0, 0.8, 0.1, 1e-6
    problem = Quadratic(copies)
    m = problem.theta.detach()[0].clone()
    # With beta2 close to 1 the quadratic term vanishes and the movement of h is (1 - beta2) (hhat - h).
    optimizer = IVON(
        [problem.theta],
        lr=0,
        ess=ess,
        hess_init=h0,
        beta2=1 - c,
        weight_decay=delta,
        noise=noise,
        generator=torch_generator(9, noise),
    )
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            problem.loss().backward()
    optimizer.step()
    hhat = ((optimizer.hess - h0) / c + h0).view(copies, 3)
    sigma2, H, g = 1 / (ess * (h0 + delta)), problem.hessian, problem.hessian @ m - problem.b
    diagonal = H.diagonal()
    variance = (2 * diagonal**2 + (H.square().sum(1) - diagonal**2) + g**2 / sigma2) / samples
    assert ((hhat.mean(0) - diagonal).abs() < 4 * (variance / copies).sqrt()).all()
    assert torch.allclose(hhat.var(0), variance, rtol=0.03)


def test_transient_of_the_hessian() -> None:
    """E h_t - h* = beta2^t (h0 - h*): here at 300 steps of beta2 = .999, within 1 % of the distance."""
    problem, steps, b2, h0 = Quadratic(400), 300, 0.999, 3.0
    problem.theta.data[:] = torch.linalg.solve(problem.hessian, problem.b)
    optimizer = IVON(
        [problem.theta], lr=0, ess=1e4, hess_init=h0, beta2=b2, weight_decay=0, generator=torch_generator(10)
    )
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            problem.loss().backward()
        optimizer.step()
    expected = problem.hessian.diagonal() + b2**steps * (h0 - problem.hessian.diagonal())
    got = optimizer.hess.view(-1, 3).mean(0)
    assert ((got - expected).abs() < 0.01 * (h0 - problem.hessian.diagonal())).all()


def test_large_ess_is_deterministic_newton_momentum() -> None:
    """As ess grows the noise vanishes; with beta2 = 1, beta1 = 0, delta = 0 a step is gradient descent of size lr."""
    model, plain = network(), network()
    options = {"ess": 1e30, "beta1": 0.0, "beta2": 1.0, "weight_decay": 0.0, "hess_init": 0.7}
    optimizer = IVON(model.parameters(), lr=0.05, **options, generator=torch_generator(11))
    descent = torch.optim.SGD(plain.parameters(), lr=0.05)
    for _ in range(10):
        with optimizer.sampled_params(train=True):
            loss_of(model).backward()
        optimizer.step()
        descent.zero_grad()
        loss_of(plain).backward()
        descent.step()
    assert torch.allclose(
        optimizer.mean, nn.utils.parameters_to_vector(plain.parameters()).detach(), rtol=0, atol=1e-10
    )
