"""Emulation of low-precision number formats."""

from bayesfed.lowprecision.emulation import MXForward, emulate_mx
from bayesfed.lowprecision.mx import quantize_mx

__all__ = ["MXForward", "emulate_mx", "quantize_mx"]
