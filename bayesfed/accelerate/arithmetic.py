"""How torch computes in every process that trains or evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def set_arithmetic() -> None:
    """One thread, and numbers too small for full precision (below 1.2e-38 in float32) count as zero.

    Two threads give other bits and cost more than they gain on small models. Saturated sigmoids make such numbers by the thousand, and a
    processor takes many times as long over each: a forward and backward pass over raw pixels took twice as long
    with them (docs/performance.md).
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # of this thread and those it starts


@contextmanager
def arithmetic() -> Iterator[None]:
    """:func:`set_arithmetic` in the block, torch's defaults and as many threads as before after it."""
    before = torch.get_num_threads()
    set_arithmetic()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Normal tensors on the CPU, gradients and no autocast in the block, whatever this thread's caller has switched on."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":  # a mode in force makes every call of torch slower
            stack.enter_context(torch.device("cpu"))
        yield
