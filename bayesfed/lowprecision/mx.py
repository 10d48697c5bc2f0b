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


FORMATS = {
    "e2m1": ElementFormat(2, 1, 2, 6.0),
    "e2m3": ElementFormat(2, 3, 2, 7.5),
    "e3m2": ElementFormat(3, 2, 4, 28.0),
    "e4m3": ElementFormat(4, 3, 8, 448.0),
}


def quantize_mx(x: Tensor, fmt: str, block_size: int = 32, rounding: str = "away", axis: int = -1) -> Tensor:
    """`x` rounded to an MX format, in `x`'s own shape and dtype.

    Each block of `block_size` consecutive values along `axis` (the reduction axis of the product it goes into; the
    last block may be shorter) shares the scale 2^e, e = floor(log2 max|x|) - emax, at least -127; a block that would
    need e > 127, or holds a non-finite value, becomes NaN. Subnormals are kept; values beyond the largest saturate.
    `rounding`: ties "away" from zero or to "even". Not differentiable.

    Raises ValueError for an unknown format or rounding, a block size below 1, or a tensor without floats or axes.
    """
    choice("fmt", fmt, FORMATS)
    choice("rounding", rounding, ("away", "even"))
    integer("block_size", block_size, at_least=1)
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x must be a floating-point tensor with at least one axis, not {x.dtype} {tuple(x.shape)}")
    element = FORMATS[fmt]
    rows = x.detach().movedim(axis, -1).to(torch.float64)
    length = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -length % block_size))
    blocks = padded.unflatten(-1, (padded.shape[-1] // block_size, block_size))
    top = blocks.abs().amax(-1, keepdim=True)
    exponent = (_floor_log2(top) - element.largest_exponent).clamp(min=-127)
    scale = torch.exp2(exponent.to(torch.float64))
    scale = torch.where((exponent > 127) | ~top.isfinite(), torch.nan, scale)

    magnitude = (blocks / scale).abs()
    smallest = 2 - 2 ** (element.exponent_bits - 1)
    quantum = torch.exp2((_floor_log2(magnitude).clamp(min=smallest) - element.mantissa_bits).to(torch.float64))
    steps = magnitude / quantum
    steps = steps.round() if rounding == "even" else (steps + 0.5).floor()
    rounded = torch.copysign((steps * quantum).clamp(max=element.largest), blocks) * scale
    return rounded.flatten(-2)[..., :length].movedim(-1, axis).to(x.dtype)


def _floor_log2(x: Tensor) -> Tensor:
    """Exact floor(log2 x) of positive floats; -1 at zero."""
    return torch.frexp(x).exponent - 1
