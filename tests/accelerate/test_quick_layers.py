"""Layers that replace torch's: same values and gradients, keyed masks of the right probability, torch's own
elsewhere.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, linearize, vmap

from bayesfed import accelerate
from bayesfed.accelerate.layers import LARGE, QuickConv2d, QuickDropout, QuickLinear, QuickMaxPool2d, quicken
from bayesfed.lowprecision import emulate_mx
from bayesfed.problem.flat import FlatModel


def net(channels: int = 3, pool: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), pool or nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.Flatten()
    )


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d((2, 3)),
        nn.MaxPool2d((2, 2), stride=2, padding=(0, 0)),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(2, stride=(2, 1)),
        nn.MaxPool2d(2, ceil_mode=True),
    ],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_convolution_and_pooling_give_torchs_values_and_gradients(pool: nn.Module, memory: torch.memory_format) -> None:
    plain = net(pool=pool)
    quick = copy.deepcopy(plain)
    quicken(quick)
    assert [type(layer) for layer in quick[:4]] == [QuickConv2d, nn.ReLU, QuickMaxPool2d, QuickConv2d]
    x = torch.randn(5, 3, 15, 14, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory)
    torch.testing.assert_close(quick(x), plain(x))
    for mine, torchs in zip(gradients(quick, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_the_pool_is_used_where_it_should_be_and_keeps_the_layout() -> None:
    layer = nn.Sequential(nn.MaxPool2d(2))
    quicken(layer)
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert type(y.grad_fn).__name__ == "_PoolBackward"
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert type(layer(x.detach().contiguous().requires_grad_()).grad_fn).__name__ != "_PoolBackward"


@pytest.mark.parametrize(
    ("options", "quick"),
    [
        ({"kernel_size": (2, 2)}, True),
        ({"kernel_size": 2, "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}, True),
        ({"kernel_size": [2, 3], "stride": (2, 3)}, True),
        ({"kernel_size": 2, "stride": (2, 1)}, False),
        ({"kernel_size": 2, "padding": (0, 1)}, False),
        ({"kernel_size": (2, 2), "dilation": (1, 2)}, False),
    ],
)
def test_a_number_and_a_pair_of_it_are_the_same_option(options: dict, quick: bool) -> None:
    x = torch.randn(2, 4, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert (type(QuickMaxPool2d(**options)(x).grad_fn).__name__ == "_PoolBackward") == quick


def test_outputs_have_their_channels_last_in_memory() -> None:
    quick = net()[:3]
    quicken(quick)
    assert quick(torch.randn(5, 3, 15, 14)).is_contiguous(memory_format=torch.channels_last)


def test_one_channel_and_subclasses_are_left_alone() -> None:
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(net(channels=1), Own(0.5))
    quicken(model)
    assert type(model[0][0]) is type(model[0][3]) is nn.Conv2d
    assert type(model[1]) is Own


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_dropout_keeps_the_mean_and_drops_its_share(p: float, memory: torch.memory_format) -> None:
    layer = QuickDropout(p)
    torch.manual_seed(3)
    x = torch.full((50, 20, 10, 10), 2.0).contiguous(memory_format=memory)
    y = layer(x)
    dropped = (y == 0).double()
    assert abs(dropped.mean() - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 2 / (1 - p)), rtol=1e-4, atol=0)
    assert y.is_contiguous(memory_format=memory)
    for axis in range(4):  # neighbours are independent
        one, other = dropped.narrow(axis, 1, x.shape[axis] - 1), dropped.narrow(axis, 0, x.shape[axis] - 1)
        assert abs(float(((one - p) * (other - p)).mean())) < 5 * p * (1 - p) / one.numel() ** 0.5


def test_dropout_follows_torchs_seed_and_its_gradient_is_its_mask() -> None:
    layer, x = QuickDropout(0.3), torch.ones(1001, requires_grad=True)
    torch.manual_seed(7)
    first = layer(x)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(gradient, first.detach())
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p: float) -> None:
    assert torch.equal(QuickDropout(p)(torch.ones(10)), torch.full((10,), 1 - p))
    assert torch.equal(QuickDropout(0.5).eval()(torch.ones(10)), torch.ones(10))


def test_the_layers_work_under_functorch_on_meta_and_in_float64() -> None:
    plain = net()
    quick = copy.deepcopy(plain)
    quicken(quick)
    x = torch.randn(4, 3, 10, 10)
    parameters = {name: value.detach() for name, value in plain.named_parameters()}

    def each(model: nn.Module) -> dict[str, torch.Tensor]:
        one = grad(lambda values, image: functional_call(model, values, (image[None],)).square().sum())
        return vmap(one, in_dims=(None, 0))(parameters, x)

    mine, torchs = each(quick), each(plain)
    for name in parameters:
        torch.testing.assert_close(mine[name], torchs[name], rtol=1e-4, atol=1e-4)
    wide = quick.to(torch.float64)
    torch.testing.assert_close(wide(x.double()), plain.to(torch.float64)(x.double()))
    assert quick.to("meta")(x.double().to("meta")).is_meta


def dense(bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """Two large linear layers and a small one; torch's and ours."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(1024, 1024, bias), nn.Tanh(), nn.Linear(1024, 1025, bias), nn.Linear(1025, 3))
    quick = copy.deepcopy(plain)
    quicken(quick)
    return plain, quick


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [2, 7])
def test_large_linear_layers_give_torchs_values_and_gradients(bias: bool, batch: int) -> None:
    plain, quick = dense(bias)
    assert [type(layer) for layer in quick] == [QuickLinear, nn.Tanh, QuickLinear, nn.Linear]
    x = torch.randn(batch, 1024)
    assert type(quick[0](x).grad_fn).__name__ == "_LinearBackward"
    torch.testing.assert_close(quick(x), plain(x))
    for mine, torchs in zip(gradients(quick, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)
    quick[0].weight.requires_grad_(False)
    (gradient,) = torch.autograd.grad(quick(x).sum(), quick[2].weight)
    assert gradient.shape == quick[2].weight.shape


def test_large_linear_layers_can_be_differentiated_twice() -> None:
    second = []
    for layer in dense():
        x = torch.linspace(-1, 1, 2048).view(2, 1024).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, layer[0].weight, layer[2].bias]))
    for torchs, mine in zip(*second, strict=True):
        assert torchs.abs().max() > 0
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-4)


