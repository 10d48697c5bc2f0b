"""What tests of whole runs share."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bayesfed import profiling
from bayesfed.accelerate import switch

# A shell starts background jobs with SIGINT ignored, and so would be every process that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

QUIET = ["display=false", "figures=false"]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands configure logging for a process of their own (Hydra does, and the server app); here later tests live in
    it.
    """
    loggers = [logging.getLogger(name) for name in (None, "bayesfed", "flwr")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def computing_as_before() -> Iterator[None]:
    """Commands choose how a process of their own computes; here later tests live in it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch, "_mode", switch._mode)
        if (name := "THP_MEM_ALLOC_ENABLE") not in os.environ:
            patch.setenv(name, "")
            del os.environ[name]
        yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def run(tmp_path) -> Callable[..., object]:
    """``run("rounds=2", to="a")``: a run of the linear-regression experiment in ``tmp_path/a``, a fraction of a
    second.
    """

    def start(*overrides: str, to: str = "run"):
        import bayesfed

        quick = [] if any(o.startswith("resume=") for o in overrides) else [
            "experiment=linreg", "strategy.family=diagonal", "strategy.damping=0.3", "eval.samples=4", *QUIET,
            f"hydra.run.dir={tmp_path / to}",
        ]  # fmt: skip
        return bayesfed.run([*quick, *overrides])

    return start


@pytest.fixture
def digest() -> Callable[[Path], str]:
    """SHA-256 of a run's ``posterior.safetensors``."""
    return lambda run_dir: hashlib.sha256((Path(run_dir) / "posterior.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def ray_with_three_slots():
    """One Ray instance for all tests that need it: starting one takes seconds."""
    import ray

    ray.init(num_cpus=max(os.cpu_count() or 1, 3), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)
