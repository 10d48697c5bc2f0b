"""What SR-VN keeps of its Gaussian, and one step on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesfed.errors import InputError, number
from clients.flat import FlatParameters
from clients.srvn.step import factor_step, precondition, step_limit, whiten
from clients.srvn.terms import as_factor, as_quadratic, as_vector, times

SAVED = ("factor", "_momentum", "_anchor", "_offset", "_largest", "_steps", "reductions")


class State:
    """The covariance's factor C, (P, P) or (P,) if diagonal, and the sums over a step's samples.

    Args:
        flat: the parameters, whose vector is the mean.
        full: whether the covariance is.
        hessian: whether :attr:`products` holds Hessians; else products of noise and gradient.
        max_change: see :class:`clients.optim.SRVN`; None raises on breakdown.
        others: see there.

    Raises:
        InputError: a value out of range, naming it.

    Attributes:
        gradient: (P,) sum over samples, once there are any.
        products: of noise * gradient, or of Hessians, likewise; in the factor's shape.
        reductions: how many steps were shortened.
    """

    def __init__(
        self,
        flat: FlatParameters,
        full: bool,
        hessian: bool,
        *,
        ess: float,
        beta1: float,
        temperature: float,
        init_precision: Any,
        prior_mean: Any,
        prior_precision: Any,
        site_linear: Any,
        site_quadratic: Any,
        max_change: float | None,
        min_precision: float,
    ):
        self.flat, self.full, self.hessian = flat, full, hessian
        self.ess, self.temperature = number("ess", ess, above=0), number("temperature", temperature, above=0)
        self.max_change = number("max_change", max_change, above=0, at_most=1 - 1e-9, optional=True)
        self.beta1 = number("beta1", beta1, at_least=0, at_most=1 - 1e-9)
        min_precision = number("min_precision", min_precision, at_least=0, at_most=1 - 1e-9)
        if full and min_precision > 0:
            raise InputError("min_precision", min_precision, "must be 0 with covariance=full")
        prior = as_quadratic("prior_precision", prior_precision, flat, full)
        # prior and site enter the expected gradient as anchor m - offset, the Hessian as anchor
        self._anchor = prior - ess * as_quadratic("site_quadratic", site_quadratic, flat, full)
        pull = times(prior, as_vector("prior_mean", prior_mean, flat))
        self._offset = pull - ess * as_vector("site_linear", site_linear, flat)
        if init_precision is None:
            init_precision = prior + as_quadratic("ess", ess, flat, full)
        self.factor = as_factor("init_precision", init_precision, flat, full)
        self._largest = (min_precision * prior).rsqrt() if min_precision else None
        self._momentum = torch.zeros_like(flat.vector) if beta1 else None
        self._steps = self.reductions = 0
        self.gradient, self.products = torch.zeros_like(flat.vector), torch.zeros_like(self.factor)
        self.work = torch.empty_like(flat.vector)

    def add(self, noise: Tensor, gradient: Tensor, first: bool) -> None:
        """Add a sample's gradient (P,) and its product with the noise (P,); the first one's is in place already."""
        if not first:
            self.gradient += gradient
        if self.full:
            torch.outer(noise, gradient, out=self.products) if first else self.products.addr_(noise, gradient)
        else:
            torch.mul(noise, gradient, out=self.products) if first else self.products.addcmul_(noise, gradient)

    def add_derivatives(self, gradient: Tensor, hessian: Tensor, first: bool) -> None:
        """Add a sample's gradient and Hessian (its diagonal, if the covariance is)."""
        for total, value in ((self.gradient, gradient), (self.products, hessian)):
            total.copy_(value) if first else total.add_(value)

    def step(self, samples: int, lr: float, lr_covariance: float) -> None:
        """Move mean and factor by the sums over ``samples`` samples; frozen parameters stay."""
        self._steps += 1
        gradient, momentum, scale = self.gradient, self._momentum, self.ess / samples
        states = [self.flat.vector, *([] if self.full else [self.factor]), *([] if momentum is None else [momentum])]
        with self.flat.keeping(*states):
            gradient.mul_(scale)
            if momentum is not None:
                momentum.lerp_(gradient, 1 - self.beta1)
                torch.div(momentum, 1 - self.beta1**self._steps, out=gradient)
            (self._step_full if self.full else self._step_diagonal)(scale, lr, lr_covariance)

    def _step_full(self, scale: float, lr: float, lr_covariance: float) -> None:
        """The step from the data's expected gradient and ``scale`` times the products."""
        mean, factor, products = self.flat.vector, self.factor, scale * self.products
        if self.hessian:
            white = whiten(factor, products + self._anchor)
        else:
            products = products @ factor
            white = 0.5 * (products + products.mT) + whiten(factor, self._anchor)
        if self.max_change is not None:
            short = min(1.0, float(step_limit(white, self.temperature, self.max_change)) / max(lr_covariance, 1e-30))
            self.reductions += short < 1
            lr, lr_covariance = lr * short, lr_covariance * short
        slope = self.gradient + self._anchor @ mean - self._offset
        self.factor = factor_step(factor, white, lr_covariance, self.temperature)
        mean.sub_(precondition(factor, slope), alpha=lr)

    def _step_diagonal(self, scale: float, lr: float, lr_covariance: float) -> None:
        """The same elementwise and in place: on networks new memory costs more than arithmetic."""
        mean, factor, gradient, variance, white = self.flat.vector, self.factor, self.gradient, self.work, self.products
        torch.mul(factor, factor, out=variance)
        if self.hessian:
            white.mul_(scale).add_(self._anchor).mul_(variance)
        else:
            white.mul_(factor).mul_(scale).addcmul_(variance, self._anchor)
        fall = white.sub_(self.temperature).mul_(0.5 * lr_covariance)  # c becomes c (1 - fall)
        gradient.addcmul_(self._anchor, mean).sub_(self._offset).mul_(variance)
        for part in self.flat.frozen:
            fall[part].zero_()
        largest = float(fall.max()) if fall.numel() else 0.0
        if self.max_change is not None and largest > self.max_change:
            gradient.mul_(self.max_change / fall.clamp_min(self.max_change))
            fall.clamp_(max=self.max_change)
            self.reductions += 1
        elif not largest < 1:
            limit = lr_covariance / largest
            raise ValueError(f"SR-VN broke down: lr_covariance={lr_covariance:g} must be below {limit:.4g} here")
        mean.sub_(gradient, alpha=lr)
        factor.mul_(fall.neg_().add_(1))
        if self._largest is not None:
            torch.minimum(factor, self._largest, out=factor)

    def forget(self) -> None:
        """Forget the momentum."""
        self._steps = 0
        if self._momentum is not None:
            self._momentum.zero_()

    def saved(self) -> dict[str, Any]:
        """What the next step depends on, the mean aside."""
        return {name: getattr(self, name) for name in SAVED}

    def load(self, saved: dict[str, Any]) -> None:
        """Inverse of :meth:`saved`."""
        for name in SAVED:
            value = saved[name]
            setattr(self, name, value.to(self.factor, copy=True) if isinstance(value, Tensor) else value)
