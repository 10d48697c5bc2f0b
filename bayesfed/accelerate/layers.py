"""Linear layers, convolution, max-pooling and dropout that compute what torch's do, in less time on a CPU
(docs/performance.md).

Convolutions are fastest when the channels of a pixel lie next to each other in memory, but torch keeps images the way
they come; it copies the gradient of a max-pooling in that layout twice; it draws the masks of dropout one float at a
time; and it multiplies small batches by large matrices with MKL, which copies the matrix first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

_LEVELS = 2**16
LARGE = 2**20  # weights; smaller matrices stay in the cache, where MKL is as fast


def quicken(module: nn.Module) -> None:
    """Swap the classes of ``nn.Conv2d``, ``nn.MaxPool2d``, ``nn.Dropout`` and large ``nn.Linear`` layers; parameters,
    names, hooks and options stay.

    Subclasses are left alone, and so are convolutions in a model whose first one sees a single channel: there changing
    the layout can cost more than it wins. On other devices, in float64, under ``torch.func`` and in forward mode the
    new layers do what torch's do.
    """
    layers = list(module.modules())
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    kept = {QuickConv2d} if first is None or first.in_channels == 1 else set()
    for layer in layers:
        quick = _QUICK.get(type(layer), type(layer))
        small = type(layer) is nn.Linear and layer.weight.numel() < LARGE
        if quick not in kept and not small:
            layer.__class__ = quick


def _plain(x: Tensor) -> bool:
    """A float32 or bfloat16 tensor on the CPU, not one of ``torch.func``'s, and no derivatives in forward mode."""
    narrow = x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"
    return narrow and not torch._C._functorch.is_functorch_wrapped_tensor(x) and forward_ad._current_level < 0


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _pair(value: Any) -> tuple[int, ...]:
    """An option of a layer for both directions, which it keeps as it was given."""
    return (value, value) if isinstance(value, int) else tuple(value)


def watched() -> bool:
    """Whether somebody looks for torch's own operations: modes (the emulation of low precision is one), autocast,
    anomaly detection, hooks on all modules.
    """
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    noticed = torch.is_autocast_enabled("cpu") or torch.is_anomaly_enabled()
    return modes > 0 or noticed or nn.modules.module._has_any_global_hook()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN, whose kernels read matrices as they lie; autograd knows nothing of it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """``x weight^T + bias`` for x (B, in), float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        # gradients that are to be differentiated again have to be made of operations that can be
        product = functional.linear if torch.is_grad_enabled() else _onednn
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.t()) if to_x else None,
            product(gradient.t(), x.t()) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


class QuickLinear(nn.Linear):
    """``nn.Linear`` for batches of vectors (B, in), B > 1, and a matrix that does not fit the cache."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        if not self._suits(input):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)

    def _suits(self, x: Tensor) -> bool:
        """Whether oneDNN can be called."""
        single = all(t.dtype == torch.float32 and _plain(t) for t in (x, self.weight))
        shape = x.dim() == 2 and len(x) > 1 and x.shape[1] == self.in_features
        return single and shape and not watched() and torch._C._get_mkldnn_enabled()


class QuickConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose output has its channels last in memory, and so all that follows it."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() == 4 and _plain(input) and _plain(weight):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return super()._conv_forward(input, weight, bias)


class _Pool(torch.autograd.Function):
    """Max-pooling, windows side by side, of images with their channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Any) -> Tensor:  # type: ignore[override]
        y, winners = functional.max_pool2d(x, size, return_indices=True)
        ctx.save_for_backward(winners)
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (winners,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        passed = gradient.new_zeros(batch, height * width, channels)
        rows = [t.permute(0, 2, 3, 1).reshape(batch, -1, channels) for t in (winners, gradient)]
        passed.scatter_(1, *rows)
        return passed.view(batch, height, width, channels).permute(0, 3, 1, 2), None


class QuickMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` whose backward pass keeps channels last in memory; same values and gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.MaxPool2d``."""
        side_by_side = (_pair(self.stride), _pair(self.padding), _pair(self.dilation)) == (
            _pair(self.kernel_size),
            (0, 0),
            (1, 1),
        )
        usual = not self.ceil_mode and not self.return_indices
        if side_by_side and usual and _plain(input) and _channels_last(input):
            return _Pool.apply(input, self.kernel_size)
        return super().forward(input)


class QuickDropout(nn.Dropout):
    """``nn.Dropout`` that draws 16 random bits an element, from torch's global generator: ``p`` is rounded to a
    multiple of 2^-16.

    Its masks are other draws than torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Dropout``."""
        dropped = round(self.p * _LEVELS)
        if not self.training or not 0 < dropped < _LEVELS or not _plain(input):
            return super().forward(input)
        count = input.numel()
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=input.device).random_(-(2**63), None)
        kept = (words.view(torch.int16)[:count] >= dropped - _LEVELS // 2).to(input.dtype)
        kept *= _LEVELS / (_LEVELS - dropped)
        if _channels_last(input):
            batch, channels, height, width = input.shape
            kept = kept.view(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            kept = kept.view(input.shape)
        return input.mul_(kept) if self.inplace else input * kept


_QUICK: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: QuickConv2d,
    nn.Linear: QuickLinear,
    nn.MaxPool2d: QuickMaxPool2d,
    nn.Dropout: QuickDropout,
}
