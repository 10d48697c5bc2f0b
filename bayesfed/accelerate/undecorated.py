"""torch's optimizers without the import of ``torch._dynamo`` that their decorators make on first use: 1.5 s in every process.

The import only keeps ``torch.compile`` from tracing these methods. bayesfed compiles no code that calls them (``client.compile`` is IVON's update
alone); where torch._dynamo was imported before, nothing is changed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def spare_dynamo() -> None:
    """Let the methods of ``torch.optim.Optimizer`` that start with ``import torch._dynamo`` do without, unless it is there already."""
    if "torch._dynamo" in sys.modules:
        return
    for name in _METHODS:
        function = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            function.__dynamo_disable = function


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """``optimizer.step`` without gradients, hooks and profiler labels around it."""
    step = inspect.unwrap(type(optimizer).step)

    def call() -> Any:
        with torch.no_grad():
            return step(optimizer)

    return call
