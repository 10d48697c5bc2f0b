"""A module whose parameters are views of one vector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bayesfed.problem.inputs import Inputs


class Gradient(Protocol):
    """Loss of a batch and its gradient in one call, see :meth:`__call__`."""

    def __call__(self, loss_of: Any, x: Inputs, y: Tensor) -> Tensor | None:
        """``loss_of(model(x), y)``, detached, with its gradient in ``grad``; None: nothing done, autograd has to."""


class FlatModel:
    """Wrap ``module`` so that all trainable parameters live in one contiguous vector.

    Everything bayesfed does to parameters (sampling, natural parameters, optimizer steps, messages) works on vectors of
    length P; the module sees the same memory through views, so nothing is gathered or scattered.

    Attributes:
        module: the wrapped module, moved to ``device`` and ``dtype``.
        vector: (P,) the parameters, in ``module.parameters()`` order.
        gradient: what is tried before autograd; None for nothing. Copies have none.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        module = module.to(device=device, dtype=dtype)
        self._attach(module)

    def __getstate__(self) -> dict[str, nn.Module]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, nn.Module]) -> None:  # copies and pickles of views are views no more
        self._attach(state["module"])

    def _attach(self, module: nn.Module) -> None:
        self.module = module
        self.gradient: Gradient | None = None
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameters")
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for parameter, values in zip(self.parameters, self.vector.split(self.sizes), strict=True):
            parameter.data = values.view_as(parameter)

    @property
    def dim(self) -> int:
        """The number of parameters P."""
        return self.vector.numel()

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers by name, which no training changes (``bayesfed.problem.model_check``)."""
        frozen = {name: p.detach() for name, p in self.module.named_parameters() if not p.requires_grad}
        return frozen | dict(self.module.named_buffers())

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Set all parameters from a vector of shape (P,), casting to the model's dtype and device."""
        self.vector.copy_(vector)

    def drop_grad(self) -> None:
        """Leave the gradients to autograd, for optimizers that take them as it made them: saves a pass over memory."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients as autograd made them, one per parameter; zeros where the backward pass did not come."""
        gradients = []
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None or gradient.layout != torch.strided:
                parameter.grad = gradient = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            gradients.append(gradient)
        return gradients

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of ``vector`` (P,), shaped like the parameters."""
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.parameters, strict=True)]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of ``vector`` (P,) by parameter name, as ``torch.func.functional_call`` takes them."""
        return dict(zip(self.names, self.split(vector), strict=True))

    def __call__(self, x: Inputs) -> Tensor:
        return self.module(x)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` within the block; every submodule's own mode is restored."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
