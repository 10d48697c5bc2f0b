"""Microscaling (MX) formats: blocks of small floats that share one power-of-two scale (OCP MX v1.0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesfed.errors import choice, integer


@dataclass(frozen=True)
class ElementFormat:
    """A sign, `exponent_bits` and `mantissa_bits`; values up to `largest` < 2^(largest_exponent + 1)."""

    exponent_bits: int
    mantissa_bits: int
    largest_exponent: int
    largest: float

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 2 - int(2 ** (self.exponent_bits - 1))


FORMATS = {
    "e2m1": ElementFormat(2, 1, 2, 6.0),
    "e2m3": ElementFormat(2, 3, 2, 7.5),
    "e3m2": ElementFormat(3, 2, 4, 28.0),
    "e4m3": ElementFormat(4, 3, 8, 448.0),
}
ROUNDINGS = ("away", "even")


def quantize_mx(x: Tensor, fmt: str, block_size: int = 32, rounding: str = "away", axis: int = -1) -> Tensor:
    """`x` rounded to an MX format, in `x`'s own shape and dtype.

    Each block of `block_size` consecutive values along `axis` (the reduction axis of the product it goes into; the
    last block may be shorter) shares the scale 2^e, e = floor(log2 max|x|) - emax, at least -127; a block that would
    need e > 127, or holds a non-finite value, becomes NaN. Subnormals are kept; values beyond the largest saturate.
    `rounding`: ties "away" from zero or to "even". Not differentiable.

    Raises ValueError for an unknown format or rounding, a block size below 1, or a tensor without floats or axes.
    """
    choice("fmt", fmt, FORMATS)
    choice("rounding", rounding, ROUNDINGS)
    integer("block_size", block_size, at_least=1)
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x must be a floating-point tensor with at least one axis, not {x.dtype} {tuple(x.shape)}")
    # every operation below is exact in float64 but the one rounding; in float32 a scale of 2^-127 would be subnormal,
    # which processes that train count as 0
    rows = x.detach().movedim(axis, -1).to(torch.float64).contiguous()
    length = rows.shape[-1]
    if length % block_size:
        rows = torch.nn.functional.pad(rows, (0, -length % block_size))
    blocks = rows.unflatten(-1, (rows.shape[-1] // block_size, block_size))
    rounded = _round_blocks(blocks, FORMATS[fmt], rounding)
    return rounded.flatten(-2)[..., :length].movedim(-1, axis).to(x.dtype)


def _round_blocks(blocks: Tensor, element: ElementFormat, rounding: str) -> Tensor:
    """Blocks (..., k) in float64, each rounded with its own scale."""
    bottom = torch.finfo(blocks.dtype).tiny
    top = blocks.abs().amax(-1, keepdim=True)
    scale = (_power_of_two(top.clamp(min=bottom)) * 2.0**-element.largest_exponent).clamp(min=2.0**-127)
    scale = torch.where((scale > 2.0**127) | ~top.isfinite(), torch.nan, scale)

    scaled = blocks / scale
    quantum = _power_of_two(scaled).abs_().clamp(min=2.0**element.smallest_exponent).mul_(2.0**-element.mantissa_bits)
    steps = scaled.abs_().div_(quantum)
    if rounding == "even":
        steps.round_()
    else:
        whole = steps.trunc()
        steps = whole.add_(steps.sub_(whole) >= 0.5)  # adding 1/2 first would round
    return steps.mul_(quantum).clamp(max=element.largest).copysign_(blocks).mul_(scale)


def _power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), with the sign of x; 0 for zero and subnormal numbers."""
    return (x.view(torch.int64) & -(1 << 52)).view(torch.float64)
