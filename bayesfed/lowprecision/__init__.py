"""Emulation of low-precision number formats."""

from bayesfed.lowprecision.mx import quantize_mx

__all__ = ["quantize_mx"]
