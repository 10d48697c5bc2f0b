"""bayesfed: federated learning in which clients and server keep posteriors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bayesfed.errors import InputError, RunFailed
    from bayesfed.runs.launch import RunResult, run
    from bayesfed.uses.trained import TrainedRun, load

_LAZY = {
    "InputError": "bayesfed.errors",
    "RunFailed": "bayesfed.errors",
    "RunResult": "bayesfed.runs.launch",
    "run": "bayesfed.runs.launch",
    "TrainedRun": "bayesfed.uses.trained",
    "load": "bayesfed.uses.trained",
}

__all__ = ["InputError", "RunFailed", "RunResult", "TrainedRun", "load", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``import bayesfed`` stays quick."""
    if name in _LAZY:
        from importlib import import_module

        from bayesfed.host import same_random

        with same_random():
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bayesfed' has no attribute '{name}'")
