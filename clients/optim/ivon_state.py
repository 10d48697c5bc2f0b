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
    noise: Tensor  # z root of a training sample; afterwards part of the Hessian statistics
    work: Tensor
    gradient: Tensor
    momentum: Tensor
    delta: float | Tensor  # prior precision / ess
    prior_mean: float | Tensor
    site_linear: float | Tensor
    site_quadratic: float | Tensor
    damping: float | Tensor  # delta as the curvature sees it: delta, or its mean over all parameters if isotropic
    total: Tensor  # h + damping, > 0
    root: Tensor  # 1 / sqrt(total)
    initial: Tensor  # h at the start; () if it was constant
    bound: float | Tensor = 0.0  # smallest total
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
        """Recompute what follows from the total, delta, the prior mean and the sites."""
        info = torch.finfo(self.total.dtype)
        self.bound = self.damping * max(min_precision, info.eps)
        self.slope = self.delta - self.site_quadratic
        self.offset = self.delta * self.prior_mean - self.site_linear
        torch.rsqrt(self.total, out=self.root)

    @property
    def hess(self) -> Tensor:
        """h: the curvature of the mean loss, less V."""
        return self.total - self.damping

    def hold(self) -> None:
        """Keep the total at its bound or above."""
        if isinstance(self.bound, Tensor):
            torch.maximum(self.total, self.bound, out=self.total)
        elif self.bound:
            self.total.clamp_(min=self.bound)
