"""IVON's step as two C functions (``bayesfed/accelerate/ivon.c``): the fast twin of :mod:`clients.ivon.step`.

A chain of torch operations reads and writes a vector some thirty times a step; these functions read and write each
once.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from bayesfed import accelerate
from clients.ivon.state import Group
from clients.noise import Noise, quantile_points


class _Term(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("number", ctypes.c_float))


class _Numbers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in ("scale", "c", "share", "debias", "rate", "lift", "clip"))


def draw(g: Group, noise: Tensor, scale: float, source: Noise) -> None:
    """``noise`` = z root and ``g.sample`` = mean + scale noise, with the z that ``source.fill`` would give next."""
    points = quantile_points(torch.float32)
    vectors = g.flat.vector, g.root, noise, g.sample
    for start, bits in source.picks(noise.numel()):
        mean, root, out, sample = (v.data_ptr() + 4 * start for v in vectors)
        length = min(noise.numel() - start, 4 * bits.numel())
        accelerate.functions().ivon_draw(length, bits.data_ptr(), points.data_ptr(), mean, root, scale, out, sample)


def update(group: dict[str, Any], g: Group, debias: float, rescale: bool) -> None:
    """``hess_step`` and ``mean_step`` after a single sample."""
    gradients = [g.gradient] if g.pieces is None else [piece.resolve_neg().contiguous() for piece in g.pieces]
    factor, lift = (g.damping, group["hess_init"]) if rescale else (0.0, 1.0)
    terms = [
        v.contiguous() if isinstance(v, Tensor) and v.dim() else float(v) for v in (g.slope, g.offset, factor, g.bound)
    ]
    c, share = 1 - group["beta2"], 1 - group["beta1"]
    rate, clip = -float(group["lr"]) / debias, group["clip_radius"] * debias  # these undo the debiasing
    numbers = _Numbers(c * math.sqrt(group["ess"]), c, share, debias, rate, lift, clip)
    accelerate.functions().ivon_update(
        *_pieces(gradients),
        *[v.data_ptr() for v in (g.noise, g.flat.vector, g.total, g.root, g.momentum)],
        (_Term * 4)(*[_Term(v.data_ptr(), 0.0) if isinstance(v, Tensor) else _Term(None, v) for v in terms]),
        ctypes.byref(numbers),
    )
    g.pieces = None


def _pieces(tensors: list[Tensor]) -> tuple[Any, ...]:
    """Number, lengths and addresses of contiguous tensors."""
    sizes, addresses = [t.numel() for t in tensors], [t.data_ptr() for t in tensors]
    return len(tensors), (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_void_p * len(sizes))(*addresses)


def finite(tensors: list[Tensor]) -> bool:
    """Whether no entry of float32 tensors is infinite or nan."""
    whole = [t.contiguous() for t in tensors]
    return bool(accelerate.functions().all_finite(*_pieces(whole)))


def suits(g: Group) -> bool:
    """Whether the functions can work on this group: h is a vector, and :func:`bayesfed.accelerate.suits`."""
    return accelerate.suits(g.total) and g.total.dim() == 1


def available() -> bool:
    """Whether the functions could be compiled."""
    return accelerate.functions() is not None
