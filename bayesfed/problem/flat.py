"""A module whose parameters are views of one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatModel:
    """Wrap ``module`` so that all trainable parameters live in one contiguous vector.

    Everything bayesfed does to parameters (sampling, natural parameters, optimizer steps, messages) works on vectors of
    length P; the module sees the same memory through views, so nothing is gathered or scattered.

    Attributes:
        module: the wrapped module, moved to ``device`` and ``dtype``.
        vector: (P,) the parameters, in ``module.parameters()`` order.
        grad: (P,) the gradients after :meth:`gather_grad`.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        module = module.to(device=device, dtype=dtype)
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameters")
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.grad = torch.zeros_like(self.vector)
        for parameter, values in zip(self.parameters, self.vector.split(self.sizes), strict=True):
            parameter.data = values.view_as(parameter)
        self._gradients = [g.view_as(p) for g, p in zip(self.grad.split(self.sizes), self.parameters, strict=True)]

    @property
    def dim(self) -> int:
        """The number of parameters P."""
        return self.vector.numel()

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Set all parameters from a vector of shape (P,), casting to the model's dtype and device."""
        self.vector.copy_(vector)

    def drop_grad(self) -> None:
        """Leave the gradients to autograd, for optimizers that take them as it made them (one pass over memory less)."""
        for parameter in self.parameters:
            parameter.grad = None

    def gather_grad(self) -> None:
        """Copy what autograd made since :meth:`drop_grad` into :attr:`grad` (0 where it made nothing), and drop it.

        One pass over the memory less than letting the backward pass add to views of a cleared vector.
        """
        grads = [parameter.grad for parameter in self.parameters]
        if all(g is not None and g.layout == torch.strided for g in grads):
            torch._foreach_copy_(self._gradients, grads)  # type: ignore[arg-type]
        else:
            for view, gradient in zip(self._gradients, grads, strict=True):
                view.zero_() if gradient is None else view.copy_(gradient.to_dense())
        self.drop_grad()

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of ``vector`` (P,) by parameter name, as ``torch.func.functional_call`` takes them."""
        pieces = vector.split(self.sizes)
        return {n: v.view(p.shape) for n, v, p in zip(self.names, pieces, self.parameters, strict=True)}

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)
