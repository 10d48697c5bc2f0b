"""The loss summed over a data set, as a function of the parameter vector, with dense derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev

from bayesfed.problem.examples import Examples
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.inputs import arrays_of
from bayesfed.problem.likelihood import Likelihood


class SummedLoss:
    """``l(theta) = sum_n loss_n(theta)`` in float64 with its derivatives by ``torch.func``, for small models.

    The model is used in eval mode: derivatives of a random function (dropout) have no meaning here.

    Args:
        model: its parameters are not touched.
        likelihood: gives the mean loss of outputs.
        data: N examples, all at once.
        memory_mb: bound on the intermediate results of the Hessian, which is computed in row blocks.

    Attributes:
        loss, gradient, hessian: functions of theta (P,), float64, with values (), (P,) and (P, P).
        gradients_per_point: what gradient and Hessian at one point cost, in gradients of one example: ``N (1 + P)``.
    """

    def __init__(self, model: FlatModel, likelihood: Likelihood, data: Examples, memory_mb: float = 256):
        module = copy.deepcopy(model.module).to(torch.float64).eval()
        x, y = data.batch(slice(None), torch.float64, model.vector.device)

        def loss(vector: Tensor) -> Tensor:
            return likelihood.loss(functional_call(module, model.named(vector), (x,)), y) * len(data)

        self.loss: Callable[[Tensor], Tensor] = loss
        self.gradient: Callable[[Tensor], Tensor] = grad(loss)
        self.gradients_per_point = len(data) * (
            1 + model.dim
        )  # a row of an example's Hessian is one more backward pass
        per_row = 8 * (model.dim + 4 * sum(v.numel() for v in arrays_of(x)))
        rows = max(1, min(model.dim, int(memory_mb * 1e6 / per_row)))
        self.hessian: Callable[[Tensor], Tensor] = (
            jacrev(grad(loss), chunk_size=rows) if rows < model.dim else hessian(loss)
        )
