"""One step of IVON on the vectors of a group, with a diagonal Hessian: operation by operation, or as one compiled kernel.

Both keep ``D = h + delta`` rather than h. With ``z`` the noise and ``c = 1 - beta2``, the recursion of h is

    D = D (1 + w^2) / 2,    w = 1 + c (hhat - h) / D = (1 - c) + c [sqrt(ess) g z / sqrt(D) + (delta - V) / D]

with the old D on the right: D stays positive whatever the gradient is, and ``z / sqrt(D)`` is the sample's displacement from the
mean, which is there already. The momentum's debiasing by ``1 - beta1^t`` is in the step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from clients.ivon.state import Group, average
from clients.noise import Noise


def draw(g: Group, noise: Tensor, scale: float, source: Noise, train: bool, antithetic: bool) -> None:
    """``noise`` = z root and ``g.sample`` = mean + scale noise; every second training sample mirrors the one before if ``antithetic``."""
    if train and g.pair is not None:
        torch.neg(g.pair, out=noise)
        g.pair = None
    else:
        source.fill(noise)
        g.pair = noise.clone() if train and antithetic else None
    noise.mul_(g.root)
    torch.add(g.flat.vector, noise, alpha=scale, out=g.sample)


def hold_frozen(g: Group, noise: Tensor) -> None:
    """No noise where parameters are frozen."""
    for part in g.flat.frozen:
        noise[part].zero_()
        g.sample[part].copy_(g.flat.vector[part])


def average_ranks(groups: Sequence[Group], samples: int, check: bool) -> int:
    """Add the statistics of all ranks, each from its ``samples``; the number of samples behind them.

    Raises:
        RuntimeError: with ``check``, the ranks have the same gradient of different samples.
    """
    for g in groups:
        if samples == 0:  # all refused: the others go on
            g.noise.zero_(), g.gradient.zero_()
        elif samples == 1:
            g.noise.mul_(g.gradient)
    if check:
        sums = [
            sum(v.double().sum() for v in values)
            for values in zip(*((g.gradient, g.noise) for g in groups), strict=True)
        ]
        own = torch.stack(sums)
        every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, own)
        gradients, products = torch.stack(every).T.tolist()
        if gradients[0] and len(set(gradients)) == 1 < len(set(products)):
            raise RuntimeError(
                "the gradients are averaged over the ranks already, which makes the curvature too small by their number: "
                "use sync=True without DistributedDataParallel, or leave the blocks under model.no_sync()"
            )
    count = torch.tensor(samples, device=groups[0].total.device)
    torch.distributed.all_reduce(count)
    for g in groups:
        torch.distributed.all_reduce(g.gradient)
        torch.distributed.all_reduce(g.noise)
    return int(count)


def update_hess(group: dict[str, Any], g: Group, samples: int, products: bool, alive: Tensor | None = None) -> None:
    """Update the total ``h + delta`` and ``root``.

    Args:
        group: the optimizer's settings of the group.
        g: its buffers.
        samples: behind the statistics.
        products: whether ``g.noise`` holds the sum of ``z root g`` already.
        alive: () bool on the device, False to change nothing; None for True.
    """
    c = 1 - group["beta2"]
    scale = c * math.sqrt(group["ess"])
    if isinstance(g.slope, Tensor):
        torch.addcdiv(_number(1 - c, g.total), g.slope, g.total, value=c, out=g.work)
    else:
        torch.addcmul(_number(1 - c, g.total), g.root, g.root, value=c * g.slope, out=g.work)
    if g.released is not None:
        noise, work, _ = g.views
        torch._foreach_addcmul_(work, noise, g.released, value=scale)
    elif products:
        g.work.add_(g.noise, alpha=scale / samples)
    else:
        g.work.addcmul_(g.noise, g.gradient, value=scale)
    if alive is not None:
        g.work.masked_fill_(~alive, 1.0)
    torch.addcmul(_number(0.5, g.total), g.work, g.work, value=0.5, out=g.work)
    g.total.mul_(g.work)
    g.hold()
    torch.rsqrt(g.total, out=g.root)


@lru_cache(maxsize=64)
def _cached(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor of shape (); made once, so that no step waits for a copy to a GPU."""
    return _cached(value, like.dtype, like.device)


def update_shared_hess(
    group: dict[str, Any], groups: Sequence[Group], samples: int, products: bool, alive: Tensor | None = None
) -> None:
    """:func:`update_hess` for one number that all groups share (the isotropic family), with hhat averaged over all parameters."""
    g = groups[0]
    c, scale = 1 - group["beta2"], math.sqrt(group["ess"]) / samples
    count = sum(p.numel() for other in groups for p in other.flat.parameters if p.requires_grad)
    sums = [other.noise.sum() if products else torch.dot(other.noise, other.gradient) for other in groups]
    slope = g.damping - average([other.site_quadratic for other in groups], groups)
    ratio = torch.stack([value.to(g.root.dtype) for value in sums]).sum().mul_(scale / count)
    w = 1 - c + c * (ratio + slope / g.total)
    if alive is not None:
        w = torch.where(alive, w, 1.0)
    g.total.mul_(0.5 + 0.5 * w * w)
    g.hold()
    torch.rsqrt(g.total, out=g.root)


