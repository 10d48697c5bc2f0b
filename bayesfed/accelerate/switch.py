"""The switch ``accelerate=auto|off``, and how a process computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bayesfed.accelerate.process import keep_freed_memory, restore_dynamo, spare_dynamo, use_large_pages

MODES = ("auto", "off")
_mode: str | None = None  # None: nobody chose; somebody else's process


def enabled() -> bool:
    """Whether fast paths may be taken where they fit; so it is until somebody chooses ``off``."""
    return _mode != "off"


def start(mode: str) -> None:
    """Choose for this process, which is bayesfed's own, and set it up: memory, optimizers, arithmetic. May be called
    again.

    Inside :func:`running`, as in another thread or at every message, it sets this thread's arithmetic.
    """
    global _mode
    first, _mode = _mode is None, mode
    if first and enabled():
        use_large_pages()
        keep_freed_memory()
        spare_dynamo()
    _set_arithmetic()


@contextmanager
def running(mode: str) -> Iterator[None]:
    """Choose for the block, in a process that may be somebody else's; afterwards all is as it was.

    Whether numbers too small for full precision counted as zero torch doesn't say: as chosen before, else they don't.
    """
    global _mode
    before, threads = _mode, torch.get_num_threads()
    _mode = mode
    spared = spare_dynamo() if enabled() else []
    _set_arithmetic()
    try:
        yield
    finally:
        _mode = before
        if before is None:
            restore_dynamo(spared)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(before == "auto")


def _set_arithmetic() -> None:
    """One thread; and with fast paths numbers too small for full precision (below 1.2e-38 in float32) count as zero.

    Two threads give other bits and cost more than they gain on small models. Saturated sigmoids make such numbers by
    the thousand, and a processor takes many times as long over each: a forward and backward pass over raw pixels took
    twice as long with them (docs/performance.md).
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(enabled())  # of this thread and those it starts