def test_large_linear_layers_are_torchs_elsewhere() -> None:
    plain, quick = dense()
    x = torch.randn(2, 3, 1024)
    torch.testing.assert_close(quick(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(x[0]).dtype == torch.bfloat16
        torch.testing.assert_close(quick(x[0]), plain(x[0]))
    parameters = {name: value.detach() for name, value in plain.named_parameters()}
    assert type(quick[0](x[0][:1]).grad_fn).__name__ == "AddmmBackward0"  # oneDNN is slower there
    assert quick(x[0][:0]).shape == (0, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quick(x[0][:, :7])
    along = linearize(quick, x[0])[1](x[1])
    torch.testing.assert_close(along, linearize(plain, x[0])[1](x[1]))
    rows = vmap(lambda row: functional_call(quick, parameters, (row,)))(x[0])
    torch.testing.assert_close(rows, plain(x[0]))
    assert quick.to(torch.bfloat16)(x[0].bfloat16()).dtype == torch.bfloat16
    assert quick.to("meta")(x[0].bfloat16().to("meta")).is_meta
    assert plain[0].weight.numel() == LARGE


def test_low_precision_is_emulated_in_large_linear_layers() -> None:
    plain, quick = dense()
    x = torch.randn(4, 1024)
    exact = quick(x)
    for model in (plain, quick):
        emulate_mx(model, "e2m1")
    assert torch.equal(quick(x), plain(x))
    assert (quick(x) - exact).abs().max() > 0.01


def test_models_of_a_run_have_them_where_they_are_asked_for() -> None:
    model = FlatModel(net())
    with accelerate.running("off"):
        accelerate.prepare(model)
    assert type(model.module[0]) is nn.Conv2d
    accelerate.prepare(model)
    assert type(model.module[0]) is QuickConv2d
