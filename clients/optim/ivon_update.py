"""One step of IVON on the vectors of a group, with a diagonal Hessian: operation by operation, or as one compiled kernel.

The Hessian's recursion in both: with ``t = (hhat - h) root`` it is ``h += c t / root + (c t)^2 / 2``, as ``root^2 = 1 / (h +
delta)``; ``hhat root = sqrt(ess) z g - V root``. The momentum's debiasing by ``1 - beta1^t`` is in the step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clients.optim.ivon_state import Group


def update_hess(group: dict[str, Any], g: Group, samples: int, products: bool) -> None:
    """Update ``h`` and ``root``, and leave ``h + delta`` in the work space.

    Args:
        group: the optimizer's settings of the group.
        g: its buffers.
        samples: behind the statistics.
        products: whether ``g.noise`` holds the sum of ``z * g`` already.
    """
    c, scale = 1 - group["beta2"], math.sqrt(group["ess"])
    torch.mul(g.hess, g.root, out=g.work)  # the work space holds -t
    if isinstance(g.site_quadratic, Tensor):
        g.work.addcmul_(g.site_quadratic, g.root)
    elif g.site_quadratic:
        g.work.add_(g.root, alpha=g.site_quadratic)
    if g.released is not None:
        noise, work, _ = g.views
        torch._foreach_addcmul_(work, noise, g.released, value=-scale)
    elif products:
        g.work.add_(g.noise, alpha=-scale / samples)
    else:
        g.work.addcmul_(g.noise, g.gradient, value=-scale)
    g.hess.addcdiv_(g.work, g.root, value=-c).addcmul_(g.work, g.work, value=0.5 * c * c)
    g.hold()
    torch.rsqrt(g.denominator(g.work), out=g.root)


def update_mean(group: dict[str, Any], g: Group, samples: int, debias: float, rescale: bool) -> None:
    """Update the momentum and the mean.

    Args:
        group: the optimizer's settings of the group.
        g: its buffers; with a diagonal Hessian the work space holds ``h + delta``.
        samples: behind the gradient.
        debias: ``1 - beta1^t``, or 1.
        rescale: multiply the learning rate by ``hess_init + delta``.
    """
    beta1, vector, direction = group["beta1"], g.flat.vector, g.sample
    if g.released is not None:
        torch._foreach_lerp_(g.views[2], g.released, 1 - beta1)
        g.released = None
    elif samples == 1:
        g.momentum.lerp_(g.gradient, 1 - beta1)
    else:
        g.momentum.mul_(beta1).add_(g.gradient, alpha=(1 - beta1) / samples)
    if isinstance(g.slope, Tensor) or isinstance(g.offset, Tensor) or g.offset:
        if isinstance(g.slope, Tensor):
            torch.mul(g.slope, vector, out=direction).sub_(g.offset)
        elif isinstance(g.offset, Tensor):
            torch.sub(g.offset, vector, alpha=g.slope, out=direction).neg_()
        else:
            torch.mul(vector, g.slope, out=direction).sub_(g.offset)
        torch.add(g.momentum, direction, alpha=debias, out=direction)
    else:
        torch.add(g.momentum, vector, alpha=g.slope * debias, out=direction)
    denominator = g.work if g.hess.dim() else g.denominator(torch.empty_like(g.hess))
    rate = -group["lr"] / debias
    if group["clip_radius"] < math.inf:
        bound = group["clip_radius"] * debias
        direction.div_(denominator).clamp_(-bound, bound)
    if rescale and isinstance(g.damping, Tensor):
        if group["hess_init"]:
            direction.addcmul_(direction, g.damping, value=1 / group["hess_init"])
            rate *= group["hess_init"]
        else:
            direction.mul_(g.damping)
    elif rescale:
        rate *= group["hess_init"] + g.damping
    if group["clip_radius"] < math.inf:
        vector.add_(direction, alpha=rate)
    else:
        vector.addcdiv_(direction, denominator, value=rate)


def update_compiled(group: dict[str, Any], g: Group, debias: float, rescale: bool) -> None:
    """Both updates after a single sample, as one pass over the memory (the kernel is compiled at the first call)."""
    like = g.flat.vector

    def constant(value: float | Tensor | None, default: float = 0.0) -> Tensor:
        return (
            value
            if isinstance(value, Tensor)
            else torch.full((), default if value is None else value, dtype=like.dtype)
        )

    factor = group["hess_init"] + g.damping if rescale else 1.0
    # Numbers that change from step to step travel as CPU tensors of shape (): no recompilation, and no copy to a GPU.
    numbers = torch.tensor(
        [
            math.sqrt(group["ess"]),
            1 - group["beta2"],
            1 - group["beta1"],
            debias,
            -group["lr"] / debias,
            min(group["clip_radius"] * debias, torch.finfo(like.dtype).max),
            g.floor,
        ],
        dtype=like.dtype,
    )
    _kernel()(
        (like, g.hess, g.root, g.momentum),
        (g.noise, g.gradient),
        (constant(g.damping), constant(g.slope), constant(g.offset), constant(g.site_quadratic), constant(factor)),
        constant(g.bound, -math.inf),
        numbers.unbind(),
    )


@lru_cache
def _kernel() -> Callable[..., None]:
    return torch.compile(_fused)


def _fused(
    state: tuple[Tensor, ...],
    statistics: tuple[Tensor, Tensor],
    terms: tuple[Tensor, ...],
    bound: Tensor,
    numbers: tuple[Tensor, ...],
) -> None:
    vector, hess, root, momentum = state
    noise, gradient = statistics
    damping, slope, offset, site_quadratic, factor = terms
    scale, c, share, debias, rate, clip, floor = numbers
    t = scale * noise * gradient - (hess + site_quadratic) * root
    curvature = torch.maximum(hess + c * t / root + 0.5 * c * c * t * t, bound)
    denominator = torch.maximum(curvature + damping, floor)
    average = momentum + share * (gradient - momentum)
    direction = (average + debias * (slope * vector - offset)) / denominator
    direction = torch.minimum(torch.maximum(direction, -clip), clip)
    vector.add_(rate * factor * direction)
    momentum.copy_(average)
    hess.copy_(curvature)
    root.copy_(denominator.rsqrt())
