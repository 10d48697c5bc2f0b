r"""SGD's and Adam's steps on tensors with a leading axis of clients, in place; each client's is :mod:`torch.optim`'s to
rounding.

Weights and what is kept of gradients are (C, P), numbers that differ between clients (C, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8  # of torch's Adam


def sgd_step(weights: Tensor, gradient: Tensor, buffer: Tensor | None, *, rate: Tensor, momentum: float) -> None:
    r""":math:`b \leftarrow \mu b + \hat g,\ w \leftarrow w - \alpha b`; without a buffer b is the gradient."""
    if buffer is not None:
        gradient = buffer.mul_(momentum).add_(gradient)
    weights.addcmul_(gradient, rate, value=-1)


def adam_step(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    rate: Tensor,
    root: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    r"""Adam's step (Kingma and Ba 2015, algorithm 1).

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) \hat g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) \hat g^2 \\
        w &\leftarrow w - \alpha\, \frac{m}{1 - \beta_1^t} \Big/ \Big(\sqrt{v / (1 - \beta_2^t)} + \epsilon\Big)

    Args:
        gradient: overwritten.
        first, second: m and v.
        rate: :math:`\alpha / (1 - \beta_1^t)`.
        root: :math:`(1 - \beta_2^t)^{-1/2}`.
    """
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = torch.sqrt(second, out=gradient).mul_(root).add_(EPS)
    weights.addcdiv_(first * rate, denominator, value=-1)
