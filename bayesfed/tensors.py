"""What torch gives out, whatever this thread's caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Normal tensors on the CPU, gradients and no autocast in the block."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":  # a mode in force makes every call of torch slower
            stack.enter_context(torch.device("cpu"))
        yield
