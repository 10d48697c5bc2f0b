"""What IVON keeps for one group of parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clients.optim.flat import FlatParameters


@dataclass
class Group:
    """Buffers of one parameter group; vectors are (P,), numbers stand for constant vectors."""

    flat: FlatParameters
    sample: Tensor  # what the parameters are while a context is open, work space otherwise
    noise: Tensor  # z of the last training sample; afterwards part of the Hessian statistics
    work: Tensor
    gradient: Tensor
    momentum: Tensor
    delta: float | Tensor  # prior precision / ess
    prior_mean: float | Tensor
    site_linear: float | Tensor
    site_quadratic: float | Tensor
    damping: float | Tensor  # delta as the curvature sees it: delta, or its mean over all parameters if isotropic
    hess: Tensor
    root: Tensor  # 1 / sqrt(hess + damping)
    initial: Tensor  # hess at the start; () if it was constant
    floor: float = 0.0  # of h + damping: below the rounding error of the sum
    bound: float | Tensor | None = None  # smallest hess, from min_precision
    slope: float | Tensor = 0.0  # gradient of prior and sites at m: slope * m - offset
    offset: float | Tensor = 0.0
    extra: Tensor | None = None  # gradient of the second and later samples of a step
    released: list[Tensor] | None = None  # gradient of the only sample of a step, as autograd made it
    pair: Tensor | None = None  # noise of the last sample, whose mirror image is due (antithetic)
    sample_views: list[Tensor] = field(default_factory=list)  # pieces of it, shaped like the parameters
    views: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # noise, work, momentum shaped like it

    def gather_released(self) -> None:
        """Put gradients kept in pieces into the vector."""
        if self.released is not None:
            torch._foreach_copy_(self.flat.split(self.gradient), self.released)
            self.released = None

    def refresh(self, min_precision: float) -> None:
        """Recompute what follows from hess, delta, the prior mean and the sites."""
        self.bound = self.damping * (min_precision - 1) if min_precision else None
        self.slope = self.delta - self.site_quadratic
        self.offset = self.delta * self.prior_mean - self.site_linear
        least = self.damping.min() if isinstance(self.damping, Tensor) else torch.tensor(self.damping)
        info = torch.finfo(self.hess.dtype)
        known = not least.is_meta and (isinstance(self.damping, Tensor) or self.damping > 0)
        self.floor = max(info.eps * float(least), info.tiny) if known else 0.0
        torch.add(self.hess, self.damping, out=self.root).rsqrt_()

    def hold(self) -> None:
        """Keep hess at its bound or above."""
        if isinstance(self.bound, Tensor):
            torch.maximum(self.hess, self.bound, out=self.hess)
        elif self.bound is not None:
            self.hess.clamp_(min=self.bound)

    def denominator(self, out: Tensor) -> Tensor:
        """hess + damping, kept above the rounding error of the sum."""
        torch.add(self.hess, self.damping, out=out)
        return out.clamp_(min=self.floor) if self.floor else out
