"""A forward pass in MX formats for any model: the operands of its products are rounded, nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from bayesfed.errors import choice, integer
from bayesfed.lowprecision.mx import FORMATS, ROUNDINGS, quantize_mx

aten = torch.ops.aten


class MXForward(TorchDispatchMode):
    """Within ``with MXForward("e2m1"):`` the products of a forward pass see both operands in an MX format.

    Products are those of ``Linear``, convolutions, ``matmul``/``bmm``/``einsum`` and attention (query x key and weights
    x value, also inside ``scaled_dot_product_attention`` and ``nn.MultiheadAttention``). Blocks run along the reduction
    axis; for convolutions along the input channels. The order is that of OCP MX libraries: operands to bfloat16, to MX,
    product with wide accumulation, result to bfloat16, plus the bias in bfloat16, to bfloat16.

    It works below autograd, which saves the operands as they were: backward is that of the exact products (straight
    through), and is exact itself even if it runs inside the block. So no module is touched: parameters, ``state_dict``,
    hooks, ``torch.func.functional_call`` and ``torch.vmap`` are as before. (``torch.func.grad`` computes its backward
    as a part of the forward pass; call it around the block, not within.)

    Args:
        fmt: ``e2m1`` (MXFP4), ``e2m3`` or ``e3m2`` (MXFP6), ``e4m3`` (MXFP8).
        rounding: ties ``away`` from zero or to ``even``.
        block_size: values that share a scale.
        bfloat16: round to bfloat16 around the products, as above; False isolates the effect of MX.

    Raises:
        InputError: an unknown format or rounding, or a block size below 1.
    """

    def __init__(self, fmt: str, rounding: str = "away", block_size: int = 32, bfloat16: bool = True):
        choice("fmt", fmt, FORMATS)
        choice("rounding", rounding, ROUNDINGS)
        integer("block_size", block_size, at_least=1)
        super().__init__()
        self.fmt, self.rounding, self.block_size, self.bfloat16 = fmt, rounding, block_size, bfloat16
        self._settings: list[ExitStack] = []

    def __enter__(self) -> MXForward:
        stack = ExitStack()
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels hide their products
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        self._settings.append(stack)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._settings.pop().close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            return func(*args, **kwargs)
        product = _PRODUCTS.get(func.overloadpacket)
        if product is not None:
            return product(self, func, *args, **kwargs)
        if not _composite(func):
            return func(*args, **kwargs)
        with self:  # without autograd (inference_mode) operations arrive whole that are usually taken apart before
            return func.decompose(*args, **kwargs)

    def operand(self, x: Tensor, axis: int) -> Tensor:
        """``x`` in the format, blocks along ``axis``."""
        return quantize_mx(self.round(x), self.fmt, self.block_size, self.rounding, axis)

    def round(self, x: Tensor) -> Tensor:
        """``x`` rounded to bfloat16, in its own dtype."""
        return x.to(torch.bfloat16).to(x.dtype) if self.bfloat16 else x


def emulate_mx(
    module: nn.Module, fmt: str, rounding: str = "away", block_size: int = 32, bfloat16: bool = True
) -> RemovableHandle:
    """Let every forward pass of ``module`` run under :class:`MXForward`, whose arguments these are.

    The module stays what it is (a pair of hooks is added). To leave parts exact, call this on those that shouldn't be.

    Returns:
        a handle; ``remove()`` ends it.
    """
    passes = _Passes(MXForward(fmt, rounding, block_size, bfloat16))
    before = module.register_forward_pre_hook(passes.begin)
    after = module.register_forward_hook(passes.end, always_call=True)
    return _Handles(before, after)


class _Passes:
    """Forward hooks that enter and leave a mode."""

    def __init__(self, mode: MXForward):
        self.mode = mode

    def begin(self, module: nn.Module, args: Any) -> None:
        self.mode.__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.mode.__exit__(None, None, None)


class _Handles(RemovableHandle):
    """Two handles as one."""

    def __init__(self, first: RemovableHandle, second: RemovableHandle):
        self.linear, self.quadratic = first, second

    def remove(self) -> None:
        self.linear.remove()
        self.quadratic.remove()


@lru_cache(maxsize=1024)
def _composite(func: Any) -> bool:
    """Whether PyTorch defines an operation through others."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _add(mode: MXForward, bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta bias + alpha product`` with the roundings of a bias in bfloat16."""
    if beta == 0:  # then the bias must not be looked at
        return mode.round(product * alpha)
    return mode.round(mode.round(product * alpha) + mode.round(bias) * beta)


def _matrices(mode: MXForward, func: Any, a: Tensor, b: Tensor) -> Tensor:
    """mm, bmm, mv and dot: the last axis of ``a`` meets the last but one of ``b`` (its only one if it is a vector)."""
    result: Tensor = func(mode.operand(a, -1), mode.operand(b, max(-2, -b.ndim)))
    return mode.round(result)


def _added(product: Any) -> Callable[..., Tensor]:
    """addmm, baddbmm and addmv on top of ``product``."""

    def call(
        mode: MXForward, func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        result = product(mode.operand(a, -1), mode.operand(b, max(-2, -b.ndim)))
        return _add(mode, bias, result, beta, alpha)

    return call


def _linear(mode: MXForward, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = func(mode.operand(x, -1), mode.operand(weight, -1))
    return mode.round(result) if bias is None else _add(mode, bias, result, 1, 1)


def _convolution(mode: MXForward, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    transposed = others[3]
    result = func(mode.operand(x, 1), mode.operand(weight, 0 if transposed else 1), None, *others)
    if bias is None:
        return mode.round(result)
    return _add(mode, bias.view(-1, *[1] * (x.ndim - 2)), result, 1, 1)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm: _matrices,
    aten.bmm: _matrices,
    aten.mv: _matrices,
    aten.dot: _matrices,
    aten.addmm: _added(aten.mm),
    aten.baddbmm: _added(aten.bmm),
    aten.addmv: _added(aten.mv),
    aten.linear: _linear,
    aten.convolution: _convolution,
}
