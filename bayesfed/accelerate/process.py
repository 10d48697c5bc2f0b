"""Settings of a process: memory and the imports of torch's optimizers."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def use_large_pages() -> None:
    """Let torch put tensors above 2 MB on large pages, 5 % of a step (docs/performance.md); it looks at its first
    tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let glibc reuse freed vectors of up to 32 MiB: by default it returns them, and new ones cost a page fault per 4
    KiB.

    A quarter of the processor time of a round with a million parameters. Can't be undone; does nothing without glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, 1 << 29)


def spare_dynamo() -> list[Any]:
    """Let the methods of ``torch.optim.Optimizer`` that first import ``torch._dynamo`` (1.5 s) do without; what was
    changed.

    The import only keeps ``torch.compile`` from tracing these methods. Where it was made before, nothing is changed.
    """
    if "torch._dynamo" in sys.modules:
        return []
    methods = (getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None) for name in _METHODS)
    changed = [method for method in methods if method is not None and not hasattr(method, "__dynamo_disable")]
    for method in changed:
        method.__dynamo_disable = method
    return changed


def restore_dynamo(changed: Iterable[Any]) -> None:
    """Undo :func:`spare_dynamo`."""
    for method in changed:
        del method.__dynamo_disable
