"""IVON as an optimizer: its contexts, errors, state, and memory layout."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayesfed.errors import InputError
from bayesfed.seeding import torch_generator
from clients.noise import Noise
from clients.optim import IVON

torch.set_num_threads(1)
X = torch.randn(16, 6, generator=torch_generator(1, "x"))


def network() -> nn.Module:
    model, generator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch_generator(2, "network")
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model


def build(model: nn.Module, **options) -> IVON:
    settings = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.9, "generator": torch_generator(3, "noise")}
    return IVON(model.parameters(), **{**settings, **options})


def train(optimizer: IVON, model: nn.Module, steps: int, samples: int = 1) -> None:
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                model(X).square().mean().backward()
        optimizer.step()


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("train_mode", [True, False])
def test_the_mean_returns_bit_for_bit(train_mode: bool) -> None:
    model = network()
    optimizer, before = build(model, ess=1e-3), values(model)  # large noise: mean = theta - noise would round
    with optimizer.sampled_params(train=train_mode):
        assert not torch.equal(values(model), before)
        assert torch.equal(optimizer.mean, before)
        model(X).sum().backward()
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_restores_the_mean_and_drops_the_samples(error: type[BaseException]) -> None:
    model = network()
    optimizer, before = build(model), values(model)
    with optimizer.sampled_params(train=True):
        model(X).sum().backward()

    def fail() -> None:
        with optimizer.sampled_params(train=True):
            model(X).sum().backward()
            raise error

    with pytest.raises(error):
        fail()
    assert torch.equal(values(model), before)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="completed"):
        optimizer.step()
    train(optimizer, model, 1)


def test_misuse_is_one_clear_error() -> None:
    model = network()
    optimizer, before = build(model), values(model)
    with pytest.raises(RuntimeError, match=r"sampled_params\(train=True\)"):
        optimizer.step()
    with optimizer.sampled_params():
        model(X).sum().backward()
        with pytest.raises(RuntimeError, match="completed"):
            optimizer.step()
    with pytest.raises(RuntimeError, match="completed"):
        optimizer.step()  # a sample without train=True collects nothing
    with optimizer.sampled_params(train=True):
        model(X)
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params(), optimizer.sampled_params():
        pass
    assert torch.equal(values(model), before)


def test_frozen_and_unused_parameters() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(4))
    optimizer, frozen = build(model, weight_decay=0.1), model[0].weight.detach().clone()
    with optimizer.sampled_params(train=True):
        assert torch.equal(model[0].weight, frozen)
        model(X).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight.grad is None
    # No gradient counts as gradient 0: only the prior pulls, with the h of hhat = 0.
    h = 0.9 * 0.5 + 0.5 * 0.01 * 0.25 / 0.6
    assert torch.allclose(model.unused, torch.full((4,), 1 - 0.1 * 0.6 * 0.1 / (h + 0.1)))
    assert optimizer.mean.numel() == 8 + 8 * 3 + 3 + 4


def test_a_whole_group_without_gradients() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    groups = [{"params": [used]}, {"params": [unused]}]
    optimizer = IVON(groups, lr=0.1, ess=10.0, weight_decay=0.0)
    for _ in range(3):
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                used.square().sum().backward()
        optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(3))


@pytest.mark.parametrize("noise", ["quantile", "normal"])
@pytest.mark.parametrize("structure", ["diagonal", "scalar"])
def test_state_dict_round_trip_gives_the_same_bits(noise: str, structure: str) -> None:
    total = 6 * 8 + 8 + 8 * 3 + 3
    vectors = {name: torch.rand(total, generator=torch_generator(4, name)) for name in ("prior_mean", "site_linear")}
    options = {**vectors, "prior_precision": torch.full((total,), 9.0), "site_quadratic": 0.01}
    model = network()
    optimizer = build(model, **options, noise=noise, hess_structure=structure)
    train(optimizer, model, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(optimizer, model, 3, samples=2)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    again = build(resumed, lr=9.0, noise=noise, hess_structure=structure, generator=torch_generator(99))
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 3, samples=2)
    assert torch.equal(values(model), values(resumed))
    assert torch.equal(optimizer.precision, again.precision)
    assert torch.equal(optimizer.hessian_moved(), again.hessian_moved())
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other parameters"):
        build(other).load_state_dict(saved["optimizer"])


def test_closure_form_is_the_same_as_contexts() -> None:
    results = []
    for closure_form in (True, False):
        model = network()
        optimizer = build(model, mc_samples=2)

        def closure(model: nn.Module = model, optimizer: IVON = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            return loss

        if closure_form:
            losses = [optimizer.step(closure) for _ in range(3)]
            assert all(loss is not None and not loss.requires_grad for loss in losses)
        else:
            train(optimizer, model, 3, samples=2)
        results.append(values(model))
    assert torch.equal(*results)


def test_evaluation_samples_do_not_disturb_a_step() -> None:
    """A sample for prediction between the training context and the step only advances the noise stream."""
    results = []
    for evaluate in (False, True):
        model, stream = network(), torch_generator(5, "noise")
        optimizer = build(model, generator=stream)
        with optimizer.sampled_params(train=True):
            model(X).square().mean().backward()
        if evaluate:
            with optimizer.sampled_params(), torch.no_grad():
                model(X)
        optimizer.step()
        results.append((values(model), optimizer.hess))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_runs_on_the_meta_device() -> None:
    model = nn.Linear(6, 3, device="meta")
    optimizer = IVON(model.parameters(), lr=0.1, ess=10.0, prior_precision=torch.ones(21, device="meta"))
    for samples in (1, 2):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                model(torch.empty(4, 6, device="meta")).sum().backward()
        optimizer.step()
    assert optimizer.precision.is_meta
    assert optimizer.hessian_moved().is_meta


@pytest.mark.parametrize("vectors", [False, True])
def test_a_step_allocates_no_parameter_sized_memory(vectors: bool) -> None:
    """After the first step the optimizer makes no tensor of P entries, with vector priors and sites neither."""
    p, grad = nn.Parameter(torch.ones(1 << 18)), torch.ones(1 << 18)
    names = ("prior_mean", "prior_precision", "site_linear", "site_quadratic") if vectors else ()
    options = {name: torch.full((1 << 18,), 0.1) for name in names}
    optimizer = IVON([p], lr=0.1, ess=10.0, noise="normal", generator=torch_generator(8), **options)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            p.grad = grad.clone()
        optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        with optimizer.sampled_params(train=True):
            p.grad = grad
        optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < grad.nbytes // 4


@pytest.mark.parametrize("vector", [False, True])
def test_the_precision_stays_positive_when_gradients_ask_for_less(vector: bool) -> None:
    p = nn.Parameter(torch.ones(20))
    precision = torch.linspace(1, 20, 20) if vector else 3.0
    optimizer = IVON([p], lr=0.1, ess=7.0, beta2=0.5, prior_precision=precision, rescale_lr=False)
    for _ in range(300):  # concave: the expected Hessian is far below zero
        with optimizer.sampled_params(train=True):
            (-100 * (p - p.detach().mean()).square()).sum().backward()
        optimizer.step()
        assert float(optimizer.precision.min()) > 0
    with optimizer.sampled_params():
        assert bool(torch.isfinite(p).all())


def test_parameters_become_views_and_existing_vectors_are_reused() -> None:
    model = network()
    before = values(model)
    optimizer = build(model)
    first = next(model.parameters())
    assert torch.equal(values(model), before)
    assert all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in model.parameters())
    address = first.data_ptr()
    build(model)
    assert first.data_ptr() == address
    model.load_state_dict(copy.deepcopy(network().state_dict()))
    first.data = torch.zeros_like(first)  # replaced behind the optimizer's back
    train(optimizer, model, 1)
    assert first.data_ptr() == address
    assert float(first.detach().abs().max()) < 1.0
    model.double()
    with pytest.raises(RuntimeError, match=r"after model\.to"):
        train(optimizer, model, 1)


def test_set_posterior_starts_from_a_gaussian() -> None:
    model = network()
    optimizer = build(model, prior_precision=4.0)
    train(optimizer, model, 2)
    total = optimizer.mean.numel()
    mean = torch.linspace(-1, 1, total)
    precision = torch.linspace(1, 9, total)  # below the prior's in places: h < 0 there
    optimizer.set_posterior(mean, precision)
    assert torch.equal(values(model), mean)
    assert torch.allclose(optimizer.precision, precision)
    assert float(optimizer.hess.min()) < 0
    assert float(optimizer.hessian_moved()) == 0
    fresh = network()
    other = build(fresh, prior_precision=4.0, hess=precision / 100 - 0.04)
    other.set_posterior(mean)
    for made in (optimizer, other):
        made.generator.manual_seed(0)
    train(optimizer, model, 3)
    train(other, fresh, 3)
    assert torch.allclose(values(model), values(fresh), rtol=0, atol=1e-6)
    assert float(optimizer.hessian_moved()) > 0.5
    for bad in (-1.0, 0.0, precision[:-1], torch.full((total,), math.nan)):
        with pytest.raises(InputError, match="precision"):
            optimizer.set_posterior(precision=bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", -0.1),
        ("ess", 0.0),
        ("hess_init", math.nan),
        ("beta1", 1.0),
        ("beta2", 1.1),
        ("weight_decay", -1e-4),
        ("mc_samples", 0),
        ("hess_approx", "gradsq"),
        ("clip_radius", 0.0),
        ("hess_structure", "full"),
        ("noise", "uniform"),
        ("prior_mean", torch.zeros(3)),
        ("prior_mean", "zero"),
        ("prior_precision", -1.0),
        ("prior_precision", torch.tensor([1.0] * 82 + [-1.0])),
        ("site_linear", [1.0, 2.0]),
        ("site_quadratic", math.inf),
        ("hess", -1.0),
    ],
)
def test_bad_arguments_are_named(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        build(network(), **{field: value})
    assert caught.value.field == field


def test_vector_arguments_in_every_form_agree() -> None:
    model = network()
    tensors = [torch.rand(p.shape, generator=torch_generator(9, i)) for i, p in enumerate(model.parameters())]
    flat = torch.cat([t.flatten() for t in tensors])
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    one = [build(model, prior_mean=form)._groups[0].prior_mean for form in (tensors, flat, [flat])]
    assert all(torch.equal(value, flat) for value in one)
    settings = {"lr": 0.1, "ess": 5.0, "prior_mean": [torch.ones(72), 2.0]}
    two = IVON([{"params": weights}, {"params": biases, "site_linear": 3.0}], **settings)
    assert torch.equal(two._groups[0].prior_mean, torch.ones(72))
    assert two._groups[1].prior_mean == 2.0
    assert (two._groups[0].site_linear, two._groups[1].site_linear) == (0.0, 3.0)


def test_precision_stays_positive_under_a_strong_negative_site() -> None:
    """V beyond delta would drive h + delta below zero in exact arithmetic's limit; float32 must not produce NaN."""
    model = network()
    optimizer = build(model, lr=0.0, prior_precision=1.0, site_quadratic=5.0, beta2=0.99)
    train(optimizer, model, 500)
    assert bool(torch.isfinite(optimizer.precision).all())
    assert float(optimizer.precision.min()) > 0
    assert bool(torch.isfinite(optimizer.mean).all())


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = network()
    stream = torch_generator(10, "shared")
    optimizer = build(model, sync=True, generator=stream)
    total = optimizer.mean.numel()
    for _ in range(3):
        for turn in range(2):  # the ranks take turns on one stream, as the two samples of one process do
            if turn == rank:
                with optimizer.sampled_params(train=True):
                    model(X).square().mean().backward()
            else:
                Noise("quantile", stream).fill(torch.empty(total))
        optimizer.step()
    torch.save(values(model), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_synchronised_ranks_are_one_process_with_two_samples(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    model = network()
    train(build(model, generator=torch_generator(10, "shared")), model, 3, samples=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ranks)
    assert torch.allclose(ranks[0], values(model), rtol=0, atol=1e-6)
