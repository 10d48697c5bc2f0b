"""Local loss, gradient and Hessian in float64, as functions of the parameter vector."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev

from bayesfed.federation.local import LocalProblem
from bayesfed.problem.inputs import arrays_of


class LocalLoss:
    """The client's summed loss ``l_k`` in float64 with its derivatives by ``torch.func`` (dense: small models only).

    The module is used in eval mode: derivatives of a random function (dropout) have no meaning here.

    Args:
        problem: gives model, data and likelihood.
        memory_mb: bound on the intermediate results of the Hessian, which is computed in row blocks.

    Attributes:
        gradients_per_point: what gradient and Hessian at one point cost, in gradients of one example: ``N_k (1 + P)``.
    """

    def __init__(self, problem: LocalProblem, memory_mb: float = 256):
        module = copy.deepcopy(problem.model.module).to(torch.float64).eval()
        x, y = problem.data.batch(slice(None), torch.float64, problem.device)
        size = problem.num_examples

        def loss(vector: Tensor) -> Tensor:
            outputs = functional_call(module, problem.model.named(vector), (x,))
            return problem.likelihood.loss(outputs, y) * size

        self.loss: Callable[[Tensor], Tensor] = loss
        self.gradient: Callable[[Tensor], Tensor] = grad(loss)
        # a row of an example's Hessian is one more backward pass
        self.gradients_per_point = size * (1 + problem.model.dim)
        per_row = 8 * (problem.model.dim + 4 * sum(v.numel() for v in arrays_of(x)))
        rows = max(1, min(problem.model.dim, int(memory_mb * 1e6 / per_row)))
        self.hessian: Callable[[Tensor], Tensor] = (
            jacrev(grad(loss), chunk_size=rows) if rows < problem.model.dim else hessian(loss)
        )
