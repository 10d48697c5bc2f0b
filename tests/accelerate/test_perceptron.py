"""The perceptron's C function: torch's losses and gradients, and torch itself wherever more is asked for."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bayesfed import accelerate
from bayesfed.accelerate import library
from bayesfed.accelerate.layers import quicken
from bayesfed.accelerate.perceptron import PerceptronGradient, _multiply
from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.federation.local import LocalProblem
from bayesfed.problem import Categorical, Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.models import MLP, Linear
from bayesfed.seeding import torch_generator
from clients.ivon import IVONSolver
from clients.lmd import LMDSolver
from clients.point import PointSolver
from clients.srvn import SRVNSolver

torch.set_num_threads(1)
usable = shutil.which("cc") is not None and _multiply() is not None
needs_native = pytest.mark.skipif(not usable, reason="needs a C compiler and torch's sgemm")
SHAPE, CLASSES = (2, 3, 5), 4
cross_entropy = nn.functional.cross_entropy


def model(kind: type[nn.Module] = MLP, dtype: torch.dtype = torch.float32, **options: Any) -> FlatModel:
    torch.manual_seed(0)
    if kind is not Linear:
        options = {"hidden": [17, 9], "activation": "sigmoid", **options}
    net = FlatModel(kind(SHAPE, CLASSES, **options), dtype)
    accelerate.prepare(net)
    return net


def batch(size: int = 13, scale: float = 1.0, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch_generator(seed, "batch")
    x = scale * torch.randn(size, *SHAPE, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def pose(net: FlatModel, kind: type[LocalProblem] = LocalProblem, **changes: Any) -> LocalProblem:
    settings = {
        "model": net,
        "initial": net.vector.clone(),
        "data": Examples(*batch()),
        "likelihood": Categorical(),
        "server": diagonal(net),
        "site": None,
        "rho": 1.0,
        "temperature": 1.0,
        "proximal": 0.0,
        "learn_precision": True,
        "round": 1,
        "client": 0,
        "seed": 1,
    }
    return kind(**settings | changes)


def diagonal(net: FlatModel) -> DiagonalGaussian:
    return DiagonalGaussian.from_mean_precision(net.vector.clone(), torch.full_like(net.vector, 5.0))


def by_torch(net: FlatModel, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    net.drop_grad()
    loss = Categorical().loss(net(x), y)
    loss.backward()
    found = [p.grad for p in net.parameters]
    net.drop_grad()
    return loss.detach(), found


def by_function(net: FlatModel, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    function = PerceptronGradient.of(net)
    assert function is not None
    loss = function(cross_entropy, x, y)
    assert loss is not None
    found = [p.grad for p in net.parameters]
    net.drop_grad()
    return loss, found


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    for mine, torchs in zip(one[1], other[1], strict=True):
        assert mine.shape == torchs.shape
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=2e-6 * float(torchs.abs().max()))


@needs_native
@pytest.mark.parametrize(
    "options", [{}, {"activation": "relu"}, {"bias": False}, {"hidden": []}, {"hidden": [300, 5, 7, 6]}]
)
@pytest.mark.parametrize("size", [1, 2, 33])
def test_values_and_gradients_are_torchs(options: dict[str, Any], size: int) -> None:
    net = model(**options)
    x, y = batch(size)
    assert_same(by_function(net, x, y), by_torch(net, x, y))


@needs_native
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_model_too(bias: bool) -> None:
    net = model(Linear, bias=bias)
    assert_same(by_function(net, *batch()), by_torch(net, *batch()))


@needs_native
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_saturated_units_and_large_logits(activation: str) -> None:
    """Arguments of exp far beyond float32, where probabilities are 0 and 1."""
    net = model(activation=activation)
    with torch.no_grad():
        net.vector.mul_(30)
    x, y = batch(50, scale=40)
    one, other = by_function(net, x, y), by_torch(net, x, y)
    assert float(other[0]) > 10
    assert_same(one, other)


@needs_native
def test_exponentials_are_exact_to_float32() -> None:
    """Sigmoids read off the gradient of the output layer: probability - label = -1/2 of two equal logits, times the
    hidden unit.
    """
    torch.manual_seed(0)
    net = FlatModel(MLP((1,), 2, hidden=[1], activation="sigmoid"))
    with torch.no_grad():
        net.load(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    function = PerceptronGradient.of(net)
    for value in torch.linspace(-80, 80, 321):
        net.drop_grad()
        assert function(cross_entropy, value.view(1, 1), torch.tensor([0])) is not None
        found = -2 * net.parameters[2].grad[0, 0].double()
        assert float(found) == pytest.approx(float(torch.sigmoid(value.double())), rel=2e-7)


@needs_native
def test_inputs_need_not_be_contiguous() -> None:
    net = model()
    x, y = batch(20)
    x, y = x.transpose(0, 1).contiguous().transpose(0, 1)[::2], y.repeat_interleave(2)[::2][::2]
    assert not x.is_contiguous()
    assert not y.is_contiguous()
    assert_same(by_function(net, x, y), by_torch(net, x, y))


@needs_native
def test_gradients_are_new_tensors_every_time() -> None:
    net = model()
    first = by_function(net, *batch())[1]
    kept = [g.clone() for g in first]
    by_function(net, *batch(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@needs_native
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_what_is_not_finite_shows(activation: str) -> None:
    net = model(activation=activation)
    x, y = batch()
    x[3, 1, 1, 1] = torch.nan
    loss, gradients = by_function(net, x, y)
    assert loss.isnan()
    for mine, torchs in zip(gradients, by_torch(net, x, y)[1], strict=True):
        assert bool(mine.isnan().any())
        assert torch.equal(mine.isnan(), torchs.isnan())


@needs_native
def test_gives_up_where_torch_does_more() -> None:
    net = model()
    function = PerceptronGradient.of(net)
    x, y = batch()
    assert function(cross_entropy, x[:0], y[:0]) is None
    assert function(cross_entropy, x[:, :1], y) is None
    assert function(cross_entropy, x.double(), y) is None
    assert function(cross_entropy, x, y.int()) is None
    assert function(cross_entropy, x, y[:5]) is None
    assert function(cross_entropy, x, y.clone().index_fill_(0, torch.tensor([2]), CLASSES)) is None
    assert function(cross_entropy, x, y.clone().index_fill_(0, torch.tensor([2]), -1)) is None
    assert function(cross_entropy, x.clone().requires_grad_(), y) is None
    with torch.no_grad():
        assert function(cross_entropy, x, y) is None
    with FlopCounterMode(display=False):
        assert function(cross_entropy, x, y) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert function(cross_entropy, x, y) is None
    with torch.autograd.set_detect_anomaly(True):
        assert function(cross_entropy, x, y) is None
    with BaseTorchFunctionMode():
        assert function(cross_entropy, x, y) is None
    assert function(cross_entropy, x.to_sparse(), y) is None
    assert function(cross_entropy, torch._neg_view(x), y) is None
    net.parameters[1].grad = torch.ones_like(net.parameters[1])
    assert function(cross_entropy, x, y) is None
    assert net.parameters[0].grad is None


@needs_native
@pytest.mark.parametrize("watch", [
    lambda net, seen: net.parameters[2].register_hook(seen),
    lambda net, seen: net.parameters[2].register_post_accumulate_grad_hook(seen),
    lambda net, seen: net.module.layers[1].register_forward_hook(seen),
    lambda net, seen: net.module.layers[1].register_full_backward_hook(seen),
    lambda net, seen: register_module_forward_hook(seen),
])  # fmt: skip
def test_hooks_are_served_by_torch_whenever_they_come(watch) -> None:
    net = model()
    function = PerceptronGradient.of(net)
    assert function(cross_entropy, *batch()) is not None
    net.drop_grad()
    handle = watch(net, lambda *given: None)
    try:
        assert function(cross_entropy, *batch()) is None
    finally:
        handle.remove()
    assert function(cross_entropy, *batch()) is not None


@needs_native
def test_frozen_and_replaced_parts_too() -> None:
    net = model()
    function = PerceptronGradient.of(net)
    net.module.layers[0].requires_grad_(False)
    assert function(cross_entropy, *batch()) is None
    net.module.layers[0].requires_grad_(True)
    net.module.forward = lambda x: torch.zeros(len(x), CLASSES)
    assert function(cross_entropy, *batch()) is None
    del net.module.forward
    net.module.double()
    assert function(cross_entropy, *batch()) is None


@needs_native
def test_a_problem_with_a_loss_of_its_own_keeps_it() -> None:
    class Doubled(LocalProblem):
        def loss(self, x: Tensor, y: Tensor, amp: str = "none") -> Tensor:
            return 2 * super().loss(x, y, amp)

    smooth = Categorical()
    smooth.loss = lambda outputs, y: nn.functional.cross_entropy(outputs, y, label_smoothing=0.1)
    plain, x, y = pose(model()), *batch()
    loss = plain.backward(x, y)
    assert float(pose(model(), Doubled).backward(x, y)) == pytest.approx(2 * float(loss))
    assert float(pose(model(), likelihood=smooth).backward(x, y)) == pytest.approx(float(smooth.loss(model()(x), y)))


@needs_native
def test_a_problem_that_was_used_can_be_copied_and_sent() -> None:
    problem, x, y = pose(model()), *batch()
    loss = problem.backward(x, y)
    for copied in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem)), replace(problem, round=2)):
        copied.model.drop_grad()
        torch.testing.assert_close(copied.backward(x, y), loss)  # copies of models go without the function
        assert all(p.grad is not None for p in copied.model.parameters)
        problem.model.drop_grad()


def test_left_alone_where_it_does_not_fit(monkeypatch) -> None:
    class Own(MLP):
        pass

    def fits(net: FlatModel) -> bool:
        return PerceptronGradient.of(net) is not None

    assert fits(model()) == usable
    assert not fits(model(activation="tanh"))
    assert not fits(model(activation="gelu"))
    assert not fits(model(dtype=torch.float64))
    assert not fits(model(kind=Own))
    assert not fits(model(hidden=[3] * 40))
    frozen = MLP(SHAPE, CLASSES)
    frozen.layers[0].bias.requires_grad_(False)
    assert not fits(FlatModel(frozen))
    large = FlatModel(MLP((1100,), CLASSES, hidden=[1000]))
    quicken(large.module)
    assert not fits(large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not fits(model())


def test_without_a_compiler_torch_does_it(monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    library._compiled.cache_clear()
    try:
        assert PerceptronGradient.of(model()) is None
    finally:
        library._compiled.cache_clear()


SOLVERS = {
    "ivon": lambda: IVONSolver(lr=0.01, epochs=2, batch_size=8, noise="normal"),
    "ivon, two samples": lambda: IVONSolver(lr=0.01, epochs=1, batch_size=8, mc_samples=2),
    "srvon": lambda: SRVNSolver(lr=0.01, epochs=2, batch_size=8),
    "lmd": lambda: LMDSolver(lr=0.01, epochs=2, batch_size=8, signed=False),
    "sgd": lambda: PointSolver(optimizer="sgd", lr=0.1, epochs=2, batch_size=8, momentum=0.9),
    "adam, clipped": lambda: PointSolver(optimizer="adam", lr=0.01, epochs=2, batch_size=8, clip_norm=0.1),
}


@needs_native
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_learn_the_same_with_it(name: str, monkeypatch) -> None:
    calls = []
    call = PerceptronGradient.__call__
    monkeypatch.setattr(
        PerceptronGradient, "__call__", lambda self, loss, x, y: calls.append(len(x)) or call(self, loss, x, y)
    )
    means = []
    for mode in accelerate.MODES:
        with accelerate.running(mode):
            net = model()
        x, y = batch(30)
        family = name if name == "lmd" else name.split(",")[0]
        server = PointMass(net.vector.clone()) if family in ("sgd", "adam", "lmd") else diagonal(net)
        problem = pose(net, data=Examples(x, y), server=server)
        means.append(SOLVERS[name]().solve(problem).posterior.mean)
        if mode == "auto":
            assert sum(calls) == 60
    assert sum(calls) == 60  # none without it
    assert not torch.equal(means[0], model().vector)
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)
