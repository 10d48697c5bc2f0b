"""Forward passes in MX formats against `quantize_mx` applied by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from bayesfed.errors import InputError
from bayesfed.lowprecision import MXForward, emulate_mx, quantize_mx

FORMATS = ["e2m1", "e2m3", "e3m2", "e4m3"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bf16(x):
    return x.bfloat16().float()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("rounding", ["away", "even"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False, "inference"])
@pytest.mark.parametrize("rows", [(5,), (2, 5), ()])
def test_linear(fmt, rounding, bias, grad, rows):
    """bf16 operands to MX, product, to bf16, plus bias in bf16, to bf16."""
    layer, x = nn.Linear(70, 9, bias=bias), randn(*rows, 70)
    emulate_mx(layer, fmt, rounding)
    with torch.inference_mode(grad == "inference"), torch.set_grad_enabled(grad is True):
        y = layer(x)
    weight = quantize_mx(bf16(layer.weight), fmt, rounding=rounding)
    expected = bf16(quantize_mx(bf16(x), fmt, rounding=rounding) @ weight.T)
    if bias:
        expected = bf16(expected + bf16(layer.bias))
    torch.testing.assert_close(y, expected.detach(), rtol=2**-7, atol=1e-5)  # one bf16 ulp: sums in another order
    assert float((y != expected).float().mean()) < 0.05
    assert not torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))


def test_straight_through_backward():
    """The gradients are those of the exact product: of the operands as they were."""
    layer, x = nn.Linear(64, 8), randn(5, 64).requires_grad_()
    emulate_mx(layer, "e2m1")
    g = randn(5, 8, seed=1)
    layer(x).backward(g)
    torch.testing.assert_close(layer.weight.grad, g.T @ x.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, g @ layer.weight.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), rtol=1e-6, atol=1e-6)


def test_a_backward_pass_within_the_block_is_exact_too():
    w = randn(8, 64).requires_grad_()
    x, g = randn(5, 64, seed=2), randn(5, 8, seed=1)
    with MXForward("e2m1"):
        (x @ w.T).backward(g)
    torch.testing.assert_close(w.grad, g.T @ x, rtol=1e-6, atol=1e-6)


def test_without_bfloat16_only_operands_are_rounded_and_that_is_idempotent():
    x, w = quantize_mx(randn(5, 64), "e3m2"), quantize_mx(randn(8, 64, seed=1), "e3m2")
    with MXForward("e3m2", bfloat16=False):
        assert torch.equal(x @ w.T, torch.mm(x, w.T))
        inside = x @ w.T
    assert torch.equal(inside, x @ w.T)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv2d(40, 6, 3, stride=2, padding=1), (2, 40, 7, 7), 1),
        (nn.Conv1d(40, 6, 3), (2, 40, 9), 1),
        (nn.Conv3d(3, 4, 2), (1, 3, 4, 4, 4), 1),
        (nn.Conv2d(40, 6, 3, groups=2, bias=False), (2, 40, 5, 5), 1),
        (nn.ConvTranspose2d(40, 6, 3), (2, 40, 5, 5), 0),
    ],
)
def test_convolutions_have_blocks_along_the_input_channels(layer, shape, axis):
    x = randn(*shape)
    exact = copy.deepcopy(layer)
    exact.weight.data = quantize_mx(layer.weight, "e2m3", axis=axis)
    emulate_mx(layer, "e2m3", bfloat16=False)
    torch.testing.assert_close(layer(x), exact(quantize_mx(x, "e2m3", axis=1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "product", [torch.matmul, torch.bmm, lambda a, b: a @ b, lambda a, b: torch.einsum("bij,bjk->bik", a, b)]
)
def test_matrix_products(product):
    a, b = randn(3, 5, 40), randn(3, 40, 6, seed=1)
    expected = torch.bmm(quantize_mx(a, "e2m1"), quantize_mx(b, "e2m1", axis=-2))
    with MXForward("e2m1", bfloat16=False):
        y = product(a, b)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_attention_rounds_both_of_its_products():
    """scaled_dot_product_attention: queries and keys along features, weights and values along positions."""
    q, k, v = (randn(2, 3, 40, 16, seed=s) for s in range(3))
    half = math.sqrt(1 / math.sqrt(16))  # PyTorch scales both operands, here by a power of two
    mask = torch.ones(40, 40).tril().bool()
    scores = quantize_mx(q * half, "e3m2") @ quantize_mx(k * half, "e3m2").mT
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = quantize_mx(weights, "e3m2") @ quantize_mx(v, "e3m2", axis=-2)
    with MXForward("e3m2", bfloat16=False):
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert float((y - exact).abs().max()) > 0.01


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention_in_every_path(need_weights, grad):
    """The module's fast path, which has no visible products, is not taken."""
    layer, x = nn.MultiheadAttention(32, 2, batch_first=True).eval(), randn(2, 40, 32)

    def project(h, w, b):
        return quantize_mx(h, "e2m1") @ quantize_mx(w, "e2m1").T + b

    with torch.no_grad():
        parts = project(x, layer.in_proj_weight, layer.in_proj_bias).view(2, 40, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        weights = (quantize_mx(q / 2, "e2m1") @ quantize_mx(k / 2, "e2m1").mT).softmax(-1)
        mixed = quantize_mx(weights, "e2m1") @ quantize_mx(v, "e2m1", axis=-2)
        expected = project(mixed.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)
    emulate_mx(layer, "e2m1", bfloat16=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(grad):
        y = layer(x, x, x, need_weights=need_weights)[0]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    # a sum in another order can move a value over a rounding boundary: few entries, one quantum
    assert float(((y - expected).abs() > 1e-4).float().mean()) < 0.1
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.05)


def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_the_module_stays_what_it_is():
    net, x = model(), randn(3, 1, 8, 8)
    names, exact = list(net.state_dict()), net(x)
    handle = emulate_mx(net, "e2m1")
    assert list(net.state_dict()) == names
    rounded = net(x)
    assert not torch.equal(rounded, exact)
    assert torch.equal(copy.deepcopy(net)(x), rounded)
    handle.remove()
    assert torch.equal(net(x), exact)


def test_functional_call_and_vmap():
    """A stack of parameters gives what each gives alone."""
    net, x = model(), randn(3, 1, 8, 8)
    emulate_mx(net, "e2m3", bfloat16=False)
    stacks = {n: p.detach() + 0.1 * randn(4, *p.shape, seed=i) for i, (n, p) in enumerate(net.named_parameters())}
    together = torch.vmap(lambda p: functional_call(net, p, (x,)))(stacks)
    for i in range(4):
        alone = functional_call(net, {n: p[i] for n, p in stacks.items()}, (x,))
        error = (together[i] - alone).abs()  # a sum in another order can move a value over a rounding boundary
        assert float(error.median()) < 1e-5
        assert float(error.max()) < 0.05
        plain = functional_call(model(), {n: p[i] for n, p in stacks.items()}, (x,))
        assert float((alone - plain).abs().median()) > 2e-3


def test_vmap_of_quantize_mx():
    x = randn(4, 6, 40)
    assert torch.equal(torch.vmap(lambda r: quantize_mx(r, "e2m1", axis=0))(x), quantize_mx(x, "e2m1", axis=1))


def test_a_part_of_a_model_and_an_error_in_it():
    net, x = model(), randn(3, 1, 8, 8)
    emulate_mx(net[3], "e2m1", bfloat16=False)
    features = net[2](net[1](net[0](x)))
    expected = quantize_mx(features, "e2m1") @ quantize_mx(net[3].weight, "e2m1").T + net[3].bias
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        net[3](randn(2, 5))
    a, b = randn(4, 40), randn(40, 4, seed=1)
    assert torch.equal(a @ b, torch.mm(a, b))
    with MXForward("e2m1"):
        pass
    torch.testing.assert_close(a.double() @ b.double(), (a @ b).double(), rtol=1e-5, atol=1e-5)  # the mode was left


def test_formats_are_ordered_by_their_error():
    net, x = model().requires_grad_(False), randn(64, 1, 8, 8)
    exact, errors = net(x), []
    for fmt in ("e4m3", "e3m2", "e2m1"):
        with MXForward(fmt):
            errors.append(float((net(x) - exact).norm() / exact.norm()))
    assert errors[0] < 0.07 < errors[2] < 0.4
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("options", "field"), [({"fmt": "fp4"}, "fmt"), ({"rounding": "up"}, "rounding"), ({"block_size": 0}, "block_size")]
)
def test_errors(options, field):
    with pytest.raises(InputError) as error:
        emulate_mx(nn.Linear(2, 2), **({"fmt": "e2m1"} | options))
    assert error.value.field == field
