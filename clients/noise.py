"""Standard normal noise for the posterior samples.

On a CPU, torch's ``normal_`` costs more than the forward and backward pass of a small network. ``quantile`` noise is
about four times as fast: 14 random bits pick one of 16,384 equally likely points in four dimensions, a scrambled Sobol
net carried over to N(0, I) by the quantile function. The table (256 KiB) fits a core's cache, which decides the speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import pi, sqrt

import torch
from torch import Tensor

_POINTS = 1 << 14
_BLOCK = 4  # entries filled by one point
_CHUNK = 1 << 18  # values at once; bounds the scratch memory


@lru_cache
@torch.inference_mode(False)  # kept for callers in other modes
def quantile_table(dtype: torch.dtype = torch.float64) -> Tensor:
    """The 16,384 values of a coordinate, ascending: mean 0, variance 1 (rescaled by 1 + 2e-6), kurtosis 2.999, largest
    4.06.

    Each is the mean of N(0, 1) over one of as many equally likely cells; their distribution function is within 2^-15 of
    that of N(0, 1) everywhere.
    """
    edges = torch.special.ndtri(torch.arange(1, _POINTS // 2 + 1, dtype=torch.float64) / _POINTS)
    density = torch.cat([torch.zeros(1, dtype=torch.float64), torch.exp(-edges.square() / 2) / sqrt(2 * pi)])
    lower = -_POINTS * density.diff()  # the mean over a cell is the difference of the density at its edges
    values = torch.cat([lower, -lower.flip(0)])
    return (values / values.square().mean().sqrt()).to(dtype)


@lru_cache
@torch.inference_mode(False)  # kept for callers in other modes
def quantile_points(dtype: torch.dtype = torch.float64) -> Tensor:
    """The (16,384, 4) points: in each column every value of :func:`quantile_table` once.

    The columns, and their squares, are uncorrelated to 3e-3 (independent points would leave 8e-3), which averages out
    over blocks, since every block draws its own point.
    """
    net = torch.quasirandom.SobolEngine(_BLOCK, scramble=True, seed=1).draw(_POINTS, dtype=torch.float64)
    return quantile_table(dtype)[(net * _POINTS).floor().long()].contiguous()


@torch.inference_mode(False)
def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    """Memory that may be written to in whatever mode the next caller is."""
    return torch.empty(size, dtype=dtype)


class Noise:
    """Fills vectors with standard normal noise.

    Args:
        kind: ``quantile`` (on CPUs; elsewhere the same as ``normal``) or ``normal`` (``Tensor.normal_``).
        generator: the source; its state alone decides the next values.
    """

    def __init__(self, kind: str, generator: torch.Generator | None):
        self.kind, self.generator = kind, generator
        self._bits, self._index = _buffer(0, torch.int64), _buffer(0, torch.int32)

    def fill(self, out: Tensor) -> Tensor:
        """Overwrite the contiguous vector ``out`` (P,)."""
        if self.kind == "normal" or out.device.type != "cpu":
            return out.normal_(generator=self.generator)
        for start, bits in self.picks(out.numel()):
            if self._index.numel() < bits.numel():
                self._index = _buffer(bits.numel(), torch.int32)
            index = self._index[: bits.numel()].copy_(bits).bitwise_and_(_POINTS - 1)
            self._gather(index, out[start : start + _CHUNK])
        return out

    def picks(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """Where a chunk of ``count`` values starts, and 16 random bits (int16) for each of its points, whose lower 14
        pick it.

        The bits are to be used before the next chunk is asked for.
        """
        for start in range(0, count, _CHUNK):
            words = -(-min(count - start, _CHUNK) // (4 * _BLOCK))  # of 64 bits: 4 points each
            if self._bits.numel() < words:
                self._bits = _buffer(words, torch.int64)
            yield start, self._bits[:words].random_(-(2**63), None, generator=self.generator).view(torch.int16)

    @staticmethod
    def _gather(index: Tensor, out: Tensor) -> None:
        """``out`` = the points ``index`` one after the other; the last one may be cut."""
        points, whole = quantile_points(out.dtype), out.numel() // _BLOCK
        body, rest = out[: whole * _BLOCK], out[whole * _BLOCK :]
        if out.dtype == torch.float32 and out.storage_offset() % _BLOCK == 0:
            # a point as one 16-byte number: rows of four cost twice as much
            body = body.view(torch.complex128)
            torch.index_select(points.view(torch.complex128).view(-1), 0, index[:whole], out=body)
        else:
            torch.index_select(points, 0, index[:whole], out=body.view(whole, _BLOCK))
        if rest.numel():
            rest.copy_(points[int(index[whole])][: rest.numel()])
