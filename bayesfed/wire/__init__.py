"""Messages: named arrays and plain values, as Flower records, and the format in which a posterior travels."""

import torch

from bayesfed.errors import BadMessage, Diverged
from bayesfed.wire.codec import FORMATS, Codec
from bayesfed.wire.records import nbytes, pack, unpack, value

DTYPES = {"float32": torch.float32, "float64": torch.float64}

__all__ = ["DTYPES", "FORMATS", "BadMessage", "Codec", "Diverged", "nbytes", "pack", "unpack", "value"]