def update_mean(
    group: dict[str, Any],
    g: Group,
    samples: int,
    debias: Any,
    rescale: bool,
    alive: Tensor | None = None,
) -> None:
    """Update the momentum and the mean.

    Args:
        group: the optimizer's settings of the group.
        g: its buffers.
        samples: behind the gradient.
        debias: ``1 - beta1^t``, or 1; () on the device with ``alive``.
        rescale: multiply the learning rate by ``hess_init + delta``.
        alive: () bool on the device, False to change nothing; None for True.
    """
    beta1, vector, direction, momentum = group["beta1"], g.flat.vector, g.sample, g.momentum
    if alive is not None:
        share = (alive * (1 - beta1)).to(momentum.dtype)
        momentum.lerp_(g.gradient if samples == 1 else g.gradient / samples, share)
        momentum, debias = momentum / debias, 1.0
    elif g.released is not None:
        torch._foreach_lerp_(g.views[2], g.released, 1 - beta1)
        g.released = None
    elif samples == 1:
        g.momentum.lerp_(g.gradient, 1 - beta1)
    else:
        g.momentum.mul_(beta1).add_(g.gradient, alpha=(1 - beta1) / samples)
    if isinstance(g.slope, Tensor):
        torch.addcmul(momentum, g.slope, vector, value=debias, out=direction)
    else:
        torch.add(momentum, vector, alpha=g.slope * debias, out=direction)
    if isinstance(g.offset, Tensor):
        direction.sub_(g.offset, alpha=debias)
    elif g.offset:
        direction.sub_(g.offset * debias)
    if alive is not None:
        direction.mul_(alive)
    rate = -float(group["lr"]) / debias
    if group["clip_radius"] < math.inf:
        bound = group["clip_radius"] * debias
        direction.div_(g.total).clamp_(-bound, bound)
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
        vector.addcdiv_(direction, g.total, value=rate)


def step_numbers(group: dict[str, Any], debias: Any) -> tuple[Any, ...]:
    """``sqrt(ess), 1 - beta2, 1 - beta1, debias``, the rate and the clip bound of a fused step; the last two undo the debiasing."""
    rate, clip = -float(group["lr"]) / debias, group["clip_radius"] * debias
    return math.sqrt(group["ess"]), 1 - group["beta2"], 1 - group["beta1"], debias, rate, clip


def update_compiled(
    group: dict[str, Any], g: Group, debias: float | Tensor, rescale: bool, alive: Tensor | None = None
) -> None:
    """Both updates after a single sample, as one pass over the memory (the kernel is compiled at the first call)."""
    like = g.flat.vector

    def constant(value: float | Tensor) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype)

    factor = group["hess_init"] + g.damping if rescale else 1.0
    # Numbers that change from step to step travel as CPU tensors of shape (): no recompilation, and no copy to a GPU.
    *first, clip = step_numbers(group, debias)
    largest = torch.finfo(like.dtype).max
    if alive is None:
        numbers = torch.tensor([*first, min(clip, largest)], dtype=like.dtype).unbind()
    else:  # beta2 = beta1 = 1 and lr = 0 change nothing
        scale, c, share, bias, rate = first
        values = [scale, c * alive, share * alive, bias, rate * alive, clip]
        made = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
        numbers = *made[:-1], made[-1].clamp(max=largest)
    _kernel()(
        (like, g.total, g.root, g.momentum),
        (g.noise, g.gradient),
        (constant(g.slope), constant(g.offset), constant(factor), constant(g.bound)),
        numbers,
    )


@lru_cache
def _kernel() -> Callable[..., None]:
    return torch.compile(_fused)


def _fused(
    state: tuple[Tensor, ...],
    statistics: tuple[Tensor, Tensor],
    terms: tuple[Tensor, ...],
    numbers: tuple[Tensor, ...],
) -> None:
    vector, total, root, momentum = state
    noise, gradient = statistics
    slope, offset, factor, bound = terms
    scale, c, share, debias, rate, clip = numbers
    w = 1 - c + c * (scale * noise * gradient + slope / total)
    denominator = torch.maximum(total * (0.5 + 0.5 * w * w), bound)
    average = momentum + share * (gradient - momentum)
    direction = (average + debias * (slope * vector - offset)) / denominator
    direction = torch.minimum(torch.maximum(direction, -clip), clip)
    vector.add_(rate * factor * direction)
    momentum.copy_(average)
    total.copy_(denominator)
    root.copy_(denominator.rsqrt())
