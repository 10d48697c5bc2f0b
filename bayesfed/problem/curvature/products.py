"""Products of a vector with the Hessian and the generalised Gauss-Newton matrix of a summed loss, never forming either.

Pearlmutter 1994; Schraudolph 2002. Each costs a few gradients of every example.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp

from bayesfed.problem.examples import Examples
from bayesfed.problem.flat import FlatModel, eval_mode
from bayesfed.problem.likelihood import Likelihood


def hvp(
    model: FlatModel, likelihood: Likelihood, data: Examples, at: Tensor, vector: Tensor, rows: int = 1000
) -> Tensor:
    """``H v`` with ``H`` the Hessian of ``l = sum_n loss_n``.

    The model is in eval mode: derivatives through dropout have no meaning here.

    Args:
        model: its parameters are not touched.
        at: (P,) where, in the model's dtype.
        vector: (P,) v.
        rows: examples at once.

    Returns:
        (P,) in the model's dtype, in units of the summed loss.
    """

    def product(x: Tensor, y: Tensor) -> Tensor:
        slope = grad(lambda theta: likelihood.loss(_outputs(model, x, theta), y))
        return jvp(slope, (at,), (vector,))[1]

    return _summed(product, model, data, rows)


def ggn_vp(
    model: FlatModel, likelihood: Likelihood, data: Examples, at: Tensor, vector: Tensor, rows: int = 1000
) -> Tensor:
    """``sum_n J_n^T L_n J_n v``: ``J_n`` the Jacobian of an example's outputs, ``L_n`` the Hessian of its loss in them.

    Equal to :func:`hvp` for models that are linear in their parameters; never negative in a quadratic form where the
    loss is convex in the outputs. Arguments and result as there.
    """

    def product(x: Tensor, y: Tensor) -> Tensor:
        outputs = partial(_outputs, model, x)
        values, tangent = jvp(outputs, (at,), (vector,))[:2]
        slope = grad(lambda values: likelihood.loss(values, y))
        return vjp(outputs, at)[1](jvp(slope, (values,), (tangent,))[1])[0]

    return _summed(product, model, data, rows)


def _summed(product: Callable[[Tensor, Tensor], Tensor], model: FlatModel, data: Examples, rows: int) -> Tensor:
    """The sum over examples of a product whose loss is a batch's mean, in eval mode."""
    total = torch.zeros_like(model.vector)
    with eval_mode(model.module):
        for start in range(0, len(data), rows):
            x, y = data.batch(slice(start, start + rows), model.vector.dtype, model.vector.device)
            total += len(y) * product(x, y)
    return total


def _outputs(model: FlatModel, x: Tensor, theta: Tensor) -> Tensor:
    outputs: Tensor = functional_call(model.module, model.named(theta), (x,))
    return outputs
