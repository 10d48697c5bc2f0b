"""A model's outputs for one draw of the parameters after the other.

Draws are evaluated one at a time, or several at once with ``torch.func.vmap``, which pays on GPUs only: on a CPU it
took 1.1 to 1.9
times as long for every model tried (docs/performance.md). There the batches of inputs are shared out among the cores,
one torch
thread each, so that bits don't depend on how many there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bayesfed.evaluation.inputs import InputBatches
from bayesfed.host import cores
from bayesfed.problem.flat import FlatModel, eval_mode
from bayesfed.problem.inputs import Inputs

Progress = Callable[[int, int], None]  # which draw of the parameters is next, from 1, and how many there are


class Posterior(Protocol):
    """What is needed of a member of ``bayesfed.families``."""

    @property
    def is_point(self) -> bool: ...
    @property
    def mean(self) -> Tensor: ...
    def sample(self, n: int, *, generator: torch.Generator) -> Tensor: ...


def parameter_draws(
    posterior: Posterior, samples: int, generator: torch.Generator | None, progress: Progress | None = None
) -> Iterator[Tensor]:
    """``samples`` draws of shape (P,), one at a time; the mean alone for ``samples=0`` or a point mass.

    ``progress`` is told of each draw before it is made, but not of the mean.
    """
    if samples == 0 or posterior.is_point:
        yield posterior.mean
        return
    if generator is None:
        raise ValueError("drawing from the posterior needs a generator")
    for draw in range(1, samples + 1):
        if progress is not None:
            progress(draw, samples)
        yield posterior.sample(1, generator=generator)[0]


@contextmanager
def evaluation_mode(model: FlatModel) -> Iterator[None]:
    """No gradients and the module in eval mode; every submodule's own mode is restored."""
    with eval_mode(model.module), torch.no_grad():
        yield


def together(device: torch.device, requested: int | None = None) -> int:
    """How many draws to evaluate at once: as requested, else 8 on a GPU and 1 elsewhere."""
    return requested or (8 if device.type == "cuda" else 1)


def _cores(device: torch.device) -> int:
    """How many batches to evaluate side by side."""
    return cores() if device.type == "cpu" else 1


def _replicas(module: nn.Module, count: int) -> list[nn.Module]:
    """``module`` and copies that share its parameters and buffers: a forward may keep what it computes in attributes.

    Fewer than ``count`` if it can't be copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    try:
        copies = [copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}) for _ in range(count - 1)]
    except Exception:  # a stranger's attributes may be of any kind
        copies = []
    return [module, *copies]


def outputs(
    model: FlatModel,
    draws: Iterable[Tensor],
    inputs: InputBatches,
    at_once: int | None = None,
    function: Callable[[Tensor], Tensor] = lambda values: values,
) -> Iterator[Tensor]:
    """``function`` of the model's outputs for every draw in turn, (N, ...) in float64 on the CPU.

    Args:
        model: left at the last draw if they are evaluated one at a time.
        draws: parameter vectors of shape (P,); the next one is made while the model runs, so making it must not touch
            the model.
        inputs: N scaled inputs.
        at_once: draws evaluated together by ``torch.func.vmap``; None is :func:`together`.
        function: of outputs (..., C) in float64, which it treats row by row.
    """
    size, thetas = together(model.vector.device, at_once), iter(draws)

    def one(theta: Tensor, x: Inputs) -> Tensor:
        return functional_call(model.module, model.named(theta), (x,))

    modules = _replicas(model.module, min(_cores(model.vector.device), len(inputs)))

    def at_the_last(batch: tuple[slice, Inputs]) -> Tensor:
        module = modules.pop()  # as many as there are threads
        try:
            with torch.no_grad():  # a thread's own setting
                return function(module(batch[1]).to("cpu", torch.float64))
        finally:
            modules.append(module)

    with ThreadPoolExecutor(len(modules)) as pool:
        chunk = list(islice(thetas, size))
        while chunk:
            if len(chunk) == 1:
                model.load(chunk[0])
                batches = pool.map(at_the_last, inputs)
                chunk = list(islice(thetas, size))  # drawn while the batches are evaluated
                yield torch.cat(list(batches))
                continue
            stacked = torch.stack(chunk).to(model.vector)
            several = [vmap(one, (0, None))(stacked, x).to("cpu", torch.float64) for _, x in inputs]
            yield from function(torch.cat(several, 1))
            chunk = list(islice(thetas, size))
